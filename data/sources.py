"""Corpora as streams of documents: hub datasets, parquet, JSON lines, text files, folders, this Python
environment.

A `Source` is one entry of a recipe's `prepare.sources`. Whatever the format, reading it yields the same
documents in
the same order, with ids that do not depend on where the corpus lies on disk: the train/held-out split hashes
    them.
"""

import glob
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.readers import RowError, read_folder, read_hub, read_jsonl, read_parquet, read_python_env, read_text
from data.schema import whole_number

FORMATS = ("hub", "parquet", "jsonl", "text", "folder", "python-env")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_SUFFIX_FORMAT = {
    ".parquet": "parquet",
    **{f".{stem}{pack}": "jsonl" for stem in ("jsonl", "json", "ndjson") for pack in ("", ".gz", ".zst")},
    **{f"{stem}{pack}": "text" for stem in TEXT_SUFFIXES for pack in ("", ".gz", ".zst")},
}


@dataclass(frozen=True)
class Document:
    """One document: its text, an id that is stable across machines and runs, and the name of its source."""

    text: str
    id: str
    source: str


@dataclass(frozen=True)
class Source:
    """One corpus.

    path: a file, a glob pattern (`books/*.jsonl.gz`, `**` allowed), a folder of text files,
        `hf://owner/dataset`, or `python-env` (sources and documentation of the running Python's standard
        library and site-packages).
    format: one of FORMATS; "auto" decides by `path`.
    name: label of the documents; by default made from `path`.
    text_column, id_column: columns of parquet, JSON lines and hub rows. Without `id_column` a document's id
        is its file name and row number.
    subset, split, revision: of a hub dataset.
    suffixes: which files of a folder (default TEXT_SUFFIXES) are documents.
    min_chars: shorter documents are skipped (python-env: 200).
    deduplicate: skip a document whose text was already seen in this source (python-env: true).
    max_bytes, max_documents: stop after that much (UTF-8 bytes of text).
    """

    path: str
    format: str = "auto"
    name: str = ""
    text_column: str = "text"
    id_column: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    min_chars: int | None = None
    deduplicate: bool | None = None
    max_bytes: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if self.format not in ("auto", *FORMATS):
            raise ValueError(f"format: unknown {self.format!r}; known: auto, {', '.join(FORMATS)}")
        for key in ("min_chars", "max_bytes", "max_documents"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, whole_number(getattr(self, key), key))
        object.__setattr__(self, "suffixes", tuple(self.suffixes))

    @property
    def label(self) -> str:
        """The source name of its documents: `name`, else the dataset's or the last plain path component."""
        if self.name:
            return self.name
        if self.format == "hub" or self.path.startswith("hf://"):
            return self.path.removeprefix("hf://")
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
        formats = {_format_of(file) if self.format == "auto" else self.format for file in files}
        if len(formats) > 1:
            raise ValueError(f"source path {self.path!r} matches files of several formats: {sorted(formats)}")
        return formats.pop(), files

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield this corpus's documents; `skipped` counts, by reason, what was left out.

        Raises FileNotFoundError (nothing at `path`) and ValueError (no such column, a broken row, an empty
        corpus).
        """
        skipped = Counter() if skipped is None else skipped
        python_env = self.resolve()[0] == "python-env"
        min_chars = self.min_chars if self.min_chars is not None else (200 if python_env else 1)
        deduplicate = self.deduplicate if self.deduplicate is not None else python_env
        seen: set[bytes] = set()
        count = size = 0
        for text, row_id in self._rows(skipped):
            if len(text) < min_chars:
                skipped["short"] += 1
                continue
            encoded = text.encode(errors="replace")  # lone surrogates of broken JSON escapes become "?"
            if deduplicate:
                digest = hashlib.blake2b(encoded, digest_size=16).digest()
                if digest in seen:
                    skipped["duplicate"] += 1
                    continue
                seen.add(digest)
            if self.max_bytes is not None and size + len(encoded) > self.max_bytes and count:
                return
            if self.max_documents is not None and count >= self.max_documents:
                return
            count += 1
            size += len(encoded)
            yield Document(encoded.decode(), f"{self.label}/{row_id}", self.label)
        if not count:
            reasons = ", ".join(f"{n} {why}" for why, n in skipped.items()) or "it has no rows"
            raise ValueError(f"source {self.path!r}: no documents ({reasons})")

    def _rows(self, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
        kind, files = self.resolve()
        if kind == "hub":
            path = self.path.removeprefix("hf://")
            yield from read_hub(path, self.subset, self.split, self.revision, self.text_column, self.id_column, skipped)
        elif kind == "python-env":
            yield from read_python_env(self.suffixes, skipped)
        elif kind == "folder":
            yield from read_folder(files[0], self.suffixes, skipped)
        elif kind == "text":
            for file in files:
                yield from read_text(file, self._name(file), skipped)
        else:
            read = read_parquet if kind == "parquet" else read_jsonl
            for file in files:
                try:
                    yield from read(file, self._name(file), self.text_column, self.id_column, skipped)
                except RowError as error:
                    raise ValueError(f"source {self.path!r}: {error}") from error

    def _name(self, file: Path) -> str:
        """A file's path below the part of `path` without wildcards: files of one name in many folders stay apart."""
        pattern = Path(self.path).expanduser()
        fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
        root = pattern.parent if len(fixed) == len(pattern.parts) else Path(*fixed)
        return file.relative_to(root).as_posix()


def _format_of(file: Path) -> str:
    for suffix, kind in _SUFFIX_FORMAT.items():
        if file.name.endswith(suffix):
            return kind
    raise ValueError(
        f"{file}: cannot tell the format from the name; set `format` to one of {', '.join(FORMATS)}"
        f" or use one of the suffixes {', '.join(_SUFFIX_FORMAT)}"
    )
