"""torch 2.11 to 2.13: loader workers that live through the signals that ask a run to stop.

A scheduler signals every process of a job. The run writes a checkpoint at its next step boundary and needs its
loader workers until then, so they take these signals from their parent alone. They are started with the signals
blocked: a handler installed inside the worker would come too late for a signal that arrives while it starts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import context
from typing import Any

from torch.utils.data import DataLoader

from s2.training.gaps.lightning import STOP_SIGNALS


class _Shielded:
    """Mixed into a process class: what it starts obeys `STOP_SIGNALS` only when they come from its parent."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a child inherits the mask
        try:
            super().start()  # type: ignore[misc]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
        super().run()  # type: ignore[misc]


class _ForkProcess(_Shielded, context.ForkProcess):
    pass


class _SpawnProcess(_Shielded, context.SpawnProcess):
    pass


class _ForkContext(context.ForkContext):
    Process = _ForkProcess


class _SpawnContext(context.SpawnContext):
    Process = _SpawnProcess


def shield_workers(loader: Any) -> Any:
    """Make a DataLoader start its worker processes shielded; other loaders are returned as they are.

    A fork server's children do not inherit the mask of the process that asks for them, so "forkserver" becomes "spawn".
    """
    if isinstance(loader, DataLoader) and loader.num_workers > 0:
        method = (loader.multiprocessing_context or multiprocessing.get_context()).get_start_method()
        loader.multiprocessing_context = _ForkContext() if method == "fork" else _SpawnContext()
    return loader


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
