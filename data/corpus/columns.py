"""Which columns of a row are its text, its id and its url, and which rows are kept.

A column inside another is written with a point, `meta.redpajama_set_name`; a column whose own name has the point comes
first.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

Bound = float | date  # dates and times without a zone are UTC


class RowError(Exception):
    """A file that cannot be read as what it claims to be; the message names the file and the place in it."""


class BadRowError(RowError):
    """One row that is not as it has to be; the rows after it can be read.

    file, place (`line 7`), reason: what the message says.
    """

    def __init__(self, file: object, place: str, reason: str):
        super().__init__(f"{file}, {place}: {reason}")
        self.file, self.place, self.reason = str(file), place, reason


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
        with dates, times and text such as 2023-01-01T12:00:00Z. A date as `max` includes that day.
    """

    text: str = "text"
    id: str | None = None
    url: str | None = None
    keep: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("text", "id", "url"):
            name = getattr(self, key)
            if not (isinstance(name, str) and name) and not (name is None and key != "text"):
                raise ValueError(f"{key}_column: expected the name of a column, got {name!r}")
        if not isinstance(self.keep, Mapping):
            raise ValueError(f"keep: expected a mapping from columns to conditions, got {self.keep!r}")
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
        conditions: dict[str, _Condition] = self._conditions  # type: ignore[attr-defined]
        for column, condition in conditions.items():
            value = find(row, column)[1]
            if value is None or not condition.holds(column, value):
                return column
        return None


def plain_conditions(keep: Any) -> Any:
    """Conditions as JSON holds them: dates, which some YAML readers make, become text."""
    if isinstance(keep, Mapping):
        return {key: plain_conditions(value) for key, value in keep.items()}
    if isinstance(keep, list | tuple):
        return [plain_conditions(value) for value in keep]
    return keep.isoformat() if isinstance(keep, date) else keep


@dataclass(frozen=True)
class _Condition:
    """values: one of these (None: any); low, high: bounds, both numbers or both dates."""

    values: tuple[Any, ...] | None = None
    low: Bound | None = None
    high: Bound | None = None

    def holds(self, column: str, value: Any) -> bool:
        if self.values is not None:
            return any(_equals(column, value, wanted) for wanted in self.values)
        if isinstance(self.low, date) or isinstance(self.high, date):
            parsed = _date(value)
            if parsed is None:
                raise WrongValueError(f"column {column!r} holds {_short(value)}, and keep.{column} asks for dates")
            return (self.low is None or _aligned(parsed, self.low) >= self.low) and (
                self.high is None or _aligned(parsed, self.high) <= self.high
            )
        if isinstance(value, bool) or not _is_number(value):
            raise WrongValueError(f"column {column!r} holds {_short(value)}, and keep.{column} asks for numbers")
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def _condition(column: str, wanted: Any) -> _Condition:
    if not isinstance(wanted, Mapping):
        values = tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,)
        for value in values:
            if not (isinstance(value, str | date) or _is_number(value)) or value != value:
                raise ValueError(f"keep.{column}: expected a value, a list or {{min, max}}, got {wanted!r}")
        if not values:
            raise ValueError(f"keep.{column}: an empty list keeps no row")
        return _Condition(values)
    if not wanted or set(wanted) - {"min", "max"}:
        raise ValueError(f"keep.{column}: expected a value, a list or {{min, max}}, got {dict(wanted)!r}")
    bounds = {key: _bound(column, bound) for key, bound in wanted.items()}
    low, high = bounds.get("min"), bounds.get("max")
    if low is not None and high is not None:
        if isinstance(low, date) != isinstance(high, date):
            raise ValueError(f"keep.{column}: {low} and {high} are not both numbers or both dates")
        first: Any = _aligned(low, high) if isinstance(low, date) else low
        if first > high:
            raise ValueError(f"keep.{column}: min {wanted['min']} is above max {wanted['max']}, so no row is kept")
    return _Condition(low=low, high=high)


def _bound(column: str, bound: Any) -> Bound:
    if _is_number(bound) and not isinstance(bound, bool):
        if math.isnan(bound):
            raise ValueError(f"keep.{column}: {bound!r} is not a number")
        return bound
    parsed = _date(bound)
    if parsed is None:
        raise ValueError(f"keep.{column}: {bound!r} is neither a number nor a date such as 2024-01-31")
    return parsed


def _equals(column: str, value: Any, wanted: Any) -> bool:
    if isinstance(value, date):
        parsed = _date(wanted)
        return parsed is not None and _aligned(_utc(value), parsed) == parsed
    if isinstance(wanted, date):
        wanted = wanted.isoformat()
    if isinstance(value, str) != isinstance(wanted, str) and (_is_number(value) or isinstance(value, str)):
        raise WrongValueError(f"column {column!r} holds {_short(value)}, which is never {wanted!r} (keep.{column})")
    return bool(value == wanted)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, complex)


def _date(value: Any) -> date | None:
    """A date, or a UTC time without a zone; None for what is neither nor the text of one."""
    if isinstance(value, str):
        for parse in (date.fromisoformat, datetime.fromisoformat):
            try:
                return _utc(parse(value.strip()))
            except ValueError:
                continue
        return None
    return _utc(value) if isinstance(value, date) else None


def _utc(value: date) -> date:
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC).replace(tzinfo=None)
    return value


def _aligned(value: date, bound: Any) -> Any:
    """`value` in the resolution of `bound`: a date, or a time."""
    if isinstance(bound, datetime):
        return value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
    return value.date() if isinstance(value, datetime) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
