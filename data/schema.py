"""Typed settings from recipe YAML: a mapping becomes a dataclass, and a wrong key names itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def from_mapping(cls: type[T], values: Any, where: str) -> T:
    """Build dataclass `cls` from a YAML mapping (an instance of `cls` is passed through).

    `where` is the place in the recipe, e.g. `mixture[0]`, and opens every message.
    Raises ValueError for something that is no mapping, an unknown key or a missing required key.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping of settings, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: missing key {name!r}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def whole_number(value: Any, key: str, least: int = 0) -> int:
    """`value` as an int; YAML reads `5e6` as text, so that counts too. Raises ValueError naming `key`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or not number.is_integer() or number < least:
        raise ValueError(f"{key}: expected a whole number >= {least}, got {value!r}")
    return value if isinstance(value, int) else int(number)


def fraction(value: Any, key: str, *, zero: bool = False) -> float:
    """`value` as a float between 0 and 1, 0 itself only where `zero`; YAML reads `5e-4` as text, so that counts too.
    Raises ValueError naming `key`."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not (0 < number < 1 or (zero and number == 0)):
        raise ValueError(f"{key}: {value!r} is not in {'[' if zero else '('}0, 1)")
    return number


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Human-readable lines, one for each leaf in which two JSON-like values differ (`sources[0].path: 'a' !=
    'b'`)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for name in [*old, *(n for n in new if n not in old)]:
            lines += differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return lines
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return [f"{key}: {len(old)} entries != {len(new)} entries"]
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{key}[{i}]")
        ]
    return [] if old == new else [f"{key}: {old!r} != {new!r}"]
