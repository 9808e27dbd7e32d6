"""The stages of a preparation that take their time: finding duplicates, and encoding. Each goes on with what is done.

Sources with a limit are read only as far as it reaches: their parts are begun a little ahead of what is confirmed.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpus.dedup import Deduplicator, select
from data.corpus.sources import Document
from data.prepare.plan import Plan, Planned
from data.prepare.pool import Workers, workers
from data.prepare.spec import PrepareSpec
from data.prepare.split import heldout_below
from data.prepare.work import Allowance, Budget, Task, discard_part, encode_part, scan_part, within
from data.shards.writer import read_arrays, write_array
from s2 import files


def deduplicate(spec: PrepareSpec, plan: Plan, work: Path) -> tuple[list[list[Planned]], list[Counter[str]]]:
    """Write which documents of each part stay: `work/kept.json` says that it is done, and for which state of the files.

    Returns the parts (of a source with a limit only as many as it takes) and what was dropped, by source and reason.
    """
    assert spec.deduplicate is not None
    file, parts = work / "kept.json", plan.sources
    kept = files.read_json(file) if file.is_file() else {}
    if kept.get("state") != plan.state:
        judge = Deduplicator(spec.deduplicate)
        with workers("scanning for duplicates", sum(map(len, parts)), spec.workers) as pool:
            kept = {
                "state": plan.state,
                "sources": [_judge(spec, n, every, judge, pool) for n, every in enumerate(parts)],
            }
        files.write_json(file, kept)
    return (
        [every[:taken] for every, (taken, _) in zip(parts, kept["sources"], strict=True)],
        [Counter(reasons) for _, reasons in kept["sources"]],
    )


def _judge(
    spec: PrepareSpec, number: int, parts: list[Planned], judge: Deduplicator, pool: Workers
) -> tuple[int, dict[str, int]]:
    """Scan a source's parts and decide about them in order; returns how many it takes and what was dropped."""
    source = spec.sources[number]
    left = Budget(source.max_bytes, source.max_documents)
    ahead = len(parts) if left == Budget(None, None) else 2 * pool.size
    tasks = [Task(spec, number, i, part) for i, part in enumerate(parts)]
    reasons: Counter[str] = Counter()
    scanned: set[int] = set()
    submitted = taken = 0
    while taken < len(tasks):
        for task in tasks[submitted : taken + ahead]:
            pool.submit(task.index, scan_part, task)
            submitted += 1
        while taken not in scanned:
            scanned.update(index for index, _ in pool.done())
        scan = read_arrays(tasks[taken].file(".scan.npz"))
        allowance = Allowance(left, first=taken == 0)
        keep, why = judge.keep(scan, allowance.takes)
        write_array(tasks[taken].file(".keep.npy"), keep)
        reasons.update(why)
        left = left.after({"bytes": int(scan["sizes"][keep].sum()), "documents": int(keep.sum())})
        taken += 1
        if allowance.exceeded or left.spent:
            break
    while pool.busy:
        pool.done()
    return taken, dict(reasons)


def split_bound(spec: PrepareSpec, plan: Plan, parts: list[list[Planned]], work: Path, *, only_tokenizer: bool) -> int:
    """The bound of `data.prepare.split`, from `work/split.json` where the files are those it was decided for.

    only_tokenizer: duplicates have not been looked for.
    """
    file = work / "split.json"
    state = [plan.state, only_tokenizer]
    deduplicated = spec.deduplicate is not None and not only_tokenizer
    decided = files.read_json(file) if file.is_file() else {}
    if decided.get("state") != state:
        documents = (
            document
            for number, every in enumerate(parts)
            for document in _documents_of(spec, number, every, deduplicated=deduplicated)
        )
        decided = {"state": state, "below": heldout_below(spec, documents, only_tokenizer=only_tokenizer)}
        files.write_json(file, decided)
    return int(decided["below"])


def _documents_of(spec: PrepareSpec, number: int, parts: list[Planned], *, deduplicated: bool) -> Iterator[Document]:
    """A source's documents, up to its limit."""
    source = spec.sources[number]
    tasks = [Task(spec, number, i, part) for i, part in enumerate(parts)]
    documents = (d for t in tasks for d in select(t.documents(Counter(), []), t.keep if deduplicated else None))
    return within(documents, Allowance(Budget(source.max_bytes, source.max_documents), first=True))


def encode(
    spec: PrepareSpec, parts: list[list[Planned]], tokenizer: str, below: int, splits: tuple[str, ...]
) -> list[list[tuple[Task, dict[str, Any]]]]:
    """Encode all parts; the tasks and records of each source in order, up to its limit. Arguments as of `Task`."""
    sources = [_Progress(spec, number, every, (tokenizer, below, splits)) for number, every in enumerate(parts)]
    with workers("tokenizing", sum(map(len, parts)), spec.workers) as pool:
        while True:
            for source in sources:
                for task in source.ready(1 if pool.size == 1 else 2 * pool.size):
                    pool.submit((source, task), encode_part, task)
            if not pool.busy:
                return [source.confirmed for source in sources]
            for (source, task), record in pool.done():
                source.take(task, record)


class _Progress:
    """How far one source has come. Without a limit all its parts are ready at once. With one, parts are begun a little
    ahead of what is confirmed, and what turns out to lie beyond the limit is discarded."""

    def __init__(
        self, spec: PrepareSpec, number: int, parts: list[Planned], made_for: tuple[str, int, tuple[str, ...]]
    ):
        source = spec.sources[number]
        self.spec, self.number, self.parts, self.made_for = spec, number, parts, made_for
        self.left = Budget(source.max_bytes, source.max_documents)
        self.unlimited = self.left == Budget(None, None)
        self.confirmed: list[tuple[Task, dict[str, Any]]] = []
        self._begun: set[int] = set()
        self._waiting: dict[int, tuple[Task, dict[str, Any]]] = {}
        self._ended = False

    def ready(self, ahead: int) -> list[Task]:
        """Tasks to begin now."""
        if self._ended:
            return []
        first = len(self.confirmed)
        stop = len(self.parts) if self.unlimited else min(len(self.parts), first + ahead)
        indices = [i for i in range(first, stop) if i not in self._begun]
        self._begun.update(indices)
        tokenizer, below, splits = self.made_for
        return [Task(self.spec, self.number, i, self.parts[i], tokenizer, self.left, below, splits) for i in indices]

    def take(self, task: Task, record: dict[str, Any]) -> None:
        """Note a part that is done."""
        self._waiting[task.index] = (task, record)
        while not self._ended and (entry := self._waiting.pop(len(self.confirmed), None)):
            if not self.left.allows(entry[1]):
                self._begun.discard(entry[0].index)  # it was begun before the limit was known exactly
                break
            self.confirmed.append(entry)
            self.left = self.left.after(entry[1])
            self._ended = entry[1]["limited"] or self.left.spent
        if self._ended:
            for task, _ in self._waiting.values():
                discard_part(task)
            self._waiting.clear()
