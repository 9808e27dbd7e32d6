"""What one worker does with one part of a source: scan it for duplicates, or turn it into token shards.

Everything about a part lies in `<output>/work/` under its name `<source>-<part>`; its record is written last, so a part
is done or not, whenever the process is killed. The record says which state of which files was read and what else the
shards depend on; a part whose record does not fit any more is made again.
"""

import hashlib
import json
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from queue import Full, Queue
from typing import Any, TypeVar

import numpy as np

from data.corpus.columns import BadRowError
from data.corpus.dedup import scan, select
from data.corpus.sources import Document
from data.corpus.tokenizer import TextTokenizer
from data.prepare.plan import Planned
from data.prepare.spec import PrepareSpec
from data.prepare.stamps import begins_in, stamps
from data.shards.writer import ShardWriter, read_arrays, remove_shards, write_arrays
from s2 import files

T = TypeVar("T")

WORK, WRITTEN = "work", "written.json"
# Everything that a preparation writes into `<output>/work/`.
WORK_FILES = (
    "plan.json",
    "kept.json",
    "split.json",
    "tokenizer.json",
    WRITTEN,
    "[0-9][0-9][0-9]-[0-9]*.json",
    "[0-9][0-9][0-9]-[0-9]*.scan.npz",
    "[0-9][0-9][0-9]-[0-9]*.keep.npy",
    "[0-9][0-9][0-9]-[0-9]*.counts.npz",
    ".*.s2-tmp",
)
BAD = "bad row"  # the reason that skipped rows are counted under
EXAMPLES = 5
_LIMITS = ("name", "max_bytes", "max_documents", "on_bad_row")  # of a source: what its scans do not depend on
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
    """One part of one source of a preparation.

    index: which of the source's parts, in reading order. tokenizer: the SHA-256 of `<output>/tokenizer.json`. below:
    documents with a smaller place are held out. splits: those that are written.
    """

    spec: PrepareSpec
    source: int
    index: int
    planned: Planned
    tokenizer: str = ""
    budget: Budget = Budget(None, None)
    below: int = 0
    splits: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.source:03d}-{self.planned.number:05d}"

    def file(self, suffix: str) -> Path:
        return Path(self.spec.output) / WORK / (self.name + suffix)

    @cached_property
    def keep(self) -> np.ndarray | None:
        """What deduplication left of the part, bool [documents]."""
        return np.load(self.file(".keep.npy")) if self.spec.deduplicate is not None else None

    @property
    def depends_on(self) -> dict[str, Any]:
        """What a record was made for, besides the files' content and the limits of the source."""
        return {
            "place": self.planned.place,
            "tokenizer": self.tokenizer,
            "below": self.below,
            "keep": None if self.keep is None else hashlib.blake2b(self.keep.tobytes(), digest_size=16).hexdigest(),
        }

    def record(self) -> dict[str, Any] | None:
        """The part's record; None while it is not done, or was done for something else."""
        try:
            record = files.read_json(self.file(".json"))
        except FileNotFoundError:
            return None
        fits = (
            record["for"] == self.depends_on
            and self.has_read(record["files"])
            and set(self.splits) <= set(record["shards"])
            and (self.skips_bad_rows or not record["skipped"].get(BAD))
            and self.budget.allows(record)
        )
        return record if fits else None

    def has_read(self, recorded: list[dict[str, Any]]) -> bool:
        """Whether the recorded state of the files is the present one."""
        now = self.planned.stamps
        return len(now) == len(recorded) and all(stamp.matches(r) for stamp, r in zip(now, recorded, strict=True))

    @property
    def skips_bad_rows(self) -> bool:
        return self.spec.skips_bad_rows(self.spec.sources[self.source])

    def documents(self, skipped: Counter[str], bad: list[str]) -> Iterator[Document]:
        """The part's documents; bad rows stop it or are counted, the first ones with their message in `bad`."""

        def skip(error: BadRowError) -> None:
            if not self.skips_bad_rows:
                raise BadRowError(error.file, error.place, f"{error.reason}. {_REMEDY}")
            skipped[BAD] += 1
            if len(bad) < EXAMPLES:
                bad.append(str(error))

        yield from self.spec.sources[self.source].read(self.planned.part, skipped, skip)

    def files_read(self) -> list[dict[str, Any]]:
        """Records of the files, for a part that has been read; ValueError where they have changed meanwhile."""
        self.check_files()
        records = [stamp.record(content=begins_in(self.planned.part)) for stamp in self.planned.stamps]
        self.check_files()
        return records

    def check_files(self) -> None:
        for was, now in zip(self.planned.stamps, stamps(self.planned.part.files), strict=True):
            if (was.size, was.mtime_ns) != (now.size, now.mtime_ns):
                raise ValueError(f"{was.path} changed while it was read; run again (what is finished is kept)")


_REMEDY = (
    "Mend or remove the row and run again (finished parts of other files are kept), or set on_bad_row: skip"
    " (data.prepare.on_bad_row=skip, or --on-bad-row skip with --sources)"
)


def scan_part(task: Task) -> None:
    """Write what deduplication needs to know about a part, unless it is there."""
    assert task.spec.deduplicate is not None
    file = task.file(".scan.npz")
    source = asdict(task.spec.sources[task.source])
    wanted = [task.planned.place, asdict(task.spec.deduplicate), {k: v for k, v in source.items() if k not in _LIMITS}]
    made_for = json.dumps(wanted, sort_keys=True)
    if file.exists():
        with np.load(file) as found:
            if str(found["made_for"]) == made_for and task.has_read(json.loads(str(found["files"]))):
                return
    arrays = scan(_counted(task.documents(Counter(), [])), task.spec.deduplicate)
    arrays |= {"made_for": np.array(made_for), "files": np.array(json.dumps(task.files_read()))}
    write_arrays(file, arrays)


def encode_part(task: Task) -> dict[str, Any]:
    """Write a part's shards and return its record; does nothing where it is done.

    Raises what reading the source raises, and OSError where writing fails; nothing of the part is left then.
    """
    record = task.record()
    if record is None:
        files.remove_files(task.file("").parent, f"{task.name}.json")
        record = _encode(task)
        files.write_json(task.file(".json"), record)
    return record


def discard_part(task: Task) -> None:
    """Remove a part that a limit turned out to leave out."""
    files.remove_files(task.file("").parent, f"{task.name}.json")
    for split in task.splits:
        remove_shards(task.spec.folders[split], _prefix(task))


def _encode(task: Task) -> dict[str, Any]:
    spec, source = task.spec, task.spec.sources[task.source]
    tokenizer = _tokenizer(Path(spec.output), spec.tokenizer.bos, spec.tokenizer.eos, task.tokenizer)
    arguments = (_prefix(task), source.label, tokenizer.dtype, tokenizer.vocab_size, spec.shard_tokens)
    skipped: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    bad: list[str] = []
    allowance = Allowance(task.budget, first=task.index == 0)
    documents = within(select(task.documents(skipped, bad), task.keep), allowance)
    with ExitStack() as stack:
        folders = {split: spec.folders[split] for split in task.splits}
        writers = {split: stack.enter_context(ShardWriter(folder, *arguments)) for split, folder in folders.items()}
        for batch, tokens in _encoded(_ahead(batches(documents)), tokenizer, skipped):
            sizes = [len(document.text.encode()) for document in batch]
            held = [spec.place(document.id) < task.below for document in batch]
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
        read = task.files_read()
        write_arrays(task.file(".counts.npz"), {split: writer.counts for split, writer in writers.items()})
    return {
        **{key: totals[key] for key in ("documents", "tokens", "bytes")},
        "for": task.depends_on,
        "files": read,
        "skipped": dict(skipped),
        "bad_rows": bad,
        "limited": allowance.exceeded,
        "budget": [task.budget.bytes, task.budget.documents],
        "shards": {split: writer.shards for split, writer in writers.items()},
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


def within(documents: Iterable[Document], allowance: Allowance) -> Iterator[Document]:
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
