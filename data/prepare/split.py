"""Which documents are held out, decided before anything is tokenized.

A document is held out when its place (`PrepareSpec.place`, a hash of its id) lies below the fraction. Of a small corpus
it can happen that none does, or that all do; then the bound moves just so far that one is on the other side.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from data.corpus.dedup import select
from data.corpus.limit import Limit
from data.corpus.parts import Part
from data.corpus.readers import Document
from data.prepare.part import Task
from data.prepare.spec import PrepareSpec


def heldout_below(spec: PrepareSpec, parts: Sequence[list[Part]], *, only_tokenizer: bool = False) -> int:
    """The bound: documents with a smaller place are held out.

    Reads until it has seen a document on either side, which on average are 1 / fraction of them. only_tokenizer:
    duplicates have not been looked for; a single document will do, and is not held out.

    Raises ValueError for a corpus of a single document (or of a single id).
    """
    asked = spec.heldout_below
    if asked == 0:
        return 0
    count, lowest, highest = 0, (2**64, ""), (-1, "")
    for document in _documents(spec, parts, is_judged=not only_tokenizer):
        count += 1
        place = (spec.place(document.id), document.id)
        lowest, highest = min(lowest, place), max(highest, place)
        if lowest[0] < asked <= highest[0]:
            return asked
    if count == 0:
        return asked
    if lowest[0] == highest[0] and only_tokenizer:
        return 0
    if lowest[0] == highest[0]:
        what = "a single document" if count == 1 else f"{count:,} documents with one id ({lowest[1]})"
        raise ValueError(
            f"{spec.output}: the corpus is {what}, so none can be held out; set heldout_fraction to 0"
            " (--heldout-fraction 0) to train on all of it, or split it into several documents"
        )
    fraction = f"heldout_fraction {spec.heldout_fraction:g}"
    if lowest[0] >= asked:
        said, below = f"no document falls below {fraction}, so one is held out: {lowest[1]}", lowest[0] + 1
    else:
        said, below = f"every document falls below {fraction}, so one is trained on: {highest[1]}", highest[0]
    print(f"{spec.output}: of {count:,} documents {said}", file=sys.stderr, flush=True)
    return below


def _documents(spec: PrepareSpec, parts: Sequence[list[Part]], *, is_judged: bool) -> Iterator[Document]:
    """The documents of all sources, up to their limits."""
    for number, (source, every) in enumerate(zip(spec.sources, parts, strict=True)):
        tasks = (Task(spec, number, part) for part in every)
        found = (d for task in tasks for d in select(task.documents(Counter(), []), task.keep if is_judged else None))
        yield from Limit.of(source).within(found)
