"""Corpora as streams of documents: hub datasets, parquet, JSON lines, text files, folders, this Python
environment.

A `Source` is one entry of a recipe's `prepare.sources`. It comes in parts that are read independently of each other;
whatever the format and however many parts, reading them in order yields the same documents in the same order, with
ids that do not depend on where the corpus lies on disk: the train/held-out split hashes them.
"""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.readers import (
    Columns,
    Row,
    RowError,
    folder_files,
    open_parquet,
    python_env_files,
    read_jsonl,
    read_parquet,
    read_text,
)
from data.remote import hub_files, remote_size
from data.schema import whole_number

FORMATS = ("hub", "parquet", "jsonl", "text", "folder", "python-env")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
PART_BYTES = 128 << 20
_LOOKUPS = 16
_SUFFIX_FORMAT = {
    ".parquet": "parquet",
    **{f".{stem}{pack}": "jsonl" for stem in ("jsonl", "json", "ndjson") for pack in ("", ".gz", ".zst")},
    **{f"{stem}{pack}": "text" for stem in TEXT_SUFFIXES for pack in ("", ".gz", ".zst")},
}


@dataclass(frozen=True)
class Document:
    """One document: its text, an id that is stable across machines and runs, the name of its source, and its url
    ("" where none is known)."""

    text: str
    id: str
    source: str
    url: str = ""


@dataclass(frozen=True)
class Part:
    """What one worker reads of a source in one go.

    format: parquet, jsonl or text. files: (path or url, name that ids begin with). span: row groups [first, last) of
    the one parquet file or bytes [begin, end) of the one JSON lines file; None for whole files. size: bytes on disk.
    """

    format: str
    files: tuple[tuple[str, str], ...]
    span: tuple[int, int] | None
    size: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Part":
        span = tuple(values["span"]) if values["span"] else None
        files = tuple((path, name) for path, name in values["files"])
        return cls(values["format"], files, span, values["size"])


@dataclass(frozen=True)
class Source:
    """One corpus.

    path: a file, a glob pattern (`books/*.jsonl.gz`, `**` allowed), a folder of text files,
        `hf://owner/dataset`, or `python-env` (sources and documentation of the running Python's standard
        library and site-packages).
    format: one of FORMATS; "auto" decides by `path`.
    name: label of the documents; by default made from `path`.
    text_column, id_column, url_column: columns of parquet, JSON lines and hub rows. Without `id_column` a document's
        id is its file name and its place in the file.
    keep: conditions on columns, e.g. {language: en, language_score: {min: 0.65}}, see `data.readers.Columns`.
    subset, split, revision: of a hub dataset.
    suffixes: which files of a folder (default TEXT_SUFFIXES) are documents.
    min_chars: shorter documents are skipped (default 1; python-env: 200).
    max_bytes, max_documents: stop after that much (UTF-8 bytes of text).
    """

    path: str
    format: str = "auto"
    name: str = ""
    text_column: str = "text"
    id_column: str | None = None
    url_column: str | None = None
    keep: Mapping[str, Any] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    min_chars: int | None = None
    max_bytes: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if self.format not in ("auto", *FORMATS):
            raise ValueError(f"format: unknown {self.format!r}; known: auto, {', '.join(FORMATS)}")
        for key, least in (("min_chars", 0), ("max_bytes", 1), ("max_documents", 1)):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, whole_number(getattr(self, key), key, least))
        if isinstance(self.suffixes, str):
            raise ValueError(f"suffixes: expected a list such as [{self.suffixes}], got {self.suffixes!r}")
        object.__setattr__(self, "suffixes", tuple(self.suffixes))
        self.columns  # noqa: B018  # checks the conditions

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.id_column, self.url_column, self.keep)

    @property
    def label(self) -> str:
        """The source name of its documents: `name`, else the dataset's or the last plain path component."""
        if self.name:
            return self.name
        if self.format == "hub" or self.path.startswith("hf://"):
            name = self.path.removeprefix("hf://")
            return Path(name).name if Path(name).is_dir() else name
        plain = [part for part in Path(self.path).parts if not glob.has_magic(part)]
        return plain[-1] if plain else "corpus"

    def resolve(self) -> tuple[str, list[Path]]:
        """The format to read and, for local formats, the files (or the folder) in sorted order.

        Raises FileNotFoundError when nothing lies at `path`, ValueError when a file's format cannot be told.
        """
        if self.format == "hub" or (self.format == "auto" and self.path.startswith("hf://")):
            return "hub", []
        if self.path == "python-env":
            return "python-env", []
        root = Path(self.path).expanduser()
        if root.is_dir():
            return "folder", [root]
        files = [root] if root.is_file() else sorted(map(Path, glob.glob(str(root), recursive=True)))
        files = [file for file in files if file.is_file()]
        if not files:
            raise FileNotFoundError(
                f"source path {self.path!r}: no such file, folder or match"
                " (a Hugging Face dataset is written hf://owner/name)"
            )
        formats = {_format_of(str(file)) if self.format == "auto" else self.format for file in files}
        if len(formats) > 1:
            raise ValueError(f"source path {self.path!r} matches files of several formats: {sorted(formats)}")
        return formats.pop(), files

    def parts(self, part_bytes: int = PART_BYTES) -> tuple[list[Part], str | None]:
        """The source in parts of about `part_bytes` on disk, in reading order, and the revision of a hub dataset.

        Small files share a part; parquet is split between row groups and plain JSON lines between lines; a larger
        compressed file is one part.
        Raises FileNotFoundError and ValueError as `resolve`, ValueError for a hub dataset in another format than
        parquet and JSON lines, `data.remote.SourceError` where the hub does not answer.
        """
        kind, paths = self.resolve()
        revision = None
        if kind == "hub":
            found = hub_files(self.path.removeprefix("hf://"), self.subset, self.split, self.revision)
            revision = found.revision
            files = [(url, self._name_on_hub(url)) for url in found.files]
            kinds = {_format_of(url) for url in found.files}
            if len(kinds) > 1 or not kinds <= {"parquet", "jsonl"}:
                raise ValueError(f"source path {self.path!r}: a hub dataset of parquet or jsonl files is expected")
            kind = kinds.pop()
        elif kind == "python-env":
            files, kind = python_env_files(self.suffixes), "text"
        elif kind == "folder":
            files, kind = folder_files(paths[0], self.suffixes), "text"
        else:
            files = [(str(path), self._name(path)) for path in paths]
        parts: list[Part] = []
        group: list[tuple[str, str]] = []
        group_size = 0
        if any("://" in path for path, _ in files):
            with ThreadPoolExecutor(_LOOKUPS) as pool:  # a hub answers many questions at once
                looked_up = list(pool.map(lambda file: self._size_and_spans(kind, file[0], part_bytes), files))
        else:
            looked_up = [self._size_and_spans(kind, path, part_bytes) for path, _ in files]
        for (path, name), (size, spans) in zip(files, looked_up, strict=True):
            if group and (len(spans) > 1 or group_size + size > part_bytes):
                parts.append(Part(kind, tuple(group), None, group_size))
                group, group_size = [], 0
            if len(spans) > 1:
                parts += [Part(kind, ((path, name),), span, size // len(spans)) for span in spans]
            else:
                group.append((path, name))
                group_size += size
        if group:
            parts.append(Part(kind, tuple(group), None, group_size))
        return parts, revision

    def _size_and_spans(self, kind: str, path: str, part_bytes: int) -> tuple[int, list[tuple[int, int]]]:
        """Bytes of a file, and the spans it is read in where it is more than one part."""
        size = remote_size(path) if "://" in path else os.stat(path).st_size
        pieces = -(-size // part_bytes)
        if pieces < 2 or kind == "text" or path.endswith((".gz", ".zst")):
            return size, []
        units = size
        if kind == "parquet":
            try:
                with open_parquet(path) as table:
                    units = table.num_row_groups
            except RowError as error:
                raise ValueError(f"source path {self.path!r}: {error}") from error
        pieces = min(pieces, units)
        return size, list(itertools.pairwise(units * i // pieces for i in range(pieces + 1))) if pieces else []

    def read(self, part: Part, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield the documents of one part; `skipped` counts, by reason, what was left out.

        Raises ValueError naming file and place for a missing column or a broken file, `data.remote.SourceError` for a
        remote file that cannot be read any more.
        """
        skipped = Counter() if skipped is None else skipped
        label = self.label
        min_chars = self.min_chars if self.min_chars is not None else (200 if self.path == "python-env" else 1)
        try:
            for path, name in part.files:
                for row in self._rows(part, path, name, skipped):
                    if len(row.text) < min_chars:
                        skipped["short"] += 1
                        continue
                    yield Document(_valid(row.text), _valid(f"{label}/{row.id}"), label, _valid(row.url))
        except RowError as error:
            raise ValueError(f"source path {self.path!r}: {error}") from error

    def documents(self) -> Iterator[Document]:
        """All documents in order, whatever `max_bytes` and `max_documents` say. Raises as `parts` and `read`."""
        for part in self.parts()[0]:
            yield from self.read(part)

    def _rows(self, part: Part, path: str, name: str, skipped: Counter[str]) -> Iterator[Row]:
        if part.format == "text":
            return read_text(path, name, skipped)
        read = read_parquet if part.format == "parquet" else read_jsonl
        return read(path, name, self.columns, skipped, part.span)

    def _name_on_hub(self, url: str) -> str:
        """A file's path inside its dataset: hf://datasets/owner/name@revision/data/x.parquet -> data/x.parquet."""
        if url.startswith("hf://datasets/"):
            return url.split("/", 5)[-1]
        return Path(url).relative_to(Path(self.path.removeprefix("hf://")).absolute()).as_posix()

    def _name(self, file: Path) -> str:
        """A file's path below the part of `path` without wildcards: files of one name in many folders stay apart."""
        pattern = Path(self.path).expanduser()
        fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
        root = pattern.parent if len(fixed) == len(pattern.parts) else Path(*fixed)
        return file.relative_to(root).as_posix()


def _valid(text: str) -> str:
    """Lone surrogates of broken JSON escapes become "?"; everything else comes back as it was."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _format_of(file: str) -> str:
    for suffix, kind in _SUFFIX_FORMAT.items():
        if file.endswith(suffix):
            return kind
    raise ValueError(
        f"{file}: cannot tell the format from the name; set `format` to one of {', '.join(FORMATS)}"
        f" or use one of the suffixes {', '.join(_SUFFIX_FORMAT)}"
    )
