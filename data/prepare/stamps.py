"""Which files a preparation has read, and in which state: sizes, modification times, checksums.

A file whose size and time are those of a record is taken to be the same. Remote files have no stamps: a dataset is
pinned to a revision.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus.parts import Part
from s2.files import checksum


@dataclass(frozen=True)
class Stamp:
    """A local file: its name in its source, its size in bytes and its modification time."""

    path: str
    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str, name: str) -> "Stamp":
        """Raises FileNotFoundError for a file that is gone."""
        stat = os.stat(path)
        return cls(path, plain(name), stat.st_size, stat.st_mtime_ns)

    def record(self, *, content: bool) -> dict[str, Any]:
        """As records and manifests hold it; with the checksum of the content if asked for."""
        digest = checksum(Path(self.path)) if content else None
        return {
            "name": self.name,
            "path": plain(self.path),
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "xxh3_128": digest,
        }

    def matches(self, record: Mapping[str, Any]) -> bool:
        """Whether the file is in the recorded state, as far as is known without reading it."""
        return (self.name, self.size, self.mtime_ns) == (record["name"], record["size"], record["mtime_ns"])


def plain(name: str) -> str:
    """A file name as any text file can hold it: bytes that are not UTF-8 become "?"."""
    return name.encode(errors="replace").decode()


def stamps(files: Iterable[tuple[str, str]]) -> list[Stamp]:
    """Of (path, name) pairs, the local ones."""
    return [Stamp.of(path, name) for path, name in files if "://" not in path]


def begins_in(part: Part) -> bool:
    """Whether a part reads its files from their beginning: of a file in several parts one does."""
    return part.span is None or part.span[0] == 0


def changes(
    recorded: Sequence[Mapping[str, Any]], files: Sequence[tuple[str, str]], *, all_read: bool, content: bool
) -> list[str]:
    """What has become of a source's files since they were recorded, one line a file.

    files: (path, name) of those that are there now, in reading order. all_read: whether the source was read to its end;
        with a limit, what lies behind the last file that was read does not matter. content: of files of which only the
        time is another (they were copied, checked out again, touched) the content decides; otherwise they count as the
        same.
    """
    there = {plain(name): path for path, name in files}
    known = {record["name"] for record in recorded}
    lines = [f"{name} is gone" for name in known - there.keys()]
    for record in recorded:
        if (path := there.get(record["name"])) is None:
            continue
        now = Stamp.of(path, record["name"])
        is_same = now.size == record["size"] and (not content or now.matches(record) or _has_content(path, record))
        lines += [] if is_same else [f"{path} has changed"]
    last = max((i for i, name in enumerate(there) if name in known), default=-1)
    end = len(there) if all_read else last
    return lines + [f"{path} is new" for name, path in list(there.items())[:end] if name not in known]


def _has_content(path: str, record: Mapping[str, Any]) -> bool:
    return record["xxh3_128"] is not None and checksum(Path(path)) == record["xxh3_128"]
