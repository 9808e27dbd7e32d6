"""Exact and near-duplicate removal over a whole corpus, before it is tokenized.

Parts are scanned in parallel (`scan`): a digest of each document's text and, for near-duplicates, its MinHash signature
over word n-grams (Broder 1997). Then one process keeps the first of each set of duplicates in reading order
(`Deduplicator`): candidates come from banded locality-sensitive hashing, and are compared by the similarity that the
signatures estimate.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH

from data.corpus.readers import Document
from s2.settings import Check, Positive, SettingError, Settings, Share


@dataclass(frozen=True)
class Deduplicate(Settings):
    """`prepare.deduplicate` of a recipe: `exact`, `near`, or the settings of near-duplicates.

    threshold: documents whose Jaccard similarity is at least that are duplicates; None compares whole texts only.
    words: length of the n-grams, in words between white space (in scripts without spaces a text is one word).
    permutations: size of the signatures; the error of the similarity is about 1 / sqrt(permutations).
    """

    threshold: Share | None = 0.8
    words: Positive = 5
    permutations: Annotated[int, Check("a whole number >= 16", lambda n: n >= 16)] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.index()
        except ValueError as error:
            reason = f"{self.threshold} with {self.permutations} permutations: {error}"
            raise SettingError("threshold", reason) from None

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        if text not in ("exact", "near"):
            raise SettingError("", f"unknown {text!r}; known: exact, near, or {{threshold, words, permutations}}")
        return {"threshold": None} if text == "exact" else {}

    def index(self) -> MinHashLSH | None:
        """An empty index of signatures, None where whole texts are compared. Its bands are chosen for recall:
        candidates are compared afterwards."""
        if self.threshold is None:
            return None
        return MinHashLSH(threshold=self.threshold, num_perm=self.permutations, weights=(0.1, 0.9))


def scan(documents: Iterable[Document], settings: Deduplicate) -> dict[str, np.ndarray]:
    """What deciding about a part's n documents needs: `digests` uint64 [n, 2], `sizes` int64 [n] (bytes of text) and
    `signatures` uint32 [n, permutations] (no columns for exact duplicates)."""
    digests, sizes, signatures = [], [], []
    near = settings.threshold is not None
    for document in documents:
        text = document.text.encode()
        digests.append(np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64))
        sizes.append(len(text))
        if near:
            sketch = MinHash(settings.permutations, seed=1, scheme="affine32", hashfunc=xxhash.xxh32_intdigest)
            sketch.update_batch(_ngrams(document.text, settings.words))
            signatures.append(sketch.hashvalues.astype(np.uint32))
    return {
        "digests": np.array(digests, dtype=np.uint64).reshape(-1, 2),
        "sizes": np.array(sizes, dtype=np.int64),
        "signatures": np.array(signatures, dtype=np.uint32).reshape(len(sizes), settings.permutations * near),
    }


def _ngrams(text: str, words: int) -> set[bytes]:
    every = text.split()
    return {" ".join(every[i : i + words]).encode() for i in range(max(1, len(every) - words + 1))}


class Deduplicator:
    """Decides about documents in order, in one process: exact duplicates at about a microsecond and 100 bytes a
    document, near-duplicates at 0.3 milliseconds and 4 kilobytes, so for up to some ten million documents."""

    def __init__(self, settings: Deduplicate):
        self.settings = settings
        self._seen: set[bytes] = set()
        self._index = settings.index()
        self._signatures: list[np.ndarray] = []

    def keep(
        self, scanned: dict[str, np.ndarray], takes: Callable[[int], bool] = lambda size: True
    ) -> tuple[np.ndarray, dict[str, int]]:
        """Which of a part's documents stay, bool [n], and how many went for which reason.

        takes: whether the source's limit has room for the next document, of so many bytes. Documents beyond the limit
            do not stay, and nothing is a duplicate of them.
        """
        reasons = {"duplicate": 0, "near duplicate": 0}
        keep = np.ones(len(scanned["sizes"]), dtype=bool)
        for i, digest in enumerate(scanned["digests"]):
            key = digest.tobytes()
            if key in self._seen:
                keep[i] = False
                reasons["duplicate"] += 1
            elif self._is_near(scanned["signatures"][i]):
                keep[i] = False
                reasons["near duplicate"] += 1
            elif takes(int(scanned["sizes"][i])):
                self._remember(key, scanned["signatures"][i])
            else:
                keep[i:] = False
                break
        return keep, {reason: n for reason, n in reasons.items() if n}

    def _is_near(self, signature: np.ndarray) -> bool:
        if self._index is None or self.settings.threshold is None:
            return False
        similar = (
            (self._signatures[other] == signature).mean() >= self.settings.threshold
            for other in self._index.query(_sketch(signature))
        )
        return any(similar)

    def _remember(self, key: bytes, signature: np.ndarray) -> None:
        self._seen.add(key)
        if self._index is not None:
            self._index.insert(len(self._signatures), _sketch(signature))
            self._signatures.append(signature)


def _sketch(signature: np.ndarray) -> MinHash:
    return MinHash(len(signature), seed=1, scheme="affine32", hashvalues=signature)


def select(documents: Iterable[Document], keep: np.ndarray | None) -> Iterator[Document]:
    """The documents that stay (all where `keep` is None).

    Raises ValueError where there are not as many as were scanned.
    """
    count = 0
    for document in documents:
        if keep is None or (count < len(keep) and keep[count]):
            yield document
        count += 1
    if keep is not None and count != len(keep):
        raise ValueError(f"a source had {len(keep):,} documents when it was scanned and {count:,} now; prepare again")
