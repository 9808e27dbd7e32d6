"""Processes that work on parts, with one progress bar.

Workers are started fresh (not forked: tokenizers and pyarrow have threads), leave interrupts to their parent, and end
when it does.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

from s2 import ending

Task = TypeVar("Task")
Report = Callable[[int], Any]  # is told of bytes of text that are done
Work = Callable[[Task, Report], Any]
Results = Generator[tuple[Task, Any], None, None]

_counter: Any = None  # in a worker process: the bytes that all of them have done


class Workers:
    """Runs `work(task, report)` for many tasks; use `workers` to make one."""

    def __init__(self, executor: ProcessPoolExecutor | None, size: int, bar: "tqdm[Any]", counter: Any):
        self.size, self._executor, self._bar, self._counter = size, executor, bar, counter
        self._running: set[Future[Any]] = set()
        self._parts = 0

    def in_order(self, work: Work[Task], tasks: Iterable[Task], ahead: int | None) -> Results[Task]:
        """Tasks with their results, in order. Work begins now; what has not begun when this is closed does not.

        ahead: how many tasks are under way beyond the one whose result is asked for (None: all of them). A task is
            taken from `tasks` when its turn comes.

        Raises what any work raises, whosever turn it is.
        """
        if self._executor is None and ahead is not None:
            ahead = 0
        todo = iter(tasks)
        begun = deque((task, self._begin(work, task)) for task in islice(todo, ahead))

        def results() -> Results[Task]:
            try:
                while True:
                    begun.extend((task, self._begin(work, task)) for task in islice(todo, 1))
                    if not begun:
                        return
                    task, future = begun.popleft()
                    yield task, self._result(future)
            finally:
                for _, future in begun:
                    future.cancel()
                    self._running.discard(future)

        return results()

    def _begin(self, work: Work[Task], task: Task) -> Future[Any]:
        if self._executor is not None:
            future = self._executor.submit(_run, work, task)
        else:
            future = Future()
            future.set_result(work(task, self._bar.update))
        self._running.add(future)
        return future

    def _result(self, wanted: Future[Any]) -> Any:
        while wanted in self._running:
            ended, self._running = wait(self._running, timeout=0.5, return_when=FIRST_COMPLETED)
            if self._counter is not None:
                self._bar.update(self._counter.get_obj().value - self._bar.n)  # its lock may belong to a dead worker
            for future in ended:
                future.result()
            self._parts += len(ended)
            self._bar.set_postfix(parts=self._parts)
        return wanted.result()


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
            yield Workers(None, 1, bar, None)
            return
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        before = set(multiprocessing.active_children())
        executor = ProcessPoolExecutor(processes, context, _begin_process, (counter, cores // processes))
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


def _begin_process(counter: Any, threads: int) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run(work: Work[Task], task: Task) -> Any:
    def report(size: int) -> None:
        with _counter.get_lock():
            _counter.value += size

    return work(task, report)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
