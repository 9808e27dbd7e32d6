"""The attention calls that recipes train with, read from their YAML files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from s2.attention import Pattern
from s2.model.config import ModelConfig, read_object
from s2.recipe import load_recipe

KINDS = ("whole", "few documents", "many documents")
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}


@dataclass(frozen=True)
class Call:
    """One shape of attention call. Those of several recipes are equal where all but the recipe is."""

    recipe: str = field(compare=False)
    pattern: Pattern
    rotation: int
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    length: int
    kind: str

    @property
    def kernels(self) -> tuple[Any, ...]:
        """Calls with the same run kernels that are compiled once."""
        pattern = self.pattern
        return (self.dtype, self.head_dim, pattern.block_size, pattern.is_dense, self.kind == "whole",
                self.heads == self.kv_heads)  # fmt: skip

    @property
    def attention(self) -> str:
        rotated = f", rotation {self.rotation}" if self.rotation else ""
        return f"{self.pattern} blocks of {self.pattern.block_size}{rotated}"

    def __str__(self) -> str:
        heads = f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads} on {self.kv_heads} heads"
        return f"{self.recipe} {self.attention}, {heads} of {self.head_dim}, {self.batch} x {self.length}, {self.kind}"


class MissingCheckpointError(ValueError):
    """A recipe goes on from a checkpoint of others, which is not there to say what the model is like."""


def recipes_of(names: Sequence[str]) -> list[Path]:
    """YAML files of the folders of recipes/ and files that are named; without names all of recipes/.

    Raises:
        ValueError: a name is neither.
    """
    paths = []
    for name in names or ["*"]:
        found = [Path(name)] if Path(name).is_file() else sorted(Path("recipes").glob(f"{name}/*.yaml"))
        if not found:
            known = ", ".join(sorted(path.name for path in Path("recipes").glob("*")))
            raise ValueError(f"recipe {name!r} is neither a YAML file nor one of {known or 'recipes/, which is empty'}")
        paths += found
    return paths


def calls_of(path: Path, max_length: int | None = None) -> list[Call]:
    """The distinct attention calls of a recipe.

    Raises:
        ValueError: a key that is needed is missing or not known, by name.
    """
    config, recipe = model_config(path), load_recipe(path)
    data = recipe.get("data") or {}
    data = data.get("init_args", data)
    if not isinstance(data.get("seq_len"), int):
        raise ValueError(f"{path}: data.seq_len={data.get('seq_len')!r} must be a number of tokens")
    batch, longest = data.get("micro_batch_size", 1), data["seq_len"]
    lengths = {longest, *(entry.get("seq_len", longest) for entry in data.get("validation") or [])}
    precision = str((recipe.get("trainer") or {}).get("precision", "32-true")).split("-")[0]
    if precision not in _DTYPES:
        raise ValueError(f"{path}: trainer.precision={precision!r} is none of {', '.join(_DTYPES)}")
    rotations = config.layout.distinct_rotations(config.num_key_value_heads)
    patterns = {(p.key, rotation): p for p, rotation in zip(config.layout.patterns, rotations, strict=True)}
    name = f"{path.parent.name}/{path.stem}"
    return [
        Call(name, pattern, rotation, _DTYPES[precision], config.num_attention_heads, config.num_key_value_heads,
             config.head_dim, batch, min(length, max_length or length), kind)
        for length in sorted(lengths)
        for (_, rotation), pattern in patterns.items()
        for kind in KINDS
    ]  # fmt: skip


def calls_of_all(names: Sequence[str], max_length: int | None = None) -> list[Call]:
    """The distinct calls of `recipes_of(names)`. Without names, recipes whose checkpoint is not there are left out and
    said to be.

    Raises:
        ValueError: as `recipes_of` and `calls_of`.
    """
    calls = []
    for path in recipes_of(names):
        try:
            calls += calls_of(path, max_length)
        except MissingCheckpointError as error:
            if names:
                raise
            print(f"left out: {error}", flush=True)
    return list(dict.fromkeys(calls))


def model_config(path: Path) -> ModelConfig:
    """The model of a recipe; of one that goes on from another, which need not have run, on top of that one's."""
    recipe = load_recipe(path)
    model = recipe.get("model") or {}
    folder, base = model.get("init_from"), {}
    if folder is not None and (Path(folder) / "config.json").is_file():
        base = asdict(ModelConfig.from_hf_dict(read_object(Path(folder) / "config.json"), f"{folder}/config.json"))
    elif folder is not None:
        before = [other for other in path.parent.glob("*.yaml") if other != path and _exports(other) == Path(folder)]
        if not before:
            raise MissingCheckpointError(
                f"{path}: model.init_from={folder} has no config.json, and no recipe in {path.parent} exports to it"
            )
        base = asdict(model_config(before[0]))
    return ModelConfig.from_dict({**base, **(model.get("config") or {})}, f"{path}: model.config")


def _exports(path: Path) -> Path:
    run = load_recipe(path).get("run") or {}
    return Path("runs", str(run.get("recipe")), str(run.get("stage")), "hf")
