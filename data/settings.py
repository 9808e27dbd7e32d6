"""Typed settings from recipe YAML: a mapping becomes a dataclass, and a wrong key or value names itself."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar

from s2 import recipe

T = TypeVar("T", bound="Settings")

_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class SettingError(ValueError):
    """A wrong setting. key: its place, as in `data.mixture[0].weight`; reason: what is wrong with it."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}" if key else reason)
        self.key, self.reason = key, reason


class Check(NamedTuple):
    """What a value has to be besides its type: `Annotated[float, Check("a positive number", ...)]`."""

    expected: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Check("a whole number >= 0", lambda n: n >= 0)]
Positive = Annotated[int, Check("a whole number >= 1", lambda n: n >= 1)]
Share = Annotated[float, Check("a number between 0 and 1", lambda x: 0 < x < 1)]
Weight = Annotated[float, Check("a positive number", lambda x: 0 < x < math.inf)]


class Settings:
    """Base of dataclasses whose values are checked against their types, however they are made.

    Types are str, int (5e6 counts as one), float, bool, Literal, tuple, other settings, `| None` and Annotated with
    `Check`s; anything else is taken as it is.

    Raises SettingError naming the field.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, hint in _hints(cls).items():
            object.__setattr__(self, name, _typed(getattr(self, name), hint, name))

    @classmethod
    def from_text(cls, text: str) -> Any:
        """The mapping that a bare text stands for; where it stands for none, the text."""
        return text


def read(cls: type[T], values: Any, where: str) -> T:
    """Build settings from a YAML mapping (an instance of `cls` is passed through).

    where: the place in the recipe, e.g. `mixture[0]`; it opens every message.

    Raises SettingError for something that is no mapping, an unknown key, a missing required key or a wrong value.
    """
    if isinstance(values, cls):
        return values
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    try:
        if isinstance(values, str):
            values = cls.from_text(values)
        if not isinstance(values, Mapping):
            raise SettingError("", f"expected a mapping of settings, got {values!r}")
        if unknown := sorted(set(values) - set(fields), key=str):
            close = difflib.get_close_matches(str(unknown[0]), fields, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise SettingError("", f"unknown key {unknown[0]!r}; known keys: {', '.join(fields)}{hint}")
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise SettingError("", f"missing key {name!r}")
        return cls(**values)
    except SettingError as error:
        key = f"{where}.{error.key}" if where and error.key else where or error.key
        raise SettingError(key, error.reason) from error.__cause__


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _typed(value: Any, hint: Any, key: str) -> Any:
    """`value` as `hint` asks for it."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _typed(value, options[0], key)
        for check in options[1:]:
            if not check.holds(value):
                raise SettingError(key, f"expected {check.expected}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _typed(value, options[0], key)
    if origin is typing.Literal:
        if value not in options:
            *most, last = options
            raise SettingError(key, f"expected {', '.join(most)} or {last}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SettingError(key, f"expected a list, got {value!r}")
        kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(kinds) != len(value):
            raise SettingError(key, f"expected a list of {len(kinds)}, got {value!r}")
        return tuple(_typed(item, kind, f"{key}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))
    if isinstance(hint, type) and issubclass(hint, Settings):
        return read(hint, value, key)
    return _plain(value, hint, key) if hint in _PLAIN else value


def _plain(value: Any, kind: type, key: str) -> Any:
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e6
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise SettingError(key, f"expected {_PLAIN[kind]}, got {value!r}")
    return value


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
