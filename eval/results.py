"""Result files of lm-eval tables, one for each set of conditions, so that none replaces another's, and the answers of
evaluations that are not finished."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus.sources import Source
from eval.samples import digest
from s2.files import checksum, make_folder, move_aside, read_json, remove_files, write_json, write_text
from s2.versions import version_of

log = logging.getLogger(__name__)


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
            "lm_eval": version_of("lm_eval"),
        }

    def content(self, files: Iterable[Path]) -> dict[str, str | None]:
        """Checksums of the data that was read: of `files`, and of the held-out documents."""
        sources = [*sorted(files), *([Path(self.heldout)] if self.heldout else [])]
        return {str(source): checksum_of(source) for source in sources}

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


def is_current(file: Path) -> bool:
    """Whether a table is there that the same command would make again: of this lm-eval, on data that is as it was."""
    if not file.is_file():
        return False
    results = read_json(file)
    content = results["s2_files"]["content"]
    return results["s2"]["lm_eval"] == version_of("lm_eval") and all(
        checksum_of(Path(source)) == checksum for source, checksum in content.items()
    )


def threshold(check: dict[str, Any]) -> str:
    """Of a check in gate.json, in words, with the base checkpoint's figure where it is compared with that."""
    key = next(key for key in ("max", "max_rise", "min", "max_drop") if check.get(key) is not None)
    return f"{key} {check[key]:g}" + (f" of {check['base']:.4g}" if check.get("base") is not None else "")


def checksum_of(source: Path) -> str | None:
    """A checksum of texts that are read: of a file, of a shard folder's manifest, or of the names and contents of the
    files that a folder or pattern stands for; None where nothing is there."""
    file = source / "manifest.json" if source.is_dir() else source
    if file.is_file():
        return checksum(file)
    try:
        found = Source(path=str(source)).resolve().files
    except FileNotFoundError:
        return None
    return digest([[name, checksum(Path(path))] for path, name in found])


def _name(value: Any) -> str:
    """What JSON cannot say (dtypes, functions, paths) becomes its name."""
    return value.__qualname__ if callable(value) and hasattr(value, "__qualname__") else str(value)


class Answers:
    """Answers of an evaluation that is not finished, a line for each request in `folder/.unfinished/<name>.jsonl`: what
    is interrupted goes on from them.

    Args:
        folder: of the results.
        name: of the table.
        identity: what the answers depend on beyond the requests; a file of another identity is begun anew.
    """

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        self._folder = make_folder(folder / ".unfinished", "answers of unfinished evaluations")
        self._file = self._folder / f"{name}.jsonl"
        header = json.dumps(identity, sort_keys=True)
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        self._known: dict[str, tuple[Any, str | None]] = {}
        for line in lines[1:] if lines[:1] == [header] else []:
            with contextlib.suppress(ValueError):  # cut by a kill
                key, result, cut = json.loads(line)
                self._known[key] = (tuple(result) if isinstance(result, list) else result, cut)
        rows = [json.dumps([key, *value]) for key, value in self._known.items()]
        write_text(self._file, "".join(f"{line}\n" for line in (header, *rows)))
        self._stream = self._file.open("a", encoding="utf-8", buffering=1)
        if rows:
            print(f"{len(rows):,} answers of an interrupted evaluation are there; going on from them", flush=True)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, kind: str, args: Any) -> tuple[Any, str | None] | None:
        """The result of a request and what of it was cut; None where it is not known."""
        return self._known.get(_key(kind, args))

    def add(self, kind: str, args: Any, result: Any, cut: str | None) -> None:
        """Keep a result. Where the disk is full, only a warning says so."""
        try:
            if not self._stream.closed:
                self._stream.write(json.dumps([_key(kind, args), result, cut]) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s): an interruption would lose what is scored now", self._file, error)
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `add` has said so
            self._stream.close()

    def discard(self) -> None:
        """Forget them: the table is written."""
        self.close()
        remove_files(self._folder, self._file.name)


def _key(kind: str, args: Any) -> str:
    return hashlib.sha256(json.dumps([kind, args], sort_keys=True).encode()).hexdigest()[:32]
