"""Train a stage of a recipe:

    python -m s2.training.cli recipes/demo/pretrain.yaml [key=value ...]

The stage lives in runs/<recipe>/<stage>/. Running the same command again continues from its newest complete
checkpoint, and does nothing once the stage is finished. Any key of the recipe can be overridden:

    trainer.max_steps=100   data.seq_len=4096   model.optimizer.lr=1e-4   data.mixture.0.weight=0.7   run.resume=never

On several GPUs of one node: trainer.devices=8. On several nodes: one task per GPU under srun, or torchrun.

Exit codes: 0 finished (or nothing to do), 1 crash, 2 something in the recipe or its files is wrong, 3 the training
diverged, 4 no checkpoint is whole, 5 out of memory, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint saved: run it
again to continue. S2_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from s2 import ending
from s2.recipe import apply_overrides, load_recipe
from s2.training.keys import check_keys

MAIN_PROCESS = "S2_MAIN_PROCESS"  # environment: the process that started the others of a node, if Lightning did


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage and return the exit code (see `s2.ending`)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return ending.DONE if argv else ending.BAD_INPUT
    code = ending.call(lambda: train(Path(argv[0]), argv[1:]))
    # Lightning kills what is left of a run some seconds after one of the processes it started ended with another code
    # than 0, and so the main process while it is still closing down; of a stopped run that one's code counts
    return ending.DONE if code == ending.STOPPED and _is_helper() else code


def _is_helper() -> bool:
    return os.environ.get(MAIN_PROCESS) == str(os.getppid())


def train(path: Path, overrides: Sequence[str]) -> int:
    """Resolve the recipe, then train, or say that there is nothing left to do.

    Raises:
        ValueError, FileNotFoundError: the recipe, its data or its checkpoints are wrong; raised before training.
        Preempted, DivergedError, DamagedError: see `s2.training.checkpoint`, `guard` and `saved`.
    """
    recipe = load_recipe(path)
    overridden = apply_overrides(recipe, overrides)
    check_keys(recipe, path, overridden)
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        # document borders differ from batch to batch, and so do sizes of tensors: without it fragments take gigabytes
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # From here on imports take seconds; whatever can be said without them has been said.
    from s2.training.launch import launch

    if _is_helper():
        launch(recipe, path, overridden)
        return 0
    os.environ[MAIN_PROCESS] = str(os.getpid())
    try:
        launch(recipe, path, overridden)
    finally:
        del os.environ[MAIN_PROCESS]
    return 0


if __name__ == "__main__":
    ending.run(main)
