"""Recipe files and `key=value` overrides, before anything heavy is imported.

    python -m s2.training.cli recipes/demo/pretrain.yaml trainer.max_steps=50 data.mixture.0.weight=0.7

A dotted key walks the YAML: a number indexes a list, and a part below a `class_path` entry goes to its `init_args`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: 8e6 is a float, not the string that YAML 1.1 makes of it."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        FileNotFoundError: no such file; recipes that exist are named.
        ValueError: not YAML (with the line), or not a mapping.
    """
    if not path.is_file():
        known = sorted(str(p) for p in Path("recipes").glob("*/*.yaml"))
        close = difflib.get_close_matches(str(path), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known) or 'no recipes here'}"
        raise FileNotFoundError(f"recipe {path} does not exist; {hint}")
    try:
        recipe = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys, not {type(recipe).__name__}")
    return recipe


def apply_overrides(recipe: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """Apply `key=value` arguments in place and return the keys; values are YAML.

    Raises:
        ValueError: not of the form key=value, or the key runs into something that has no keys.
    """
    keys = []
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals or not key:
            raise ValueError(f"argument {argument!r} is not of the form key=value, for example trainer.max_steps=100")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise ValueError(f"argument {argument!r}: the value {text!r} is not valid YAML") from None
        _assign(recipe, key, value)
        keys.append(key)
    return keys


def _assign(recipe: dict[str, Any], key: str, value: Any) -> None:
    node: Any = recipe
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        where = ".".join(parts[:depth])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"override {key}: {where} is a list of {len(node)}; {part!r} is no index into it")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
            continue
        if "class_path" in node and part not in ("class_path", "init_args", "dict_kwargs"):
            node = node.setdefault("init_args", {})
        if last:
            node[part] = value
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise ValueError(f"override {key}: {'.'.join(parts[: depth + 1])} is {node!r} and has no keys below it")


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
