"""Which files a preparation has read, and in which state: sizes, modification times, checksums.

A file whose size and time are those of a record is taken to be the same. Remote files have no stamps: a dataset is
pinned to a revision.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.corpus.parts import File
from s2.files import checksum


def record(file: File, *, content: bool) -> dict[str, Any]:
    """A local file as records and manifests hold it; with the checksum of the content if asked for."""
    digest = checksum(Path(file.path)) if content else None
    known = {"name": plain(file.name), "path": plain(file.path), "size": file.size, "mtime_ns": file.mtime_ns}
    return known | {"xxh3_128": digest}


def matches(file: File, recorded: Mapping[str, Any]) -> bool:
    """Whether the file is in the recorded state, as far as is known without reading it."""
    return [plain(file.name), file.size, file.mtime_ns] == [recorded[key] for key in ("name", "size", "mtime_ns")]


def plain(name: str) -> str:
    """A file name as any text file can hold it: bytes that are not UTF-8 become "?"."""
    return name.encode(errors="replace").decode()


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
    known = {was["name"] for was in recorded}
    lines = [f"{name} is gone" for name in known - there.keys()]
    for was in recorded:
        if (path := there.get(was["name"])) is None:
            continue
        now = File.found(path, was["name"])
        if now.size != was["size"] or (content and not matches(now, was) and checksum(Path(path)) != was["xxh3_128"]):
            lines.append(f"{path} has changed")
    last = max((i for i, name in enumerate(there) if name in known), default=-1)
    end = len(there) if all_read else last
    return lines + [f"{path} is new" for name, path in list(there.items())[:end] if name not in known]
