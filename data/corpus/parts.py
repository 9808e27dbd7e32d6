"""Parts of a source: what one worker reads in one go."""

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from data.corpus.folders import NamedFile
from data.corpus.readers import PACKS, open_parquet
from data.corpus.remote import remote_size

_LOOKUPS = 16  # a hub answers many questions at once


@dataclass(frozen=True)
class Part:
    """What one worker reads of a source in one go.

    format: parquet, jsonl, text or retrieval. files: (path or url, name that ids begin with). span: row groups
    [first, last) of the one parquet file, bytes [begin, end) of the one JSON lines file or documents [first, last) made
    on the spot; None for whole files. size: bytes on disk, or about as many of text.
    """

    format: str
    files: tuple[NamedFile, ...]
    span: tuple[int, int] | None
    size: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Part":
        span = tuple(values["span"]) if values["span"] else None
        files = tuple((path, name) for path, name in values["files"])
        return cls(values["format"], files, span, values["size"])


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
    groups: list[list[Part]] = []
    size, number = 0, None  # of the last group
    for (_, name), parts in zip(files, by_file, strict=True):
        is_alike = bool(groups) and groups[-1][-1].span is None and before.get(name) == number
        if len(parts) == 1 and is_alike and size + parts[0].size <= part_bytes:
            groups[-1] += parts
            size += parts[0].size
        else:
            groups += [[part] for part in parts]
            size, number = parts[-1].size, before.get(name)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups]


def _joined(group: Sequence[Part]) -> Part:
    files = tuple(file for part in group for file in part.files)
    return Part(group[0].format, files, None, sum(part.size for part in group))


def divide_made(documents: int, size: int, part_bytes: int) -> list[Part]:
    """Synthetic documents of about `size` bytes in parts."""
    spans = itertools.pairwise([*range(0, documents, max(1, part_bytes // size)), documents])
    file = ("retrieval://", "")  # no local file, whose size and time would be looked up
    return [Part("retrieval", (file,), span, (span[1] - span[0]) * size) for span in spans]


def row_groups(path: str) -> int:
    """How many row groups a parquet file has."""
    with open_parquet(path) as table:
        return table.num_row_groups


def file_size(path: str) -> int:
    """Bytes of a local or remote file."""
    return remote_size(path) if "://" in path else os.stat(path).st_size


def _parts_of(kind: str, file: NamedFile, part_bytes: int) -> list[Part]:
    size = file_size(file[0])
    pieces = -(-size // part_bytes)
    if pieces < 2 or kind == "text" or file[0].endswith(PACKS):
        return [Part(kind, (file,), None, size)]
    units = row_groups(file[0]) if kind == "parquet" else size
    pieces = min(pieces, units)
    if pieces < 2:
        return [Part(kind, (file,), None, size)]
    ends = itertools.pairwise(units * i // pieces for i in range(pieces + 1))
    return [Part(kind, (file,), span, size // pieces) for span in ends]
