"""Best-fit packing: which piece of which document lies in which window.

A window of `seq_len` inputs holds up to seq_len + 1 tokens, because the target of a position is the token after it.
Documents that fit are never cut: best-fit decreasing bin packing puts them together, longest first, each into the
fullest window that still has room (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
A longer document is cut into full windows that share one token, so that every token but the document's first is a
target once; what remains of it is packed like a document.

Where that leaves more than `TOLERATED_WASTE` empty (hardly any short documents, as in the long part of a mixture), the
longer documents are cut otherwise: poured, one after another, into what the others leave free and then into windows of
their own.
"""

import itertools
from dataclasses import dataclass

import numpy as np

TOLERATED_WASTE = 0.005
LEAST_SHARE = 1 / 64  # of a window: smaller gaps are not worth a cut
# Documents are packed in groups of about that many tokens, which bounds the working memory and costs no more than one
# partly filled window a group.
GROUP_TOKENS = 1 << 30


@dataclass(frozen=True)
class Packing:
    """Windows as pieces of documents; piece p is tokens [start[p], start[p] + length[p]) of document[p].

    borders: int64 [windows + 1]; window w holds the pieces borders[w] to borders[w + 1].
    document [pieces], index into the lengths given, and start [pieces]: int32 where that is enough, else int64.
    length: int32 [pieces]. seq_len: inputs a window.
    """

    borders: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    seq_len: int

    @property
    def num_windows(self) -> int:
        return len(self.borders) - 1

    @property
    def waste(self) -> float:
        """Share of the windows' seq_len + 1 places that hold no token."""
        return 1 - int(self.length.sum(dtype=np.int64)) / max(1, self.num_windows * (self.seq_len + 1))


def pack(lengths: np.ndarray, seq_len: int) -> Packing:
    """Pack documents of `lengths` tokens (int64 [n], n and each at least 1) into windows of `seq_len` inputs.

    A pure function. Within a window pieces are in the order of their documents, so neighbours on disk are read as one.
    """
    ends = np.cumsum(lengths)
    groups = np.searchsorted(ends, np.arange(GROUP_TOKENS, ends[-1], GROUP_TOKENS))
    edges = np.unique([0, *groups, len(lengths)])
    packed = [_pack_group(lengths[a:b], seq_len, first=int(a)) for a, b in itertools.pairwise(edges)]
    offsets = np.cumsum([0, *(len(p.document) for p in packed)])
    borders = [p.borders[:-1] + offset for p, offset in zip(packed, offsets[:-1], strict=True)]
    return Packing(
        np.concatenate([*borders, offsets[-1:]]).astype(np.int64),
        np.concatenate([p.document for p in packed]).astype(_narrow(len(lengths)), copy=False),
        np.concatenate([p.start for p in packed]).astype(_narrow(lengths.max()), copy=False),
        np.concatenate([p.length for p in packed]),
        seq_len,
    )


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The bin of each item of `lengths` (int [n], in [1, capacity]) as int64 [n], and the number of bins.

    Items of one length are interchangeable, and so are bins with the same room: both are moved in bulk, so the cost
    grows with the number of distinct lengths rather than of items.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, firsts = np.unique(-lengths[order], return_index=True)
    edges = [*firsts, len(order)]
    bin_of = np.empty(len(lengths), dtype=np.int64)
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # open bins by the room they have left
    has_room = np.zeros(capacity + 1, dtype=bool)
    num_bins = 0

    def put(bins: np.ndarray, left: int) -> None:
        if left > 0 and len(bins):
            room[left].append(bins)
            has_room[left] = True

    for negative, a, b in zip(distinct, edges[:-1], edges[1:], strict=True):
        length, items = int(-negative), order[a:b]
        while len(items):
            left = length + int(np.argmax(has_room[length:]))
            if has_room[left]:
                bins = room[left][0] if len(room[left]) == 1 else np.concatenate(room[left])
                room[left], has_room[left] = [], False
            else:
                left = capacity
                bins = np.arange(num_bins, num_bins - (-len(items) // (capacity // length)))
                num_bins += len(bins)
            each = left // length  # the fullest bin stays the fullest until the next item does not fit any more
            full, rest = divmod(len(items), each)
            full = min(full, len(bins))
            bin_of[items[: full * each]] = np.repeat(bins[:full], each)
            put(bins[:full], left - each * length)
            items = items[full * each :]
            if full < len(bins) and rest and len(items) == rest:
                bin_of[items] = bins[full]
                put(bins[full : full + 1], left - rest * length)
                full, items = full + 1, items[:0]
            put(bins[full:], left)
    return bin_of, num_bins


def _pack_group(lengths: np.ndarray, seq_len: int, first: int) -> Packing:
    packed = _arrange(*_whole(lengths, seq_len), seq_len, first)
    if packed.waste > TOLERATED_WASTE and (lengths > seq_len + 1).any():
        packed = min(packed, _arrange(*_poured(lengths, seq_len), seq_len, first), key=lambda p: p.num_windows)
    return packed


def _arrange(
    document: np.ndarray, start: np.ndarray, length: np.ndarray, window: np.ndarray, seq_len: int, first: int
) -> Packing:
    """Pieces and their windows, in the order of windows."""
    order = np.lexsort((start, document, window))
    borders = np.zeros(int(window.max()) + 2, dtype=np.int64)
    np.cumsum(np.bincount(window), out=borders[1:])
    return Packing(borders, first + document[order], start[order], length[order].astype(np.int32), seq_len)


def _whole(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Document, start, length and window of all pieces, where long documents become full windows and one remainder."""
    long = np.flatnonzero(lengths > seq_len + 1)
    short = np.flatnonzero(lengths <= seq_len + 1)
    full = (lengths[long] - 1) // seq_len  # windows that a long document fills alone
    rest_start = full * seq_len
    rest = lengths[long] - rest_start
    keep = rest > 1  # a rest of one token holds no target that the last full window does not have
    items = np.concatenate([lengths[short], rest[keep]])
    bins, num_bins = best_fit_decreasing(items, seq_len + 1)
    num_full = int(full.sum())
    return (
        np.concatenate([np.repeat(long, full), short, long[keep]]),
        np.concatenate([_ranges(full) * seq_len, np.zeros(len(short), dtype=np.int64), rest_start[keep]]),
        np.concatenate([np.full(num_full, seq_len + 1), items]),
        np.concatenate([num_bins + np.arange(num_full), bins]),
    )


def _poured(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same, where long documents fill what the others leave free, largest gaps first, and then further windows."""
    short = np.flatnonzero(lengths <= seq_len + 1)
    bins, num_bins = best_fit_decreasing(lengths[short], seq_len + 1)
    room = seq_len + 1 - np.bincount(bins, weights=lengths[short], minlength=num_bins).astype(np.int64)
    by_room = np.argsort(-room, kind="stable")
    gaps = [(int(b), int(room[b])) for b in by_room if room[b] >= max(2, LEAST_SHARE * seq_len)]
    windows = itertools.chain(gaps, ((w, seq_len + 1) for w in itertools.count(num_bins)))
    cuts: list[tuple[int, int, int, int]] = []
    window, free = next(windows)
    for document in np.flatnonzero(lengths > seq_len + 1).tolist():
        start, left = 0, int(lengths[document])
        while left > 1:
            if free < 2:
                window, free = next(windows)
            taken = min(left, free)
            cuts.append((document, start, taken, window))
            free -= taken
            start, left = start + taken - 1, left - taken + 1  # a cut repeats the token at which it is made
    columns = np.array(cuts, dtype=np.int64).reshape(-1, 4).T
    return (
        np.concatenate([short, columns[0]]),
        np.concatenate([np.zeros(len(short), dtype=np.int64), columns[1]]),
        np.concatenate([lengths[short], columns[2]]),
        np.concatenate([bins, columns[3]]),
    )


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, and so on, in one array."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _narrow(most: int) -> type:
    """The integer type for a corpus of that size: these arrays are the memory that a large corpus takes."""
    return np.int32 if most < 1 << 31 else np.int64
