"""One reader for each corpus format. Each yields `(text, row id)` in a fixed order; `sources.py` does the
rest.

JSON lines are read line by line rather than through the `datasets` builder: that one fixes the column types
on its first chunk and then rejects files whose rows do not all have the same fields, and it cannot say which
line is broken. Parquet goes through pyarrow so that only the columns in use are read.
"""

import gzip
import hashlib
import io
import json
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

Rows = Iterator[tuple[str, str]]


class RowError(Exception):
    """A file that cannot be read as what it claims to be; the message names the file and the place in it."""


def open_binary(file: Path) -> IO[bytes]:
    """Open a plain, .gz or .zst file for reading bytes."""
    if file.suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if file.suffix == ".zst":
        import zstandard

        # Tools that compress in parallel write several frames; without the flag everything after the first is
        # lost.
        reader = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)
    return file.open("rb")


def read_jsonl(file: Path, name: str, text_column: str, id_column: str | None, skipped: Counter[str]) -> Rows:
    """Rows of a JSON lines file; blank lines are passed over. Ids are `name` and the row where no column gives them."""
    line_number = 0
    try:
        with open_binary(file) as stream:
            for line_number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise RowError(f"{file}, line {line_number}: expected a JSON object, got {line[:60]!r}")
                yield from _columns(row, text_column, id_column, f"{name}:{line_number - 1}", file, skipped)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise RowError(f"{file}, line {line_number}: not valid JSON ({error})") from error
    except (EOFError, OSError) as error:
        raise RowError(f"{file}: broken after line {line_number} ({error})") from error


def read_parquet(file: Path, name: str, text_column: str, id_column: str | None, skipped: Counter[str]) -> Rows:
    """Rows of a parquet file, reading only the text and id columns. Ids as in `read_jsonl`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [text_column] + ([id_column] if id_column else [])
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise RowError(f"{file}: not a parquet file ({error})") from error
    with table:
        for column in wanted:
            if column not in table.schema_arrow.names:
                raise RowError(_no_column(column, table.schema_arrow.names, file))
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                yield from _columns(row, text_column, id_column, f"{name}:{number}", file, skipped)
                number += 1


def read_hub(
    name: str,
    subset: str | None,
    split: str,
    revision: str | None,
    text_column: str,
    id_column: str | None,
    skipped: Counter[str],
) -> Rows:
    """Rows of a Hugging Face dataset, streamed: nothing is downloaded beyond what is read."""
    import datasets

    stream = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
    try:
        for number, row in enumerate(stream):
            yield from _columns(row, text_column, id_column, f"{split}:{number}", f"hf://{name}", skipped)
    except RowError as error:
        raise ValueError(str(error)) from error


def read_text(file: Path, row_id: str, skipped: Counter[str]) -> Rows:
    """A whole file as one document; binary and non-UTF-8 files are skipped and counted."""
    with open_binary(file) as stream:
        content = stream.read()
    if b"\0" in content:
        skipped["binary"] += 1
        return
    try:
        yield content.decode("utf-8-sig").replace("\r\n", "\n"), row_id
    except UnicodeDecodeError:
        skipped["undecodable"] += 1


def read_folder(root: Path, suffixes: Iterable[str], skipped: Counter[str]) -> Rows:
    """Every file below `root` with one of `suffixes`, in sorted order; the id is the path below `root`."""
    for file in _walk(root, tuple(suffixes)):
        yield from read_text(file, file.relative_to(root).as_posix(), skipped)


def read_python_env(suffixes: Iterable[str], skipped: Counter[str]) -> Rows:
    """Sources and documentation of the standard library and of the installed packages.

    The order is by hash of the file's path, so that a size limit takes a fair sample of all packages and not
    the first ones of the alphabet.
    """
    paths = sysconfig.get_paths()
    stdlib, site = Path(paths["stdlib"]), Path(paths["purelib"])
    files = [(f"stdlib/{file.relative_to(stdlib).as_posix()}", file) for file in _walk(stdlib, tuple(suffixes))]
    files = [(name, file) for name, file in files if not file.is_relative_to(site) and "site-packages" not in name]
    files += [(f"site-packages/{f.relative_to(site).as_posix()}", f) for f in _walk(site, tuple(suffixes))]
    for name, file in sorted(files, key=lambda item: hashlib.blake2b(item[0].encode()).digest()):
        yield from read_text(file, name, skipped)


def _walk(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = (file for file in root.rglob("*") if file.name.endswith(suffixes))
    return sorted(file for file in files if "__pycache__" not in file.parts and file.is_file())


def _columns(
    row: dict[str, Any],
    text_column: str,
    id_column: str | None,
    row_id: str,
    file: object,
    skipped: Counter[str],
) -> Rows:
    if text_column not in row:
        raise RowError(_no_column(text_column, row, file))
    text = row[text_column]
    if text is None:
        skipped["null"] += 1
        return
    if not isinstance(text, str):
        raise RowError(f"{file}, row {row_id}: column {text_column!r} holds {type(text).__name__}, expected text")
    if id_column is not None:
        if id_column not in row:
            raise RowError(_no_column(id_column, row, file))
        row_id = str(row[id_column])
    yield text, row_id


def _no_column(column: str, found: Iterable[str], file: object) -> str:
    return f"{file} has no column {column!r}; it has: {', '.join(sorted(found))}"
