"""The decode step, from tokens to logits, as a CUDA graph: captured once, replayed for each token.

A small model decodes as fast as the host can launch some twenty kernels a layer; a replay launches them all at once. On
the device nothing but the cache's memory says how many tokens there are, so that one graph serves every length; the
host counts along (`KVCache.reserve`, `commit`) and never waits.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from s2.attention.decode import MAX_TOKENS
from s2.model.layouts import ranges
from s2.model.transformer import Transformer
from s2.out_of_memory import is_out_of_memory

from .cache import KVCache
from .checks import whole

LEAST_TOKENS = 32  # new tokens from which on a capture pays
WARM_UP = 2  # steps that run eagerly: kernels are compiled, and libraries make their workspaces

Step = Callable[[Tensor], Tensor]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def decode_step(model: Transformer, cache: KVCache, new_tokens: int, graph: bool | None) -> Step:
    """What makes logits `[B, 1, V]` of tokens `[B, 1]`, by a graph or eagerly.

    Args:
        model, cache: of which the step is.
        new_tokens: how many will be asked for.
        graph: None takes a graph where one is possible and `new_tokens` are enough for it.

    Raises:
        ValueError: `graph` is True, and none is possible.
    """
    return DecodeGraph(model, cache) if takes_graph(model, cache, new_tokens, graph) else eager_step(model, cache)


def takes_graph(model: Transformer, cache: KVCache, new_tokens: int, graph: bool | None) -> bool:
    """Whether `decode_step` takes a graph. Raises ValueError as it does."""
    reason = obstacle(model.model.embed_tokens.weight.device, cache)
    if graph and reason:
        raise ValueError(f"graph=True: {reason}")
    return bool(graph or (graph is None and not reason and new_tokens >= LEAST_TOKENS))


def eager_step(model: Transformer, cache: KVCache) -> Step:
    """The step that launches its kernels one by one."""
    return lambda tokens: model(tokens, cache=cache, logits_to_keep=1)


def obstacle(device: torch.device, cache: KVCache) -> str | None:
    """Why there can be no graph of the decode step; None if there can."""
    if device.type != "cuda":
        return f"the model is on {device}, and a CUDA graph needs it on a GPU"
    if cache.whole_layers:
        return (
            f"layers {ranges(cache.whole_layers)} keep every token although their pattern sees fewer, and attend to "
            "them by kernels whose launch depends on the length; leave graph at None or False"
        )
    return None


class DecodeGraph:
    """Decode steps of a model with a cache: the first ones run eagerly, then one is captured, the others replay it.
    Where memory runs out during the capture a warning says so, and all go on to run eagerly.

    Args:
        model: on its device; its weights stay where they are.
        cache: with the prompts in it. Whatever else is done with it between steps (`truncate`, further prompts) counts.
        num_tokens: new tokens of each sequence in a step, at most 8: several to check what a smaller model proposes.
        memory: a `torch.cuda.graph_pool_handle` of captured steps of which none is needed while another runs.
        capture: makes of a call one that does on the device what the first did, whatever the host has changed since.

    Raises:
        ValueError: no graph is possible (`obstacle`), or `num_tokens` out of range.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        num_tokens: int = 1,
        *,
        memory: Any = None,
        capture: Capture | None = None,
    ) -> None:
        weight = model.model.embed_tokens.weight
        if capture is None and (reason := obstacle(weight.device, cache)):
            raise ValueError(f"no CUDA graph: {reason}")
        whole("num_tokens", num_tokens, 1, MAX_TOKENS, must=f"1 to {MAX_TOKENS}, as a decode step takes them")
        self._model, self._cache = model, cache
        self._capture = capture or partial(_capture, device=weight.device, memory=memory)
        shape = len(cache.lengths), num_tokens
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=weight.device)
        self._warm = 0
        self._replay: Callable[[], Tensor] | None = None
        self._is_eager = False  # there was no memory for a graph

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `[B, num_tokens, V]` after tokens `[B, num_tokens]`, which count as held from then on. The next step
        overwrites them. That the model has these tokens is not checked: the host would wait for each step.

        Raises:
            ValueError: another shape, an empty cache, or no room in it.
        """
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"tokens {list(tokens.shape)} must be {list(self._tokens.shape)}, as the step was made")
        if not self._cache.length:
            raise ValueError("the cache is empty: feed the prompts before the first decode step")
        new = self._cache.reserve(*tokens.shape)
        self._tokens.copy_(tokens)
        with self._cache.whole_steps(), torch.cuda.device_of(self._tokens):  # whose stream captures and replays
            logits = self._next()
            self._cache.commit(new)
        return logits

    def _next(self) -> Tensor:
        if self._replay is None and not self._is_eager:
            if self._warm >= WARM_UP:
                self._replay = self._captured()
                self._is_eager = self._replay is None
            self._warm += 1
        return self._replay() if self._replay else self._run()

    def _captured(self) -> Callable[[], Tensor] | None:
        """What replays the step, None where there is no memory for it. What the capture had is free again then."""
        handled = sys.exception()  # by who tries a smaller batch after one that found no memory
        try:
            return self._capture(self._run)
        except RuntimeError as error:
            if not is_out_of_memory(error, handled=handled):
                raise
        warnings.warn(
            f"memory ran out while the decode step of {self._tokens.shape[0]} sequences was captured in a CUDA graph, "
            "so it runs eagerly, which takes a small model longer; fewer sequences or shorter ones leave room",
            stacklevel=4,
        )
        return None

    def _run(self) -> Tensor:
        return self._model(self._tokens, cache=_OnDevice(self._cache))


class _OnDevice:
    """A cache (`s2.model.layers.Cache`) whose host does not count: what can be captured of it."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.attend = cache.attend

    @property
    def lengths(self) -> tuple[int, ...]:
        return self._cache.lengths

    @property
    def positions(self) -> Tensor:
        return self._cache.positions

    def begin(self, batch_size: int, num_tokens: int, counts: Sequence[int] | None = None) -> None:
        self._cache.begin_on_device(num_tokens)

    def advance(self) -> None:
        self._cache.advance_on_device()


_STREAMS: dict[torch.cuda.Stream, torch.cuda.Stream] = {}
_CAPTURES = threading.Lock()


def _capture(call: Callable[[], Tensor], device: torch.device, memory: Any) -> Callable[[], Tensor]:
    """On a stream of its own for each current one: cuBLAS keeps a workspace for every stream that it has seen, which
    graphs that are replayed on one stream may share."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    with _CAPTURES:
        stream = _STREAMS.get(current) or _STREAMS.setdefault(current, torch.cuda.Stream(device))
        # other threads may allocate meanwhile
        captured = torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(current), captured:  # a capture that fails may leave its own stream the current one
            result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
