"""Typed settings: what a recipe says, checked against the annotations of what takes it.

Classes and dataclasses say by their annotations what they take. A mapping stands for a dataclass, and
`{class_path: package.module.Class, init_args: {...}}` for an object of any other class. `read_parameters` finds the
annotations of a class in its source, so that most of a recipe is checked before imports that take seconds.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
Parameters = Mapping[str, inspect.Parameter]  # by name, with types as annotations

_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_WORDS |= {type(None): "null", dict: "a mapping", list: "a list", tuple: "a list"}
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_NO = object()  # of a value that does not fit
_ANYTHING: Parameters = {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD, annotation=Any)}


class SettingError(ValueError):
    """The value of a key does not fit."""

    def __init__(self, key: str, value: Any, problem: str) -> None:
        self.key, self.value, self.problem = key, value, problem
        super().__init__(f"{key}={in_words(value)}: {problem}")


class UnknownKeyError(ValueError):
    """Nothing takes a key; `known` are those that are taken in its place."""

    def __init__(self, key: str, known: list[str]) -> None:
        self.key, self.known = key, known
        close = difflib.get_close_matches(key, known, n=1)
        super().__init__(f"unknown key {key}; {f'did you mean {close[0]}?' if close else f'known keys: {known}'}")


class MissingKeyError(ValueError):
    """A key that must be there is not."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"the key {key} is missing")


def build(cls: type[T], values: Any, key: str) -> T:
    """A dataclass from a mapping. An object of the class is passed through.

    Args:
        key: what stands before the names of its fields in messages; "" for nothing.

    Raises:
        SettingError, UnknownKeyError, MissingKeyError: of a key.
        ValueError: what the class says of its values.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise SettingError(key, values, "expected a mapping of keys")
    return cls(**check(values, parameters(cls), key))


def check(values: Mapping[str, Any], known: Parameters, key: str, *, complete: bool = True) -> dict[str, Any]:
    """`values` as keyword arguments of what takes `known`, with objects in place of the mappings that stand for them.

    Args:
        complete: refuse a mapping that lacks an argument without a default.

    Raises: as `build`.
    """
    before = f"{key}." if key else ""
    names = [name for name, each in known.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    if len(names) == len(known):
        for name in values:
            if name not in names:
                raise UnknownKeyError(f"{before}{name}", [f"{before}{name}" for name in names])
    for name in names:
        if complete and known[name].default is inspect.Parameter.empty and name not in values:
            raise MissingKeyError(f"{before}{name}")
    return {
        name: convert(value, known[name].annotation if name in names else Any, f"{before}{name}")
        for name, value in values.items()
    }


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as a value of the type `hint`: 5e6 for a whole number, lists for tuples, objects for mappings.

    Raises: as `build`.
    """
    if (found := _fitted(value, hint, key)) is not _NO:
        return found
    expected = f"expected {' or '.join(_expected(hint))}"
    raise SettingError(key, value, expected if value is not None else f"it needs a value ({expected}), or no such line")


def instantiate(section: Mapping[str, Any], base: type, key: str) -> Any:
    """The object that a mapping with `class_path` and `init_args` stands for.

    Args:
        base: which its class must be, or derive from.

    Raises: as `build`.
    """
    if other := section.keys() - {"class_path", "init_args", "dict_kwargs"}:
        raise UnknownKeyError(f"{key}.{min(other)}", [f"{key}.class_path", f"{key}.init_args"])
    path = section.get("class_path")
    cls = _imported(path, f"{key}.class_path")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise SettingError(f"{key}.class_path", path, f"expected a subclass of {base.__name__}")
    given = {**(section.get("init_args") or {}), **(section.get("dict_kwargs") or {})}
    arguments = check(given, parameters(cls), key)
    try:
        return cls(**arguments)
    except (TypeError, ImportError) as error:  # of packages that are not installed, and what annotations do not say
        raise SettingError(f"{key}.class_path", path, str(error)) from error


def class_path(section: Any, key: str) -> tuple[str, str]:
    """Module and class that a section names, from its text alone. Raises SettingError where it names none."""
    path = section.get("class_path") if isinstance(section, Mapping) else section
    if not isinstance(path, str) or not _CLASS_PATH.fullmatch(path):
        raise SettingError(f"{key}.class_path", path, "expected a module and a class in it, as package.module.Class")
    module, _, name = path.rpartition(".")
    return module, name


def parameters(cls: type) -> Parameters:
    """What a class takes; types that cannot be found out are Any."""
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):
        hints = {}
    found = inspect.signature(cls).parameters
    return {name: _parameter(name, hints.get(name, Any), each.default, each.kind) for name, each in found.items()}


def read_parameters(module: str, name: str) -> Parameters:
    """`parameters` of a class whose module is not imported, from the source. Types that `typing` and the builtins do
    not know are Any; where the source does not tell, as of a class that inherits what it takes, anything is taken."""
    try:
        file = _source_file(module)
        tree = ast.parse(file.read_text(encoding="utf-8")) if file is not None else ast.Module([], [])
    except (OSError, SyntaxError, UnicodeDecodeError):
        return _ANYTHING
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return _of_class(found[0]) if found else _ANYTHING


def in_words(value: Any) -> str:
    """A value as a recipe has it, cut to a readable length."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:80]}..."


# --- helpers ----------------------------------------------------------------------------------------------------------


def _fitted(value: Any, hint: Any, key: str) -> Any:
    """`convert`, or `_NO` where the value as a whole is of another type; errors inside of it are raised."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(value) in arguments:  # 1.0 for `int | float` stays what it is
            return value
        return next((found for each in arguments if (found := _fitted(value, each, key)) is not _NO), _NO)
    if origin is Literal:
        return value if any(type(value) is type(each) and value == each for each in arguments) else _NO
    kind = origin or hint
    if kind is None or kind is type(None):
        return value if value is None else _NO
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind in (int, float):
        return value if isinstance(value, int | kind) and not isinstance(value, bool) else _NO
    if kind in (bool, str):
        return value if isinstance(value, kind) else _NO
    if kind in _LISTS:
        return _listed(value, kind, arguments, key)
    if kind in (dict, collections.abc.Mapping):
        return value if isinstance(value, Mapping) else _NO
    if kind is Any or not isinstance(kind, type) or isinstance(value, kind):
        return value  # the second: what only a type checker understands
    if isinstance(value, Mapping) and dataclasses.is_dataclass(kind):
        return build(kind, value, key)
    return instantiate(value, kind, key) if isinstance(value, Mapping) and "class_path" in value else _NO


def _listed(value: Any, kind: Any, hints: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, list | tuple):
        return _NO
    if kind is tuple and hints[-1:] != (...,):
        if hints and len(value) != len(hints):
            raise SettingError(key, value, f"expected a list of {len(hints)}")
        return tuple(convert(item, hint, f"{key}.{i}") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))
    items = [convert(item, hints[0] if hints else Any, f"{key}.{i}") for i, item in enumerate(value)]
    return tuple(items) if kind is tuple else items


def _expected(hint: Any) -> list[str]:
    """The types of `hint` in words, those first that a recipe can write down."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(word for each in arguments for word in _expected(each)))
    if origin is Literal:
        return [str(each) for each in arguments]
    kind = origin or hint
    if kind in _LISTS:
        return ["a list"]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return ["a mapping of keys"]
    return [_WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")]


def _imported(path: Any, key: str) -> Any:
    module, name = class_path(path, key.removesuffix(".class_path"))
    try:
        found = import_module(module)
    except ImportError as error:
        raise SettingError(key, path, str(error)) from None
    if not hasattr(found, name):
        close = difflib.get_close_matches(name, vars(found), n=1)
        raise SettingError(key, path, f"{module} has no {name}" + (f"; did you mean {close[0]}?" if close else ""))
    return getattr(found, name)


def _parameter(name: str, hint: Any, default: Any, kind: Any = inspect.Parameter.KEYWORD_ONLY) -> inspect.Parameter:
    if default is None and hint is not Any:
        hint = Union[hint, None]  # noqa: UP007 -- for hints that have no |
    return inspect.Parameter(name, kind, default=default, annotation=hint)


def _source_file(module: str) -> Path | None:
    """The file of a module, without importing it or its packages."""
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first)
    if spec is None or not spec.submodule_search_locations:
        return None
    files = (Path(place, *rest).with_suffix(".py") for place in spec.submodule_search_locations)
    return next((file for file in files if file.is_file()), None)


def _of_class(node: ast.ClassDef) -> Parameters:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            given = item.args
            if given.kwarg is not None:
                return _ANYTHING
            ordered = [*given.posonlyargs, *given.args]
            defaults = [None] * (len(ordered) - len(given.defaults)) + list(given.defaults)
            pairs = [*zip(ordered, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
            return {each.arg: _read_parameter(each.arg, each.annotation, default) for each, default in pairs[1:]}
    if any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list) and not node.bases:
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
        return {each.target.id: _read_parameter(each.target.id, each.annotation, each.value) for each in fields}  # type: ignore[union-attr]
    return _ANYTHING


def _read_parameter(name: str, annotation: ast.expr | None, default: ast.expr | None) -> inspect.Parameter:
    return _parameter(
        name, _read_type(annotation), inspect.Parameter.empty if default is None else getattr(default, "value", ...)
    )


class _Names(dict[str, Any]):
    """Of `typing` and the builtins; every other name is Any."""

    def __missing__(self, name: str) -> Any:
        return Any


def _read_type(annotation: ast.expr | None) -> Any:
    names = _Names({**vars(typing), **{kind.__name__: kind for kind in (*_WORDS, *_LISTS)}})
    try:
        return Any if annotation is None else eval(ast.unparse(annotation), {"__builtins__": {}}, names)
    except (TypeError, AttributeError, SyntaxError, NameError):
        return Any
