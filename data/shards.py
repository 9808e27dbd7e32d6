"""Token shards: the on-disk form of a tokenized corpus.

A shard folder holds, for each shard, `<name>.bin` (the tokens of its documents one after another, uint16 or
uint32), `<name>.npy` (int64 [2, documents + 1]: row 0 where each document's tokens begin in the .bin, row 1 where
its UTF-8 bytes would begin) and `<name>.parquet` (the id and url of each document); `counts.npy` (see
`TokenShards.counts`) and `manifest.json`, which is written last: a folder without it is unfinished, whatever else
lies in it. A shard's documents come from one source.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
COUNTS = "counts.npy"
FORMAT = "s2-token-shards/2"
_PAGE = mmap.PAGESIZE


class ShardWriter:
    """Writes documents of one source into shards `<prefix>-000`, `<prefix>-001`, ... of a folder.

    A file takes its final name only when it is whole and on disk. `close` returns what the manifest says about the
    shards; without it they count for nothing, and another writer of the same prefix replaces them.

    counts: int64 [2, vocab_size], see `TokenShards.counts`.
    """

    def __init__(self, folder: Path, prefix: str, source: str, dtype: np.dtype, vocab_size: int, shard_tokens: int):
        self.folder, self.prefix, self.source = folder, prefix, source
        self.dtype, self.shard_tokens = np.dtype(dtype), shard_tokens
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{prefix}-*"):
            leftover.unlink()
        self.counts = np.zeros((2, vocab_size), dtype=np.int64)
        self.shards: list[dict[str, Any]] = []
        self._stream: Any = None

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
        self._stream = (self.folder / f"{self._name}.bin.tmp").open("wb")
        self._sha256 = hashlib.sha256()
        self._tokens = 0
        self._lengths: list[np.ndarray] = []
        self._sizes: list[int] = []
        self._ids: list[str] = []
        self._urls: list[str] = []

    def _close_shard(self) -> None:
        _sync_and_close(self._stream)
        self._stream = None
        (self.folder / f"{self._name}.bin.tmp").replace(self.folder / f"{self._name}.bin")
        lengths = np.concatenate(self._lengths)
        offsets = np.zeros((2, len(lengths) + 1), dtype=np.int64)
        np.cumsum(lengths, out=offsets[0, 1:])
        np.cumsum(self._sizes, out=offsets[1, 1:])
        write_array(self.folder / f"{self._name}.npy", offsets)
        _write_origins(self.folder / f"{self._name}.parquet", self._ids, self._urls)
        self.shards.append(
            {
                "name": self._name,
                "source": self.source,
                "documents": len(lengths),
                "tokens": int(offsets[0, -1]),
                "bytes": int(offsets[1, -1]),
                "sha256": self._sha256.hexdigest(),
                "offsets_sha256": _sha256(self.folder / f"{self._name}.npy"),
            }
        )

    def close(self) -> list[dict[str, Any]]:
        """Close the last shard and return the shards' records."""
        if self._stream is not None:
            self._close_shard()
        return self.shards

    def abort(self) -> None:
        """Remove everything this writer wrote."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        for file in self.folder.glob(f"{self.prefix}-*"):
            file.unlink()


def write_manifest(
    folder: Path, dtype: np.dtype, shards: Sequence[Mapping[str, Any]], counts: np.ndarray, **fields: Any
) -> None:
    """Finish a shard folder: token counts, then the manifest with totals, `fields` and the shards' records."""
    write_array(folder / COUNTS, counts)
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    manifest = {"format": FORMAT, "dtype": np.dtype(dtype).name, **totals, **fields, "shards": list(shards)}
    write_json(folder / MANIFEST, manifest)


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted preparation left in a shard folder, and nothing else."""
    for file in [folder / MANIFEST, folder / COUNTS, *folder.glob("shard-*"), *folder.glob("*.tmp")]:
        file.unlink(missing_ok=True)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished shard folder.

    Raises FileNotFoundError for a missing or unfinished folder, ValueError for a foreign manifest.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        state = "is unfinished (it has no manifest.json)" if file.parent.is_dir() else "does not exist"
        raise FileNotFoundError(f"shard folder {folder} {state}; prepare it with `python -m data.prepare`")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: format {manifest.get('format')!r}, expected {FORMAT!r}; prepare it again")
    return manifest


class TokenShards:
    """A finished shard folder, memory-mapped and seen as one long row of tokens.

    offsets: int64 [documents + 1], where each document's tokens begin in that row.
    byte_offsets: int64 [documents + 1], the same in UTF-8 bytes of text.
    counts: int64 [2, vocab_size], how often each token occurs (row 0) and how often it opens a document (row
        1).

    Raises FileNotFoundError / ValueError where a file is missing or its size is not what the manifest says;
    `verify` also reads everything and compares the checksums.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.dtype = np.dtype(self.manifest["dtype"])
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self._maps: list[mmap.mmap] = []
        self._rows: list[np.ndarray] = []
        starts, byte_starts, token_base, byte_base = [], [], [0], 0
        for shard in self.manifest["shards"]:
            offsets = np.load(self._file(shard, ".npy", None), mmap_mode="r")
            bin_file = self._file(shard, ".bin", shard["tokens"] * self.dtype.itemsize)
            if offsets.shape != (2, shard["documents"] + 1) or offsets[0, -1] != shard["tokens"]:
                raise ValueError(f"{bin_file.with_suffix('.npy')}: does not match manifest.json; prepare again")
            with bin_file.open("rb") as stream:
                self._maps.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            self._rows.append(np.frombuffer(self._maps[-1], dtype=self.dtype))
            starts.append(offsets[0, :-1] + token_base[-1])
            byte_starts.append(offsets[1, :-1] + byte_base)
            token_base.append(token_base[-1] + shard["tokens"])
            byte_base += shard["bytes"]
        self._base = np.array(token_base, dtype=np.int64)
        self.offsets = np.concatenate([*starts, [token_base[-1]]]).astype(np.int64)
        self.byte_offsets = np.concatenate([*byte_starts, [byte_base]]).astype(np.int64)

    def __reduce__(self) -> Any:  # workers started by spawn reopen the files instead of copying them
        return TokenShards, (self.folder,)

    def _file(self, shard: dict[str, Any], suffix: str, size: int | None) -> Path:
        file = self.folder / (shard["name"] + suffix)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: listed in manifest.json but missing; prepare again")
        if size is not None and file.stat().st_size != size:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, manifest.json says {size}; prepare again")
        return file

    @property
    def counts(self) -> np.ndarray:
        return np.load(self.folder / COUNTS)

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
            size = min(len(out) - done, len(self._rows[shard]) - begin)
            out[done : done + size] = self._rows[shard][begin : begin + size]
            first = begin * self.dtype.itemsize // _PAGE * _PAGE
            self._maps[shard].madvise(mmap.MADV_DONTNEED, first, (begin + size) * self.dtype.itemsize - first)
            done, shard = done + size, shard + 1

    def verify(self) -> None:
        """Compare every file with its checksum; raises ValueError naming the first that differs."""
        for shard in self.manifest["shards"]:
            for suffix, key in ((".bin", "sha256"), (".npy", "offsets_sha256")):
                file = self.folder / (shard["name"] + suffix)
                if _sha256(file) != shard[key]:
                    raise ValueError(f"{file}: checksum differs from manifest.json; prepare again")


def write_array(file: Path, array: np.ndarray) -> None:
    """Write a .npy file that exists only when it is whole and on disk."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file that exists only when it is whole and on disk."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_origins(file: Path, ids: list[str], urls: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = file.with_name(file.name + ".tmp")
    pq.write_table(pa.table({"id": ids, "url": urls}), temporary, compression="zstd")
    temporary.replace(file)


def _sync_and_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
