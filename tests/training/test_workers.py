"""Loader workers and the signals of a scheduler."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader

from s2.training.gaps.lightning import STOP_SIGNALS
from s2.training.gaps.workers import shield_workers


def slow_start(worker: int) -> None:
    time.sleep(0.5)


def signal_from_elsewhere(pid: int, number: int) -> None:
    """From another process: a worker's parent is the one sender it obeys."""
    subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {number})"], check=True)


def loader(method: str) -> DataLoader:
    return shield_workers(
        DataLoader(
            torch.arange(8), batch_size=2, num_workers=1, worker_init_fn=slow_start, multiprocessing_context=method
        )
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_comes_while_a_worker_starts_does_not_end_it(method: str, number: int) -> None:
    batches = iter(loader(method))
    (worker,) = multiprocessing.active_children()
    signal_from_elsewhere(worker.pid, number)
    assert torch.cat(list(batches)).tolist() == list(range(8))


def test_a_worker_obeys_its_parent() -> None:
    batches = iter(loader("fork"))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(timeout=20)
    assert worker.exitcode == 0


def test_a_process_that_fails_leaves_at_once_though_its_workers_are_alive() -> None:
    program = (
        "import torch; from torch.utils.data import DataLoader; from s2.training.gaps.workers import shield_workers\n"
        "batches = iter(shield_workers(DataLoader(torch.arange(8), num_workers=1)))\n"
        "next(batches); raise RuntimeError('as a rank would')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "as a rank would" in result.stderr
