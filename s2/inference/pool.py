"""The memory of one batch's cache, and the decode steps captured on it, for the batches after it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from s2.model.transformer import Transformer

from .cache import KVCache
from .checks import whole
from .graph import DecodeGraph, Step, decode_step, eager_step, takes_graph

MOST_KEPT = 8  # sizes of batches whose caches and captured steps are kept: those of the latest


class DecodePool:
    """Serves generations of one model, one after another: `generate(..., pool=pool)`.

    Reused are the memory of keys and values, by batches that need no more of it than the largest before, and the CUDA
    graph of the decode step, by batches of as many rows and a similar length. A batch finds a cache as a new one is,
    empty and of zeros, and longer than it needs by a sixteenth or a block at most, where the step is captured by a
    factor of two, so that few are. A batch for which the memory is too small takes the place of it all.

    Who generates while another generation with the pool has not ended, in this thread or in another, gets a cache for
    itself. After an error, or on another CUDA stream, nothing is reused. The pool holds its memory as long as it lives.

    Args:
        model: on its device; its weights stay where they are.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._kept: _Kept | None = None
        self._lent = threading.Lock()  # held by the generation that `_kept` is lent to

    def reserve(self, batch_size: int, max_length: int) -> None:
        """Take memory for such a batch, so that smaller ones before it make no cache of their own.

        Raises:
            ValueError: as `KVCache`, or a generation with the pool has not ended.
        """
        batch_size, max_length = whole("batch_size", batch_size, 1), whole("max_length", max_length, 1)
        if not self._lent.acquire(blocking=False):
            raise ValueError("the pool's memory is lent: reserve before the first generation with it or after the last")
        try:
            self._enough(batch_size, max_length)
        finally:
            self._lent.release()

    @contextmanager
    def lend(
        self, batch_size: int, max_length: int, new_tokens: int, graph: bool | None
    ) -> Iterator[tuple[KVCache, Step]]:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens or more, and the decode step on it, as
        `s2.inference.graph.decode_step` makes it of the other arguments.

        Raises:
            ValueError: as `KVCache` and `decode_step`.
        """
        if not self._lent.acquire(blocking=False):
            cache = new_cache(self.model, batch_size, max_length)
            yield cache, decode_step(self.model, cache, new_tokens, graph)
            return
        try:
            kept = self._enough(batch_size, max_length)
            is_captured = takes_graph(self.model, kept.cache, new_tokens, graph)
            try:
                yield kept.lend(batch_size, max_length, is_captured)
            except GeneratorExit:  # of a stream that is read no further
                raise
            except BaseException:
                self._kept = None
                raise
        finally:
            self._lent.release()

    def _enough(self, batch_size: int, max_length: int) -> _Kept:
        stream = _stream(self.model)
        if self._kept and self._kept.cache.has_room_for(batch_size, max_length) and self._kept.stream == stream:
            return self._kept
        self._kept = None  # its memory first
        self._kept = _Kept(self.model, new_cache(self.model, batch_size, _rounded(max_length, self.model)), stream)
        return self._kept


class _Kept:
    """What is reused.

    Attributes:
        cache: whose memory the caches that are lent stand in; it is not fed itself.
        stream: on which they are used one after another.
    """

    def __init__(self, model: Transformer, cache: KVCache, stream: torch.cuda.Stream | None) -> None:
        self._model, self.cache, self.stream = model, cache, stream
        self._lent: dict[tuple[int, int], _Lent] = {}  # by rows and length, the latest last
        self._memory: Any = None  # of all graphs, of which one runs at a time

    def lend(self, rows: int, max_length: int, is_captured: bool) -> tuple[KVCache, Step]:
        size = rows, self._length(rows, max_length, is_captured)
        lent = self._lent.pop(size, None)
        if lent is None:
            while len(self._lent) >= MOST_KEPT:
                del self._lent[next(iter(self._lent))]
            lent = _Lent(self.cache.first(*size))
        else:
            lent.cache.reset()
        self._lent[size] = lent
        if not is_captured:
            return lent.cache, eager_step(self._model, lent.cache)
        if lent.graph is None:
            if self._memory is None and self._model.model.embed_tokens.weight.is_cuda:
                self._memory = torch.cuda.graph_pool_handle()
            lent.graph = DecodeGraph(self._model, lent.cache, memory=self._memory)
        return lent.cache, lent.graph

    def _length(self, rows: int, max_length: int, is_captured: bool) -> int:
        """Tokens that the cache for up to `max_length` is made for: rounded, as far as there is memory."""
        rounded = _rounded(max_length, self._model)
        if is_captured:
            doubled = min(1 << (rounded - 1).bit_length(), max(rounded, self.cache.max_length))
            if self.cache.has_room_for(rows, doubled):
                return doubled
        return rounded if self.cache.has_room_for(rows, rounded) else max_length


@dataclass
class _Lent:
    """A cache, and the step captured on it, if one was."""

    cache: KVCache
    graph: DecodeGraph | None = None


def new_cache(model: Transformer, batch_size: int, max_length: int) -> KVCache:
    """On the model's device, in its dtype."""
    weight = model.model.embed_tokens.weight
    return KVCache(model.config, batch_size, max_length, device=weight.device, dtype=weight.dtype)


def _stream(model: Transformer) -> torch.cuda.Stream | None:
    device = model.model.embed_tokens.weight.device
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _rounded(tokens: int, model: Transformer) -> int:
    step = max(model.config.block_size, (1 << tokens.bit_length()) // 32)
    return max(tokens, min(-(-tokens // step) * step, model.config.max_position_embeddings))
