"""What one worker does with one part of a source: scan it for duplicates, or turn it into token shards.

Everything about a part lies in `<output>/work/` under its name `<source>-<part>`; its record is written last, so a part
is done or not, whenever the process is killed. The record says which state of which files was read and what else the
shards depend on; a part whose record does not fit any more is made again.
"""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import compress, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.corpus.columns import BadRowError
from data.corpus.dedup import scan, select
from data.corpus.parts import File, Part
from data.corpus.readers import Document
from data.corpus.sources import Limit
from data.corpus.tokenizer import TextTokenizer
from data.prepare.plan import KEPT, PLAN
from data.prepare.spec import PrepareSpec
from data.shards.writer import ShardWriter, write_arrays
from s2 import files

WORK, WRITTEN = "work", "written.json"
# Everything that a preparation writes into `<output>/work/`.
WORK_FILES = (
    *(PLAN, KEPT, WRITTEN, "tokenizer.json", ".*.s2-tmp"),
    *(f"[0-9][0-9][0-9]-[0-9]*{end}" for end in (".json", ".scan.npz", ".keep.npy", ".counts.npz")),
)
BAD = "bad row"  # the reason that skipped rows are counted under
EXAMPLES = 5
_BATCH_BYTES, _BATCH_DOCUMENTS = 4 << 20, 4096
T = TypeVar("T")
_FREE = ("name", "max_bytes", "max_documents", "on_bad_row")  # of a source: what its scans do not depend on


@dataclass(frozen=True)
class Task:
    """One part of one source of a preparation.

    tokenizer: the SHA-256 of `<output>/tokenizer.json`. limit: what has been taken of the source before the part.
    below: documents with a smaller place are held out. splits: those that are written.
    """

    spec: PrepareSpec
    source: int
    part: Part
    tokenizer: str = ""
    limit: Limit = field(default_factory=Limit)
    below: int = 0
    splits: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.source:03d}-{self.part.number:05d}"

    def file(self, suffix: str) -> Path:
        return Path(self.spec.output) / WORK / (self.name + suffix)

    @cached_property
    def keep(self) -> np.ndarray | None:
        """What deduplication left of the part, bool [documents]."""
        return np.load(self.file(".keep.npy")) if self.spec.deduplicate is not None else None

    @property
    def depends_on(self) -> dict[str, Any]:
        """What a record was made for, besides the files' content and the limits of the source."""
        made = self.spec.sources[self.source].retrieval
        return {
            "place": self.part.place,
            "tokenizer": self.tokenizer,
            "below": self.below,
            "keep": None if self.keep is None else hashlib.blake2b(self.keep.tobytes(), digest_size=16).hexdigest(),
            **({"filler": made.text} if made and made.filler else {}),
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
        )
        # Of a part that was begun with less known about the limit, whether it is what it would be now.
        fits &= record.get("before") == [self.limit.bytes, self.limit.documents] or (
            not record["limited"] and self.limit.allows(record["bytes"], record["documents"])
        )
        return record if fits else None

    def has_read(self, recorded: list[dict[str, Any]]) -> bool:
        """Whether the recorded state of the files is the present one."""
        now = self.part.local_files
        return len(now) == len(recorded) and all(map(File.matches, now, recorded))

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

        yield from self.spec.sources[self.source].read(self.part, skipped, skip)

    def files_read(self) -> list[dict[str, Any]]:
        """Records of the files, for a part that has been read; ValueError where they have changed meanwhile."""
        is_beginning = self.part.span is None or self.part.span[0] == 0  # of a file in several parts one has it
        records = [file.record(content=is_beginning) for file in self.part.local_files]
        for file in self.part.local_files:
            if File.found(file.path, file.name) != file:
                raise ValueError(f"{file.path} changed while it was read; run again (what is finished is kept)")
        return records


_REMEDY = (
    "Mend or remove the row and run again (finished parts of other files are kept), or set on_bad_row: skip"
    " (data.prepare.on_bad_row=skip, or --on-bad-row skip with --sources)"
)


def scan_part(task: Task) -> None:
    """Write what deduplication needs to know about a part, unless it is there."""
    assert task.spec.deduplicate is not None
    file = task.file(".scan.npz")
    source = asdict(task.spec.sources[task.source])
    wanted = [task.part.place, asdict(task.spec.deduplicate), {k: v for k, v in source.items() if k not in _FREE}]
    made_for = json.dumps(wanted, sort_keys=True)
    if file.exists():
        with np.load(file) as found:
            if str(found["made_for"]) == made_for and task.has_read(json.loads(str(found["files"]))):
                return
    arrays = scan(task.documents(Counter(), []), task.spec.deduplicate)
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


def _encode(task: Task) -> dict[str, Any]:
    spec, source = task.spec, task.spec.sources[task.source]
    tokenizer = _tokenizer(Path(spec.output), spec.tokenizer.bos, spec.tokenizer.eos, task.tokenizer)
    arguments = (f"shard-{task.name}", source.label, tokenizer.dtype, tokenizer.vocab_size, spec.shard_tokens)
    skipped: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    bad: list[str] = []
    limit = replace(task.limit)
    documents = limit.within(select(task.documents(skipped, bad), task.keep))
    with ExitStack() as stack:
        folders = {split: spec.folders[split] for split in task.splits}
        writers = {split: stack.enter_context(ShardWriter(folder, *arguments)) for split, folder in folders.items()}
        for batch, tokens in encoded(ahead(batches(documents)), tokenizer, skipped):
            sizes = [len(document.text.encode()) for document in batch]
            held = [spec.place(document.id) < task.below for document in batch]
            columns: tuple[list[Any], ...] = (tokens, sizes, [each.id for each in batch], [each.url for each in batch])
            for split, writer in writers.items():
                chosen = [is_held == (split == "heldout") for is_held in held]
                writer.add(*(list(compress(column, chosen)) for column in columns))
            totals.update(documents=len(batch), tokens=sum(map(len, tokens)), bytes=sum(sizes))
        read = task.files_read()
        write_arrays(task.file(".counts.npz"), {split: writer.counts for split, writer in writers.items()})
    return {
        **{key: totals[key] for key in ("documents", "tokens", "bytes")},
        "for": task.depends_on,
        "files": read,
        "skipped": dict(skipped),
        "bad_rows": bad,
        "limited": limit.reached,
        "before": [task.limit.bytes, task.limit.documents],
        "shards": {split: writer.shards for split, writer in writers.items()},
    }


@lru_cache(maxsize=1)
def _tokenizer(output: Path, bos: str, eos: str, sha256: str) -> TextTokenizer:
    tokenizer = TextTokenizer(output / "tokenizer.json", bos, eos)
    if tokenizer.sha256 != sha256:
        raise ValueError(f"{tokenizer.file} was replaced while {output} was being prepared; run again")
    return tokenizer


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


def encoded(
    read: Iterable[list[Document]], tokenizer: TextTokenizer, skipped: Counter[str]
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
    """Batches with their tokens; `skipped` also counts what the vocabulary cannot express.

    Two batches are under way where the tokenizer uses several cores: the library encodes one while the ids of the
    other, for which the interpreter is needed, are taken over.
    """
    at_once = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else 2

    def encode(batch: list[Document]) -> tuple[list[Document], list[np.ndarray], Counter[str]]:
        lost: Counter[str] = Counter()
        return batch, tokenizer.encode_documents([document.text for document in batch], lost), lost

    with ThreadPoolExecutor(at_once) as pool:
        source = iter(read)
        under_way = deque(pool.submit(encode, batch) for batch in islice(source, at_once))
        while under_way:
            under_way.extend(pool.submit(encode, batch) for batch in islice(source, 1))
            batch, tokens, lost = under_way.popleft().result()
            skipped.update(lost)
            yield batch, tokens


def ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The same items, made by another thread up to `depth` in advance."""
    source = iter(items)
    pool = ThreadPoolExecutor(1)
    made = deque(pool.submit(next, source, None) for _ in range(depth))
    try:
        while (item := made.popleft().result()) is not None:
            made.append(pool.submit(next, source, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
