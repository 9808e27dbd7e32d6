"""Processes that work on parts, with one progress bar.

Workers are started fresh (not forked: tokenizers and pyarrow have threads), leave interrupts to their parent, and end
when it does.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any

from data.corpus.parts import Part
from data.corpus.sources import Limit
from data.prepare.part import Task
from data.prepare.spec import PrepareSpec
from s2 import ending
from s2.processes import begin_worker
from s2.progress import Progress, progress

Results = Generator[tuple[Task, Any], None, None]
Work = Callable[[Task], Any]


class Workers:
    """Runs `work(task)` for many tasks; use `workers` to make one."""

    def __init__(self, executor: ProcessPoolExecutor | None, size: int, bar: Progress):
        self.size, self._executor, self._bar = size, executor, bar
        self._running: set[Future[Any]] = set()

    def in_order(self, work: Work, tasks: Iterable[Task], ahead: int | None) -> Results:
        """Tasks with their results, in order. Work begins now; what has not begun when this is closed does not.

        ahead: how many tasks are under way beyond the one whose result is asked for (None: all of them). A task is
            taken from `tasks` when its turn comes.

        Raises what any work raises, whosever turn it is.
        """
        todo = iter(tasks)
        begun = deque((task, self._begin(work, task)) for task in islice(todo, ahead if self._executor else 0))

        def results() -> Results:
            try:
                while True:
                    begun.extend((task, self._begin(work, task)) for task in islice(todo, 1))
                    if not begun:
                        return
                    task, future = begun.popleft()
                    while future in self._running:
                        ended, self._running = wait(self._running, return_when=FIRST_COMPLETED)
                        for other in ended:
                            other.result()
                    self._bar.update(task.part.size)
                    yield task, future.result()
            finally:
                for _, future in begun:
                    future.cancel()
                    self._running.discard(future)

        return results()

    def _begin(self, work: Work, task: Task) -> Future[Any]:
        if self._executor is not None:
            future = self._executor.submit(work, task)
            self._running.add(future)
        else:
            future = Future()
            future.set_result(work(task))
        return future


@contextmanager
def workers(what: str, spec: PrepareSpec, parts: Sequence[list[Part]]) -> Iterator[Workers]:
    """Workers for the parts of the sources; the bar counts what they have on disk.

    With at least four parts a core every core works on its own; with fewer, several cores share the parts by the
    tokenizer's threads. Raises `s2.ending.FailureError` where a worker dies.
    """
    sizes = [part.size for every in parts for part in every]
    total = sum(sizes) if all(Limit.of(source).is_none for source in spec.sources) else None
    cores = spec.workers or len(os.sched_getaffinity(0))
    processes = max(1, min(cores, len(sizes) // 4))
    with progress(what, total, "B", scaled=True) as bar:
        if processes == 1:
            yield Workers(None, 1, bar)
            return
        before = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(processes, context, begin_worker, (cores // processes,))
        try:
            yield Workers(executor, processes, bar)
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
