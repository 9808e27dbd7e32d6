"""Recipe files and `key=value` overrides: the one reader, for training, data and evaluation.

    python -m s2.training.cli recipes/demo/pretrain.yaml trainer.max_steps=50 data.mixture.0.weight=0.7

A dotted key walks the YAML: a number indexes a list, and a part below a `class_path` entry goes to its `init_args`.

Scalars are those of YAML 1.2, with underscores allowed in numbers: `5e-1` and `8e6` are numbers, `true` and `false` are
the only booleans, and `no`, `on`, `2024-01-31` and `12:30` are text. A key that stands twice in a mapping is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 -- declared so by PyYAML

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):  # of a scalar with a tag, as `!!bool maybe`
            problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which the loader would take for another scalar."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_SCALARS = (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.inf|\.nan", "-+."),
    ("merge", r"<<", "<"),
)
for _kind, _text, _first in _SCALARS:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_text})$"), list(_first))


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    try:
        return int(text, 16 if "x" in text else 10)
    except ValueError:
        raise yaml.constructor.ConstructorError(None, None, "the number has too many digits", node.start_mark) from None


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice in one mapping", key.start_mark
                )
            seen.add(key.value)
    mapping: dict[Any, Any] = {}
    yield mapping
    mapping.update(loader.construct_mapping(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, with the scalars that this module names. Raises yaml.YAMLError.

    A part that stands under an alias is a copy of its own, so that an override of one leaves the other as it is.
    """
    try:
        return _unshared(yaml.load(text, Loader=_Loader))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or an alias stands inside of what it names") from None


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def dump_yaml(value: Any) -> str:
    """Text that `parse_yaml` reads back as `value`; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _those_there_are(path: Path) -> str:
    """Of a recipe that is not there: the stages beside it, else all recipes."""
    beside = sorted(file.name for file in path.parent.glob("*.yaml"))
    if beside and path.parent.parts:
        close = difflib.get_close_matches(path.name, beside, n=1)
        return f"did you mean {path.parent / close[0]}?" if close else f"{path.parent} has {', '.join(beside)}"
    known = {file.parent.name: file.parent for file in sorted(Path("recipes").glob("*/*.yaml"))}
    close = difflib.get_close_matches(path.parent.name, known, n=1)
    if close:
        return f"did you mean {known[close[0]]}?"
    return f"there are {', '.join(map(str, known.values())) or 'no recipes here'}"


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe. Raises FileNotFoundError that names recipes that exist, or ValueError for what is not YAML (with
    the line) or no mapping."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist; {_those_there_are(path)}")
    try:
        recipe = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys, not {type(recipe).__name__}")
    return recipe


def apply_overrides(recipe: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """Apply `key=value` arguments in place and return the keys; values are YAML. Raises ValueError for what is not of
    that form, or a key that runs into something that has no keys."""
    keys = []
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals or not key:
            raise ValueError(f"argument {argument!r} is not of the form key=value, for example trainer.max_steps=100")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise ValueError(f"argument {_short(argument)}: the value is not valid YAML") from None
        _assign(recipe, key, value)
        keys.append(key)
    return keys


def _assign(recipe: dict[str, Any], key: str, value: Any) -> None:
    node: Any = recipe
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where, index = ".".join(parts[:depth]), cast(Any, part)
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ValueError(f"override {key}: {where} is a list of {len(node)}; {part!r} is no index into it")
            index = int(part)
        elif not isinstance(node, dict):
            raise ValueError(f"override {key}: {where} is {node!r} and has no keys below it")
        elif "class_path" in node and part not in ("class_path", "init_args", "dict_kwargs"):
            if node.get("init_args") is None:
                node["init_args"] = {}
            node = node["init_args"]
            if not isinstance(node, dict):
                raise ValueError(f"override {key}: {where}.init_args is {node!r}, not a mapping of arguments")
        if depth == len(parts) - 1:
            node[index] = value
            return
        below = node.get(part) if isinstance(node, dict) else node[index]
        if below is None:
            below = node[index] = {}
        node = below


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:80]}...")


def unknown_key_message(key: str, known: Iterable[str], recipe: Path, overridden: Iterable[str]) -> str:
    """One sentence for a key that nothing takes: where it stands and what it may have meant."""
    plain = key.replace(".init_args", "")
    candidates = sorted({name.replace(".init_args", "") for name in known})
    place = "on the command line" if plain in {o.replace(".init_args", "") for o in overridden} else f"in {recipe}"
    close = difflib.get_close_matches(plain, candidates, n=1, cutoff=0.5)
    parent = plain.rpartition(".")[0]
    siblings = [name for name in candidates if name.rpartition(".")[0] == parent]
    if close:
        hint = f"did you mean {close[0]}?"
    else:
        hint = f"known keys there: {', '.join(siblings)}" if siblings else "no key starts like that"
    return f"unknown key {plain} {place}; {hint}"


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of each leaf in which two nests of mappings and lists differ.

    A key that one of them lacks counts as None there; lists of different lengths differ as a whole.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        pairs = [(f"{key}.{name}" if key else str(name), old.get(name), new.get(name)) for name in names]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}.{i}", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [(key, old, new)]
    return [line for name, a, b in pairs for line in differences(a, b, name)]


def difference_lines(old: Any, new: Any) -> list[str]:
    """`differences` for people, one line each: `sources[0].path: 'a' != 'b'`."""
    lines = []
    for key, a, b in differences(old, new):
        place = re.sub(r"(?:^|\.)(\d+)(?=\.|$)", r"[\1]", key)
        if isinstance(a, list) and isinstance(b, list):
            lines.append(f"{place}: {len(a)} entries != {len(b)} entries")
        else:
            lines.append(f"{place}: {a!r} != {b!r}")
    return lines
