"""Corpora that lie elsewhere: the files of a Hugging Face dataset, and any remote file read by ranges.

`open_remote` reads a file like a local one: a parquet reader fetches only the columns it wants, a line reader streams.
What may pass by itself (a dropped connection, silence, HTTP 429 and 5xx) is tried again as `RETRIES` says; what will
not (no such file, no access) is reported at once.

Bytes of `hf://` files come over the hub library's own http session, below its file system: that one hides five retries
in each of ours, does not check that it got the range it asked for, and starts a block again from its first byte. Other
urls (`s3://`, `https://`) are read through the fsspec package for them.
"""

import io
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fsspec.caching import BaseCache
from fsspec.spec import AbstractBufferedFile

from s2.files import temporary_folder

T = TypeVar("T")
Pieces = Callable[[int, int], Iterator[bytes]]

# Reading ahead starts at the least and grows fourfold with each sequential read, so that a stream soon asks for large
# blocks while jumps between parquet columns fetch little more than the column.
LEAST_BLOCK = 1 << 16
MOST_BLOCK = 1 << 23
SILENCE = 60.0  # seconds without a byte after which a request that set no limit of its own has failed
_NETWORK_LIBRARIES = {"aiohttp", "botocore", "http", "httpx", "httpx2", "urllib3"}
_JITTER = random.Random()  # its own generator: the global one belongs to the user's seed


@dataclass(frozen=True)
class Retries:
    """How often one read is tried without a single new byte, and the seconds between: doubled up to the longest."""

    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0


RETRIES = Retries()


class SourceError(OSError):
    """A remote file or dataset that could not be read in all attempts; the message names url, offset and cause."""


def hub_files(
    name: str,
    subset: str | None,
    split: str,
    revision: str | None,
    *,
    data_dir: str | None = None,
    pattern: str | None = None,
) -> tuple[list[str], str | None]:
    """The files of `split` of a hub dataset's `subset`, as its card lays them out, and their commit. `name` may be a
    local folder: then they are absolute paths and no urls, and there is no commit.

    data_dir: only files below this folder. pattern: the files that match it, whatever the card says.

    Raises FileNotFoundError (no such dataset, revision or files), PermissionError (no access), ValueError (no such
    subset or split) and SourceError (the hub cannot be reached).
    """
    import datasets

    folder = Path(name).expanduser()
    where, opened, commit = f"hf://datasets/{name}", str(folder.absolute()), None
    if not folder.is_dir():
        opened, commit = _with_retries(where, lambda: _commit(name, revision))

    def data_files() -> dict[str, list[str]]:
        _session()  # for its time limit: `datasets` lists the repository over it
        with temporary_folder() as empty:  # in its own cache it would find old copies when the hub is down
            return datasets.load_dataset_builder(
                opened,
                subset,
                revision=commit,
                cache_dir=str(empty),
                data_dir=data_dir,
                data_files=None if pattern is None else {split: pattern},
            ).config.data_files

    try:
        splits = _with_retries(where, data_files)
    except ValueError as error:
        subsets = _with_retries(where, lambda: datasets.get_dataset_config_names(opened, revision=commit))
        if subset in subsets or (subset is None and len(subsets) == 1):
            raise ValueError(f"hub dataset {name!r}: {_line(error)}") from error
        wrong = "has several subsets, choose one" if subset is None else f"has no subset {subset!r}"
        raise ValueError(f"hub dataset {name!r} {wrong}; it has: {', '.join(subsets)}") from error
    if split not in splits:
        which = f" in subset {subset!r}" if subset else ""
        raise ValueError(f"hub dataset {name!r} has no split {split!r}{which}; it has: {', '.join(map(str, splits))}")
    if not splits[split]:
        raise FileNotFoundError(f"hub dataset {name!r}: its card names no existing file for split {split!r}")
    return list(dict.fromkeys(splits[split])), commit  # a card's patterns may match a file twice


def _commit(name: str, revision: str | None) -> tuple[str, str]:
    """The dataset's id as the hub writes it and the commit sha that `revision` (None: the main branch) stands for."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(name, revision=revision, expand=["sha"], timeout=SILENCE)
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"hub dataset {name!r} has no branch, tag or commit {revision!r}") from error
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        raise FileNotFoundError(
            f"there is no hub dataset {name!r} and no such local folder, or it is private"
            " (log in with `hf auth login` or set HF_TOKEN)"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"hub dataset {name!r}: {_line(error)}") from error
    assert info.sha is not None
    return info.id, info.sha


def open_remote(url: str) -> AbstractBufferedFile:
    """Open `url` (`hf://`, `http(s)://` or another fsspec protocol) for reading; seekable, not for several threads.

    Opening and every read try again as `RETRIES` says and then raise SourceError. A read is never short before the
    end of the file. Raises FileNotFoundError, PermissionError at once.
    """
    return _RemoteFile(url, *_with_retries(url, lambda: _connect(url)))


def remote_size(url: str) -> int:
    """Bytes in `url`; raises as `open_remote` does."""
    return _with_retries(url, lambda: _connect(url))[0]


class _RemoteFile(AbstractBufferedFile):
    """A remote file of `size` bytes of which one block, the last one fetched, is held in memory."""

    def __init__(self, url: str, size: int, pieces: Pieces):
        super().__init__(None, url, "rb", LEAST_BLOCK, cache_type="none", size=size)
        self.cache = _Ahead(LEAST_BLOCK, self._fetch_range, size)
        self._pieces = pieces

    def _fetch_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`; an attempt goes on where the last one broke off."""
        data = bytearray()

        def attempt() -> None:
            begin = len(data)
            for piece in self._pieces(start + begin, end):
                data.extend(piece)
            if len(data) > end - start:
                del data[begin:]
                raise OSError("the server sent more than the range asked for")
            if len(data) < end - start:
                raise OSError(f"the server sent {len(data) - begin} of {end - start - begin} bytes")

        _with_retries(self.path, attempt, lambda: start + len(data))
        return bytes(data)


class _Ahead(BaseCache):
    """Holds one block, and reads further ahead the longer a file is read in sequence."""

    block, start, ahead = b"", 0, LEAST_BLOCK

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        start, stop = start or 0, min(self.size if stop is None else stop, self.size)
        held = self.block[start - self.start : stop - self.start] if start >= self.start else b""
        if (missing := start + len(held)) < stop:
            follows = missing == self.start + len(self.block)
            self.ahead = min(4 * self.ahead, MOST_BLOCK) if follows else LEAST_BLOCK
            self.block = self.fetcher(missing, min(max(stop, missing + self.ahead), self.size))
            self.start = missing
            held += self.block[: stop - missing]
        return held


def _connect(url: str) -> tuple[int, Pieces]:
    """Bytes in `url` and a function that yields those from a start to a stop as they arrive. One attempt."""
    from fsspec.core import url_to_fs
    from huggingface_hub.utils import build_hf_headers

    _session()  # for its time limit, as above
    files, path = url_to_fs(url)
    info = files.info(path)
    if info["type"] != "file":
        raise IsADirectoryError(f"{url}: not a file")
    if url.startswith("hf://"):
        address = files.url(path)
        return info["size"], lambda start, stop: _hub_pieces(address, build_hf_headers(), start, stop, info["size"])
    return info["size"], lambda start, stop: iter([files.cat_file(path, start=start, end=stop)])


def _hub_pieces(address: str, headers: dict[str, str], start: int, stop: int, size: int) -> Iterator[bytes]:
    from huggingface_hub import constants

    headers = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with _session().stream("GET", address, headers=headers, follow_redirects=True, timeout=limit) as response:
        response.raise_for_status()
        sent = response.headers.get("Content-Range", "nothing")
        if sent not in (f"bytes {start}-{stop - 1}/{size}", f"bytes {start}-{stop - 1}/*"):
            raise OSError(f"asked for bytes {start}-{stop - 1}/{size}, the server announced {sent}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError("the server compressed a range, which cannot be put together")
        yield from response.iter_raw()


def _session() -> Any:
    """The hub library's http session (its proxies, certificates, offline mode), made to fail on silence."""
    from huggingface_hub import get_session

    session = get_session()
    if _limit_silence not in session.event_hooks["request"]:
        session.event_hooks = {**session.event_hooks, "request": [*session.event_hooks["request"], _limit_silence]}
    return session


def _limit_silence(request: Any) -> None:
    # The library lists folders with no time limit at all: a connection that a router forgot would stop us for ever.
    if request.method == "GET":
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            stage: limits.get(stage) or SILENCE for stage in ("connect", "read", "write", "pool")
        }


def _with_retries(url: str, attempt: Callable[[], T], offset: Callable[[], int] = lambda: 0) -> T:
    """The result of `attempt`, which is tried until `RETRIES.attempts` in a row failed to bring `offset` further."""
    reached, failures = offset(), 0
    while True:
        try:
            return attempt()
        except Exception as error:
            if (refusal := _refusal(url, error)) is error:
                raise
            if refusal is not None:
                raise refusal from error
            problem = error
        # `datasets` reports an unreachable hub as a file that it did not find: say what lies behind.
        reason = _line(list(_chain(problem))[-1] if isinstance(problem, FileNotFoundError) else problem)
        failures = failures + 1 if offset() == reached else 0
        reached = offset()
        if failures >= RETRIES.attempts:
            raise SourceError(
                f"{url}: gave up at offset {reached} after {failures} attempts ({reason}); the same command goes on"
                " from there, or name files on disk as `sources` in its place"
            ) from problem
        wait = RETRIES.first_wait * 2 ** max(failures - 1, 0) * _JITTER.uniform(0.75, 1.25)
        wait = max(min(wait, RETRIES.longest_wait), _asked_wait(problem))
        again = f"trying again in {wait:.1f} s (attempt {failures + 1} of {RETRIES.attempts})"
        print(f"{url}: {reason} at offset {reached}; {again}", file=sys.stderr, flush=True)
        time.sleep(wait)


def _refusal(url: str, error: Exception) -> Exception | None:
    """What to raise for an error that will not pass by itself; None where it may. A refusal by HTTP status becomes the
    built-in exception that a local file would raise."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    links, status = list(_chain(error)), _status(error)
    if any(isinstance(link, OfflineModeIsEnabled) for link in links):
        return error
    if status is not None:
        if status >= 500 or status in (408, 425, 429):
            return None
        if isinstance(error, FileNotFoundError | PermissionError):
            return error
        if status in (401, 403):
            hint = "a private or gated dataset needs `hf auth login` or HF_TOKEN, and its terms accepted"
            return PermissionError(f"{url}: access refused with HTTP {status}; {hint}")
        if status in (404, 410):
            return FileNotFoundError(f"{url}: no such file (HTTP {status})")
        return SourceError(f"{url}: {_line(error)}")
    if any(type(link).__module__.partition(".")[0] in _NETWORK_LIBRARIES for link in links):
        return None
    permanent = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, io.UnsupportedOperation)
    return None if isinstance(error, OSError | EOFError) and not isinstance(error, permanent) else error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what lies behind it: libraries wrap a network error, some in a FileNotFoundError."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> int | None:
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", getattr(link, "status", None))
        if isinstance(status, int):
            return status
    return None


def _asked_wait(error: Exception) -> float:
    """Seconds for which the server asked to be left alone; the hub counts requests in windows of five minutes."""
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None) or {}
        after = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
        window = re.search(r";\s*t\s*=\s*(\d+)", headers.get("RateLimit", "")) if _status(error) == 429 else None
        if found := after or window:
            return min(float(found[1]), 600.0)
    return 0.0


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).partition(" For more information")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
