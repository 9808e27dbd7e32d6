"""The order of samples: how many of every thousand each component of a mixture gets, and which window comes k-th, both
found at once for any k and never written down.

A component's share of a period is a whole number, which it has in every period, and a fraction. The fractions add up
to a few places, which go round: in period k they are {k * phi} + j, j = 0, 1, ..., on a line along which the fractions
lie one behind the other, phi the golden ratio, whose multiples are spread as evenly as can be. How often a component
has had such a place before period k is a sum of floors, in O(log k) steps (Knuth, TAOCP 1.2.4, ex. 45).

Windows are permuted by a Feistel network over the smallest even-bit power of two that holds the domain; values that
fall outside are sent through again ("cycle walking", Black and Rogaway 2002), which keeps it a bijection. NumPy's
generators may draw otherwise in another version (NEP 19); a resumed run must not.
"""

import hashlib
import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

PERIOD = 1000
_EXACT = 1e-6  # of a sample a period: if all shares are nearer to whole numbers, that is rounding
_UNIT = 1 << 48  # the fractions are counted in this
_STEP = int(_UNIT * 0.6180339887498949) | 1
_MASK = (1 << 64) - 1
_ROUNDS = 6


class Quotas:
    """Places of each component in each period of `PERIOD` samples, for shares in proportion to `weights`.

    exact: what a component gets in a period on average, float64 [components].
    """

    def __init__(self, weights: Sequence[float]):
        weight = np.array(weights, dtype=np.float64)
        exact = weight / weight.sum() * PERIOD
        near = np.round(exact)
        self.exact = near if (near > 0).all() and (np.abs(exact - near) < _EXACT).all() else exact
        self._whole = np.floor(self.exact).astype(np.int64)
        left = PERIOD - int(self._whole.sum())  # places that go round
        ends = np.cumsum(self.exact - self._whole)
        edges = [0, *(round(float(end) * _UNIT) for end in ends)]
        if left:
            # What rounding has left over or taken goes to the last that has a fraction.
            last = int(np.flatnonzero(self.exact > self._whole)[-1])
            edges[last + 1 :] = [left * _UNIT] * (len(ends) - last)
        self._edges = tuple(itertools.pairwise(edges)) if left else ()

    def in_period(self, period: int) -> np.ndarray:
        """Places in a period, int64 [components]; they sum to PERIOD."""
        return self.before(period + 1) - self.before(period)

    def before(self, period: int) -> np.ndarray:
        """Places in all earlier periods, int64 [components]."""
        return self._whole * period + (_places_before(self._edges, period) if self._edges else 0)


@lru_cache(maxsize=128)  # of the periods that the readers of a rank are at
def _places_before(edges: tuple[tuple[int, int], ...], period: int) -> np.ndarray:
    """How many of the places that go round lay between each pair of edges before a period."""
    counts = [0] * len(edges)
    for i, (begin, end) in enumerate(edges):
        for j in range(begin // _UNIT, -(-end // _UNIT)):
            counts[i] += _multiples_below(period, min(_UNIT, end - j * _UNIT))
            counts[i] -= _multiples_below(period, max(0, begin - j * _UNIT))
    return np.array(counts)


def _multiples_below(n: int, bound: int) -> int:
    """How many of k * _STEP mod _UNIT, k < n, are below `bound` <= _UNIT."""
    return n + _floor_sum(n, 0) - _floor_sum(n, _UNIT - bound)


def _floor_sum(n: int, b: int) -> int:
    """Sum of (k * _STEP + b) // _UNIT over k < n."""
    total, m, a = 0, _UNIT, _STEP
    while n:
        total += (a // m) * n * (n - 1) // 2 + (b // m) * n
        a, b = a % m, b % m
        n, b = divmod(a * n + b, m)
        m, a = a, m
    return total


class Permutation:
    """A bijection of range(size), a pure function of (key, size). The domain is below 4 * size, so a lookup
    takes fewer than four passes of the network on average.

    key: whatever should make permutations differ; its `repr` is hashed.
    """

    def __init__(self, size: int, key: object):
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """The element at `index`; raises IndexError outside range(size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} outside range({self.size})")
        bits, mask = self._half_bits, (1 << self._half_bits) - 1
        while True:
            left, right = index >> bits, index & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            index = left << bits | right
            if index < self.size:
                return index


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
