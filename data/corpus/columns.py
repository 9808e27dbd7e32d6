"""Which columns of a row are its text, its id and its url, and which rows are kept.

A column inside another is written with a point, `meta.redpajama_set_name`; a column whose own name has the point comes
first.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Any

from s2.settings import SettingError


class BadRowError(ValueError):
    """One row that is not as it has to be; the rows after it can be read.

    file, place (`line 7`), reason: what the message says.
    """

    def __init__(self, file: object, place: str, reason: str):
        super().__init__(str(file), place, reason)  # so that it can be handed from one process to another
        self.file, self.place, self.reason = str(file), place, reason

    def __str__(self) -> str:
        return f"{self.file}, {self.place}: {self.reason}"


class WrongValueError(Exception):
    """A value that a column may not hold; whoever knows the row makes a BadRowError of it."""


def find(row: Mapping[str, Any], column: str) -> tuple[bool | None, Any]:
    """Whether a row has a column, and its value; what would lie inside of null may be there or not: None, and null."""
    if column in row:
        return True, row[column]
    value: Any = row
    for name in column.split("."):
        if value is None:
            return None, None
        if not isinstance(value, Mapping) or name not in value:
            return False, None
        value = value[name]
    return True, value


@dataclass(frozen=True)
class Columns:
    """Which columns of a row mean what.

    id, url: rows that lack them get an id from their place, and no url.
    keep: conditions by column; a row that fails one, or has no value there, is left out. A condition is a value, a list
        of values, or {min, max} (inclusive, either may be missing) of numbers or of dates: `{min: 2023-01-01}` compares
        with dates, times and text such as 2023-01-01T12:00:00Z, in UTC. A date as `max` includes that day.
    """

    text: str = "text"
    id: str | None = None
    url: str | None = None
    keep: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("text", "id", "url"):
            if getattr(self, key) == "":
                raise SettingError(f"{key}_column", "expected the name of a column, got ''")
        if not isinstance(self.keep, Mapping):
            raise SettingError("keep", f"expected a mapping from columns to conditions, got {self.keep!r}")
        conditions = {column: _condition(column, wanted) for column, wanted in self.keep.items()}
        object.__setattr__(self, "_conditions", conditions)

    @property
    def names(self) -> list[str]:
        """All columns in use, each once."""
        return list(dict.fromkeys([self.text, *filter(None, (self.id, self.url)), *self.keep]))

    def rejects(self, row: Mapping[str, Any]) -> str | None:
        """The column whose condition the row fails, None where it passes all.

        Raises WrongValueError for a value that cannot be compared with the condition.
        """
        conditions: dict[str, Callable[[Any], bool]] = self._conditions  # type: ignore[attr-defined]
        for column, condition in conditions.items():
            value = find(row, column)[1]
            if value is None or not condition(value):
                return column
        return None


def _condition(column: str, wanted: Any) -> Callable[[Any], bool]:
    """Whether a value of the column passes; raises WrongValueError where it cannot be compared."""
    key = f"keep.{column}"
    expected = f"expected a value, a list or {{min, max}}, got {wanted!r}"
    if not isinstance(wanted, Mapping):
        values = tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,)
        if not all((isinstance(value, str) or _is_number(value)) and value == value for value in values):
            raise SettingError(key, expected)
        if not values:
            raise SettingError(key, "an empty list keeps no row")
        return lambda value: any(_equals(column, value, each) for each in values)
    if not wanted or set(wanted) - {"min", "max"}:
        raise SettingError(key, expected)
    bounds = {name: _bound(key, bound) for name, bound in wanted.items()}
    if len({isinstance(low, datetime) for low, _ in bounds.values()}) > 1:
        raise SettingError(key, f"{wanted['min']} and {wanted['max']} are not both numbers or both dates")
    are_dates = any(isinstance(low, datetime) for low, _ in bounds.values())
    low, _ = bounds.get("min", (datetime.min if are_dates else -math.inf, None))
    _, high = bounds.get("max", (None, datetime.max if are_dates else math.inf))
    if low > high:
        raise SettingError(key, f"min {wanted['min']} is above max {wanted['max']}, so no row is kept")

    def is_between(value: Any) -> bool:
        span = _span(value) if are_dates else (value, value) if _is_number(value) else None
        if span is None or isinstance(value, bool):
            what = "dates" if are_dates else "numbers"
            raise WrongValueError(f"column {column!r} holds {_short(value)}, and {key} asks for {what}")
        return bool(low <= span[0] <= high)

    return is_between


def _bound(key: str, bound: Any) -> tuple[Any, Any]:
    if _is_number(bound) and not isinstance(bound, bool) and not math.isnan(bound):
        return bound, bound
    if isinstance(bound, date) or (span := _span(bound)) is None:  # dates are text in settings
        raise SettingError(key, f"{bound!r} is neither a number nor a date such as 2024-01-31")
    return span


def _equals(column: str, value: Any, wanted: Any) -> bool:
    if isinstance(value, date):
        span, moments = _span(wanted), _span(value)
        return span is not None and moments is not None and span[0] <= moments[0] <= span[1]
    if isinstance(value, str) != isinstance(wanted, str) and (_is_number(value) or isinstance(value, str)):
        raise WrongValueError(f"column {column!r} holds {_short(value)}, which is never {wanted!r} (keep.{column})")
    return bool(value == wanted)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, complex)


def _span(value: Any) -> tuple[datetime, datetime] | None:
    """The first and the last moment, UTC without a zone, of a date, a time or the text of one; None for what is
    neither."""
    if isinstance(value, str):
        for parse in (date.fromisoformat, datetime.fromisoformat):
            try:
                return _span(parse(value.strip()))
            except ValueError:
                continue
        return None
    if isinstance(value, datetime):
        moment = value if value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)
        return moment, moment
    return (datetime.combine(value, time.min), datetime.combine(value, time.max)) if isinstance(value, date) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
