"""Typed settings: what a recipe says, checked by pydantic against the annotations of what takes it; a wrong key or
value names itself in one sentence. Nothing is guessed: text is no number, and a number is not true or false.
"""

import collections.abc
import difflib
import inspect
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, InstanceOf, PydanticUserError, Strict, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, SchemaError, core_schema

T = TypeVar("T", bound="Settings")

_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_STRICT: dict[Any, Any] = {
    int: Annotated[int, Strict(), BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)],
    float: Annotated[float, Strict()],
    bool: Annotated[bool, Strict()],
    type(None): Annotated[None, "an option that messages name"],
    inspect.Parameter.empty: Any,
    Any: Any,
}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "none": "null"}
_WORDS |= {"list": "a list", "tuple": "a list", "dict": "a mapping", "mapping": "a mapping"}


class SettingError(ValueError):
    """A wrong setting. key: its place, as in `data.mixture[0].weight`; reason: what is wrong with it."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


class UnknownKeyError(SettingError):
    """A key that nothing takes. name: the key; known: those that are taken in its place."""

    def __init__(self, key: str, name: str, known: list[str]):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        super().__init__(key, f"unknown key {name!r}; known keys: {', '.join(known)}{hint}")
        self.name, self.known = name, known


@contextmanager
def below(where: str) -> Iterator[None]:
    """Have the errors inside say that their key is a part of `where`."""
    try:
        yield
    except SettingError as error:
        between = "." if where and error.key and not error.key.startswith("[") else ""
        error.key = f"{where}{between}{error.key}"
        raise


@dataclass(frozen=True)
class Check:
    """What a value has to be besides its type: `Annotated[float, Check("a positive number", ...)]`."""

    expected: str
    holds: Callable[[Any], bool]

    def __get_pydantic_core_schema__(self, kind: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.checked, handler(kind))

    def checked(self, value: Any) -> Any:
        """`value` where it holds; pydantic says otherwise."""
        if not self.holds(value):
            raise PydanticCustomError("check", "{expected}", {"expected": self.expected})
        return value


Count = Annotated[int, Check("a whole number >= 0", lambda n: n >= 0)]
Positive = Annotated[int, Check("a whole number >= 1", lambda n: n >= 1)]
Share = Annotated[float, Check("a number between 0 and 1", lambda x: 0 < x < 1)]
Ratio = Annotated[float, Check("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Weight = Annotated[float, Check("a positive number", lambda x: 0 < x < math.inf)]


class Settings:
    """Base of dataclasses whose values are checked against their types, however they are made.

    Raises SettingError naming the field.
    """

    def __post_init__(self) -> None:
        for name, value in arguments(vars(self), type(self), "").items():
            object.__setattr__(self, name, value)

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
    with below(where):
        if isinstance(values, str):
            values = cls.from_text(values)
        if not isinstance(values, Mapping):
            raise SettingError("", f"expected a mapping of settings, got {values!r}")
        return cls(**arguments(values, cls, ""))


def instantiate(section: Mapping[str, Any], base: type, where: str) -> Any:
    """The object of the class `class_path`, which has to derive from `base`, with the arguments `init_args`.

    Raises as `read`, and what the class raises.
    """
    with below(where):
        if other := section.keys() - {"class_path", "init_args", "dict_kwargs"}:
            raise UnknownKeyError("", str(min(other)), ["class_path", "init_args"])
        module, name = class_path(section)
        try:
            found = import_module(module)
            if (cls := getattr(found, name, None)) is None:
                close = difflib.get_close_matches(name, vars(found), n=1)
                raise ImportError(f"{module} has no {name}" + (f"; did you mean {close[0]}?" if close else ""))
        except ImportError as error:
            raise SettingError("class_path", f"{module}.{name}: {error}") from None
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise SettingError("class_path", f"expected a subclass of {base.__name__}, got {module}.{name}")
        given = arguments({**(section.get("init_args") or {}), **(section.get("dict_kwargs") or {})}, cls, "")
    try:
        return cls(**given)
    except (TypeError, ImportError) as error:  # of packages that are not installed, and what annotations do not say
        with below(where):
            raise SettingError("class_path", f"{module}.{name}: {error}") from error


def class_path(section: Mapping[str, Any]) -> tuple[str, str]:
    """Module and class that a section names, from its text alone. Raises SettingError where it names none."""
    path = section.get("class_path")
    if not isinstance(path, str) or not _CLASS_PATH.fullmatch(path):
        raise SettingError("class_path", f"expected a module and a class in it, as package.module.Class, got {path!r}")
    module, _, name = path.rpartition(".")
    return module, name


@cache
def parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """What a class takes by name, with types as annotations as far as they can be found out."""
    try:
        found = inspect.signature(cls, eval_str=True).parameters
    except (NameError, TypeError, AttributeError):
        found = inspect.signature(cls).parameters
    return {name: each for name, each in found.items() if each.kind is not each.VAR_POSITIONAL}


def arguments(values: Mapping[str, Any], cls: type, where: str) -> dict[str, Any]:
    """`values` as keyword arguments of a class: converted to its types, with objects in place of the mappings that
    stand for them. Raises as `read`."""
    known = {name: each for name, each in parameters(cls).items() if each.kind is not each.VAR_KEYWORD}
    with below(where):
        if len(known) == len(parameters(cls)):
            check_names(values, list(known), "")
        for name, each in known.items():
            if each.default is each.empty and name not in values:
                raise SettingError("", f"missing key {name!r}")
        return {
            name: convert(value, known[name].annotation, name)
            if name in known and value is not known[name].default
            else value
            for name, value in values.items()
        }


def check_names(values: Mapping[str, Any], known: list[str], where: str) -> None:
    """Raises UnknownKeyError for a key that is none of `known`."""
    if unknown := sorted(set(values) - set(known), key=str):
        raise UnknownKeyError(where, str(unknown[0]), known)


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as a value of the type `hint`: 5e6 for a whole number, lists for tuples, objects for mappings; of types
    that pydantic cannot know, whatever it is. Raises SettingError."""
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)

    def rank(error: Any) -> tuple[bool, int]:  # of an option that fits but for a part, the part is said
        return error["type"] in ("check", "value_error"), sum(isinstance(part, int) for part in error["loc"])

    best = max(map(rank, errors))
    errors = [error for error in errors if rank(error) == best]
    place = key + "".join(f"[{part}]" for part in errors[0]["loc"] if isinstance(part, int))
    if cause := errors[0].get("ctx", {}).get("error"):
        with below(place):
            raise cause
    *most, last = dict.fromkeys(word for error in errors for word in _expected(error))
    expected = f"{', '.join(most)} or {last}" if most else last
    given = errors[0]["input"]
    raise SettingError(place, f"expected {expected}, got {'null' if given is None else repr(given)}")


def _expected(error: Any) -> list[str]:
    kind, text = error["type"].rpartition("_")[0], error["msg"].removeprefix("Input should be ")
    return re.split(", | or ", text.replace("'", "")) if kind == "literal" else [_WORDS.get(kind, text)]


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(_strict(hint), config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, SchemaError, TypeError, NameError):
        return TypeAdapter(Any)


def _strict(hint: Any) -> Any:
    """`hint` for pydantic: what YAML tells apart is kept apart, and mappings stand for settings and objects."""
    kind, options = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return Annotated[_strict(options[0]), *options[1:]]
    if kind in (Union, types.UnionType):  # 1.0 for `int | float` stays what it is
        exact = {int: Annotated[int, Strict()]} if float in options else {}
        return Union[tuple(exact.get(each) or _strict(each) for each in options)]  # noqa: UP007
    if kind in (list, tuple, collections.abc.Sequence, collections.abc.Iterable) and options:
        strict = (tuple if kind is tuple else list)[tuple(map(_strict, options))]
        if kind is not tuple or ... in options:
            return strict
        fits = Check(f"a list of {len(options)}", lambda x: not isinstance(x, list | tuple) or len(x) == len(options))
        return Annotated[strict, BeforeValidator(fits.checked)]
    if isinstance(kind, type) and issubclass(kind, Settings):
        return Annotated[Any, BeforeValidator(lambda value: read(kind, value, ""))]
    if isinstance(kind, type) and kind.__module__ != "builtins" and not options and kind not in _STRICT:
        made = BeforeValidator(lambda x: instantiate(x, kind, "") if isinstance(x, dict) and "class_path" in x else x)
        return Annotated[InstanceOf[kind], made]  # type: ignore[valid-type, misc]
    return _STRICT.get(kind, Any if isinstance(kind, str) else hint)
