"""Token shards: the on-disk form of a tokenized corpus.

A shard folder holds, for shard k, `shard-0000k.bin` (the tokens of its documents one after another, uint16 or
uint32) and `shard-0000k.npy` (int64 [2, documents + 1]: row 0 where each document's tokens begin in the .bin,
row 1 where its UTF-8 bytes would begin), `counts.npy` (see `TokenShards.counts`) and `manifest.json`, which
is written last: a folder without it is unfinished, whatever else lies in it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
COUNTS = "counts.npy"
FORMAT = "s2-token-shards/1"


class ShardWriter:
    """Writes one shard folder: `add` documents, then `finish`. Without `finish` the folder stays unfinished.

    Leftovers of an interrupted earlier attempt in `folder` are removed first; nothing else there is touched.
    """

    def __init__(self, folder: Path, dtype: np.dtype, vocab_size: int, shard_tokens: int):
        self.folder, self.dtype, self.shard_tokens = folder, np.dtype(dtype), shard_tokens
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # first: from here on the folder counts as unfinished
        for leftover in [*folder.glob("shard-*"), *folder.glob("*.tmp"), folder / COUNTS]:
            leftover.unlink(missing_ok=True)
        self.counts = np.zeros((2, vocab_size), dtype=np.int64)
        self.shards: list[dict[str, Any]] = []
        self._lengths: list[int] = []
        self._bytes: list[int] = []
        self._stream: Any = None

    def add(self, documents: Sequence[np.ndarray], text_bytes: Sequence[int]) -> None:
        """Append documents (1-D arrays of at least one token) and the UTF-8 size of each one's text."""
        if not documents:
            return
        vocab_size = self.counts.shape[1]
        self.counts[0] += np.bincount(np.concatenate(documents), minlength=vocab_size)
        self.counts[1] += np.bincount([int(document[0]) for document in documents], minlength=vocab_size)
        for document, size in zip(documents, text_bytes, strict=True):
            if self._stream is None:
                self._name = f"shard-{len(self.shards):05d}"
                self._stream = (self.folder / f"{self._name}.bin.tmp").open("wb")
                self._sha256 = hashlib.sha256()
                self._tokens = 0
            data = document.astype(self.dtype, copy=False).tobytes()
            self._stream.write(data)
            self._sha256.update(data)
            self._lengths.append(len(document))
            self._bytes.append(size)
            self._tokens += len(document)
            if self._tokens >= self.shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        _sync_and_close(self._stream)
        (self.folder / f"{self._name}.bin.tmp").replace(self.folder / f"{self._name}.bin")
        offsets = np.zeros((2, len(self._lengths) + 1), dtype=np.int64)
        np.cumsum(self._lengths, out=offsets[0, 1:])
        np.cumsum(self._bytes, out=offsets[1, 1:])
        _write_array(self.folder / f"{self._name}.npy", offsets)
        self.shards.append(
            {
                "name": self._name,
                "documents": len(self._lengths),
                "tokens": int(offsets[0, -1]),
                "bytes": int(offsets[1, -1]),
                "sha256": self._sha256.hexdigest(),
                "offsets_sha256": _sha256(self.folder / f"{self._name}.npy"),
            }
        )
        self._stream, self._lengths, self._bytes = None, [], []

    def finish(self, **fields: Any) -> None:
        """Close the last shard and write the manifest: totals, checksums and `fields`."""
        if self._stream is not None:
            self._close_shard()
        _write_array(self.folder / COUNTS, self.counts)
        totals = {key: sum(shard[key] for shard in self.shards) for key in ("documents", "tokens", "bytes")}
        manifest = {"format": FORMAT, "dtype": self.dtype.name, **totals, **fields, "shards": self.shards}
        temporary = self.folder / f"{MANIFEST}.tmp"
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(manifest, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.folder / MANIFEST)

    def abort(self) -> None:
        """Close the open file; the folder stays without a manifest."""
        if self._stream is not None:
            self._stream.close()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished shard folder.

    Raises FileNotFoundError for a missing or unfinished folder, ValueError for a foreign manifest.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        state = "is unfinished (it has no manifest.json)" if file.parent.is_dir() else "does not exist"
        raise FileNotFoundError(f"shard folder {folder} {state}; prepare it with `python -m data.prepare`")
    manifest = json.loads(file.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: format {manifest.get('format')!r}, expected {FORMAT!r}")
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
        self._bins: list[np.ndarray] = []
        starts, byte_starts, token_base, byte_base = [], [], [0], 0
        for shard in self.manifest["shards"]:
            offsets = np.load(self._file(shard, ".npy", None), mmap_mode="r")
            bin_file = self._file(shard, ".bin", shard["tokens"] * self.dtype.itemsize)
            if offsets.shape != (2, shard["documents"] + 1) or offsets[0, -1] != shard["tokens"]:
                raise ValueError(f"{bin_file.with_suffix('.npy')}: does not match manifest.json; prepare again")
            self._bins.append(np.memmap(bin_file, dtype=self.dtype, mode="r"))
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

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the row, as int64."""
        pieces = []
        shard = int(np.searchsorted(self._base, start, side="right")) - 1
        while start < stop:
            base = int(self._base[shard])
            end = min(stop, int(self._base[shard + 1]))
            pieces.append(self._bins[shard][start - base : end - base])
            start, shard = end, shard + 1
        return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, dtype=np.int64)

    def verify(self) -> None:
        """Compare every file with its checksum; raises ValueError naming the first that differs."""
        for shard in self.manifest["shards"]:
            for suffix, key in ((".bin", "sha256"), (".npy", "offsets_sha256")):
                file = self.folder / (shard["name"] + suffix)
                if _sha256(file) != shard[key]:
                    raise ValueError(f"{file}: checksum differs from manifest.json; prepare again")


def _write_array(file: Path, array: np.ndarray) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _sync_and_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
