"""The `prepare` section of a recipe: which corpora become which shard folders, and how."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.corpus.dedup import Deduplicate
from data.corpus.sources import PART_BYTES, Source
from data.corpus.tokenizer import TokenizerSpec, tokenizer_settings
from data.settings import differences, fraction, from_mapping, whole_number
from s2.recipe import apply_overrides, load_recipe, unknown_key_message

# What does not decide the content of shards: where they lie, how the work is divided, what happens to bad rows (parts
# and manifests say how many there were).
_FREE = ("output", "workers", "part_bytes", "on_bad_row")
_CWD = "cwd"  # in records: the folder from which relative paths lead
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# A recipe's `data` section is for this class, which takes these arguments; to import it takes seconds.
DATAMODULE = "data.datamodule.PackedDataModule"
DATAMODULE_KEYS = (
    "seq_len",
    "micro_batch_size",
    "mixture",
    "validation",
    "prepare",
    "seed",
    "num_workers",
    "document_mask",
    "curriculum",
)


@dataclass(frozen=True)
class PrepareSpec:
    """The `prepare` section of a recipe.

    output: folder to write; `~` is the home folder, as in all paths here.
    sources: see `data.corpus.sources.Source`; a bare string is its path.
    tokenizer: see `data.corpus.tokenizer.TokenizerSpec`; its `path` may be a Hugging Face folder with a tokenizer.json.
    deduplicate: see `data.corpus.dedup.Deduplicate`; over all sources, the first of a set of duplicates stays. The
        corpus is then read twice.
    heldout_fraction, seed: a document is held out when a hash of (seed, its id) falls below the fraction;
        which documents those are does not depend on the order or number of sources. Fraction 0 writes no
        held-out folder. Of a corpus so small that no document falls below it, the one with the smallest hash is
        held out.
    on_bad_row: "stop" at a row that is not as it has to be (broken JSON, a text column that holds no text), or "skip"
        it; skipped rows are counted in the manifest and the report. A source may say otherwise for itself.
    shard_tokens: a shard file is closed once it holds that many tokens.
    part_bytes: of the sources on disk, that a worker reads in one go. An interrupted preparation goes on with the
        parts that are missing.
    workers: processes; all cores by default. They do not change what is written.
    """

    output: str
    sources: tuple[Source, ...]
    tokenizer: TokenizerSpec
    deduplicate: Deduplicate | None = None
    heldout_fraction: float = 0.01
    seed: int = 0
    on_bad_row: str = "stop"
    shard_tokens: int = 1 << 27
    part_bytes: int = PART_BYTES
    workers: int | None = None

    @classmethod
    def parse(cls, values: Any, where: str = "prepare") -> "PrepareSpec":
        """Build from YAML; raises ValueError naming the wrong key."""
        spec = from_mapping(cls, values, where)
        if not spec.output:
            raise ValueError(f"{where}.output: expected the folder to write, got {spec.output!r}")
        if spec.on_bad_row not in ("stop", "skip"):
            raise ValueError(f"{where}.on_bad_row: expected stop or skip, got {spec.on_bad_row!r}")
        if not isinstance(spec.sources, list | tuple) or not spec.sources:
            raise ValueError(f"{where}.sources: expected a list of at least one corpus, got {spec.sources!r}")
        sources = tuple(
            from_mapping(Source, {"path": entry} if isinstance(entry, str) else entry, f"{where}.sources[{i}]")
            for i, entry in enumerate(spec.sources)
        )
        labels = [source.label for source in sources]
        for i, label in enumerate(labels):
            if label in labels[:i]:
                raise ValueError(f"{where}.sources[{i}]: the name {label!r} occurs twice; set `name`")
        return replace(
            spec,
            output=os.path.expanduser(spec.output),
            sources=sources,
            tokenizer=_in_folder(from_mapping(TokenizerSpec, spec.tokenizer, f"{where}.tokenizer")),
            heldout_fraction=fraction(spec.heldout_fraction, f"{where}.heldout_fraction", zero=True),
            deduplicate=Deduplicate.parse(spec.deduplicate, f"{where}.deduplicate"),
            workers=None if spec.workers is None else whole_number(spec.workers, f"{where}.workers", least=1),
            shard_tokens=whole_number(spec.shard_tokens, f"{where}.shard_tokens", least=1),
            part_bytes=whole_number(spec.part_bytes, f"{where}.part_bytes", least=1),
        )

    @property
    def folders(self) -> dict[str, Path]:
        """Shard folders by split: `train`, and `heldout` unless the fraction is 0."""
        splits = ("train", "heldout") if self.heldout_fraction else ("train",)
        return {split: Path(self.output) / split for split in splits}

    def settings(self) -> dict[str, Any]:
        """All that decides the shards' content, as the manifest records it. Raises FileNotFoundError where the
        tokenizer is missing."""
        settings = self._content(tokenizer_settings(self.tokenizer))
        for values, source in zip(settings["sources"], self.sources, strict=True):
            values["path"] = source.path
        return settings | {"part_bytes": self.part_bytes, "on_bad_row": self.on_bad_row, _CWD: os.getcwd()}

    def changes(self, recorded: dict[str, Any]) -> list[str]:
        """What differs between the settings that a manifest or an interrupted preparation records (those of earlier
        versions lack some keys) and those asked for now, one line a key (`seed: 0 != 1`). Empty where the shards are
        the same. A brought tokenizer that is not there any more counts as the recorded one; so do sources of the same
        path as it was written (in a project folder that has moved) or as it leads from the recorded working folder."""
        recorded = dict(recorded)
        then = recorded.pop(_CWD, None)
        try:
            tokenizer = tokenizer_settings(self.tokenizer)
        except FileNotFoundError:
            tokenizer = {**asdict(self.tokenizer), "path": recorded["tokenizer"]["path"]}
        now = self._content(tokenizer)
        try:
            spec = PrepareSpec.parse(recorded | {"output": self.output}, "recorded")
        except ValueError:  # of a later version
            return differences(recorded, now)
        before = spec._content(asdict(spec.tokenizer), then)
        for old, new, was, source in zip(before["sources"], now["sources"], spec.sources, self.sources, strict=False):
            if was.path == source.path:
                old["path"] = new["path"]
        return differences(before, now)

    def _content(self, tokenizer: dict[str, Any], cwd: str | None = None) -> dict[str, Any]:
        """The settings that decide the shards' content; sources by their labels and whole paths, relative ones from
        `cwd` on."""
        settings = asdict(self) | {"tokenizer": tokenizer}
        for values, source in zip(settings["sources"], self.sources, strict=True):
            values["name"] = source.label
            if source.path != "python-env" and "://" not in source.path:
                values["path"] = os.path.abspath(os.path.join(cwd or "", os.path.expanduser(source.path)))
            del values["on_bad_row"]
        return json.loads(json.dumps({key: value for key, value in settings.items() if key not in _FREE}))

    def skips_bad_rows(self, source: Source) -> bool:
        return (source.on_bad_row or self.on_bad_row) == "skip"

    def place(self, document_id: str) -> int:
        """Where a document falls in the split: a number of [0, 2**64), the same on every machine."""
        digest = hashlib.blake2b(f"{self.seed}:{document_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    @property
    def heldout_below(self) -> int:
        """Documents with a smaller `place` are held out."""
        return math.ceil(self.heldout_fraction * 2**64)

    def is_heldout(self, document_id: str) -> bool:
        return self.place(document_id) < self.heldout_below


def _in_folder(tokenizer: TokenizerSpec) -> TokenizerSpec:
    """The same with the whole path, and the file where that is a folder."""
    if tokenizer.path is None:
        return tokenizer
    tokenizer = replace(tokenizer, path=os.path.expanduser(tokenizer.path))
    if not (folder := Path(str(tokenizer.path))).is_dir():
        return tokenizer
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            return replace(tokenizer, path=str(folder / name))
    raise FileNotFoundError(f"tokenizer {str(folder)!r}: the folder holds no {' and no '.join(_TOKENIZER_FILES)}")


def prepare_section(recipe: str | Path, overrides: Sequence[str] = ()) -> list[PrepareSpec]:
    """The `prepare` settings of a training recipe (one mapping or a list of them), below `data`.

    overrides: `key=value` arguments, see `s2.recipe`.
    """
    section = data_section(Path(recipe), overrides).get("prepare")
    if not section:
        raise ValueError(f"{recipe}: no data.init_args.prepare section, so there is nothing to prepare")
    return parse_sections(section, f"{recipe}: data.prepare")


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
        for key in section:
            if key not in DATAMODULE_KEYS:
                known = [f"data.{name}" for name in DATAMODULE_KEYS]
                raise ValueError(unknown_key_message(f"data.{key}", known, recipe, [".".join(k[:2]) for k in keys]))
    return section


def is_override(argument: str) -> bool:
    """Whether a command-line argument is a `key=value` of a recipe, and not an unknown option."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and ("." in key or not key.startswith("-"))


def parse_sections(section: Any, where: str = "prepare") -> list[PrepareSpec]:
    """One `prepare` mapping or a list of them, as specs."""
    if isinstance(section, list):
        return [PrepareSpec.parse(values, f"{where}[{i}]") for i, values in enumerate(section)]
    return [PrepareSpec.parse(section, where)]
