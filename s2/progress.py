"""Progress of long work: a bar on a terminal, a line a minute where standard error goes into a file.

A bar is drawn over and over; in a log file all of that becomes one very long line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partialmethod
from typing import Any, Protocol

from tqdm import tqdm

EVERY = 60.0  # seconds between the lines


class Progress(Protocol):
    """What counts the work that is done."""

    def update(self, n: int = 1) -> Any: ...


def progress(
    what: str, total: int | None, unit: str, *, scaled: bool = False, quiet: bool = False
) -> AbstractContextManager[Progress]:
    """Counts up to `total` (None: unknown) on standard error.

    scaled: numbers with k, M, G. quiet: say nothing, as another process does.
    """
    if sys.stderr.isatty() or quiet:
        return tqdm(desc=what, total=total, unit=unit, unit_scale=scaled, disable=quiet)
    return _Lines(what, total, unit, scaled)


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Within it the bars of libraries that draw with tqdm are left out where standard error is no terminal."""
    init = tqdm.__init__
    tqdm.__init__ = partialmethod(init, disable=None)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        tqdm.__init__ = init  # type: ignore[method-assign]


class _Lines:
    def __init__(self, what: str, total: int | None, unit: str, scaled: bool) -> None:
        self._about: dict[str, Any] = {"prefix": what, "total": total, "unit": unit, "unit_scale": scaled}
        self._done, self._began = 0, time.monotonic()
        self._said = self._began

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            line = tqdm.format_meter(n=self._done, elapsed=now - self._began, ncols=0, **self._about)
            print(line.strip(), file=sys.stderr, flush=True)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to say: the work itself says when it is done."""
