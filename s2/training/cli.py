"""Train a stage of a recipe:

    python -m s2.training.cli recipes/demo/pretrain.yaml [key=value ...]

The stage lives in runs/<recipe>/<stage>/. Running the same command again continues from its newest complete
checkpoint, and does nothing once the stage is finished. Any key of the recipe can be overridden:

    trainer.max_steps=100   data.seq_len=4096   model.optimizer.lr=1e-4   data.mixture.0.weight=0.7   run.resume=never

On several GPUs of one node: trainer.devices=8. On several nodes: one task per GPU under srun, or torchrun.

Exit codes: 0 finished (or nothing to do), 1 crash, 2 something in the recipe or its files is wrong, 3 the training
diverged, 4 no checkpoint is whole, 5 out of memory, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint saved: run it
again to continue. What ends training before trainer.max_steps (a callback of the recipe) ends with 75 too. S2_DEBUG=1
shows tracebacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from s2 import ending
from s2.recipe import apply_overrides, load_recipe
from s2.training.config import read_stage
from s2.training.gaps.lightning import is_helper, quieten


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage and return the exit code (see `s2.ending`)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return ending.DONE if argv else ending.BAD_INPUT
    code = ending.call(lambda: train(Path(argv[0]), argv[1:]))
    return ending.DONE if code == ending.STOPPED and is_helper() else code


def train(path: Path, overrides: Sequence[str]) -> int:
    """Resolve the recipe, then train, or say that there is nothing left to do. Raises as `read_stage` and `Stage`."""
    recipe = load_recipe(path)
    overridden = apply_overrides(recipe, overrides)
    config = read_stage(recipe, path, overridden)
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        # document borders differ from batch to batch, and so do sizes of tensors: without it fragments take gigabytes
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # From here on imports take seconds; whatever can be said without them has been said.
    from s2.training.stage import Stage

    quieten()
    Stage(config).train()
    return ending.DONE


if __name__ == "__main__":
    ending.run(main)
