"""Unknown keys of a recipe, found without importing what the keys are for.

Importing torch and Lightning takes seconds, and a mistyped key should not have to wait for that. The parameters of the
classes that a recipe configures are read from their source. What cannot be read so is left to the parser, which knows
types and values too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from s2.recipe import unknown_key_message

_SECTIONS = {"run": ("s2.training.run", "RunConfig"), "model": ("s2.training.module", "PretrainModule")}
_SECTIONS |= {"trainer": ("lightning.pytorch.trainer.trainer", "Trainer")}
_NESTED = {
    "model.optimizer": ("s2.training.optim", "OptimizerConfig"),
    "model.schedule": ("s2.training.optim", "ScheduleConfig"),
    "model.config": ("s2.model.config", "ModelConfig"),
}
_OTHERS = ("seed_everything", "data")
_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def check_keys(recipe: Mapping[str, Any], source: Path, overridden: Iterable[str]) -> None:
    """Refuse a section that is no mapping, and the first key that nothing takes.

    Args:
        recipe: keys after overrides.
        source: the file they came from, for the message.
        overridden: keys that were set on the command line.

    Raises:
        ValueError: says where the key stands and which it may have meant.
    """
    _check_sections(recipe, source)
    sections = {**_SECTIONS, **_NESTED, **_data(recipe)}
    known = {key: parameters(*place) for key, place in sections.items()}
    names = {f"{key}.{name}" for key, found in known.items() for name in found or ()} | {*_SECTIONS, *_OTHERS}
    for key, value in recipe.items():
        if key not in _SECTIONS and key not in _OTHERS:
            below = f".{next(iter(value))}" if isinstance(value, Mapping) and value else ""
            raise ValueError(unknown_key_message(f"{key}{below}", names, source, overridden))
    for key, found in known.items():
        for name in _section(recipe, key):
            if found is not None and name not in found:
                raise ValueError(unknown_key_message(f"{key}.{name}", names, source, overridden))


def _check_sections(recipe: Mapping[str, Any], source: Path) -> None:
    for key in (*_SECTIONS, "data", "model.optimizer", "model.schedule"):
        parent, _, name = key.rpartition(".")
        section = _section(recipe, parent) if parent else recipe
        if name in section and not isinstance(section[name], Mapping):
            raise ValueError(f"{key}={section[name]!r} in {source}: expected a mapping of keys")
    data = _section(recipe, "data")
    path = data.get("class_path")
    if "data" in recipe and not (isinstance(path, str) and _CLASS_PATH.fullmatch(path)):
        said = f"data.class_path={path!r} in {source}" if "class_path" in data else f"{source}: no data.class_path"
        raise ValueError(f"{said}; expected a module and a class in it, as data.datamodule.PackedDataModule")
    if not isinstance(arguments := data.get("init_args", {}), Mapping):
        raise ValueError(f"data.init_args={arguments!r} in {source}: expected a mapping of the class's arguments")


def parameters(module: str, name: str) -> set[str] | None:
    """Parameters of a class's `__init__`, or fields of a dataclass; None where its source does not tell.

    A class that takes any keyword, or inherits what it takes, does not.
    """
    file = _file(module)
    if file is None:
        return None
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node)
    return None


def _of_class(node: ast.ClassDef) -> set[str] | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            every = item.args
            if every.kwarg is not None:
                return None
            return {argument.arg for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs)} - {"self"}
    if any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list) and not node.bases:
        targets = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
        return {target.id for target in targets if isinstance(target, ast.Name)}
    return None


def _file(module: str) -> Path | None:
    """The file of a module, without importing it or its packages."""
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first)
    if spec is None or not spec.submodule_search_locations:
        return None
    for place in spec.submodule_search_locations:
        file = Path(place, *rest).with_suffix(".py")
        if file.is_file():
            return file
    return None


def _data(recipe: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The class that the data section names, under the key that its arguments stand below."""
    path = _section(recipe, "data").get("class_path")
    if not isinstance(path, str) or "." not in path:
        return {}
    module, _, name = path.rpartition(".")
    return {"data.init_args": (module, name)}


def _section(recipe: Any, key: str) -> Mapping[str, Any]:
    for part in key.split("."):
        recipe = recipe.get(part) if isinstance(recipe, Mapping) else None
    return recipe if isinstance(recipe, Mapping) else {}
