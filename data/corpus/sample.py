"""The sample of a corpus that its tokenizer is trained on.

It is spread over all of a source, whose files often come by language, domain or date. Which documents it is depends on
the corpus and the seed alone.
"""

import bisect
import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from data.corpus.parts import Part, row_groups
from data.corpus.readers import PACKS, Document, OnBad, stop
from data.corpus.sources import Limit, Source
from s2.progress import progress

READ = 2  # bytes that are looked at for each byte of the sample; a source that has no more on disk is read whole
_STRETCH, _PLACES = 4 << 20, 64  # of a larger one, up to that many bytes at each of at least as many places
_LONGEST = 1 << 16  # bytes of one document, or a hundredth of the sample where that is more


def sample_texts(
    sources: Sequence[Source],
    parts: Sequence[list[Part]],
    sample_bytes: int,
    seed: int,
    is_heldout: Callable[[str], bool],
    on_bad: OnBad = stop,
) -> Iterator[str]:
    """Texts of about `sample_bytes` UTF-8 bytes: an equal share from each source, and where one has less, more from the
    others. Documents that `is_heldout` (by id) are not taken.

    Within a source every document has the same chance, in proportion to the size of its files; long documents count
    with their beginning. Of a compressed file larger than the share of it, the beginning is read.
    """
    found: dict[int, _Reservoir] = {}
    left = max(sample_bytes, len(sources))
    by_size = sorted(range(len(sources)), key=lambda i: sum(part.size for part in parts[i]))
    for done, i in enumerate(by_size):
        reservoir = _Reservoir(max(1, left // (len(sources) - done)), seed)
        with progress(f"tokenizer sample: {sources[i].label}", None, "B", scaled=True) as bar:
            for document in _looked_at(sources[i], parts[i], reservoir.size, on_bad):
                bar.update(len(document.text))
                if not is_heldout(document.id):
                    reservoir.add(document)
        reservoir.cut()
        found[i] = reservoir
        left -= reservoir.held
    for i in range(len(sources)):
        yield from found.pop(i).texts()


class _Reservoir:
    """Of all documents added, those with the smallest hashes that fit into `size` bytes; the last one is cut."""

    def __init__(self, size: int, seed: int):
        self.size, self.held = size, 0
        self._seed, self._count = seed, 0
        self._longest = min(size, max(size // 100, _LONGEST))
        self._heap: list[tuple[int, int, bytes]] = []  # negative hash, place, text

    def add(self, document: Document) -> None:
        digest = hashlib.blake2b(f"sample:{self._seed}:{document.id}".encode(), digest_size=8).digest()
        key = -int.from_bytes(digest, "big")
        self._count += 1
        if self.held >= self.size and key < self._heap[0][0]:
            return
        text = document.text[: self._longest].encode()[: self._longest]
        heapq.heappush(self._heap, (key, self._count, text))
        self.held += len(text)
        while self.held - len(self._heap[0][2]) >= self.size:
            self.held -= len(heapq.heappop(self._heap)[2])

    def cut(self) -> None:
        """Cut the last document to the size."""
        if self.held > self.size:
            key, place, text = self._heap[0]
            self._heap[0] = (key, place, text[: len(text) - (self.held - self.size)])
            self.held = self.size

    def texts(self) -> Iterator[str]:
        """What is held, in the order in which it came."""
        for _, _, text in sorted(self._heap, key=lambda entry: entry[1]):
            yield text.decode(errors="ignore")


def _looked_at(source: Source, parts: list[Part], share: int, on_bad: OnBad) -> Iterator[Document]:
    """The documents that a sample of `share` bytes is chosen from."""
    budget = READ * share
    total = sum(part.size for part in parts)
    total = min(total, source.max_bytes or total)  # a limit, in bytes of text, reaches about as far on disk
    if total <= budget or source.max_documents is not None:
        yield from Limit.of(source).within(document for part in parts for document in source.read(part, on_bad=on_bad))
        return
    stretch = max(1, min(_STRETCH, budget // _PLACES))
    step = total * stretch // budget
    begin, next_place = 0, step // 2
    for part in parts:
        inside = []
        while next_place < min(begin + part.size, total):
            inside.append(next_place - begin)
            next_place += step
        for piece, times in _pieces(part, inside, stretch, step).items():
            taken = 0
            for document in source.read(piece, on_bad=on_bad):
                yield document
                taken += len(document.text)
                if taken >= times * stretch:
                    break
        begin += part.size


def _pieces(part: Part, places: list[int], stretch: int, step: int) -> Counter[Part]:
    """What to read at some places of a part, `step` bytes from each other, and how many of these each piece holds."""
    found: Counter[Part] = Counter()
    if not places:
        return found
    whole = part.span is not None or len(part.files) == 1
    sizes = [part.size] if whole else [file.size for file in part.files]
    ends = list(itertools.accumulate(sizes))
    taken = 0  # files before this one have been
    for place in places:
        i = max(taken, bisect.bisect_right(ends, place, hi=len(ends) - 1))
        if i == len(sizes):
            break
        if sizes[i] < stretch and not whole:
            last = bisect.bisect_left(ends, ends[i] - sizes[i] + stretch, hi=len(ends) - 1)
            found[Part(part.format, part.files[i : last + 1], None, stretch)] = 1
            taken = last + 1
        else:
            offset = max(0, place - (ends[i] - sizes[i]))
            found[_piece(part, i, offset, sizes[i], step)] += 1
    return found


def _piece(part: Part, i: int, offset: int, size: int, step: int) -> Part:
    """File `i` of a part from `offset` on, or as much of it as can be read on its own."""
    file = part.files[i]
    span = part.span
    if part.format == "jsonl" and not file.path.endswith(PACKS):
        begin, end = span or (0, size)
        at = min(begin + offset, end)
        span = (at, min(at + step, end))
    elif part.format == "parquet":
        first, last = span or (0, row_groups(file.path))
        at = first + min(offset * (last - first) // max(1, size), last - first - 1)
        span = (at, at + 1) if last > first else span
    return Part(part.format, (file,), span, min(step, size))
