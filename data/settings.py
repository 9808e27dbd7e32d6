"""Typed settings from recipe YAML: a mapping becomes a dataclass, and a wrong key names itself."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from s2 import recipe

T = TypeVar("T")

_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def from_mapping(cls: type[T], values: Any, where: str) -> T:
    """Build dataclass `cls` from a YAML mapping (an instance of `cls` is passed through).

    `where` is the place in the recipe, e.g. `mixture[0]`, and opens every message. Values of fields that are text,
    whole numbers, numbers or truth values (or None where the field allows it) are checked; what the others may hold is
    for `cls` to say.

    Raises ValueError for something that is no mapping, an unknown key, a missing required key or a value of a wrong
    type.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping of settings, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields), key=str):
        close = difflib.get_close_matches(str(unknown[0]), fields, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}{hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: missing key {name!r}")
    hints = typing.get_type_hints(cls)
    checked = {name: _plain(value, hints[name], f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**checked)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _plain(value: Any, hint: Any, key: str) -> Any:
    """`value` if it fits a field of type str, int, float or bool (`| None`); of other types, whatever it is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = set(typing.get_args(hint)) if is_union else {hint}
    if (value is None and type(None) in options) or not (kinds := options & _PLAIN.keys()) or len(options) > 2:
        return value
    kind = kinds.pop()
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e6
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{key}: expected {_PLAIN[kind]}, got {value!r}")
    return value


def whole_number(value: Any, key: str, least: int = 0) -> int:
    """`value` as an int, as which 5e6 counts too. Raises ValueError naming `key`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not value.is_integer()) or value < least:
        raise ValueError(f"{key}: expected a whole number >= {least}, got {value!r}")
    return int(value)


def fraction(value: Any, key: str, *, zero: bool = False) -> float:
    """`value` as a float between 0 and 1, 0 itself only where `zero`. Raises ValueError naming `key`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value < 1 or (zero and value == 0)):
        raise ValueError(f"{key}: {value!r} is not in {'[' if zero else '('}0, 1)")
    return float(value)


def differences(old: Any, new: Any) -> list[str]:
    """Human-readable lines, one for each leaf in which two JSON-like values differ (`sources[0].path: 'a' !=
    'b'`)."""
    lines = []
    for key, a, b in recipe.differences(old, new):
        place = re.sub(r"(?:^|\.)(\d+)(?=\.|$)", r"[\1]", key)
        if isinstance(a, list) and isinstance(b, list):
            lines.append(f"{place}: {len(a)} entries != {len(b)} entries")
        else:
            lines.append(f"{place}: {a!r} != {b!r}")
    return lines
