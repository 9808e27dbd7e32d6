"""Two CPU ranks that run different graphs in most micro-batches train as ranks that run the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.processes import LEFT_BY_LIGHTNING

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("cases", "ways"),
    [
        ("zero_2-small", "mixed"),  # one rank compiled, the other eager
        ("zero_3-selective", "mixed"),
        ("zero_1-small,zero_3,zero_3-selective,zero_3-full", "eager"),
    ],
)
def test_ranks_agree(cases: str, ways: str) -> None:
    inherited = {key: value for key, value in os.environ.items() if key not in LEFT_BY_LIGHTNING}
    asked = ["--ranks", "2", "--steps", "2", "--cases", cases, "--ways", ways]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "check_ranks.py"), *asked],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("zero_")]
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(rows) == len(cases.split(",")) and "DISAGREES" not in done.stdout
