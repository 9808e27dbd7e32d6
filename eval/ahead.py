"""Things made in other processes before they are asked for, so that the device does not wait for them."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from s2.ending import FailureError
from s2.processes import begin_worker

Item = TypeVar("Item")
Made = TypeVar("Made")
_AHEAD = 2  # items of each process beyond the one that is asked for

_make: Callable[[Any], Any]  # of a worker


def made_ahead(make: Callable[[Item], Made], items: Sequence[Item], processes: int) -> Generator[Made, None, None]:
    """`make(item)` of each item, in order. Until the processes have started, which takes seconds, things are made here;
    where they do not start, all are.

    Args:
        make: can be pickled, and gives the same in every process.
        processes: 0: everything is made here, when it is asked for.
    Raises:
        FailureError: a process was killed. What `make` raises.
    """
    if not processes or len(items) < 2:  # one is needed at once
        yield from map(make, items)
        return
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (make,))
    begun: deque[Future[Made]] = deque()
    todo = iter(items)
    try:
        started = executor.submit(_is_there)
        for item in todo:
            if started.done() and started.exception() is None:
                begun.append(executor.submit(_made, item))
                break
            yield make(item)
        while begun:
            begun.extend(executor.submit(_made, item) for item in islice(todo, 1 + _AHEAD * processes - len(begun)))
            yield begun.popleft().result()
    except BrokenProcessPool as error:
        raise FailureError(
            "a process that makes prompts was killed, perhaps for memory; the same command goes on"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _begin(make: Callable[[Any], Any]) -> None:
    global _make
    begin_worker(1)
    _make = make


def _is_there() -> bool:
    return True


def _made(item: Any) -> Any:
    return _make(item)
