"""Result files of lm-eval tables: one for each set of conditions, so that none replaces another's."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from s2.files import checksum, move_aside, read_json, write_json, write_text


@dataclass(frozen=True)
class Conditions:
    """What the numbers of a table depend on, beyond the content of checkpoint and data. Paths are absolute."""

    checkpoint: str
    tasks: tuple[str, ...]
    max_length: int
    bos: str
    dtype: str
    on_overflow: str
    num_fewshot: int | None
    limit: float | None
    data: str | None
    heldout: str | None
    metadata: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What a result file says of them; the checkpoint stands there under its short name."""
        values = dataclasses.asdict(self)
        del values["checkpoint"]
        return values | {
            "tasks": list(self.tasks),
            "num_fewshot": "task default" if self.num_fewshot is None else str(self.num_fewshot),
            "lm_eval": version("lm_eval"),
        }

    def content(self, files: Iterable[Path]) -> dict[str, str | None]:
        """Checksums of the data that was read: of `files`, and of the held-out documents."""
        sources = [*sorted(files), *([Path(self.heldout)] if self.heldout else [])]
        return {str(source): _checksum(source) for source in sources}

    @property
    def name(self) -> str:
        """File name without suffix: what a reader looks for, and a digest of everything."""
        tasks = "+".join(self.tasks)
        if len(self.tasks) > 4 or len(tasks) > 100:
            tasks = f"{self.tasks[0]}+{len(self.tasks) - 1}-more"
        shots = "" if self.num_fewshot is None else f"-{self.num_fewshot}shot"
        limit = "" if self.limit is None else f"-limit{self.limit:g}"
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True, default=str).encode()).hexdigest()
        return f"lm-{tasks}{shots}{limit}-{digest[:8]}"


def write_results(folder: Path, results: dict[str, Any], text: str) -> tuple[Path, Path]:
    """Write a table as JSON and Markdown and return the files.

    The same checkpoint under the same conditions has the same files. Those of a checkpoint or of data with other
    content, of another lm-eval, or with samples that would be lost, move aside to <name>.1, <name>.2, ...
    """
    name = results["s2_files"]["name"]
    files = folder / f"{name}.json", folder / f"{name}.md"
    if not _is_replaced_by(files[0], results):
        for file in files:
            if os.path.lexists(file):
                move_aside(file)
    write_json(files[0], results, default=_name)
    write_text(files[1], text)
    return files


def _is_replaced_by(file: Path, results: dict[str, Any]) -> bool:
    try:
        old = read_json(file)
        same = all(old["s2"][key] == results["s2"][key] for key in ("fingerprint", "lm_eval"))
        return same and old["s2_files"] == results["s2_files"] and ("samples" in results or "samples" not in old)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum(source: Path) -> str | None:
    """A checksum of a file or of a shard folder's manifest; None for other folders and patterns."""
    file = source / "manifest.json" if source.is_dir() else source
    return checksum(file) if file.is_file() else None


def _name(value: Any) -> str:
    """What JSON cannot say (dtypes, functions, paths) becomes its name."""
    return value.__qualname__ if callable(value) and hasattr(value, "__qualname__") else str(value)
