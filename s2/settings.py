"""Typed settings: what a recipe says, checked against the annotations of what takes it; a wrong key or value names
itself.

`read` makes dataclasses (`Settings`) of mappings, `instantiate` objects of any class that a recipe names, and
`read_parameters` finds the annotations of a class in its source, so that a recipe is checked before slow imports.
"""

import ast
import collections.abc
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin

T = TypeVar("T", bound="Settings")
Parameters = Mapping[str, inspect.Parameter]  # by name, with types as annotations

_PLAIN: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_WORDS = _PLAIN | {type(None): "null", dict: "a mapping", list: "a list", tuple: "a list"}
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_NO = object()  # of a value that does not fit


class SettingError(ValueError):
    """A wrong setting. key: its place, as in `data.mixture[0].weight`; reason: what is wrong with it."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason

    def below(self, where: str) -> "SettingError":
        """The same of a part of `where`."""
        self.key = f"{where}.{self.key}" if where and self.key else where or self.key
        return self


class UnknownKeyError(SettingError):
    """A key that nothing takes. name: the key; known: those that are taken in its place."""

    def __init__(self, key: str, name: str, known: list[str]):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        super().__init__(key, f"unknown key {name!r}; known keys: {', '.join(known)}{hint}")
        self.name, self.known = name, known


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

    Raises SettingError naming the field.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(cast(Any, type(self))).items():
            object.__setattr__(self, name, convert(getattr(self, name), hint, name))

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
    try:
        if isinstance(values, str):
            values = cls.from_text(values)
        if not isinstance(values, Mapping):
            raise SettingError("", f"expected a mapping of settings, got {values!r}")
        _check_names(values, parameters(cls), "")
        return cls(**values)
    except SettingError as error:
        raise error.below(where) from error.__cause__


def arguments(values: Mapping[str, Any], known: Parameters, where: str) -> dict[str, Any]:
    """`values` as keyword arguments of what takes `known`: converted to its types, with objects in place of the
    mappings that stand for them. Raises as `read`."""
    _check_names(values, known, where)
    hints = {name: each.annotation for name, each in known.items() if each.kind is not each.VAR_KEYWORD}
    return {name: convert(value, hints.get(name, Any), f"{where}.{name}") for name, value in values.items()}


def instantiate(section: Mapping[str, Any], base: type, where: str) -> Any:
    """The object of the class `class_path` with the arguments `init_args`.

    base: which the class must be, or derive from.

    Raises as `read`, and what the class raises.
    """
    if other := section.keys() - {"class_path", "init_args", "dict_kwargs"}:
        raise UnknownKeyError(where, str(min(other)), ["class_path", "init_args"])
    module, name = class_path(section, where)
    try:
        found = import_module(module)
    except ImportError as error:
        raise SettingError(f"{where}.class_path", f"{module}.{name}: {error}") from None
    if not hasattr(found, name):
        close = difflib.get_close_matches(name, vars(found), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingError(f"{where}.class_path", f"{module}.{name}: {module} has no {name}{hint}")
    cls = getattr(found, name)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise SettingError(f"{where}.class_path", f"expected a subclass of {base.__name__}, got {module}.{name}")
    given = {**(section.get("init_args") or {}), **(section.get("dict_kwargs") or {})}
    converted = arguments(given, parameters(cls), where)
    try:
        return cls(**converted)
    except (TypeError, ImportError) as error:  # of packages that are not installed, and what annotations do not say
        raise SettingError(f"{where}.class_path", f"{module}.{name}: {error}") from error


def class_path(section: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Module and class that a section names, from its text alone. Raises SettingError where it names none."""
    path = section.get("class_path")
    if not isinstance(path, str) or not _CLASS_PATH.fullmatch(path):
        reason = f"expected a module and a class in it, as package.module.Class, got {path!r}"
        raise SettingError(f"{where}.class_path", reason)
    module, _, name = path.rpartition(".")
    return module, name


def parameters(cls: type) -> Parameters:
    """What a class takes; types that cannot be found out are Any."""
    try:
        hints = typing.get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):
        hints = {}
    found = inspect.signature(cls).parameters
    return {name: _parameter(name, hints.get(name, Any), each.default, each.kind) for name, each in found.items()}


def read_parameters(module: str, name: str) -> Parameters:
    """`parameters` of a class whose module is not imported, from the source. Types that neither `typing` nor the
    builtins nor this module know are Any; where the source does not tell, as of a class that inherits what it takes,
    anything is taken."""
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first)
    places = (spec.submodule_search_locations if spec else None) or []
    try:
        file = next(file for place in places if (file := Path(place, *rest).with_suffix(".py")).is_file())
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (StopIteration, OSError, SyntaxError, UnicodeDecodeError):
        return _ANYTHING
    found = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
    return _of_class(found[0]) if found else _ANYTHING


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as a value of the type `hint`: 5e6 for a whole number, lists for tuples, objects for mappings; of types
    that a recipe cannot write down, whatever it is. Raises SettingError."""
    if (found := _fitted(value, hint, key)) is not _NO:
        return found
    *most, last = _expected(hint)
    expected = f"{', '.join(most)} or {last}" if most else last
    raise SettingError(key, f"expected {expected}, got {'null' if value is None else repr(value)}")


# --- helpers ----------------------------------------------------------------------------------------------------------


def _check_names(values: Mapping[str, Any], known: Parameters, where: str) -> None:
    names = [name for name, each in known.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    if unknown := sorted(set(values) - set(names), key=str) if len(names) == len(known) else []:
        raise UnknownKeyError(where, str(unknown[0]), names)
    for name in names:
        if known[name].default is inspect.Parameter.empty and name not in values:
            raise SettingError(where, f"missing key {name!r}")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return {name: each.annotation for name, each in parameters(cls).items()}


def _fitted(value: Any, hint: Any, key: str) -> Any:
    """`convert`, or `_NO` where the value as a whole is of another type; errors inside of it are raised."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = _fitted(value, options[0], key)
        for check in options[1:]:
            if found is not _NO and not check.holds(found):
                raise SettingError(key, f"expected {check.expected}, got {value!r}")
        return found
    if origin in (Union, types.UnionType):
        if type(value) in options:  # 1.0 for `int | float` stays what it is
            return value
        return next((found for each in options if (found := _fitted(value, each, key)) is not _NO), _NO)
    if origin is Literal:
        return value if any(type(value) is type(each) and value == each for each in options) else _NO
    kind = origin or hint
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e6
    if kind in _PLAIN or kind is type(None):
        accepted = (int, float) if kind is float else kind
        return value if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)) else _NO
    if kind in _LISTS:
        return _listed(value, kind, options, key)
    if kind in (dict, collections.abc.Mapping):
        return value if isinstance(value, Mapping) else _NO
    if kind is Any or not isinstance(kind, type) or isinstance(value, kind):
        return value  # the second: what only a type checker understands
    if issubclass(kind, Settings):
        return read(kind, value, key) if isinstance(value, Mapping | str) else _NO
    return instantiate(value, kind, key) if isinstance(value, Mapping) and "class_path" in value else _NO


def _listed(value: Any, kind: Any, hints: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, list | tuple):
        return _NO
    kinds = hints if kind is tuple and hints[-1:] != (...,) else (hints or (Any,))[:1] * len(value)
    if len(kinds) != len(value):
        raise SettingError(key, f"expected a list of {len(kinds)}, got {value!r}")
    items = [convert(item, hint, f"{key}[{i}]") for i, (item, hint) in enumerate(zip(value, kinds, strict=True))]
    return tuple(items) if kind is tuple else items


def _expected(hint: Any) -> list[str]:
    """What may stand for `hint`, in words."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _expected(options[0])
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(word for each in options for word in _expected(each)))
    if origin is Literal:
        return [str(each) for each in options]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Settings):
        return ["a mapping of settings"]
    return ["a list"] if kind in _LISTS else [_WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")]


def _parameter(name: str, hint: Any, default: Any, kind: Any = inspect.Parameter.KEYWORD_ONLY) -> inspect.Parameter:
    if default is None and hint is not Any:
        hint = Union[hint, None]  # noqa: UP007 -- for hints that have no |
    return inspect.Parameter(name, kind, default=default, annotation=hint)


_ANYTHING: Parameters = {"kwargs": _parameter("kwargs", Any, inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD)}


def _of_class(node: ast.ClassDef) -> Parameters:
    empty = inspect.Parameter.empty
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            given = item.args
            if given.kwarg is not None:
                return _ANYTHING
            ordered = [*given.posonlyargs, *given.args]
            defaults = [*[None] * (len(ordered) - len(given.defaults)), *given.defaults, *given.kw_defaults]
            names = [(each.arg, each.annotation) for each in (*ordered, *given.kwonlyargs)]
            found = [(name, hint, default) for (name, hint), default in zip(names, defaults, strict=True)][1:]
            break
    else:
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
        is_plain = all(ast.unparse(base) == "Settings" for base in node.bases)
        if not is_plain or not any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list):
            return _ANYTHING
        found = [(ast.unparse(item.target), item.annotation, item.value) for item in fields]
    return {
        name: _parameter(name, _read_type(hint), empty if default is None else getattr(default, "value", ...))
        for name, hint, default in found
    }


class _Names(dict[str, Any]):
    """Types by name; every other name is Any."""

    def __missing__(self, name: str) -> Any:
        return Any


def _read_type(annotation: ast.expr | None) -> Any:
    ours = {"Check": Check, "Count": Count, "Positive": Positive, "Share": Share, "Weight": Weight}
    names = _Names({**vars(typing), **{kind.__name__: kind for kind in (*_WORDS, *_LISTS)}, **ours})
    try:
        return Any if annotation is None else eval(ast.unparse(annotation), {"__builtins__": {}}, names)
    except (TypeError, AttributeError, SyntaxError, NameError):
        return Any
