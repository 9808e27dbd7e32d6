"""What one worker does with one part of a source: scan it for duplicates, or turn it into token shards.

Everything about a part lies in `<output>/work/` under its name `<source>-<part>`; its record is written last, so a part
is done or not, whenever the process is killed. A worker holds the part's lock while it is at it.
"""

import fcntl
import json
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from queue import Full, Queue
from typing import Any, TypeVar

import numpy as np

from data.dedup import scan, select
from data.shards import ShardWriter, read_arrays, remove_shards, write_arrays, write_json
from data.sources import Document, Part
from data.spec import PrepareSpec
from data.tokenizer import TextTokenizer

T = TypeVar("T")

_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 4096

progress: Callable[[int], Any] = lambda size: None  # noqa: E731  # bytes of text done; set by whoever runs the work


@dataclass(frozen=True)
class Budget:
    """How much more of a source may be taken, None for all of it."""

    bytes: int | None
    documents: int | None

    def after(self, record: dict[str, Any]) -> "Budget":
        """What is left after a part."""
        return Budget(
            None if self.bytes is None else self.bytes - record["bytes"],
            None if self.documents is None else self.documents - record["documents"],
        )

    @property
    def spent(self) -> bool:
        return any(left is not None and left <= 0 for left in (self.bytes, self.documents))

    def allows(self, record: dict[str, Any]) -> bool:
        """Whether a part taken under another budget is what this one gives."""
        if record["budget"] == [self.bytes, self.documents]:
            return True
        left = self.after(record)
        return not record["limited"] and all(n is None or n >= 0 for n in (left.bytes, left.documents))


@dataclass(frozen=True)
class Task:
    """One part of one source of a preparation; tokenizer: the SHA-256 of `<output>/tokenizer.json`."""

    spec: PrepareSpec
    source: int
    index: int
    part: Part
    tokenizer: str = ""
    budget: Budget = Budget(None, None)

    @property
    def name(self) -> str:
        return f"{self.source:03d}-{self.index:05d}"

    def file(self, suffix: str) -> Path:
        return Path(self.spec.output) / "work" / (self.name + suffix)

    @cached_property
    def keep(self) -> np.ndarray | None:
        """What deduplication left of the part, bool [documents]."""
        return np.load(self.file(".keep.npy")) if self.spec.deduplicate is not None else None

    def record(self) -> dict[str, Any] | None:
        """The part's record; None while it is not done with this tokenizer and within this budget."""
        try:
            record = json.loads(self.file(".json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record if record["tokenizer"] == self.tokenizer and self.budget.allows(record) else None


def scan_part(task: Task) -> None:
    """Write what deduplication needs to know about a part, unless it is there."""
    with _locked(task):
        if task.file(".scan.npz").exists():
            return
        assert task.spec.deduplicate is not None
        source = task.spec.sources[task.source]
        write_arrays(task.file(".scan.npz"), scan(_counted(source.read(task.part)), task.spec.deduplicate))


def encode_part(task: Task) -> dict[str, Any]:
    """Write a part's shards and return its record; does nothing where it is done.

    Raises what reading the source raises, and OSError where writing fails; nothing of the part is left then.
    """
    with _locked(task):
        record = task.record()
        if record is not None:
            return record
        task.file(".json").unlink(missing_ok=True)
        record = _encode(task)
        write_json(task.file(".json"), record)
        return record


def discard_part(task: Task) -> None:
    """Remove a part that a limit turned out to leave out."""
    with _locked(task):
        task.file(".json").unlink(missing_ok=True)
        for folder in task.spec.folders.values():
            remove_shards(folder, _prefix(task))


def _encode(task: Task) -> dict[str, Any]:
    spec, source = task.spec, task.spec.sources[task.source]
    tokenizer = _tokenizer(Path(spec.output), spec.tokenizer.bos, spec.tokenizer.eos, task.tokenizer)
    arguments = (_prefix(task), source.label, tokenizer.dtype, tokenizer.vocab_size, spec.shard_tokens)
    writers = {split: ShardWriter(folder, *arguments) for split, folder in spec.folders.items()}
    skipped: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    allowance = Allowance(task.budget, first=task.index == 0)
    documents = _within(select(source.read(task.part, skipped), task.keep), allowance)
    try:
        for batch, tokens in _encoded(_ahead(batches(documents)), tokenizer, skipped):
            sizes = [len(document.text.encode()) for document in batch]
            held = [spec.is_heldout(document.id) for document in batch]
            for split, writer in writers.items():
                chosen = [i for i, is_held in enumerate(held) if is_held == (split == "heldout")]
                writer.add(
                    [tokens[i] for i in chosen],
                    [sizes[i] for i in chosen],
                    [batch[i].id for i in chosen],
                    [batch[i].url for i in chosen],
                )
            totals.update(documents=len(batch), tokens=sum(map(len, tokens)), bytes=sum(sizes))
            progress(sum(sizes))
        shards = {split: writer.close() for split, writer in writers.items()}
        write_arrays(task.file(".counts.npz"), {split: writer.counts for split, writer in writers.items()})
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    return {
        **{key: totals[key] for key in ("documents", "tokens", "bytes")},
        "tokenizer": task.tokenizer,
        "skipped": dict(skipped),
        "limited": allowance.exceeded,
        "budget": [task.budget.bytes, task.budget.documents],
        "shards": shards,
    }


def part_counts(task: Task) -> dict[str, np.ndarray]:
    """Token counts of a part that is done, by split; see `TokenShards.counts`."""
    return read_arrays(task.file(".counts.npz"))


def _prefix(task: Task) -> str:
    return f"shard-{task.name}"


@lru_cache(maxsize=1)
def _tokenizer(output: Path, bos: str, eos: str, sha256: str) -> TextTokenizer:
    tokenizer = TextTokenizer(output / "tokenizer.json", bos, eos)
    if tokenizer.sha256 != sha256:
        raise ValueError(f"{tokenizer.file} was replaced while {output} was being prepared; run again")
    return tokenizer


class Allowance:
    """Tells document by document whether a budget still has room; the first document of a source always finds it."""

    def __init__(self, budget: Budget, first: bool):
        self._budget, self._first = budget, first
        self._bytes = self._documents = 0
        self.exceeded = False

    def takes(self, size: int) -> bool:
        """Whether the next document, of `size` bytes, is still taken; once one is not, none is."""
        self._bytes += size
        self._documents += 1
        too_large = self._budget.bytes is not None and self._bytes > self._budget.bytes
        too_many = self._budget.documents is not None and self._documents > self._budget.documents
        self.exceeded |= too_many or (too_large and not (self._first and self._documents == 1))
        return not self.exceeded


def _within(documents: Iterable[Document], allowance: Allowance) -> Iterator[Document]:
    for document in documents:
        if not allowance.takes(len(document.text.encode())):
            return
        yield document


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    read: Iterable[list[Document]], tokenizer: TextTokenizer, skipped: Counter[str]
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
    """Batches with their tokens; `skipped` also counts what the vocabulary cannot express.

    Two batches are under way where the tokenizer uses several cores: the library encodes one while the ids of the
    other, for which the interpreter is needed, are taken over.
    """
    at_once = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else 2
    under_way: deque[tuple[list[Document], Future[list[np.ndarray]], Counter[str]]] = deque()

    def next_done() -> tuple[list[Document], list[np.ndarray]]:
        batch, tokens, lost = under_way.popleft()
        result = tokens.result()
        skipped.update(lost)
        return batch, result

    with ThreadPoolExecutor(at_once) as pool:
        for batch in read:
            lost: Counter[str] = Counter()
            under_way.append((batch, pool.submit(tokenizer.encode_documents, [d.text for d in batch], lost), lost))
            if len(under_way) > at_once:
                yield next_done()
        while under_way:
            yield next_done()


def _counted(documents: Iterable[Document]) -> Iterator[Document]:
    for batch in batches(documents):
        yield from batch
        progress(sum(len(document.text) for document in batch))


def _ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The same items, made by another thread up to `depth` in advance."""
    queue: Queue[tuple[bool, Any]] = Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stop.is_set():
            try:
                return queue.put(entry, timeout=0.1)
            except Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                put((True, item))
                if stop.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            more, item = queue.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stop.set()
        thread.join()


@contextmanager
def _locked(task: Task) -> Iterator[None]:
    """Hold the part's lock: a process that outlived its killed parent may still be at it."""
    with task.file(".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
