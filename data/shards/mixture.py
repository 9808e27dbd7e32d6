"""Which tokens make up sample number i: packed streams of documents, weighted mixtures of them, and a curriculum of
window lengths.

Everything here is a pure function of (settings, seed, index) and costs the same for any index: nothing is replayed.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data.shards.order import PERIOD, Permutation, Quotas
from data.shards.packing import pack
from data.shards.reader import TokenShards
from s2.settings import SettingError

SYNTHETIC = "retrieval"  # the path of sources that `data.corpus.retrieval` makes up
PACKING = "best-fit/1"  # of `data.shards.packing`; another algorithm is another sequence

Window = tuple[np.ndarray, np.ndarray]  # tokens int64 [at most seq_len + 1], borders inside them int64


class PackedStream:
    """The documents of a shard folder that pass a filter, packed into windows (`data.shards.packing`).

    source: only documents of that source. min_tokens, max_tokens: only documents of that many tokens (inclusive).

    Raises ValueError where no document passes, or all that pass hold no target.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        *,
        source: str | None = None,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        where: str = "",
    ):
        self.shards, self.seq_len, self.source = shards, seq_len, source
        self.label = _label(shards, source, min_tokens, max_tokens)
        lengths = np.diff(shards.offsets)
        of_source = shards.documents_of(source, f"{where}.source" if where else "")
        keep = np.zeros(len(lengths), dtype=bool)
        keep[of_source] = lengths[of_source] >= min_tokens
        if max_tokens is not None:
            keep &= lengths <= max_tokens
        if not keep.any():
            bound = "" if max_tokens is None else f" and at most {max_tokens}"
            raise SettingError(
                where,
                f"none of the {len(of_source):,} documents in {shards.folder} has at least"
                f" {min_tokens}{bound} tokens; the longest has {lengths[of_source].max():,},"
                f" the shortest {lengths[of_source].min():,}; change that bound, or prepare other documents (more"
                " held-out ones by `heldout_fraction`)",
            )
        self.documents = np.flatnonzero(keep).astype(np.int32 if len(keep) < 1 << 31 else np.int64)  # [n] kept ones
        kept = lengths[self.documents]
        self.num_tokens = int(kept.sum())
        if self.num_tokens == len(kept):
            raise SettingError(where, f"every document in {shards.folder} is a single token, so there is no target")
        self.packing = pack(kept, seq_len)

    @property
    def num_windows(self) -> int:
        return self.packing.num_windows

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the kept documents' text."""
        return int(np.diff(self.shards.byte_offsets)[self.documents].sum())

    @property
    def synthetic_share(self) -> float:
        """Share of the kept documents' tokens whose source is made up (`path: retrieval`), 0 to 1."""
        sources = self.shards.manifest["sources"]
        names = [each["name"] for each in sources if each["path"] == SYNTHETIC and each["documents"]]
        made = np.concatenate([np.empty(0, dtype=np.int64), *map(self.shards.documents_of, names)])
        made = np.intersect1d(made, self.documents, assume_unique=True)
        return int((self.shards.offsets[made + 1] - self.shards.offsets[made]).sum()) / self.num_tokens

    def window(self, index: int) -> Window:
        """Tokens of a window, int64 [at most seq_len + 1], and the positions in [1, len(tokens)) at which another
        piece begins, int64."""
        packing = self.packing
        pieces = slice(int(packing.borders[index]), int(packing.borders[index + 1]))
        lengths = packing.length[pieces]
        begins = self.shards.offsets[self.documents[packing.document[pieces]]] + packing.start[pieces]
        ends = np.cumsum(lengths, dtype=np.int64)
        tokens = np.empty(int(ends[-1]), dtype=np.int64)
        # Pieces that lie next to each other on disk are read in one go.
        breaks = np.flatnonzero(begins[1:] != begins[:-1] + lengths[:-1]) + 1
        for i, j in zip([0, *breaks.tolist()], [*breaks.tolist(), len(begins)], strict=True):
            self.shards.read_into(tokens[int(ends[i]) - int(lengths[i]) : int(ends[j - 1])], int(begins[i]))
        return tokens, ends[:-1]


def _label(shards: TokenShards, source: str | None, min_tokens: int, max_tokens: int | None) -> str:
    words = [str(shards.folder)]
    if source is not None:
        words.append(f"source {source}")
    if min_tokens > 1 or max_tokens is not None:
        most = "or more" if max_tokens is None else f"to {max_tokens:,}"
        words.append(f"documents of {min_tokens:,} {most} tokens")
    return ", ".join(words)


class Mixture:
    """An endless, weighted, shuffled sequence of windows.

    Of every `PERIOD` consecutive samples (aligned) each component gets its quota (`data.shards.order`), at shuffled
    places. Within a component, windows come in a pseudo-random order, another one each epoch.

    quotas: places of each component in a period on average, float64 [components].
    """

    def __init__(self, streams: Sequence[PackedStream], weights: Sequence[float], seed: int):
        self.streams, self.seed = list(streams), seed
        self._quotas = Quotas(weights)
        self.quotas = self._quotas.exact

    def locate(self, index: int) -> tuple[int, int, int]:
        """Sample number -> (component, epoch of that component, window)."""
        period, place = divmod(index, PERIOD)
        owner, turn = _layout(tuple(self._quotas.in_period(period).tolist()), self.seed)
        component = int(owner[place])
        local = int(self._quotas.before(period)[component] + turn[place])
        size = self.streams[component].num_windows
        epoch, window = divmod(local, size)
        return component, epoch, Permutation(size, ("windows", self.seed, component, epoch))[window]

    def drawn(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples are of each component, int64 [components]."""
        period, rest = divmod(samples, PERIOD)
        owner, _ = _layout(tuple(self._quotas.in_period(period).tolist()), self.seed)
        return self._quotas.before(period) + np.bincount(owner[:rest], minlength=len(self.streams))

    def __getitem__(self, index: int) -> Window:
        """Tokens and borders of sample `index` >= 0 (see `PackedStream.window`)."""
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
                    "windows": s.num_windows,
                    "quota": int(q) if q == int(q) else float(q),
                }
                for s, q in zip(self.streams, self.quotas, strict=True)
            ],
        }


@lru_cache(maxsize=128)
def _layout(quotas: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which component has each place of a period, and how many earlier places of the period it has."""
    shuffle = Permutation(PERIOD, ("interleave", seed))
    owner = np.repeat(np.arange(len(quotas)), quotas)[[shuffle[i] for i in range(PERIOD)]]
    turn = np.zeros(PERIOD, dtype=np.int64)
    for component in range(len(quotas)):
        places = np.flatnonzero(owner == component)
        turn[places] = np.arange(len(places))
    return owner, turn


@dataclass(frozen=True)
class Passes:
    """How much of a mixture's component a run asks for.

    component: folder, source and lengths of its documents. available: its tokens. asked: places for tokens in its share
    of the samples. passes: how often its windows are gone through; what is above 1 is repetition. synthetic: share of
    its tokens that are synthetic retrieval documents, 0 to 1.
    """

    component: str
    available: int
    asked: int
    passes: float
    synthetic: float


class Curriculum:
    """The endless training sequence: rows of `seq_len` inputs, made of one window or of several shorter ones.

    Phase p takes `rows[p]` rows from mixture p, whose windows are seq_len / k long; a row then is k windows side by
    side, and neither attention nor positions cross from one to the next. So every batch of a run has the same shape
    and the same number of tokens. The last phase has no end. Each phase begins its own pass over the documents.
    """

    def __init__(self, mixtures: Sequence[Mixture], rows: Sequence[int]):
        self.mixtures = list(mixtures)
        self.seq_len = mixtures[-1].streams[0].seq_len
        self.begins = [0, *np.cumsum(rows, dtype=np.int64).tolist()]
        self.windows_per_row = [self.seq_len // mixture.streams[0].seq_len for mixture in mixtures]

    def __getitem__(self, index: int) -> list[Window]:
        """The windows of row `index` >= 0."""
        phase = bisect.bisect_right(self.begins, index) - 1
        per_row = self.windows_per_row[phase]
        first = (index - self.begins[phase]) * per_row
        return [self.mixtures[phase][first + i] for i in range(per_row)]

    def passes(self, rows: int) -> list["Passes"]:
        """How often each component is gone through in the first `rows` rows."""
        streams = self.mixtures[-1].streams
        asked, passes = np.zeros(len(streams), dtype=np.int64), np.zeros(len(streams))
        ends = [*self.begins[1:], rows]
        for mixture, begin, end, per_row in zip(self.mixtures, self.begins, ends, self.windows_per_row, strict=True):
            windows = mixture.drawn(max(0, min(rows, end) - begin) * per_row)
            asked += windows * mixture.streams[0].seq_len
            passes += windows / [stream.num_windows for stream in mixture.streams]
        return [
            Passes(stream.label, stream.num_tokens, int(n), float(p), stream.synthetic_share)
            for stream, n, p in zip(streams, asked, passes, strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """What the rows depend on; equal fingerprints mean equal sequences."""
        phases = [
            {"begins": begin, **mixture.fingerprint()}
            for begin, mixture in zip(self.begins, self.mixtures, strict=True)
        ]
        return {"packing": PACKING, "seq_len": self.seq_len, "phases": phases}
