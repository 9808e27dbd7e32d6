"""Writing token shards (`data.shards.reader` says what they are)."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from data.shards.reader import COUNTS, FILES, FORMAT, KIND, MANIFEST, sha256
from s2 import files

_ENDS = (".bin", ".npy", ".parquet")
_FILE_KEYS = {
    "source": "int32",
    "name": "string",
    "path": "string",
    "size": "int64",
    "mtime_ns": "int64",
    "xxh3_128": "string",
}


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Writes documents of one source into shards `<prefix>-000`, `<prefix>-001`, ... of a folder, in a `with` block.

    A file takes its final name only when it is whole and on disk. Another writer of the same prefix replaces them;
    where the block ends with an error they are removed.

    shards: what the manifest says about them. counts: int64 [2, vocab_size], see `TokenShards.counts`.

    Raises `s2.files.NotOursError` for a folder that holds something else.
    """

    def __init__(self, folder: Path, prefix: str, source: str, dtype: np.dtype, vocab_size: int, shard_tokens: int):
        self.folder, self.prefix, self.source = files.make_folder(folder, KIND), prefix, source
        self.dtype, self.shard_tokens = np.dtype(dtype), shard_tokens
        self.counts = np.zeros((2, vocab_size), dtype=np.int64)
        self.shards: list[dict[str, Any]] = []
        self._file: Any = None  # of the shard that is open, as `files.whole` makes it
        self._stream: Any = None

    def __exit__(self, kind: Any, *about: Any) -> None:
        if kind is None:
            if self._stream is not None:
                self._close_shard()
            return
        if self._stream is not None:
            self._stream = None
            self._file.__exit__(kind, *about)
        files.remove_files(self.folder, *(f"{self.prefix}-*{end}" for end in _ENDS), f".{self.prefix}-*.s2-tmp")

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
                "offsets_sha256": sha256(self.folder / f"{self._name}.npy"),
                "origins_sha256": sha256(self.folder / f"{self._name}.parquet"),
            }
        )


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
        "counts": {"sources": list(counts), "sha256": sha256(folder / COUNTS)},
        "files": {"sha256": sha256(folder / FILES)},
        "shards": list(shards),
    }
    files.write_json(folder / MANIFEST, manifest)


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


def _write_table(file: Path, columns: Mapping[str, list[Any]], types: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    with files.whole(file) as stream:
        pq.write_table(table, stream, compression="zstd")
