"""One reader for each corpus format, in a fixed order; `pick` makes documents of their rows.

JSON lines are not read through the `datasets` builder, which fixes the column types on its first chunk, rejects files
whose rows do not all have the same fields, and cannot say which line is broken. Files may be remote.
"""

import bz2
import gzip
import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.columns import BadRowError, Columns, WrongValueError, find
from data.corpus.remote import SourceError, open_remote

PACKS = (".gz", ".zst", ".bz2", ".xz")
_PARQUET_BYTES = 16 << 20
_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, OSError)


class Document(NamedTuple):
    """A text, an id that is stable across machines and runs, and a url ("" where none is known)."""

    text: str
    id: str
    url: str = ""


OnBad = Callable[[BadRowError], None]
RawRows = Iterator[tuple[str, int, Mapping[str, Any]]]  # place, number, columns


def stop(error: BadRowError) -> None:
    """What a reader does about a bad row unless it is told otherwise."""
    raise error


@contextmanager
def open_binary(file: str | Path) -> Iterator[Any]:
    """A plain, .gz, .zst, .bz2 or .xz file, local or remote, open for reading bytes; memory does not grow with what a
    few packed bytes become.

    Reads of a damaged or truncated file raise one of `_BROKEN`; an OSError that says so has no errno.
    """
    is_remote = "://" in str(file)
    with io.BufferedReader(open_remote(str(file)), _BUFFER) if is_remote else Path(file).open("rb") as raw:
        unpack = next((unpack for suffix, unpack in _UNPACK.items() if str(file).endswith(suffix)), None)
        yield raw if unpack is None else io.BufferedReader(unpack(raw), _BUFFER)


def _unpack_zstd(raw: Any) -> Any:
    import pyarrow as pa

    # Unlike the zstandard package it tells a truncated file from a whole one, and is fast where there are many frames,
    # as tools that compress in parallel write them.
    return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")


_UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": _unpack_zstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


def json_rows(file: str | Path, span: tuple[int, int] | None = None, on_bad: OnBad = stop) -> RawRows:
    """Place (`line 7`), byte at which it begins in the uncompressed file and object of each line of a JSON lines file;
    blank lines are passed over.

    span: only lines that begin in these bytes [begin, end); plain files only.
    on_bad: is told of each line that is no row; reading goes on behind it unless that raises.
    """
    begin, end = span or (0, None)
    number, offset = 0, begin
    word = "line" if not begin else f"byte {begin} on, line"
    try:
        with open_binary(file) as stream:
            if begin:
                stream.seek(begin - 1)
                offset += len(stream.readline()) - 1  # the rest of a line that belongs to the span before
            else:
                _refuse_other_json(file, stream)
            for number, line in enumerate(stream, start=1):
                if end is not None and offset >= end:
                    return
                here, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                try:
                    yield f"{word} {number}", here, _object(line)
                except WrongValueError as error:
                    on_bad(BadRowError(file, f"{word} {number}", str(error)))
    except _BROKEN as error:
        if _is_foreign(error):
            raise
        raise ValueError(f"{file}: broken after line {number} ({error})") from error


def _refuse_other_json(file: str | Path, stream: Any) -> None:
    """Raise ValueError for JSON that is not by lines, before a line of many gigabytes is read."""
    head = stream.peek(_BUFFER).removeprefix(_BOM).lstrip()
    if head.startswith(b"[") or head.split(b"\n", 1)[0].rstrip() == b"{":
        found = "an array" if head.startswith(b"[") else "an object of several lines"
        convert = "jq -c '.[]'" if head.startswith(b"[") else "jq -c ."
        raise ValueError(
            f"{file}, line 1: expected a JSON object on each line, and this begins {found};"
            f" `{convert} FILE > FILE.jsonl` makes JSON lines of it"
        )


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line.removeprefix(_BOM).decode(errors="surrogatepass"))
    except UnicodeDecodeError as error:
        raise WrongValueError(f"not valid UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        raise WrongValueError(f"not valid JSON ({error})") from None
    except RecursionError:
        raise WrongValueError("not valid JSON (nested too deeply)") from None
    except ValueError:  # the interpreter's limit, against numbers that take for ever
        raise WrongValueError(f"a number of more than {sys.get_int_max_str_digits():,} digits") from None
    if not isinstance(row, dict):
        raise WrongValueError(f"expected a JSON object, got {line[:60]!r}")
    return row


def parquet_rows(file: str | Path, columns: Columns, span: tuple[int, int] | None = None) -> RawRows:
    """Place (`row 7`), number and the columns in use of each row of a parquet file.

    span: only these row groups [first, last).
    """
    import pyarrow as pa

    with open_parquet(file) as table:
        kinds = {column: parquet_type(table.schema_arrow, column) for column in columns.names}
        if (kind := kinds[columns.text]) is None:
            raise ValueError(f"{file} has {no_column(columns.text, table.schema_arrow.names)}")
        if not _holds_text(kind):
            raise ValueError(f"{file}: column {columns.text!r} is of type {kind}, expected text")
        found = [column for column, kind in kinds.items() if kind is not None]
        first, last = span or (0, table.num_row_groups)
        number = sum(table.metadata.row_group(i).num_rows for i in range(first))
        try:
            for batch in table.iter_batches(_rows_at_once(table), range(first, last), found):
                for row in batch.to_pylist():
                    yield f"row {number}", number, row
                    number += 1
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and _is_foreign(error):
                raise
            raise ValueError(f"{file}: broken after row {number} ({error})") from error


def parquet_type(schema: Any, column: str) -> Any:
    """The Arrow type of a column, which may lie inside others (`meta.url`); None where there is none."""
    import pyarrow as pa

    if column in schema.names:
        return schema.field(column).type
    fields = schema
    for name in column.split("."):
        names = [field.name for field in fields]
        if name not in names:
            return None
        kind = fields.field(name).type
        fields = kind if pa.types.is_struct(kind) else ()
    return kind


def _holds_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_foreign(error: BaseException) -> bool:
    """Whether an OSError is about the disk or the network; what libraries say of a file's content has no number."""
    return isinstance(error, SourceError) or getattr(error, "errno", None) is not None


def _rows_at_once(table: Any) -> int:
    """Rows that are about `_PARQUET_BYTES` of the file: books need smaller batches than web pages."""
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    size = sum(group.total_byte_size for group in groups) / max(1, sum(group.num_rows for group in groups))
    return int(min(1024, max(1, _PARQUET_BYTES / max(1, size))))


def open_parquet(file: str | Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, local or remote. Raises ValueError for what is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = open_remote(str(file)) if "://" in str(file) else file
    try:
        return pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a parquet file, or a truncated one ({error})") from error


def read_text(file: str | Path, row_id: str, skipped: Counter[str]) -> Iterator[Document]:
    """A whole file as one document; binary and non-UTF-8 files are skipped and counted."""
    try:
        with open_binary(file) as stream:
            content = stream.read()
    except _BROKEN as error:
        if _is_foreign(error):
            raise
        raise ValueError(f"{file}: broken ({error})") from error
    if b"\0" in content:
        skipped["binary"] += 1
        return
    try:
        yield Document(content.decode("utf-8-sig").replace("\r\n", "\n"), row_id)
    except UnicodeDecodeError:
        skipped["undecodable"] += 1


def pick(
    rows: RawRows, columns: Columns, file: str, name: str, skipped: Counter[str], on_bad: OnBad = stop
) -> Iterator[Document]:
    """The rows that are kept, with their text, id and url. Where no column gives ids they are `name` and the number.

    skipped: counts the others by reason. on_bad: as of `json_rows`.
    """
    for place, number, row in rows:
        try:
            has_text, text = find(row, columns.text)
            if has_text is False:
                raise WrongValueError(no_column(columns.text, row))
            rejecting = columns.rejects(row)
            if rejecting is None and not isinstance(text, str | None):
                raise WrongValueError(f"column {columns.text!r} holds {type(text).__name__}, expected text")
        except WrongValueError as error:
            on_bad(BadRowError(file, place, str(error)))
            continue
        if rejecting is not None or text is None:
            skipped["null" if rejecting is None else f"{rejecting} not kept"] += 1
            continue
        given_id = find(row, columns.id)[1] if columns.id is not None else None
        url = find(row, columns.url)[1] if columns.url is not None else None
        yield Document(text, f"{name}:{number}" if given_id is None else str(given_id), "" if url is None else str(url))


def no_column(column: str, found: Iterable[str]) -> str:
    """What is said where a column is missing."""
    return f"no column {column!r}; it has: {', '.join(sorted(found))}"
