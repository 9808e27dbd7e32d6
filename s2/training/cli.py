"""Train a stage of a recipe:

    python -m s2.training.cli recipes/demo/pretrain.yaml [key=value ...]

The stage lives in runs/<recipe>/<stage>/. Running the same command again continues from its newest complete
checkpoint, and does nothing once the stage is finished. Any key of the recipe can be overridden:

    trainer.max_steps=100   data.seq_len=4096   model.optimizer.lr=1e-4   data.mixture.0.weight=0.7   run.resume=never

On several GPUs of one node: trainer.devices=8. On several nodes: one task per GPU under srun, or torchrun.

Exit codes: 0 finished (or nothing to do), 1 the loss diverged, 2 something in the recipe or its files is wrong,
75 stopped by SIGTERM or SIGUSR1 with a checkpoint saved; run it again to continue.
S2_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from s2 import ending
from s2.recipe import apply_overrides, load_recipe

EXIT_DIVERGED, EXIT_WRONG_INPUT, EXIT_PREEMPTED = 1, 2, 75  # 75 is EX_TEMPFAIL: try again later
MAIN_PROCESS = "S2_MAIN_PROCESS"  # environment: the process that started the others of a node, if Lightning did


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else EXIT_WRONG_INPUT
    try:
        return train(Path(argv[0]), argv[1:])
    except Exception as error:
        code = _exit_code(error)
        if code is None or os.environ.get("S2_DEBUG") == "1":
            raise
        kind = "stopped" if code == EXIT_PREEMPTED else "error"
        print(f"{ending.rank_prefix(os.environ)}{kind}: {error}", file=sys.stderr)
        # Lightning kills what is left of a run some seconds after one of the processes it started ended with another
        # code than 0, and so the main process while it is still closing down; of a stopped run that one's code counts
        return 0 if code == EXIT_PREEMPTED and _is_helper() else code


def _is_helper() -> bool:
    return os.environ.get(MAIN_PROCESS) == str(os.getppid())


def _exit_code(error: Exception) -> int | None:
    """None for what is not the user's to mend: that deserves its traceback."""
    if isinstance(error, ValueError | OSError):
        return EXIT_WRONG_INPUT
    by_name = {"Preempted": EXIT_PREEMPTED, "NonFiniteLossError": EXIT_DIVERGED}
    by_name["MisconfigurationException"] = EXIT_WRONG_INPUT
    return by_name.get(type(error).__name__)


def train(path: Path, overrides: Sequence[str]) -> int:
    """Resolve the recipe, then train, or say that there is nothing left to do.

    Raises:
        ValueError, FileNotFoundError: the recipe, its data or its checkpoints are wrong; raised before training.
        Preempted, NonFiniteLossError: see `s2.training.checkpoint` and `s2.training.module`.
    """
    recipe = load_recipe(path)
    overridden = apply_overrides(recipe, overrides)
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
    sys.exit(main())
