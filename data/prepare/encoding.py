"""Documents in batches, read and encoded at the same time."""

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from data.corpus.readers import Document
from data.corpus.tokenizer import TextTokenizer

T = TypeVar("T")

_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 4096


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
