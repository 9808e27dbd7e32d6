"""Records of the stages of an experiment (<arm>/<stage>.run.json), and what else its runs have left, as they were
written: of a file that is otherwise a sentence tells, with its name."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from s2.settings import Check, SettingError, below, convert

_RECORD = {"command": list[str], "recipe": dict[str, Any] | None, "attempts": list[dict[str, Any]]}
_BEGAN = Annotated[
    str, Check("a time like 2026-01-31T23:59:59+0000", lambda text: len(text) >= len("2026-01-31T23:59"))
]
_ENDED = {"exit_code": int, "seconds": float}
_ABOUT = {"commit": str, "device": str, "versions": dict[str, Any], "data": dict[str, Any]}  # of what a page tells


def checked(record: Any, place: str) -> dict[str, Any]:
    """`record`, if it is one of a stage that was begun. Raises ValueError that names its place and what is wrong."""
    try:
        if not isinstance(record, dict):
            raise SettingError("", f"expected a mapping, got {str(record)[:100]}")
        _take(record, _RECORD)
        if not record["attempts"]:
            raise SettingError("attempts", "expected one or more")
        for i, attempt in enumerate(record["attempts"]):
            with below(f"attempts[{i}]"):
                _take(attempt, {"began": _BEGAN, **({"exit_code": int} if "exit_code" in attempt else {"pid": int})})
        if _ENDED.keys() & record.keys():
            _take(record, _ENDED | _ABOUT)
    except SettingError as error:
        raise ValueError(f"{place}: not a record of a stage ({error})") from None
    return record


def _take(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        if name not in values:
            raise SettingError("", f"missing key {name!r}")
        convert(values[name], kind, name)


@contextmanager
def as_written(file: Path) -> Iterator[None]:
    """Name the file whose content has not what is read of it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, statistics.StatisticsError) as error:
        raise ValueError(f"{file}: not as it was written ({type(error).__name__}: {error})") from error
