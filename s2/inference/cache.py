"""The KV cache: of each layer and head the keys and values that some later token sees.

A dense layer keeps every token. A sparse head keeps its sinks, a ring of its local window and the blocks of its stride
(`s2.attention.regions`); what nobody sees any more is overwritten. All of it is allocated once. Prompts may be fed
whole, in pieces or token by token, and the sequences of a batch may differ in length.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from s2.attention import Pattern
from s2.attention.decode import MAX_TOKENS
from s2.attention.regions import HeadGroup, lay_out, whole_group
from s2.model.config import ModelConfig
from s2.model.layouts import ranges

from .storage import LayerStore, Step


class KVCache:
    """Keys and values of up to `max_length` tokens of each of `batch_size` sequences.

    `model(input_ids, cache=cache)` feeds it: `begin`, `attend` in each layer, `advance`. Decode steps do not
    wait for the device: how many tokens each sequence has is known on the host too.

    Args:
        config: the model's, for its layers, KV heads and layout.
        batch_size: sequences decoded side by side.
        max_length: tokens of prompt and continuation together.
        device: where the model runs.
        dtype: the model's.
        slack: tokens that `truncate` can take back at any time; rings are longer by so much, in whole blocks.
        keep_all: every layer keeps every token whatever its pattern, so that `truncate` takes any length.

    Raises:
        ValueError: `max_length` beyond max_position_embeddings, or a size below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        slack: int = MAX_TOKENS,
        keep_all: bool = False,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size={batch_size} and max_length={max_length} must be at least 1")
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"a cache of {max_length} tokens is longer than max_position_embeddings="
                f"{config.max_position_embeddings}; ask for fewer new tokens"
            )
        if slack < 0:
            raise ValueError(f"slack={slack} must be a number of tokens, 0 or more")
        self._max_length, self._block_size = max_length, config.block_size
        kv_heads = config.num_key_value_heads
        num_blocks, spare = -(-max_length // config.block_size), -(-max(slack, MAX_TOKENS) // config.block_size)
        groups: dict[tuple[Pattern, int], list[tuple[HeadGroup, Tensor]]] = {}
        self._layers: list[LayerStore] = []
        for pattern, rotation in zip(config.layout, config.layout.distinct_rotations(kv_heads), strict=True):
            key = pattern, rotation
            if key not in groups:  # layers that attend alike share tables
                laid_out: tuple[HeadGroup, ...] = (whole_group(pattern, kv_heads, num_blocks),)
                if not keep_all:
                    laid_out = lay_out(pattern, kv_heads, rotation, num_blocks, spare)
                groups[key] = [(group, group.table.to(device or torch.get_default_device())) for group in laid_out]
            self._layers.append(LayerStore(*key, groups[key], batch_size, config.head_dim, device, dtype))
        self._groups = [group for laid_out in groups.values() for group, _ in laid_out]
        self._tables = [table for laid_out in groups.values() for _, table in laid_out]
        self._lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._held = [0] * batch_size  # the same on the host
        self._written = [0] * batch_size  # the most tokens each sequence has had: rings are overwritten up to there
        self._step: Step | None = None
        self._kept: dict[Any, Any] = {}
        if self.whole_layers and not keep_all:
            warnings.warn(
                f"attention_layout {config.attention_layout!r}: layers {ranges(self.whole_layers)} have one rule a "
                "query head, which KV heads cannot drop keys by, so the cache keeps every token of them",
                stacklevel=2,
            )

    @classmethod
    def bytes_for(cls, config: ModelConfig, batch_size: int, max_length: int, dtype: torch.dtype) -> int:
        """`num_bytes` of such a cache, without making it."""
        with warnings.catch_warnings(action="ignore"):
            return cls(config, batch_size, max_length, device="meta", dtype=dtype).num_bytes

    def first(self, rows: int) -> Self:
        """An empty cache in the memory of the first sequences: what one of the two is fed the other loses."""
        if not 1 <= rows <= len(self._held):
            raise ValueError(f"rows={rows} must be 1 to {len(self._held)}, the sequences that the cache was made for")
        view = copy(self)
        view._layers = [layer.first(rows) for layer in self._layers]
        view._lengths, view._kept = self._lengths[:rows], {}
        view._held = [0] * rows
        view.reset()
        return view

    def reset(self) -> None:
        """Make it as a new one is: empty, and of zeros."""
        for layer in self._layers:
            layer.reset()
        self._lengths.zero_()
        self._held, self._written, self._step = [0] * len(self._held), [0] * len(self._held), None

    @property
    def length(self) -> int:
        """Tokens held of the longest sequence."""
        return max(self._held)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held of each sequence."""
        return tuple(self._held)

    @property
    def max_length(self) -> int:
        """Tokens of each sequence there is room for."""
        return self._max_length

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes: keys, values, tables of where they stand, and lengths."""
        return sum(self.layer_bytes) + sum(table.nbytes for table in self._tables) + self._lengths.nbytes

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of the keys and values of each layer."""
        return tuple(layer.num_bytes for layer in self._layers)

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """Layers that keep every token although their pattern sees fewer: all sparse ones with `keep_all`, and those
        with one rule a query head where several share a KV head."""
        return tuple(i for i, layer in enumerate(self._layers) if any(part.group.is_whole for part in layer.parts))

    @property
    def oldest_length(self) -> int:
        """The shortest length, but for 0, that `truncate` takes."""
        return max(map(self._oldest, range(len(self._held))))

    @property
    def positions(self) -> Tensor:
        """Of the tokens of the call that has begun, int64 `[B, S]`, or `[1, S]` where all sequences have the same."""
        return self._begun.positions

    def begin(self, batch_size: int, num_tokens: int, counts: Sequence[int] | None = None) -> None:
        """A call with `num_tokens` new tokens of each sequence, or with `counts[b]` of sequence b and padding behind
        them.

        Raises:
            ValueError: as `reserve`.
        """
        new = self.reserve(batch_size, num_tokens, counts)
        self._open(num_tokens, new, stand_alike=len(set(self._held)) == 1)

    def reserve(self, batch_size: int, num_tokens: int, counts: Sequence[int] | None = None) -> list[int]:
        """What the host does of `begin`: it checks that the tokens have room, and returns the new ones of each
        sequence, which `commit` takes. A call that was captured in a CUDA graph (`s2.inference.graph`) is replayed
        between the two.

        Raises:
            ValueError: another batch size than the cache's, no room, counts that do not fit, or a call before that
                failed with keys overwritten that these tokens see.
        """
        if batch_size != len(self._held):
            raise ValueError(f"the cache was made for {len(self._held)} sequences, got {batch_size}")
        new = [num_tokens] * batch_size if counts is None else [int(count) for count in counts]
        if len(new) != batch_size or min(new) < 0 or max(new) != num_tokens:
            raise ValueError(
                f"lengths={new} must be {batch_size} numbers of new tokens, the largest of them {num_tokens} as "
                "input_ids is wide"
            )
        ends = [held + count for held, count in zip(self._held, new, strict=True)]
        if max(ends) > self.max_length:
            raise ValueError(f"{max(ends)} tokens do not fit in a cache of max_length={self.max_length}")
        if self._step is not None:  # which has not been finished
            lost = [b for b, held in enumerate(self._held) if held and held < self._oldest(b)]
            if lost:
                raise ValueError(
                    f"a call that failed has overwritten keys before token {self._oldest(lost[0])} of sequence "
                    f"{lost[0]}, which has {self._held[lost[0]]} tokens: truncate(0) and feed the prompts again"
                )
        self._written = [max(pair) for pair in zip(self._written, ends, strict=True)]
        return new

    def begin_on_device(self, num_tokens: int) -> None:
        """What the device does of `begin`, with as many new tokens of each sequence, whatever their lengths are. No
        value of the host goes into it, so that it can be captured."""
        self._open(num_tokens, [num_tokens] * len(self._held), stand_alike=False)

    def _open(self, num_tokens: int, new: list[int], *, stand_alike: bool) -> None:
        added: int | Tensor = num_tokens
        if min(new) < num_tokens:
            added = torch.tensor(new, dtype=torch.int32).to(self._lengths.device, non_blocking=True)
        before = self._lengths.clone()
        first = before[:1] if stand_alike else before
        token = torch.arange(num_tokens, device=before.device)
        self._step = Step(num_tokens, list(self._held), new, before, before + added, first[:, None] + token, self._kept)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, rotation: int) -> Tensor:
        """What the new tokens of a layer see, `[B, S, Hq, D]`, of their own keys and values `[B, S, H, D]`, which are
        kept, and of those before.

        Raises:
            ValueError: the layer attends by another pattern, or has other keys, than the cache was made for.
        """
        if layer >= len(self._layers):
            raise ValueError(f"layer {layer} attends, but the cache was made for {len(self._layers)} layers")
        store = self._layers[layer]
        if pattern != store.pattern or rotation != store.rotation:
            raise ValueError(
                f"layer {layer} attends by {pattern} (rotation {rotation}) in blocks of {pattern.block_size}, but the "
                f"cache was made for {store.pattern} (rotation {store.rotation}) in blocks of "
                f"{store.pattern.block_size}; make one from the configuration that the model attends by"
            )
        if (k.shape[2], k.shape[3], k.dtype) != store.keys:
            heads, dim, dtype = store.keys
            raise ValueError(
                f"layer {layer} has {k.shape[2]} KV heads of {k.shape[3]} in {k.dtype}, but the cache was made for "
                f"{heads} of {dim} in {dtype}; make one from the model's configuration, with its dtype"
            )
        return store.attend(self._begun, q, k, v)

    def advance(self) -> None:
        """All layers have attended: the new tokens count as held."""
        new = self._begun.counts
        self.advance_on_device()
        self.commit(new)

    def advance_on_device(self) -> None:
        """What the device does of `advance`."""
        self._lengths.copy_(self._begun.after)
        self._step = None

    def commit(self, new: Sequence[int]) -> None:
        """What the host does of `advance`: so many more tokens of each sequence, of `reserve`, are held."""
        self._held = [sum(pair) for pair in zip(self._held, new, strict=True)]

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, e.g. to decode several continuations of one prompt. Shorter sequences
        stay as they are.

        Raises:
            ValueError: `length` is beyond what is held, or rings have overwritten what a context of that length sees.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length} tokens: the cache holds {self.length}")
        if 0 < length < self.oldest_length:
            raise ValueError(
                f"cannot truncate to {length} tokens: of {self.length} the layers with local windows have kept what a "
                f"context of {self.oldest_length} or more sees; make the cache with more slack, or with keep_all=True"
            )
        self._lengths.clamp_(max=length)
        self._held = [min(held, length) for held in self._held]
        if length == 0:
            self._written = [0] * len(self._held)

    def _oldest(self, row: int) -> int:
        """The shortest length, but for 0, at which all that is seen of a sequence is still held."""
        newest = (self._written[row] - 1) // self._block_size
        return max(group.oldest_block(newest) for group in self._groups) * self._block_size

    @property
    def _begun(self) -> Step:
        if self._step is None:
            raise ValueError("no call has begun: feed the cache through Transformer.forward(cache=), or call begin")
        return self._step
