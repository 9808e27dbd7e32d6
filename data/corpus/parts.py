"""Parts of a source: what one worker reads in one go."""

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.folders import NamedFile
from data.corpus.readers import PACKS, open_parquet
from data.corpus.remote import remote_size
from s2.files import checksum

_LOOKUPS = 16  # a hub answers many questions at once


class File(NamedTuple):
    """A path or url, the name that ids begin with, bytes on disk and the modification time (None: it is remote, so its
    dataset is pinned to a revision)."""

    path: str
    name: str
    size: int = 0
    mtime_ns: int | None = None

    @classmethod
    def found(cls, path: str, name: str) -> "File":
        """As it is now; raises FileNotFoundError for a file that is gone."""
        if "://" in path:
            return cls(path, name, remote_size(path))
        stat = os.stat(path)
        return cls(path, name, stat.st_size, stat.st_mtime_ns)

    def record(self, *, content: bool) -> dict[str, Any]:
        """A local file as records and manifests hold it; with the checksum of the content if asked for."""
        digest = checksum(Path(self.path)) if content else None
        known = {"name": plain(self.name), "path": plain(self.path), "size": self.size, "mtime_ns": self.mtime_ns}
        return known | {"xxh3_128": digest}

    def matches(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the file is in the recorded state: of that size and time."""
        return [plain(self.name), self.size, self.mtime_ns] == [recorded[key] for key in ("name", "size", "mtime_ns")]


def plain(text: str) -> str:
    """A text as any file can hold it: bytes of a file name that are not UTF-8 and lone surrogates of broken JSON
    escapes become "?"."""
    return text if text.isascii() else text.encode(errors="replace").decode()


@dataclass(frozen=True)
class Part:
    """What one worker reads of a source in one go.

    format: parquet, jsonl, text or retrieval. span: row groups [first, last) of the one parquet file, bytes
    [begin, end) of the one JSON lines file or documents [first, last) made on the spot; None for whole files. size:
    bytes on disk, or about as many of text. number: names what is made of it.
    """

    format: str
    files: tuple[File, ...]
    span: tuple[int, int] | None
    size: int
    number: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Part":
        files = tuple(File(*file) for file in values["files"])
        return cls(**{**values, "files": files, "span": tuple(values["span"]) if values["span"] else None})

    @property
    def place(self) -> list[Any]:
        """What tells parts of a source apart, as JSON holds it: format, names of the files, span."""
        return [self.format, [file.name for file in self.files], list(self.span) if self.span else None]

    @property
    def local_files(self) -> list[File]:
        return [file for file in self.files if file.mtime_ns is not None]


def divide(kind: str, files: Sequence[NamedFile], part_bytes: int, before: Mapping[str, int] = {}) -> list[Part]:
    """Files in parts of about `part_bytes` on disk, in reading order.

    Small files share a part; parquet is split between row groups and plain JSON lines between lines; a larger
    compressed file is one part. Raises what opening the files raises.

    before: numbers of the parts in which files were, by name; only files of one number share a part again, so that it
        stays what it was when others grow, come or go.
    """
    if any("://" in path for path, _ in files):
        with ThreadPoolExecutor(_LOOKUPS) as pool:
            by_file = list(pool.map(lambda file: _parts_of(kind, file, part_bytes), files))
    else:
        by_file = [_parts_of(kind, file, part_bytes) for file in files]
    found: list[Part] = []
    number = None  # that the last file had
    for (_, name), parts in zip(files, by_file, strict=True):
        joins = len(parts) == 1 and bool(found) and found[-1].span is None and before.get(name) == number
        if joins and found[-1].size + parts[0].size <= part_bytes:
            found[-1] = Part(kind, found[-1].files + parts[0].files, None, found[-1].size + parts[0].size)
        else:
            found += parts
        number = before.get(name)
    return found


def divide_made(documents: int, size: int, part_bytes: int) -> list[Part]:
    """Synthetic documents of about `size` bytes in parts."""
    spans = itertools.pairwise([*range(0, documents, max(1, part_bytes // size)), documents])
    files = (File("retrieval://", ""),)
    return [Part("retrieval", files, span, (span[1] - span[0]) * size) for span in spans]


def row_groups(path: str) -> int:
    """How many row groups a parquet file has."""
    with open_parquet(path) as table:
        return table.num_row_groups


def _parts_of(kind: str, named: NamedFile, part_bytes: int) -> list[Part]:
    file = File.found(*named)
    pieces = -(-file.size // part_bytes)
    if pieces < 2 or kind == "text" or file.path.endswith(PACKS):
        return [Part(kind, (file,), None, file.size)]
    units = row_groups(file.path) if kind == "parquet" else file.size
    pieces = min(pieces, units)
    if pieces < 2:
        return [Part(kind, (file,), None, file.size)]
    ends = itertools.pairwise(units * i // pieces for i in range(pieces + 1))
    return [Part(kind, (file,), span, file.size // pieces) for span in ends]
