"""How many of every thousand samples each component of a mixture gets, so that any weights are met exactly.

A component's share of a period is a whole number, which it has in every period, and a fraction. The fractions add up
to a few places, which go round: in period k they are {k * phi} + j, j = 0, 1, ..., on a line along which the fractions
lie one behind the other, phi the golden ratio, whose multiples are spread as evenly as can be. How often a component
has had such a place before period k is a sum of floors, in O(log k) steps (Knuth, TAOCP 1.2.4, ex. 45).
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

PERIOD = 1000
_EXACT = 1e-6  # of a sample a period: if all shares are nearer to whole numbers, that is rounding
_UNIT = 1 << 48  # the fractions are counted in this
_STEP = int(_UNIT * 0.6180339887498949) | 1


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
