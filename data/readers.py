"""One reader for each corpus format. Each yields `Row`s in a fixed order; `sources.py` does the rest.

JSON lines are read line by line rather than through the `datasets` builder: that one fixes the column types
on its first chunk and then rejects files whose rows do not all have the same fields, and it cannot say which
line is broken. Parquet goes through pyarrow so that only the columns in use are read. Files may be remote
(`data.remote`): a hub dataset is read like local files, in ranges, without being downloaded.
"""

import gzip
import hashlib
import io
import json
import math
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from data.remote import SourceError, open_remote

_PARQUET_BYTES = 16 << 20
_BUFFER = 1 << 20
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


class Row(NamedTuple):
    """A document as a file holds it: its text, an id and a url ("" where there is none)."""

    text: str
    id: str
    url: str


class RowError(Exception):
    """A file that cannot be read as what it claims to be; the message names the file and the place in it."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a row mean what.

    id, url: rows that lack them get an id from their place, and no url. The first row of JSON lines must have all
        columns, later ones may leave out any but the text.
    keep: conditions by column; a row that fails one, or has no value there, is left out. A condition is a value, a list
        of values, or {min, max} (inclusive, either may be missing).
    """

    text: str = "text"
    id: str | None = None
    url: str | None = None
    keep: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Mapping):
            raise ValueError(f"keep: expected a mapping from columns to conditions, got {self.keep!r}")
        for column, wanted in self.keep.items():
            if isinstance(wanted, Mapping) and (not wanted or set(wanted) - {"min", "max"}):
                raise ValueError(f"keep.{column}: expected a value, a list or {{min, max}}, got {dict(wanted)!r}")
            for bound in wanted.values() if isinstance(wanted, Mapping) else ():
                if isinstance(bound, bool) or not isinstance(bound, int | float) or math.isnan(bound):
                    raise ValueError(f"keep.{column}: {bound!r} is not a number")

    @property
    def names(self) -> list[str]:
        """All columns in use, each once."""
        return list(dict.fromkeys([self.text, *filter(None, (self.id, self.url)), *self.keep]))

    def rejects(self, row: Mapping[str, Any], file: object) -> str | None:
        """The column whose condition the row fails, None where it passes all; RowError for an incomparable value."""
        for column, wanted in self.keep.items():
            value = row.get(column)
            if isinstance(wanted, Mapping):
                if value is None:
                    return column
                try:
                    if not wanted.get("min", value) <= value <= wanted.get("max", value):
                        return column
                except TypeError:
                    raise RowError(f"{file}: column {column!r} holds {value!r}, which has no order") from None
            elif value not in (wanted if isinstance(wanted, list | tuple) else (wanted,)):
                return column
        return None


def open_binary(file: str | Path) -> IO[bytes]:
    """Open a plain, .gz or .zst file, local or remote, for reading bytes."""
    remote = "://" in str(file)
    raw: Any = io.BufferedReader(open_remote(str(file)), _BUFFER) if remote else Path(file).open("rb")  # noqa: SIM115
    if str(file).endswith(".gz"):
        return io.BufferedReader(_Unpacked(raw, gzip.GzipFile(fileobj=raw).readinto), _BUFFER)
    if str(file).endswith(".zst"):
        return io.BufferedReader(_Unpacked(raw, _ZstdFrames(raw).readinto), _BUFFER)
    return raw


class _Unpacked(io.RawIOBase):
    """A decompressed stream that closes the file it comes from."""

    def __init__(self, raw: Any, readinto: Callable[[Any], int]):
        self._raw, self._readinto = raw, readinto

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._readinto(buffer)

    def close(self) -> None:
        super().close()
        self._raw.close()


class _ZstdFrames:
    """The content of one zstd frame after another (tools that compress in parallel write several). Unlike the library's
    stream reader it tells a truncated file from a whole one."""

    def __init__(self, raw: Any):
        self._raw, self._packed, self._plain = raw, b"", memoryview(b"")
        self._frame: Any = None

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._packed:
                self._packed = self._raw.read(_BUFFER)
                if not self._packed and self._frame is None:
                    return 0
                if not self._packed:
                    raise EOFError("the last zstd frame is incomplete")
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size


def read_jsonl(
    file: str | Path, name: str, columns: Columns, skipped: Counter[str], span: tuple[int, int] | None = None
) -> Iterator[Row]:
    """Rows of a JSON lines file; blank lines are passed over. Where no column gives ids they are `name` and the byte at
    which the row begins in the uncompressed file.

    span: only lines that begin in these bytes [begin, end); plain files only.
    """
    begin, end = span or (0, None)
    number, offset = 0, begin
    place = "line" if not begin else f"byte {begin} on, line"
    try:
        with open_binary(file) as stream:
            if begin:
                stream.seek(begin - 1)
                offset += len(stream.readline()) - 1  # the rest of a line that belongs to the span before
            for number, line in enumerate(stream, start=1):
                if end is not None and offset >= end:
                    return
                here, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise RowError(f"{file}, {place} {number}: expected a JSON object, got {line[:60]!r}")
                if number == 1 and not begin:
                    for column in columns.names:
                        if column not in row:
                            raise RowError(_no_column(column, row, file))
                yield from _pick(row, columns, f"{name}:{here}", file, skipped)
    except UnicodeDecodeError as error:
        raise RowError(f"{file}, {place} {number}: not valid UTF-8 ({error})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"{file}, {place} {number}: not valid JSON ({error})") from error
    except _BROKEN as error:
        raise RowError(f"{file}: broken after line {number} ({error})") from error


def read_parquet(
    file: str | Path, name: str, columns: Columns, skipped: Counter[str], span: tuple[int, int] | None = None
) -> Iterator[Row]:
    """Rows of a parquet file, reading only the columns in use. Where no column gives ids they are `name` and the row.

    span: only these row groups [first, last).
    """
    import pyarrow as pa

    with open_parquet(file) as table:
        for column in columns.names:
            if column not in table.schema_arrow.names:
                raise RowError(_no_column(column, table.schema_arrow.names, file))
        first, last = span or (0, table.num_row_groups)
        number = sum(table.metadata.row_group(i).num_rows for i in range(first))
        try:
            for batch in table.iter_batches(_rows_at_once(table), range(first, last), columns.names):
                for row in batch.to_pylist():
                    yield from _pick(row, columns, f"{name}:{number}", file, skipped)
                    number += 1
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, SourceError) or getattr(error, "errno", None) is not None:
                raise  # the disk or the network; pyarrow's own complaints about the content have no number
            raise RowError(f"{file}: broken after row {number} ({error})") from error


def _rows_at_once(table: Any) -> int:
    """Rows that are about `_PARQUET_BYTES` of the file: books need smaller batches than web pages."""
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    size = sum(group.total_byte_size for group in groups) / max(1, sum(group.num_rows for group in groups))
    return int(min(1024, max(1, _PARQUET_BYTES / max(1, size))))


def open_parquet(file: str | Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, local or remote. Raises RowError for what is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = open_remote(str(file)) if "://" in str(file) else file
    try:
        return pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
    except pa.ArrowInvalid as error:
        raise RowError(f"{file}: not a parquet file, or a truncated one ({error})") from error


def read_text(file: str | Path, row_id: str, skipped: Counter[str]) -> Iterator[Row]:
    """A whole file as one document; binary and non-UTF-8 files are skipped and counted."""
    try:
        with open_binary(file) as stream:
            content = stream.read()
    except _BROKEN as error:
        raise RowError(f"{file}: broken ({error})") from error
    if b"\0" in content:
        skipped["binary"] += 1
        return
    try:
        yield Row(content.decode("utf-8-sig").replace("\r\n", "\n"), row_id, "")
    except UnicodeDecodeError:
        skipped["undecodable"] += 1


def folder_files(root: Path, suffixes: Iterable[str]) -> list[tuple[str, str]]:
    """(path, path below `root`) of every file below `root` with one of `suffixes`, in sorted order."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        paths = [os.path.join(folder, name) for name in names if name.endswith(tuple(suffixes))]
        found += [(path, os.path.relpath(path, root)) for path in paths if os.path.isfile(path)]
    return sorted(found, key=lambda file: file[1].split(os.sep))


def python_env_files(suffixes: Iterable[str]) -> list[tuple[str, str]]:
    """(path, name) of sources and documentation of the standard library and of the installed packages.

    The order is by hash of the name, so that a size limit takes a fair sample of all packages and not the first ones
    of the alphabet.
    """
    paths = sysconfig.get_paths()
    files = [
        (path, f"stdlib/{name}")
        for path, name in folder_files(Path(paths["stdlib"]), suffixes)
        if "site-packages" not in name and not path.startswith(paths["purelib"] + os.sep)
    ]
    files += [(path, f"site-packages/{name}") for path, name in folder_files(Path(paths["purelib"]), suffixes)]
    return sorted(files, key=lambda file: hashlib.blake2b(file[1].encode()).digest())


def _pick(row: Mapping[str, Any], columns: Columns, row_id: str, file: object, skipped: Counter[str]) -> Iterator[Row]:
    if columns.text not in row:
        raise RowError(_no_column(columns.text, row, file))
    if (rejecting := columns.rejects(row, file)) is not None:
        skipped[f"{rejecting} not kept"] += 1
        return
    text = row[columns.text]
    if text is None:
        skipped["null"] += 1
        return
    if not isinstance(text, str):
        raise RowError(f"{file}, row {row_id}: column {columns.text!r} holds {type(text).__name__}, expected text")
    if columns.id is not None and row.get(columns.id) is not None:
        row_id = str(row[columns.id])
    url = row.get(columns.url) if columns.url is not None else None
    yield Row(text, row_id, "" if url is None else str(url))


def _no_column(column: str, found: Iterable[str], file: object) -> str:
    return f"{file} has no column {column!r}; it has: {', '.join(sorted(found))}"
