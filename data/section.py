"""The `data` section of a recipe: which shard folders are mixed, held out, prepared, and in windows of which length."""

import math
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from data.prepare.spec import PrepareSpec, parse_sections
from data.shards.mixture import PackedStream
from data.shards.reader import TokenShards
from s2.recipe import apply_overrides, load_recipe, unknown_key_message
from s2.settings import Check, Count, Positive, SettingError, Settings, Share, Weight, read

DATAMODULE = "data.datamodule.PackedDataModule"  # whose arguments these are; to import it takes seconds


@dataclass(frozen=True, kw_only=True)
class Selection(Settings):
    """Documents of a shard folder.

    path: the folder. source: only documents of that source (the names are in the folder's report).
    min_tokens, max_tokens: only documents of that many tokens (inclusive).
    """

    path: str
    source: str | None = None
    min_tokens: Count = 0
    max_tokens: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "path", os.path.expanduser(self.path))
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            reason = f"{self.max_tokens} is below min_tokens {self.min_tokens}, so no document is left"
            raise SettingError("max_tokens", reason)

    def shares_documents_with(self, other: "Selection") -> bool:
        """Whether both may select a document, as far as settings tell."""
        if os.path.realpath(self.path) != os.path.realpath(other.path):
            return False
        if None not in (self.source, other.source) and self.source != other.source:
            return False
        most = min(each.max_tokens or math.inf for each in (self, other))
        return max(self.min_tokens, other.min_tokens) <= most

    def pack(self, shards: TokenShards, seq_len: int, where: str) -> PackedStream:
        """The documents in windows. Raises as `PackedStream`."""
        least, most = self.min_tokens, self.max_tokens
        return PackedStream(shards, seq_len, source=self.source, min_tokens=least, max_tokens=most, where=where)


@dataclass(frozen=True)
class LongDocuments(Settings):
    """`long` of a mixture component: which documents count as long, and their share of the component's samples."""

    min_tokens: Annotated[int, Check("a whole number >= 2", lambda n: n >= 2)]
    share: Share


@dataclass(frozen=True, kw_only=True)
class Component(Selection):
    """One entry of a recipe's `mixture`.

    weight: share of the samples (any scale; shares are weight / sum of weights).
    long: {min_tokens, share} upsamples long documents inside this component and leaves its weight as it is, so that
        domains keep their shares (per-source length upsampling, Fu et al., arXiv 2402.10171).
    """

    weight: Weight = 1.0
    long: LongDocuments | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.long and not self.min_tokens < self.long.min_tokens <= (self.max_tokens or self.long.min_tokens):
            raise SettingError(
                "long.min_tokens",
                f"{self.long.min_tokens} leaves no short or no long documents between min_tokens {self.min_tokens} and"
                f" max_tokens {self.max_tokens}",
            )

    def by_length(self) -> list["Component"]:
        """The components that are sampled: itself, or with `long` its short and its long documents."""
        if self.long is None:
            return [self]
        bound, share = self.long.min_tokens, self.long.share
        return [
            replace(self, long=None, weight=self.weight * (1 - share), max_tokens=bound - 1),
            replace(self, long=None, weight=self.weight * share, min_tokens=bound),
        ]


@dataclass(frozen=True, kw_only=True)
class HeldOutSet(Selection):
    """One entry of a recipe's `validation`.

    name: as it appears in the logs. seq_len: another length than training's.
    micro_batch_size: rows a rank and batch; by default about as many tokens as in training.
    max_windows: score only so many windows, the first of the set's fixed shuffled order: the same ones on any number
        of ranks and with any micro-batch, so that curves compare. By default all.
    """

    name: str
    seq_len: Positive | None = None
    micro_batch_size: Positive | None = None
    max_windows: Positive | None = None


@dataclass(frozen=True)
class Phase(Settings):
    """One entry of a recipe's `curriculum`: windows of `seq_len` tokens until `tokens` have been trained on in them."""

    seq_len: Positive
    tokens: Positive


@dataclass(frozen=True, kw_only=True)
class RetrievalShare(Settings):
    """`retrieval` of a recipe: synthetic retrieval documents (`data.corpus.retrieval`) beside its mixture.

    share: of all samples; 0 leaves them out and prepares none.
    prepare: how to make them; what is held out of them is scored as `retrieval`.
    """

    share: Annotated[float, Check("a number from 0 to below 1", lambda x: 0 <= x < 1)]
    prepare: PrepareSpec


@dataclass(frozen=True)
class DataSection(Settings):
    """The arguments of `data.datamodule.PackedDataModule`, which says what they mean, checked against each other."""

    seq_len: Positive
    micro_batch_size: Positive
    mixture: tuple[Component, ...] | None = None
    validation: tuple[HeldOutSet, ...] | None = None
    prepare: Any = None
    seed: int = 0
    num_workers: Count = 2
    document_mask: bool = True
    curriculum: tuple[Phase, ...] | None = None
    retrieval: RetrievalShare | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, phase in enumerate(self.phases):
            if self.seq_len % phase.seq_len:
                reason = f"windows of {phase.seq_len} do not fill a row of {self.seq_len}"
                raise SettingError(f"curriculum[{i}].seq_len", reason)
            if phase.tokens < self.seq_len:
                reason = f"{phase.tokens} is less than a row of {self.seq_len}"
                raise SettingError(f"curriculum[{i}].tokens", reason)
        if not self.components:
            raise SettingError("mixture", "empty; list at least one {path, weight}, or give a `prepare` section")
        names = [heldout.name for heldout in self.heldout_sets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SettingError("validation", f"the name {twice.pop()!r} occurs twice")
        self._check_held_out()
        self._check_outputs()
        for key, selections in (("mixture", self.mixture), ("validation", self.validation)):
            for i, each in enumerate(selections or ()):
                check_source(each.path, each.source, self.specs, f"{key}[{i}].source")

    def _check_held_out(self) -> None:
        """Refuse to score text that is trained on as if it were held out."""
        for i, heldout in enumerate(self.validation or ()):
            for j, component in enumerate(self.components):
                if heldout.shares_documents_with(component):
                    trained = f"mixture[{j}]" if self.mixture else "the mixture"
                    reason = (
                        f"{heldout.path} is trained on too ({trained}), so that its loss says nothing of other text; "
                        f"name a folder that is held out, or another source of this one, or leave the set out"
                    )
                    raise SettingError(f"validation[{i}].path", reason)
        trained_on = {os.path.realpath(component.path) for component in self.components}
        for spec in self.specs:
            fillers = [source.retrieval.filler for source in spec.sources if source.retrieval]
            if os.path.realpath(spec.folders["train"]) not in trained_on:
                continue
            for filler in (os.path.realpath(os.path.expanduser(path)) for path in fillers if path):
                if scored := [each for each in self.heldout_sets if os.path.realpath(each.path) == filler]:
                    reason = (
                        f"{scored[0].path} is trained on too (the filler of the retrieval documents in {spec.output}), "
                        f"so that its loss says nothing of other text; name a train folder as filler"
                    )
                    raise SettingError("validation", reason)

    def _check_outputs(self) -> None:
        """Refuse to prepare what nothing reads, as when `output` is another one and the mixture's paths are not."""
        read = [each.path for each in (*self.components, *self.heldout_sets)]
        for spec in self.specs:
            fillers = [source.retrieval.filler for source in spec.sources if source.retrieval]
            read += [path for path in (*fillers, spec.tokenizer.path, *(each.path for each in spec.sources)) if path]
        for spec in self._prepared:
            if not any(os.path.abspath(path).startswith(os.path.abspath(spec.output) + os.sep) for path in read):
                paths = ", ".join(dict.fromkeys(each.path for each in self.components))
                reason = (
                    f"nothing reads what is prepared in {spec.output}: the mixture takes {paths}; change the paths in "
                    f"mixture and validation with output, or take the section out (null, where it is the only one)"
                )
                raise SettingError("prepare", reason)

    @cached_property
    def specs(self) -> list[PrepareSpec]:
        """What is to be prepared; the retrieval documents last, which may lie in text of the others."""
        return self._prepared + [each.prepare for each in self._added]

    @cached_property
    def _prepared(self) -> list[PrepareSpec]:
        return parse_sections(self.prepare) if self.prepare else []

    @property
    def _added(self) -> list[RetrievalShare]:
        return [self.retrieval] if self.retrieval and self.retrieval.share else []

    @property
    def components(self) -> list[Component]:
        """`mixture`, by default the training folders that are prepared; and the retrieval documents."""
        if self.mixture is not None:
            mixture = list(self.mixture)
        else:
            mixture = [Component(path=str(spec.folders["train"])) for spec in self._prepared]
        others = sum(each.weight for each in mixture)
        for each in self._added if mixture else []:
            weight = others * each.share / (1 - each.share)
            mixture.append(Component(path=str(each.prepare.folders["train"]), weight=weight))
        return mixture

    @property
    def heldout_sets(self) -> list[HeldOutSet]:
        """`validation`, by default the held-out folders that are prepared; and that of the retrieval documents."""
        if self.validation is not None:
            sets = list(self.validation)
        else:
            folders = [spec.folders["heldout"] for spec in self._prepared if "heldout" in spec.folders]
            names = ["heldout"] if len(folders) == 1 else [folder.parent.name for folder in folders]
            sets = [HeldOutSet(name=name, path=str(folder)) for name, folder in zip(names, folders, strict=True)]
        added = [each.prepare.folders for each in self._added]
        return sets + [HeldOutSet(name="retrieval", path=str(at["heldout"])) for at in added if "heldout" in at]

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.curriculum or ()


def check_source(path: str, source: str | None, specs: Sequence[PrepareSpec], key: str) -> None:
    """Raises SettingError where `path` is a folder that one of `specs` prepares, and `source` none of its sources."""
    for spec in specs:
        labels = [each.label for each in spec.sources]
        is_prepared = any(os.path.abspath(path) == os.path.abspath(folder) for folder in spec.folders.values())
        if source is not None and is_prepared and source not in labels:
            reason = f"{source!r} is none of the sources that {spec.output} is prepared of: {', '.join(labels)}"
            raise SettingError(key, f"{reason}; a source has the `name` that it is given")


def data_section(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments of a recipe's datamodule, after `key=value` overrides.

    Raises ValueError for a recipe without any, or an override of something that the datamodule has not.
    """
    values = load_recipe(recipe)
    top = {*values, "data"}
    keys = [key.replace(".init_args", "").split(".") for key in apply_overrides(values, overrides)]
    for key in keys:
        if key[0] not in top:
            raise ValueError(unknown_key_message(key[0], top, recipe, [key[0]]))
    data = values.get("data") or {}
    section = (data.get("init_args", data) or {}) if isinstance(data, dict) else data
    if not isinstance(section, dict):
        raise ValueError(f"{recipe}: data: expected a mapping of settings, got {section!r}")
    if data.get("class_path", DATAMODULE) == DATAMODULE:
        known = [f"data.{field.name}" for field in fields(DataSection)]
        for key in section:
            if f"data.{key}" not in known:
                raise ValueError(unknown_key_message(f"data.{key}", known, recipe, [".".join(k[:2]) for k in keys]))
    return section


def prepare_section(recipe: str | Path, overrides: Sequence[str] = ()) -> list[PrepareSpec]:
    """The `prepare` settings of a training recipe (one mapping or a list of them), below `data`.

    overrides: `key=value` arguments, see `s2.recipe`.
    """
    section = data_section(Path(recipe), overrides)
    specs = parse_sections(section["prepare"], f"{recipe}: data.prepare") if section.get("prepare") else []
    if section.get("retrieval"):
        retrieval = read(RetrievalShare, section["retrieval"], f"{recipe}: data.retrieval")
        specs += [retrieval.prepare] if retrieval.share else []
    if not specs:
        raise ValueError(f"{recipe}: no data.init_args.prepare section, so there is nothing to prepare")
    return specs


def parse_arguments(parser: ArgumentParser, argv: Sequence[str] | None) -> tuple[Namespace, list[str]]:
    """The options of a command that takes `--recipe RECIPE key=value ...`, and the overrides."""
    args, overrides = parser.parse_known_args(argv)
    if strange := [text for text in overrides if "=" not in text or re.match("-[^.]*=", text)]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if overrides and not args.recipe:
        parser.error(f"{overrides[0]}: key=value arguments override keys of a --recipe")
    return args, overrides
