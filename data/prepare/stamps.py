"""Which files a preparation has read, and in which state: sizes, modification times, checksums.

A file whose size and time are those of a record is taken to be the same. Where only the time is another (it was copied,
checked out again, touched) the content decides. Remote files have no stamps: a dataset is pinned to a revision.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.corpus.parts import Part
from s2.files import checksum


@dataclass(frozen=True)
class Stamp:
    """A local file: its name in its source, its size in bytes and its modification time.

    same: earlier modification times, under which it had the content that it has now.
    """

    path: str
    name: str
    size: int
    mtime_ns: int
    same: tuple[int, ...] = ()

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
        times = (self.mtime_ns, *self.same)
        return (self.name, self.size) == (record["name"], record["size"]) and record["mtime_ns"] in times


def plain(name: str) -> str:
    """A file name as any text file can hold it: bytes that are not UTF-8 become "?"."""
    return name.encode(errors="replace").decode()


def stamps(files: Iterable[tuple[str, str]]) -> list[Stamp]:
    """Of (path, name) pairs, the local ones."""
    return [Stamp.of(path, name) for path, name in files if "://" not in path]


def begins_in(part: Part) -> bool:
    """Whether a part reads its files from their beginning: of a file in several parts one does."""
    return part.span is None or part.span[0] == 0


def with_known_content(found: Sequence[Stamp], records: Iterable[Mapping[str, Any]]) -> list[Stamp]:
    """The same stamps, each with the recorded times under which its content was the present one; reads files whose
    time alone is another than that of a record."""
    recorded: dict[tuple[str, int], dict[int, str]] = {}  # checksums by name and size, then by time
    for record in records:
        if record["xxh3_128"] is not None:
            recorded.setdefault((record["name"], record["size"]), {})[record["mtime_ns"]] = record["xxh3_128"]
    known = []
    for stamp in found:
        checksums = recorded.get((stamp.name, stamp.size), {})
        if checksums and stamp.mtime_ns not in checksums:
            now = checksum(Path(stamp.path))
            stamp = replace(stamp, same=tuple(time for time, was in checksums.items() if was == now))
        known.append(stamp)
    return known


def changes(
    recorded: Sequence[Mapping[str, Any]], files: Sequence[tuple[str, str]], *, all_read: bool, content: bool
) -> list[str]:
    """What has become of a source's files since they were recorded, one line a file.

    files: (path, name) of those that are there now, in reading order. all_read: whether the source was read to its end;
        with a limit, what lies behind the last file that was read does not matter. content: read files of which only
        the time is another; otherwise they count as the same.
    """
    files = [(path, plain(name)) for path, name in files]
    known = {record["name"] for record in recorded}
    now = [Stamp.of(path, name) for path, name in files if name in known]
    there = {stamp.name: stamp for stamp in (with_known_content(now, recorded) if content else now)}
    lines = [f"{record['name']} is gone" for record in recorded if record["name"] not in there]
    for record in recorded:
        stamp = there.get(record["name"])
        if stamp and not stamp.matches(record) and (content or stamp.size != record["size"]):
            lines.append(f"{stamp.path} has changed")
    last = max((i for i, (_, name) in enumerate(files) if name in known), default=-1)
    end = len(files) if all_read else last
    return lines + [f"{path} is new" for path, name in files[:end] if name not in known]
