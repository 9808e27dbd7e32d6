"""The training command in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_BY_LIGHTNING = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")


def start(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    """The command line in a process group of its own, without what a run in this process left in the
    environment."""
    inherited = {key: value for key, value in os.environ.items() if key not in LEFT_BY_LIGHTNING}
    return subprocess.Popen(
        [sys.executable, "-m", "s2.training.cli", str(recipe), *overrides],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
