"""Token shards: the on-disk form of a tokenized corpus.

A shard folder holds, for each shard, `<name>.bin` (the tokens of its documents one after another, uint16 or
uint32), `<name>.npy` (int64 [2, documents + 1]: row 0 where each document's tokens begin in the .bin, row 1 where
its UTF-8 bytes would begin) and `<name>.parquet` (the id and url of each document); `counts.npy` (int64
[sources, 2, vocab_size], see `TokenShards.counts`), `files.parquet` (which files the documents were read from, see
`TokenShards.source_files`) and `manifest.json`, which is written last: a folder without it is unfinished, whatever else
lies in it. A shard's documents come from one source. The folder is marked (`s2.files`); what else somebody puts there
stays.
"""

import hashlib
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from s2 import ending, files

KIND = "token shards"
MANIFEST = "manifest.json"
COUNTS = "counts.npy"
FILES = "files.parquet"
FORMAT = "s2-token-shards/2"
_ENDS = (".bin", ".npy", ".parquet")
# A page fault maps the pages around it too, in aligned runs of this size (Linux, fault_around_bytes).
_MAPPED_AT_ONCE = max(1 << 16, mmap.PAGESIZE)


class DamagedShardsError(ValueError):
    """A shard folder is not what was written."""

    exit_code = ending.DAMAGED


class ShardWriter:
    """Writes documents of one source into shards `<prefix>-000`, `<prefix>-001`, ... of a folder.

        with ShardWriter(...) as writer:
            writer.add(...)
        writer.shards  # what the manifest says about them

    A file takes its final name only when it is whole and on disk. Without their records the shards count for nothing,
    and another writer of the same prefix replaces them; where the block ends with an error they are removed.

    counts: int64 [2, vocab_size], see `TokenShards.counts`.

    Raises `s2.files.NotOursError` for a folder that holds something else.
    """

    def __init__(self, folder: Path, prefix: str, source: str, dtype: np.dtype, vocab_size: int, shard_tokens: int):
        self.folder, self.prefix, self.source = files.make_folder(folder, KIND), prefix, source
        self.dtype, self.shard_tokens = np.dtype(dtype), shard_tokens
        self.counts = np.zeros((2, vocab_size), dtype=np.int64)
        self.shards: list[dict[str, Any]] = []
        self._file: Any = None  # of the shard that is open, as `files.whole` makes it
        self._stream: Any = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if self._stream is not None:
                self._close_shard()
            return
        if self._stream is not None:
            self._stream = None
            self._file.__exit__(kind, error, trace)
        remove_shards(self.folder, self.prefix)

    def add(
        self, documents: Sequence[np.ndarray], sizes: Sequence[int], ids: Sequence[str], urls: Sequence[str]
    ) -> None:
        """Append documents (1-D arrays of at least one token) with the UTF-8 size of their text, their ids and their
        urls (empty where there is none)."""
        if not documents:
            return
        row = np.concatenate(documents)
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        ends = np.cumsum(lengths)
        vocab_size = self.counts.shape[1]
        self.counts[0] += np.bincount(row, minlength=vocab_size)
        self.counts[1] += np.bincount(row[ends - lengths], minlength=vocab_size)
        data = row.astype(self.dtype, copy=False)
        first = written = 0
        while first < len(documents):
            if self._stream is None:
                self._open()
            # The document that reaches `shard_tokens` is the last of its shard.
            last = int(np.searchsorted(ends, written + self.shard_tokens - self._tokens)) + 1
            last = min(last, len(documents))
            piece = data[written : ends[last - 1]].data
            self._stream.write(piece)
            self._sha256.update(piece)
            self._tokens += len(piece)
            self._lengths.append(lengths[first:last])
            self._sizes.extend(sizes[first:last])
            self._ids.extend(ids[first:last])
            self._urls.extend(urls[first:last])
            first, written = last, int(ends[last - 1])
            if self._tokens >= self.shard_tokens:
                self._close_shard()

    def _open(self) -> None:
        self._name = f"{self.prefix}-{len(self.shards):03d}"
        self._file = files.whole(self.folder / f"{self._name}.bin")
        self._stream = self._file.__enter__()
        self._sha256 = hashlib.sha256()
        self._tokens = 0
        self._lengths: list[np.ndarray] = []
        self._sizes: list[int] = []
        self._ids: list[str] = []
        self._urls: list[str] = []

    def _close_shard(self) -> None:
        self._stream = None
        self._file.__exit__(None, None, None)
        lengths = np.concatenate(self._lengths)
        offsets = np.zeros((2, len(lengths) + 1), dtype=np.int64)
        np.cumsum(lengths, out=offsets[0, 1:])
        np.cumsum(self._sizes, out=offsets[1, 1:])
        write_array(self.folder / f"{self._name}.npy", offsets)
        origins = {"id": self._ids, "url": self._urls}
        _write_table(self.folder / f"{self._name}.parquet", origins, {"id": "string", "url": "string"})
        self.shards.append(
            {
                "name": self._name,
                "source": self.source,
                "documents": len(lengths),
                "tokens": int(offsets[0, -1]),
                "bytes": int(offsets[1, -1]),
                "sha256": self._sha256.hexdigest(),
                "offsets_sha256": _sha256(self.folder / f"{self._name}.npy"),
                "origins_sha256": _sha256(self.folder / f"{self._name}.parquet"),
            }
        )


def remove_shards(folder: Path, prefix: str) -> None:
    """Remove the shards of a writer, finished or not."""
    files.remove_files(folder, *(f"{prefix}-*{end}" for end in _ENDS), f".{prefix}-*.s2-tmp")


def remove_unlisted(folder: Path, shards: Iterable[str] = ()) -> None:
    """Remove all shards of preparation but those named, and what interrupted runs have left in the folder."""
    if not folder.is_dir():
        return
    keep = set(shards)
    written = re.compile(r"(shard-\d{3}-\d{5,}-\d{3,})\.(bin|npy|parquet)")
    found = (written.fullmatch(name) for name in os.listdir(folder))
    files.remove_files(folder, *(match[0] for match in found if match and match[1] not in keep), ".*.s2-tmp")


def write_manifest(
    folder: Path,
    dtype: np.dtype,
    shards: Sequence[Mapping[str, Any]],
    counts: Mapping[str, np.ndarray],
    read: Sequence[Mapping[str, Any]] = (),
    **fields: Any,
) -> None:
    """Finish a shard folder: token counts by source, the files that were read, then the manifest with totals, `fields`
    and the shards' records.

    counts: for each source int64 [2, vocab_size], see `TokenShards.counts`. read: see `TokenShards.source_files`.
    Files of shards that are not listed are removed.
    """
    remove_unlisted(folder, (shard["name"] for shard in shards))
    write_array(folder / COUNTS, np.stack(list(counts.values())))
    _write_table(folder / FILES, {key: [file[key] for file in read] for key in _FILE_KEYS}, _FILE_KEYS)
    manifest = {
        "format": FORMAT,
        "dtype": np.dtype(dtype).name,
        **{key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")},
        **fields,
        "counts": {"sources": list(counts), "sha256": _sha256(folder / COUNTS)},
        "files": {"sha256": _sha256(folder / FILES)},
        "shards": list(shards),
    }
    files.write_json(folder / MANIFEST, manifest)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished shard folder.

    Raises FileNotFoundError for a missing or unfinished folder, ValueError for a foreign manifest, DamagedShardsError
    for one that cannot be read.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        state = "is unfinished (it has no manifest.json)" if file.parent.is_dir() else "does not exist"
        raise FileNotFoundError(f"shard folder {folder} {state}; prepare it with `python -m data.prepare`")
    try:
        manifest = files.read_json(file)
    except ValueError as error:
        raise DamagedShardsError(f"{error}; delete {folder} and prepare it again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file}: format {found!r}, expected {FORMAT!r}; prepare the corpus into another folder")
    return manifest


class TokenShards:
    """A finished shard folder, memory-mapped and seen as one long row of tokens.

    offsets: int64 [documents + 1], where each document's tokens begin in that row.

    Raises FileNotFoundError / DamagedShardsError where a file is missing or its size is not what the manifest says;
    `verify` also reads everything and compares the checksums.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.dtype = np.dtype(self.manifest["dtype"])
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self._files: list[tuple[Path, int, int]] = []  # path, size and modification time
        for shard in self.manifest["shards"]:
            file = self._file(shard, ".bin", shard["tokens"] * self.dtype.itemsize)
            stat = file.stat()
            self._files.append((file, stat.st_size, stat.st_mtime_ns))
        self._base = np.cumsum([0, *(shard["tokens"] for shard in self.manifest["shards"])], dtype=np.int64)
        self.offsets = self._offsets(0, "tokens")

    @cached_property
    def byte_offsets(self) -> np.ndarray:
        """int64 [documents + 1], where each document's text begins, in UTF-8 bytes of all text before it."""
        return self._offsets(1, "bytes")

    def _offsets(self, row: int, total: str) -> np.ndarray:
        base, pieces = 0, []
        for shard in self.manifest["shards"]:
            file = self._file(shard, ".npy", None)
            try:
                offsets = np.load(file, mmap_mode="r")
            except (ValueError, EOFError) as error:
                raise DamagedShardsError(f"{file}: not readable ({error}); {self._remedy}") from error
            if offsets.shape != (2, shard["documents"] + 1) or offsets[0, -1] != shard["tokens"]:
                raise DamagedShardsError(f"{file}: does not match manifest.json; {self._remedy}")
            pieces.append(offsets[row, :-1] + base)
            base += shard[total]
        return np.concatenate([*pieces, [base]]).astype(np.int64)

    def __reduce__(self) -> Any:  # workers started by spawn reopen the files instead of copying them
        return TokenShards, (self.folder,)

    def _file(self, shard: dict[str, Any], suffix: str, size: int | None) -> Path:
        file = self.folder / (shard["name"] + suffix)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: listed in manifest.json but missing; {self._remedy}")
        if size is not None and (found := file.stat().st_size) != size:
            raise DamagedShardsError(f"{file}: {found} bytes, manifest.json says {size}; {self._remedy}")
        return file

    @property
    def _remedy(self) -> str:
        return f"delete {self.folder} and prepare it again"

    @cached_property
    def source_files(self) -> list[dict[str, Any]] | None:
        """The files that the documents were read from, in reading order: `source` (its index), `name`, `path`, `size`,
        `mtime_ns` and `xxh3_128`; no remote ones. None for a folder of an earlier version, which does not know.
        """
        import pyarrow.parquet as pq

        if "files" not in self.manifest:
            return None
        return pq.read_table(self._file({"name": "files"}, ".parquet", None)).to_pylist()

    def counts(self, source: str | None = None) -> np.ndarray:
        """int64 [2, vocab_size]: how often each token occurs (row 0) and how often it opens a document (row 1), in one
        source or in all."""
        counts = np.load(self.folder / COUNTS)
        return counts.sum(axis=0) if source is None else counts[self.manifest["counts"]["sources"].index(source)]

    @property
    def identity(self) -> str:
        """SHA-256 over the shards' checksums: equal where the tokens are equal, wherever the folder lies."""
        joined = "".join(shard["sha256"] + shard["offsets_sha256"] for shard in self.manifest["shards"])
        return hashlib.sha256(joined.encode()).hexdigest()

    @property
    def tokenizer_file(self) -> Path:
        return (self.folder / self.manifest["tokenizer"]["file"]).resolve()

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order of their documents."""
        return list(dict.fromkeys(shard["source"] for shard in self.manifest["shards"]))

    def documents_of(self, source: str | None, where: str = "") -> np.ndarray:
        """Indices of a source's documents (all for None), int64. Raises ValueError for a source that is not there."""
        if source is None:
            return np.arange(len(self.offsets) - 1)
        if source not in self.sources:
            raise ValueError(
                f"{where or self.folder}: source: {self.folder} has no source {source!r}; it has: "
                + ", ".join(self.sources)
            )
        counts = [shard["documents"] for shard in self.manifest["shards"]]
        mine = [shard["source"] == source for shard in self.manifest["shards"]]
        return np.flatnonzero(np.repeat(mine, counts))

    def origin(self, document: int) -> tuple[str, str]:
        """Id and url ("" where the source has none) of a document."""
        import pyarrow.parquet as pq

        for shard in self.manifest["shards"]:
            if document < shard["documents"]:
                row = pq.read_table(self._file(shard, ".parquet", None)).slice(document, 1).to_pylist()[0]
                return row["id"], row["url"]
            document -= shard["documents"]
        raise IndexError(f"{self.folder} has {len(self.offsets) - 1} documents")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the row, as int64."""
        tokens = np.empty(stop - start, dtype=np.int64)
        self.read_into(tokens, start)
        return tokens

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Copy tokens [start, start + len(out)) of the row to `out`.

        The pages are given back at once (they stay in the page cache), so that the memory of a process that reads
        a large corpus at random does not grow.
        """
        shard = int(np.searchsorted(self._base, start, side="right")) - 1
        done = 0
        while done < len(out):
            begin = start + done - int(self._base[shard])
            pages, row = _mapped(*self._files[shard], self.dtype)
            size = min(len(out) - done, len(row) - begin)
            out[done : done + size] = row[begin : begin + size]
            first = begin * self.dtype.itemsize // _MAPPED_AT_ONCE * _MAPPED_AT_ONCE
            last = -(-(begin + size) * self.dtype.itemsize // _MAPPED_AT_ONCE) * _MAPPED_AT_ONCE
            pages.madvise(mmap.MADV_DONTNEED, first, min(last, len(pages)) - first)
            done, shard = done + size, shard + 1

    def verify(self) -> None:
        """Compare every file, the tokenizer's too, with its checksum; raises DamagedShardsError naming the first that
        differs, FileNotFoundError for a missing one."""
        checksums = [(self.folder / COUNTS, self.manifest["counts"]["sha256"])]
        if "files" in self.manifest:
            checksums.append((self.folder / FILES, self.manifest["files"]["sha256"]))
        checksums.append((self.tokenizer_file, self.manifest["tokenizer"]["sha256"]))
        kinds = ((".bin", "sha256"), (".npy", "offsets_sha256"), (".parquet", "origins_sha256"))
        for shard in self.manifest["shards"]:
            checksums += [(self.folder / (shard["name"] + suffix), shard[key]) for suffix, key in kinds]
        for file, checksum in checksums:
            if not file.is_file():
                raise FileNotFoundError(f"{file}: missing; {self._remedy}")
            if _sha256(file) != checksum:
                raise DamagedShardsError(f"{file}: checksum differs from manifest.json; {self._remedy}")


@lru_cache(maxsize=256)
def _mapped(file: Path, size: int, modified_ns: int, dtype: np.dtype) -> tuple[mmap.mmap, np.ndarray]:
    """A shard's tokens in memory. Each map holds a file descriptor, so only those in use are kept; size and time tell
    apart what was written anew under the same name."""
    with file.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return pages, np.frombuffer(pages, dtype=dtype)


def write_array(file: Path, array: np.ndarray) -> None:
    """Write a .npy file that exists only when it is whole and on disk."""
    with files.whole(file) as stream:
        np.save(stream, array)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file that exists only when it is whole and on disk."""
    with files.whole(file) as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return dict(arrays)


_FILE_KEYS = {
    "source": "int32",
    "name": "string",
    "path": "string",
    "size": "int64",
    "mtime_ns": "int64",
    "xxh3_128": "string",
}


def _write_table(file: Path, columns: Mapping[str, list[Any]], types: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    with files.whole(file) as stream:
        pq.write_table(table, stream, compression="zstd")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
