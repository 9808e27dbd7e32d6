"""The `prepare` section of a recipe: which corpora become which shard folders, and how."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from data.corpus.dedup import Deduplicate
from data.corpus.sources import PART_BYTES, Source
from data.corpus.tokenizer import TokenizerSpec, tokenizer_settings
from s2.recipe import difference_lines
from s2.settings import Check, Positive, SettingError, Settings, read

# What does not decide the content of shards: where they lie, how the work is divided, what happens to bad rows (parts
# and manifests say how many there were).
_FREE = ("output", "workers", "part_bytes", "on_bad_row")
_CWD = "cwd"  # in records: the folder from which relative paths lead


@dataclass(frozen=True)
class PrepareSpec(Settings):
    """The `prepare` section of a recipe.

    output: folder to write; `~` is the home folder, as in all paths here.
    sources: see `data.corpus.sources.Source`; a bare string is its path.
    tokenizer: see `data.corpus.tokenizer.TokenizerSpec`; its `path` may be a Hugging Face folder with a tokenizer.json.
    deduplicate: see `data.corpus.dedup.Deduplicate`; over all sources, the first of a set of duplicates stays. The
        corpus is then read twice.
    heldout_fraction, seed: a document is held out when a hash of (seed, its id) falls below the fraction, whatever the
        other sources are; of a small corpus at least one is. Fraction 0 writes no held-out folder.
    on_bad_row: "stop" at a row that is not as it has to be (broken JSON, a text column that holds no text), or "skip"
        it; skipped rows are counted in the manifest and the report. A source may say otherwise for itself.
    shard_tokens: a shard file is closed once it holds that many tokens.
    part_bytes: of the sources on disk, that a worker reads in one go. An interrupted preparation goes on with the
        parts that are missing.
    workers: processes; all cores by default. They do not change what is written.
    """

    output: Annotated[str, Check("the folder to write", bool)]
    sources: Annotated[tuple[Source, ...], Check("a list of at least one corpus", bool)]
    tokenizer: TokenizerSpec
    deduplicate: Deduplicate | None = None
    heldout_fraction: Annotated[float, Check("a number of [0, 1)", lambda x: 0 <= x < 1)] = 0.01
    seed: int = 0
    on_bad_row: Literal["stop", "skip"] = "stop"
    shard_tokens: Positive = 1 << 27
    part_bytes: Positive = PART_BYTES
    workers: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, source in enumerate(self.sources):
            if source.label in (other.label for other in self.sources[:i]):
                raise SettingError(f"sources[{i}]", f"the name {source.label!r} occurs twice; set `name`")
        object.__setattr__(self, "output", os.path.expanduser(self.output))

    @classmethod
    def parse(cls, values: Any, where: str = "prepare") -> "PrepareSpec":
        """Build from YAML; raises SettingError naming the wrong key."""
        return read(cls, values, where)

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
            return difference_lines(recorded, now)
        before = spec._content(asdict(spec.tokenizer), then)
        for old, new, was, source in zip(before["sources"], now["sources"], spec.sources, self.sources, strict=False):
            if was.path == source.path:
                old["path"] = new["path"]
        return difference_lines(before, now)

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


def parse_sections(section: Any, where: str = "prepare") -> list[PrepareSpec]:
    """One `prepare` mapping or a list of them, as specs."""
    if isinstance(section, list):
        return [PrepareSpec.parse(values, f"{where}[{i}]") for i, values in enumerate(section)]
    return [PrepareSpec.parse(section, where)]
