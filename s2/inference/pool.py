"""The memory of one batch's cache, and the decode steps captured on it, for the batches after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from s2.model.transformer import Transformer

from .cache import KVCache
from .graph import DecodeGraph, Step, decode_step, eager_step, takes_graph


class DecodePool:
    """Serves generations of one model, one after another: `generate(..., pool=pool)`.

    Reused are the memory of keys and values, by batches that have no more rows and tokens than it was made for, and for
    each number of rows the CUDA graph of its decode step. A batch finds the cache as a new one is, empty and of zeros.
    One that does not fit takes the place of it all; its length is rounded up by a sixteenth at most, so that a
    slightly longer one fits.

    Who generates while another generation with the pool has not ended gets a cache for itself. After an error nothing
    is reused. The pool holds its memory as long as it lives.

    Args:
        model: on its device; its weights stay where they are.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._kept: _Kept | None = None
        self._is_lent = False

    @contextmanager
    def lend(
        self, batch_size: int, max_length: int, new_tokens: int, graph: bool | None
    ) -> Iterator[tuple[KVCache, Step]]:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens or more, and the decode step on it, as
        `s2.inference.graph.decode_step` makes it of the other arguments.

        Raises:
            ValueError: as `KVCache` and `decode_step`.
        """
        if self._is_lent:
            cache = new_cache(self.model, batch_size, max_length)
            yield cache, decode_step(self.model, cache, new_tokens, graph)
            return
        self._is_lent = True
        try:
            kept = self._fitting(batch_size, max_length)
            cache = kept.first(batch_size)
            yield cache, kept.step(self.model, cache, new_tokens, graph)
        except GeneratorExit:  # of a stream that is read no further
            raise
        except BaseException:
            self._kept = None
            raise
        finally:
            self._is_lent = False

    def _fitting(self, batch_size: int, max_length: int) -> _Kept:
        if self._kept is None or not self._kept.fits(batch_size, max_length):
            self._kept = None  # its memory first
            self._kept = _Kept(new_cache(self.model, batch_size, _rounded(max_length, self.model)))
        return self._kept


class _Kept:
    """What is reused: `cache`, in its memory one for each number of first rows, and the steps captured on those."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._firsts: dict[int, KVCache] = {}
        self._graphs: dict[int, DecodeGraph] = {}
        self._memory: Any = None  # of all graphs, of which one runs at a time

    def fits(self, batch_size: int, max_length: int) -> bool:
        return batch_size <= len(self._cache.lengths) and max_length <= self._cache.max_length

    def first(self, rows: int) -> KVCache:
        if rows not in self._firsts:
            self._firsts[rows] = self._cache.first(rows)
        self._firsts[rows].reset()
        return self._firsts[rows]

    def step(self, model: Transformer, cache: KVCache, new_tokens: int, graph: bool | None) -> Step:
        if not takes_graph(model, cache, new_tokens, graph):
            return eager_step(model, cache)
        rows = len(cache.lengths)
        if rows not in self._graphs:
            if self._memory is None and model.model.embed_tokens.weight.is_cuda:
                self._memory = torch.cuda.graph_pool_handle()
            self._graphs[rows] = DecodeGraph(model, cache, memory=self._memory)
        return self._graphs[rows]


def new_cache(model: Transformer, batch_size: int, max_length: int) -> KVCache:
    """On the model's device, in its dtype."""
    weight = model.model.embed_tokens.weight
    return KVCache(model.config, batch_size, max_length, device=weight.device, dtype=weight.dtype)


def _rounded(tokens: int, model: Transformer) -> int:
    step = max(1, (1 << tokens.bit_length()) // 32)
    return max(tokens, min(-(-tokens // step) * step, model.config.max_position_embeddings))
