"""The `prepare` section of a recipe: which corpora become which shard folders, and how."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data.dedup import Deduplicate
from data.schema import fraction, from_mapping, whole_number
from data.sources import PART_BYTES, Source
from data.tokenizer import TokenizerSpec, tokenizer_settings


@dataclass(frozen=True)
class PrepareSpec:
    """The `prepare` section of a recipe.

    output: folder to write. sources: see `data.sources.Source`; a bare string is its path.
    tokenizer: see `data.tokenizer.TokenizerSpec`.
    deduplicate: see `data.dedup.Deduplicate`; over all sources, the first of a set of duplicates stays. The corpus is
        then read twice.
    heldout_fraction, seed: a document is held out when a hash of (seed, its id) falls below the fraction;
        which documents those are does not depend on the order or number of sources. Fraction 0 writes no
        held-out folder.
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
    shard_tokens: int = 1 << 27
    part_bytes: int = PART_BYTES
    workers: int | None = None

    @classmethod
    def parse(cls, values: Any, where: str = "prepare") -> "PrepareSpec":
        """Build from YAML; raises ValueError naming the wrong key."""
        spec = from_mapping(cls, values, where)
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
            sources=sources,
            tokenizer=from_mapping(TokenizerSpec, spec.tokenizer, f"{where}.tokenizer"),
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
        settings = asdict(self) | {"tokenizer": tokenizer_settings(self.tokenizer)}
        for key in ("output", "workers"):
            del settings[key]
        return json.loads(json.dumps(settings))

    def is_heldout(self, document_id: str) -> bool:
        digest = hashlib.blake2b(f"{self.seed}:{document_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.heldout_fraction * 2**64


def prepare_section(recipe: str | Path) -> list[PrepareSpec]:
    """The `prepare` settings of a training recipe (one mapping or a list of them), below `data`."""
    file = Path(recipe)
    if not file.is_file():
        raise FileNotFoundError(f"recipe {str(recipe)!r}: no such file")
    section = data_section(file).get("prepare")
    if not section:
        raise ValueError(f"{recipe}: no data.init_args.prepare section, so there is nothing to prepare")
    return parse_sections(section, f"{recipe}: data.init_args.prepare")


def data_section(recipe: Path) -> dict[str, Any]:
    """The arguments of a recipe's datamodule."""
    data = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("data") or {}
    return data.get("init_args", data)


def parse_sections(section: Any, where: str = "prepare") -> list[PrepareSpec]:
    """One `prepare` mapping or a list of them, as specs."""
    if isinstance(section, list):
        return [PrepareSpec.parse(values, f"{where}[{i}]") for i, values in enumerate(section)]
    return [PrepareSpec.parse(section, where)]
