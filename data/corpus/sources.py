"""Corpora as streams of documents.

A `Source` is one entry of a recipe's `prepare.sources`. However many parts it comes in, reading them in order yields
the same documents, with ids that do not depend on where the corpus lies on disk: the train/held-out split hashes them.
"""

import glob
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.corpus import folders, readers
from data.corpus.columns import Columns, find
from data.corpus.folders import TEXT_SUFFIXES, Format, Found, NamedFile
from data.corpus.parts import Part, divide, divide_made, plain
from data.corpus.readers import Document, OnBad, stop
from data.corpus.remote import hub_files
from data.corpus.retrieval import Retrieval, read_retrieval
from s2.settings import Count, Positive, SettingError, Settings

PART_BYTES = 128 << 20
PROBED_ROWS = 1000
LOST = "lone surrogates"  # replaced by "?"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source(Settings):
    """One corpus.

    path: a file, a glob pattern (`books/*.jsonl.gz`, `**` allowed), a folder, `hf://owner/dataset` with a folder or a
        pattern of files behind it if need be, `python-env` (sources and documentation of the running Python's
        standard library and site-packages), or `retrieval` (synthetic documents, see `data.corpus.retrieval`).
    retrieval: what those are like, see `data.corpus.retrieval.Retrieval`.
    format: "auto" decides by `path`. Of a folder's files, at any depth, those of one format are read: parquet, JSON
        lines, or text files as a document each. Where it holds several, `format` has to say which; what is about the
        data (README, LICENSE, dataset_info.json) does not count beside rows. `folder` is `text`.
    name: label of the documents; by default made from `path`.
    text_column, id_column, url_column: columns of parquet, JSON lines and hub rows. Without `id_column` a document's
        id is its file name and its place in the file.
        A column inside another is written with a point (`meta.url`).
    keep: conditions on columns, e.g. {language: en, language_score: {min: 0.65}}, see `data.corpus.columns.Columns`.
    subset, split, revision: of a hub dataset. data_dir: only files below this folder of it.
    suffixes: which files of a folder (default TEXT_SUFFIXES, packed or not) are documents; it implies `format: text`.
    min_chars: shorter documents are skipped (default 1; python-env: 200).
    max_bytes, max_documents: stop after that much (UTF-8 bytes of text).
    on_bad_row: "stop" or "skip" for this source, see `data.prepare.spec.PrepareSpec`.
    """

    path: str
    format: Format = "auto"
    name: str = ""
    text_column: str = "text"
    id_column: str | None = None
    url_column: str | None = None
    keep: Any = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    min_chars: Count | None = None
    max_bytes: Positive | None = None
    max_documents: Positive | None = None
    data_dir: str | None = None
    on_bad_row: Literal["stop", "skip"] | None = None
    retrieval: Retrieval | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path.removeprefix("hf://").strip("/ ") and not self.path.startswith("/"):
            raise SettingError("path", f"expected a file, a folder or a dataset, got {self.path!r}")
        if self.data_dir is not None and not self._is_hub:
            raise SettingError("data_dir", f"{self.data_dir!r} is for hub datasets; of others `path` names the folder")
        if (self.path == "retrieval") != (self.retrieval is not None):
            raise SettingError("retrieval", "settings of a source with `path: retrieval`, and of no other")
        self.columns  # noqa: B018  # checks the conditions

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"path": text}

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.id_column, self.url_column, self.keep)

    @property
    def label(self) -> str:
        """The source name of its documents: `name`, else the dataset's or the last plain path component."""
        if self.name:
            return self.name
        if self._is_hub:
            name, data_dir, pattern = self._place_on_hub()
            if Path(name).is_dir():
                name = Path(name).name
            below = [part for part in (data_dir or pattern or "").split("/") if part and not glob.has_magic(part)]
            return "/".join([name, *below])
        parts = Path(self.path).parts
        if not os.path.exists(os.path.expanduser(self.path)):
            parts = tuple(part for part in parts if not glob.has_magic(part))
        return parts[-1] if parts else "corpus"

    @property
    def _is_hub(self) -> bool:
        return self.format == "hub" or (self.format == "auto" and self.path.startswith("hf://"))

    def resolve(self) -> Found:
        """Look up what lies at `path`.

        Raises FileNotFoundError when nothing lies there, ValueError when a file's format cannot be told or a folder
        holds several.
        """
        if self._is_hub:
            return Found("hub", [], [])
        if self.path == "python-env" or self.retrieval is not None:
            if self.format not in ("auto", self.path):
                raise ValueError(f"source path {self.path!r}: format {self.format!r} does not go with it")
            if self.retrieval is None:
                return Found("text", folders.python_env_files(self.suffixes), [])
            self.retrieval.check()
            return Found("retrieval", [], [])
        root = Path(self.path).expanduser()
        if self.format == "python-env" or (self.format == "folder" and not root.is_dir()):
            what = "'python-env'" if self.format == "python-env" else "a folder"
            raise ValueError(f"source path {self.path!r}: with format {self.format!r} the path is {what}")
        if root.is_dir():
            return folders.of_one_format(
                self.path, folders.folder_files(root), self.format.replace("folder", "text"), self.suffixes
            )
        files = folders.matching_files(self.path)
        if not files:
            raise FileNotFoundError(
                f"source path {self.path!r}: no such file, folder or match"
                " (a Hugging Face dataset is written hf://owner/name)"
            )
        formats = {folders.format_of(path) if self.format == "auto" else self.format for path, _ in files}
        if len(formats) > 1:
            raise ValueError(
                f"source path {self.path!r} matches files of several formats: {', '.join(sorted(formats))}; make them"
                " sources of their own"
            )
        return Found(formats.pop(), files, [])

    def parts(self, part_bytes: int = PART_BYTES, before: Mapping[str, int] = {}) -> tuple[list[Part], str | None]:
        """The source in parts (arguments as of `data.corpus.parts.divide`), and the revision of a hub dataset.

        Raises FileNotFoundError and ValueError as `resolve`, ValueError for a hub dataset in another format than
        parquet and JSON lines, `data.corpus.remote.SourceError` where the hub does not answer.
        """
        kind, files, left_out = self.resolve()
        revision = None
        if self.retrieval is not None:
            return divide_made(self.retrieval.documents, self.retrieval.mean_chars, part_bytes), None
        if kind == "hub":
            kind, files, revision = self._on_hub()
        if left_out:
            read = f"reading {len(files):,} {kind} file{'s' if len(files) > 1 else ''}"
            print(f"source {self.label}: {read}, leaving out {folders.listed(left_out)}", file=sys.stderr)
        return divide(kind, files, part_bytes, before), revision

    def probe(self, parts: list[Part]) -> None:
        """Find out early what would stop the reading: a format or a text column that is wrong, or a column that none
        of the first `PROBED_ROWS` rows (of parquet: none of as many files) has. Rows may lack what others have.

        Raises as `read`, ValueError naming the column.
        """
        missing = dict.fromkeys(self.columns.names)
        there: dict[str, None] = {}
        if parts and parts[0].format not in ("text", "retrieval"):
            file = parts[0].files[0].path
            for names, found in itertools.islice(self._first_rows(parts), PROBED_ROWS):
                there |= dict.fromkeys(names)
                missing = {column: None for column in missing if column not in found}
                if not missing:
                    break
            if missing and there:
                rows = f" in its first {PROBED_ROWS:,} rows" if parts[0].format == "jsonl" else ""
                raise ValueError(
                    f"source path {self.path!r}: {file} has {readers.no_column(next(iter(missing)), there)}{rows}"
                )
        for part in parts[:1]:
            next(self.read(part, on_bad=lambda error: None), None)

    def _first_rows(self, parts: list[Part]) -> Iterator[tuple[Iterable[str], list[str]]]:
        """Names of the columns, and which of those asked for are there, row by row (of parquet: file by file)."""
        names = self.columns.names
        for part in parts:
            for path, *_ in part.files:
                if part.format == "jsonl":
                    for _, _, row in readers.json_rows(path, part.span, on_bad=lambda error: None):
                        yield row, [name for name in names if find(row, name)[0]]
                else:
                    with readers.open_parquet(path) as table:
                        schema = table.schema_arrow
                    yield schema.names, [name for name in names if readers.parquet_type(schema, name) is not None]

    def read(self, part: Part, skipped: Counter[str] | None = None, on_bad: OnBad = stop) -> Iterator[Document]:
        """Yield the documents of one part.

        skipped: counts, by reason, the rows that were left out, and under `LOST` the characters.
        on_bad: is told of each row that is not as it has to be (`data.corpus.columns.BadRowError`), and may raise; by
            default it does.

        Raises ValueError naming file and place for a bad row or a broken file, `data.corpus.remote.SourceError` for a
        remote file that cannot be read any more.
        """
        skipped = Counter() if skipped is None else skipped
        label = self.label
        min_chars = self.min_chars if self.min_chars is not None else (200 if self.path == "python-env" else 1)
        for path, name, *_ in part.files:
            for row in self._rows(part, path, name, skipped, on_bad):
                if len(row.text) < min_chars:
                    skipped["short"] += 1
                    continue
                text = plain(row.text)
                if text != row.text:
                    skipped[LOST] += len(_SURROGATE.findall(row.text))
                yield Document(text, plain(f"{label}/{row.id}"), plain(row.url))

    def documents(self) -> Iterator[Document]:
        """All documents in order, whatever `max_bytes` and `max_documents` say. Raises as `parts`, `probe`, `read`."""
        parts = self.parts()[0]
        self.probe(parts)
        for part in parts:
            yield from self.read(part)

    def _rows(self, part: Part, path: str, name: str, skipped: Counter[str], on_bad: OnBad) -> Iterator[Document]:
        if part.format == "text":
            return readers.read_text(path, name, skipped)
        if self.retrieval is not None and part.span is not None:
            return read_retrieval(self.retrieval, *part.span)
        columns = self.columns
        is_parquet = part.format == "parquet"
        rows = (
            readers.parquet_rows(path, columns, part.span) if is_parquet else readers.json_rows(path, part.span, on_bad)
        )
        return readers.pick(rows, columns, path, name, skipped, on_bad)

    def _on_hub(self) -> tuple[str, list[NamedFile], str | None]:
        """Format, files and revision of a hub dataset."""
        name, data_dir, pattern = self._place_on_hub()
        urls, revision = hub_files(name, self.subset, self.split, self.revision, data_dir=data_dir, pattern=pattern)
        files = [(url, self._name_on_hub(url)) for url in urls]
        kinds = {folders.known_format(url) for url in urls}
        if len(kinds) > 1 or not kinds <= {"parquet", "jsonl"}:
            raise ValueError(
                f"source path {self.path!r}: expected parquet or JSON lines files of one kind in the hub dataset, got"
                f" {folders.listed([name for _, name in files])}; choose by `data_dir` or a pattern, as in"
                " hf://owner/name/data/*.parquet"
            )
        return str(kinds.pop()), files, revision

    def _place_on_hub(self) -> tuple[str, str | None, str | None]:
        """Dataset (or local folder), folder in it and pattern of files in it that `path` and `data_dir` say."""
        name = self.path.removeprefix("hf://")
        if Path(name).expanduser().is_dir():
            return name, self.data_dir, None
        parts = name.removeprefix("datasets/").strip("/").split("/")
        name, below = "/".join(parts[:2]), "/".join(parts[2:])
        if below and self.data_dir:
            raise ValueError(f"source path {self.path!r} names a place in the dataset, and so does data_dir; say one")
        if glob.has_magic(below) or folders.known_format(below):
            return name, None, below
        return name, below or self.data_dir, None

    def _name_on_hub(self, url: str) -> str:
        """A file's path inside its dataset: hf://datasets/owner/name@revision/data/x.parquet -> data/x.parquet."""
        if url.startswith("hf://datasets/"):
            return url.split("/", 5)[-1]
        return Path(url).relative_to(Path(self.path.removeprefix("hf://")).absolute()).as_posix()


@dataclass
class Limit:
    """The limits of a source (None: there is none) and what has been taken of it: bytes of text, documents.

    The same for any number of workers. A first document is taken however long it is. reached: nothing more is taken.
    """

    most_bytes: int | None = None
    most_documents: int | None = None
    bytes: int = 0
    documents: int = 0
    reached: bool = False

    @classmethod
    def of(cls, source: Source) -> "Limit":
        return cls(source.max_bytes, source.max_documents)

    @property
    def is_none(self) -> bool:
        return self.most_bytes is None and self.most_documents is None

    def allows(self, size: int, documents: int = 1) -> bool:
        """Whether so much more stays within the limit."""
        count = self.documents + documents
        return (self.most_documents is None or count <= self.most_documents) and (
            self.most_bytes is None or self.bytes + size <= self.most_bytes or count <= 1
        )

    def add(self, size: int, documents: int = 1) -> None:
        self.bytes += size
        self.documents += documents
        full = self.most_bytes is not None and self.bytes >= self.most_bytes
        self.reached |= full or (self.most_documents is not None and self.documents >= self.most_documents)

    def takes(self, size: int) -> bool:
        """Whether the next document, of `size` bytes of text, is still taken; after the first that is not, none is."""
        self.reached = self.reached or not self.allows(size)
        if not self.reached:
            self.add(size)
            return True
        return False

    def within(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that are taken."""
        return itertools.takewhile(lambda document: self.takes(len(document.text.encode())), documents)
