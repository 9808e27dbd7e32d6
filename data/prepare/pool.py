"""Processes that work on parts, with one progress bar.

Workers are started fresh (not forked: tokenizers and pyarrow have threads), leave interrupts to their parent, and end
when it does.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

import data.prepare.work as work
from s2 import ending


class Workers:
    """`submit` work, then ask for what is `done`; use `workers` to make one."""

    def __init__(self, executor: ProcessPoolExecutor | None, size: int, bar: "tqdm[Any]", counter: Any):
        self.size, self._executor, self._bar, self._counter = size, executor, bar, counter
        self._running: dict[Future[Any], Any] = {}
        self._parts = 0

    @property
    def busy(self) -> int:
        return len(self._running)

    def submit(self, key: Any, function: Callable[[work.Task], Any], task: work.Task) -> None:
        """Run function(task); here and now where there is no other process."""
        if self._executor is not None:
            future = self._executor.submit(function, task)
        else:
            future = Future()
            future.set_result(function(task))
        self._running[future] = key

    def done(self) -> list[tuple[Any, Any]]:
        """(key, result) of what has ended since the last time, at least one; raises what the work raised."""
        ended: set[Future[Any]] = set()
        while not ended:
            ended, _ = wait(self._running, timeout=0.5, return_when=FIRST_COMPLETED)
            if self._counter is not None:
                self._bar.update(self._counter.get_obj().value - self._bar.n)  # its lock may belong to a dead worker
        self._parts += len(ended)
        self._bar.set_postfix(parts=self._parts)
        return [(self._running.pop(future), future.result()) for future in list(self._running) if future in ended]


@contextmanager
def workers(what: str, parts: int, size: int | None) -> Iterator[Workers]:
    """Workers for `parts` parts on `size` cores (default: all there are).

    With at least four parts a core every core works on its own; with fewer, several cores share the parts by the
    tokenizer's threads. Raises `s2.ending.FailureError` where a worker dies.
    """
    cores = size or len(os.sched_getaffinity(0))
    processes = max(1, min(cores, parts // 4))
    with tqdm(desc=what, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        if processes == 1:
            work.progress = bar.update
            try:
                yield Workers(None, 1, bar, None)
            finally:
                work.progress = lambda size: None
            return
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        before = set(multiprocessing.active_children())
        executor = ProcessPoolExecutor(processes, context, _begin, (counter, cores // processes))
        try:
            yield Workers(executor, processes, bar, counter)
        except BrokenProcessPool as error:
            raise ending.FailureError(
                f"{what}: a worker process was killed, perhaps for memory; run again to go on with the parts that are"
                " missing, with fewer `workers` if it happens again"
            ) from error
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
                process.join()


def _begin(counter: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"

    def progress(size: int) -> None:
        with counter.get_lock():
            counter.value += size

    work.progress = progress
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
