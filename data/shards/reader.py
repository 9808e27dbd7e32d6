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
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from s2 import ending, files
from s2.settings import SettingError

KIND = "token shards"
MANIFEST = "manifest.json"
COUNTS = "counts.npy"
FILES = "files.parquet"
FORMAT = "s2-token-shards/2"
# A page fault maps the pages around it too, in aligned runs of this size (Linux, fault_around_bytes).
_MAPPED_AT_ONCE = max(1 << 16, mmap.PAGESIZE)


class DamagedShardsError(ValueError):
    """A shard folder is not what was written."""

    exit_code = ending.DAMAGED


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


def identity_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over the shards' checksums: equal where the tokens are equal, wherever the folder lies."""
    joined = "".join(shard["sha256"] + shard["offsets_sha256"] for shard in manifest["shards"])
    return hashlib.sha256(joined.encode()).hexdigest()


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
        """`identity_of` its manifest."""
        return identity_of(self.manifest)

    @property
    def tokenizer_file(self) -> Path:
        return (self.folder / self.manifest["tokenizer"]["file"]).resolve()

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order of their documents."""
        return list(dict.fromkeys(shard["source"] for shard in self.manifest["shards"]))

    def documents_of(self, source: str | None, key: str = "") -> np.ndarray:
        """Indices of a source's documents (all for None), int64. Raises SettingError, which names `key`, for a
        source that is not there."""
        if source is None:
            return np.arange(len(self.offsets) - 1)
        if source not in self.sources:
            known = ", ".join(self.sources)
            raise SettingError(key, f"{self.folder} has no source {source!r}; it has: {known}")
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
            if sha256(file) != checksum:
                raise DamagedShardsError(f"{file}: checksum differs from manifest.json; {self._remedy}")


def splits_of(output: Path) -> dict[str, TokenShards]:
    """The shard folders that were prepared into a folder, or the one that it is."""
    found = {name: TokenShards(output / name) for name in ("train", "heldout") if (output / name).is_dir()}
    return found or {"train": TokenShards(output)}


@lru_cache(maxsize=256)
def _mapped(file: Path, size: int, modified_ns: int, dtype: np.dtype) -> tuple[mmap.mmap, np.ndarray]:
    """A shard's tokens in memory. Each map holds a file descriptor, so only those in use are kept; size and time tell
    apart what was written anew under the same name."""
    with file.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return pages, np.frombuffer(pages, dtype=dtype)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
