"""Which tokens make up sample number i: packed streams of documents, and a weighted mixture of them.

Everything here is a pure function of (settings, seed, index) and costs the same for any index, so resuming a
run on other hardware, or looking at sample 10^9, needs no replay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.permutation import Permutation
from data.schema import whole_number
from data.shards import TokenShards

PERIOD = 1000  # samples after which every component has had exactly its quota


@dataclass(frozen=True)
class Component:
    """One entry of a recipe's `mixture`.

    path: a shard folder. weight: share of the samples (any scale; shares are weight / sum of weights).
    min_tokens, max_tokens: use only documents of that many tokens (inclusive).
    """

    path: str
    weight: float = 1.0
    min_tokens: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight: {self.weight!r}, expected a positive number")
        check_length_filter(self)


def check_length_filter(settings: Any) -> None:
    """Make `min_tokens`, `max_tokens` of frozen `settings` ints; raises ValueError where they exclude all."""
    object.__setattr__(settings, "min_tokens", whole_number(settings.min_tokens, "min_tokens"))
    if settings.max_tokens is not None:
        least = settings.min_tokens or 1
        object.__setattr__(settings, "max_tokens", whole_number(settings.max_tokens, "max_tokens", least))


class PackedStream:
    """The documents of a shard folder, end to end, cut into windows.

    Window k holds stream tokens [k * seq_len, (k + 1) * seq_len]: seq_len inputs and one more token, because
    the target of a position is the token after it. Neighbours share that token, so every token is a target
    once. `keep_tail` adds the last, shorter window.

    Raises ValueError where no document passes the filter, or all that pass make less than one window.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        *,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        keep_tail: bool = False,
        where: str = "",
    ):
        if seq_len < 1:
            raise ValueError(f"seq_len: {seq_len}, expected at least 1")
        self.shards, self.seq_len = shards, seq_len
        lengths = np.diff(shards.offsets)
        keep = lengths >= min_tokens
        if max_tokens is not None:
            keep &= lengths <= max_tokens
        where = where or str(shards.folder)
        if not keep.any():
            bound = "" if max_tokens is None else f" and at most {max_tokens}"
            raise ValueError(
                f"{where}: none of the {len(lengths):,} documents in {shards.folder} has at least"
                f" {min_tokens}{bound} tokens; the longest has {lengths.max():,},"
                f" the shortest {lengths.min():,}"
            )
        self.documents = np.flatnonzero(keep)  # [n] kept documents
        self.starts = np.zeros(len(self.documents) + 1, dtype=np.int64)  # [n + 1] where each begins in the stream
        np.cumsum(lengths[self.documents], out=self.starts[1:])
        self.num_tokens = int(self.starts[-1])
        targets = self.num_tokens - 1
        self.num_windows = -(-targets // seq_len) if keep_tail else targets // seq_len
        if self.num_windows < 1:
            raise ValueError(
                f"{where}: {len(self.documents):,} documents with {self.num_tokens:,} tokens"
                f" in {shards.folder} make less than one window of seq_len {seq_len} (+1)"
            )

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the kept documents' text."""
        return int(np.diff(self.shards.byte_offsets)[self.documents].sum())

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [seq_len + 1] of a window (fewer in a kept tail) and, int64, the positions in
        [1, len(tokens)) at which a new document begins."""
        start = index * self.seq_len
        stop = min(start + self.seq_len + 1, self.num_tokens)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))  # documents [first, last) overlap
        documents = self.documents[first:last]
        # Kept documents that lie next to each other on disk are read in one piece.
        breaks = np.flatnonzero(np.diff(documents) != 1) + 1
        pieces = []
        for i, j in zip([0, *breaks], [*breaks, len(documents)], strict=True):
            begin, end = self.shards.offsets[documents[i]], self.shards.offsets[documents[j - 1] + 1]
            begin += max(0, start - int(self.starts[first + i]))
            end -= max(0, int(self.starts[first + j]) - stop)
            pieces.append(self.shards.read(int(begin), int(end)))
        borders = self.starts[first + 1 : last] - start
        return np.concatenate(pieces), borders[borders > 0]


class Mixture:
    """An endless, weighted, shuffled sequence of windows.

    Of every `PERIOD` consecutive samples (aligned) each component gets a fixed quota by largest remainder, at
    shuffled places. Within a component, windows come in a pseudo-random order, another one each epoch.

    Raises ValueError where a component's share is below one sample per period.
    """

    def __init__(self, streams: Sequence[PackedStream], weights: Sequence[float], seed: int):
        self.streams, self.seed = list(streams), seed
        shares = np.array(weights, dtype=np.float64) / np.sum(weights)
        self.quotas = largest_remainder(shares, PERIOD)
        for stream, share, quota in zip(streams, shares, self.quotas, strict=True):
            if quota == 0:
                raise ValueError(
                    f"mixture: {stream.shards.folder} has a share of {share:.2g}, below one sample"
                    f" in {PERIOD}; raise its weight or leave it out"
                )
        owners = np.repeat(np.arange(len(shares)), self.quotas)
        shuffle = Permutation(PERIOD, ("interleave", seed))
        self._owner = np.array([owners[shuffle[i]] for i in range(PERIOD)])
        self._turn = np.zeros(PERIOD, dtype=np.int64)  # how many earlier samples of the period the owner had
        for component in range(len(shares)):
            places = np.flatnonzero(self._owner == component)
            self._turn[places] = np.arange(len(places))
        self._permutations: dict[tuple[int, int], Permutation] = {}

    def locate(self, index: int) -> tuple[int, int, int]:
        """Sample number -> (component, epoch of that component, window)."""
        period, place = divmod(index, PERIOD)
        component = int(self._owner[place])
        local = period * int(self.quotas[component]) + int(self._turn[place])
        size = self.streams[component].num_windows
        epoch, turn = divmod(local, size)
        key = (component, epoch)
        if key not in self._permutations:
            if len(self._permutations) > 4 * len(self.streams):
                self._permutations.clear()
            self._permutations[key] = Permutation(size, ("windows", self.seed, component, epoch))
        return component, epoch, self._permutations[key][turn]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document starts of sample `index` >= 0 (see `PackedStream.window`)."""
        component, _, window = self.locate(index)
        return self.streams[component].window(window)

    def fingerprint(self) -> dict[str, Any]:
        """What the sample order depends on; equal fingerprints mean equal sequences."""
        return {
            "seed": self.seed,
            "seq_len": self.streams[0].seq_len,
            "components": [
                {
                    "data": s.shards.identity,
                    "documents": len(s.documents),
                    "tokens": s.num_tokens,
                    "quota": int(q),
                }
                for s, q in zip(self.streams, self.quotas, strict=True)
            ],
        }


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers proportional to `shares` (which sum to 1) that sum to `total`: Hamilton's method."""
    exact = shares * total
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - quotas), kind="stable")
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas
