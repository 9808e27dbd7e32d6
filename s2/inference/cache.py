"""The KV cache: of each layer and head the keys and values that some later token sees.

A dense layer keeps every token. A sparse head keeps its sinks, a ring of its local window and the blocks of its stride
(`s2.attention.regions`); what nobody sees any more is overwritten. All of it is allocated once. Prompts may be fed
whole, in pieces or token by token, and the sequences of a batch may differ in length.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from s2.attention import Pattern
from s2.attention.decode import MAX_TOKENS
from s2.attention.store import Step
from s2.model.config import ModelConfig
from s2.model.layouts import ranges

from .checks import whole
from .memory import Memory, Plans


@dataclass(frozen=True)
class _Mark:
    """What `KVCache.rewind` comes back to: lengths, how far rings were written, and what stood in them."""

    held: tuple[int, ...]
    written: tuple[int, ...]
    rings: list[Tensor]


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
        _check_size(config, batch_size, max_length)
        slack = whole("slack", slack, 0, must="a number of tokens, 0 or more")
        device = torch.empty(0, device=device).device
        self._block_size, self._plans = config.block_size, Plans(config, slack, keep_all, device)
        # zeros, since what is not seen is multiplied by 0
        values = torch.zeros(batch_size * self._plans.of(max_length).numel, device=device, dtype=dtype)
        self._memory = Memory(values)
        self._place(batch_size, max_length)
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

    def first(self, rows: int, max_length: int | None = None) -> Self:
        """An empty cache in the first part of this one's memory: of fewer sequences, of shorter ones (None: as long),
        or of more that are so much shorter. What one of the two is fed the other loses; it says so when it is used.

        Raises:
            ValueError: as the class, or it does not fit into the memory (`has_room_for`).
        """
        max_length = self.max_length if max_length is None else max_length
        if not self.has_room_for(rows, max_length):
            raise ValueError(
                f"{rows} sequences of {max_length} tokens do not fit into the memory of {len(self._held)} of "
                f"{self.max_length}"
            )
        part = copy(self)
        part._place(rows, max_length)
        part.reset()
        return part

    def has_room_for(self, rows: int, max_length: int) -> bool:
        """Whether the memory is enough for another cache of so many sequences and tokens (`first`).

        Raises:
            ValueError: as the class.
        """
        _check_size(self._plans.config, rows, max_length)
        return rows * self._plans.of(max_length).numel <= self._memory.values.numel()

    def _place(self, batch_size: int, max_length: int) -> None:
        """Stand at the beginning of the memory, whatever is in it."""
        plan = self._plans.of(max_length)
        self._max_length, self._groups, self._tables = max_length, plan.groups, list(plan.tables.values())
        self._values = self._memory.values[: batch_size * plan.numel]
        self._layers = plan.stores(self._values, batch_size)
        self._lengths = torch.zeros(batch_size, dtype=torch.int32, device=self._values.device)
        self._taken = self._memory.taken  # by this cache
        self._held = [0] * batch_size  # the lengths on the host
        self._written = [0] * batch_size  # the most tokens each sequence has had: rings are overwritten up to there
        self._step: Step | None = None
        self._mark: _Mark | None = None
        self._kept: dict[Any, Any] = {}

    @torch.inference_mode()
    def reset(self) -> None:
        """Make it as a new one is: empty, and of zeros. Another cache in its memory loses what it held."""
        self._memory.taken += 1
        self._taken = self._memory.taken
        self._values.zero_()
        self._lengths.zero_()
        self._held, self._written, self._step = [0] * len(self._held), [0] * len(self._held), None
        self._mark = None

    @property
    def length(self) -> int:
        """Tokens held of the longest sequence."""
        return max(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held of each sequence."""
        return (0,) * len(self._held) if self._is_lost else tuple(self._held)

    @property
    def max_length(self) -> int:
        """Tokens of each sequence there is room for."""
        return self._max_length

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes: keys, values, tables of where they stand, lengths, and what `mark` has copied."""
        tables = sum(table.nbytes for table in self._tables)
        return sum(self.layer_bytes) + tables + self._lengths.nbytes + self.marked_bytes

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of the keys and values of each layer."""
        return tuple(layer.num_bytes for layer in self._layers)

    @property
    def marked_bytes(self) -> int:
        """Bytes that `mark` has copied, 0 without a mark."""
        return sum(ring.nbytes for ring in self._mark.rings) if self._mark else 0

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """Layers that keep every token although their pattern sees fewer: all sparse ones with `keep_all`, and those
        with one rule a query head where several share a KV head."""
        return tuple(i for i, layer in enumerate(self._layers) if any(part.group.is_whole for part in layer.parts))

    @property
    def oldest_length(self) -> int:
        """The shortest length, but for 0, that `truncate` takes."""
        return 0 if self._is_lost else max(map(self._oldest, range(len(self._held))))

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
            ValueError: another batch size than the cache's, no room, counts that do not fit, or keys that these tokens
                see were overwritten, by a call before that failed or by another cache in the memory.
        """
        if batch_size != len(self._held):
            raise ValueError(f"the cache was made for {len(self._held)} sequences, got {batch_size}")
        new = [num_tokens] * batch_size if counts is None else [int(count) for count in counts]
        if len(new) != batch_size or min(new) < 0 or max(new) != num_tokens:
            raise ValueError(
                f"lengths={new} must be {batch_size} numbers of new tokens, the largest of them {num_tokens} as "
                "input_ids is wide"
            )
        if self._is_lost and any(self._held):
            raise ValueError(
                "another cache in the memory of this one has overwritten its tokens: truncate(0) and feed the prompts "
                "again"
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
        if self._is_lost:
            self.reset()
        if self._mark and any(held < marked for held, marked in zip(self._held, self._mark.held, strict=True)):
            self._mark = None  # what only grows is overwritten from here on
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
        with self.whole_steps():
            self.advance_on_device()
            self.commit(new)

    def advance_on_device(self) -> None:
        """What the device does of `advance`."""
        self._lengths.copy_(self._begun.after)
        self._step = None

    def commit(self, new: Sequence[int]) -> None:
        """What the host does of `advance`: so many more tokens of each sequence, of `reserve`, are held."""
        self._held = [sum(pair) for pair in zip(self._held, new, strict=True)]

    @contextmanager
    def whole_steps(self) -> Iterator[None]:
        """Where the device has advanced and something, Ctrl-C for instance, keeps the host from it, neither has."""
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # of a device that does nothing any more
                self._lengths.copy_(torch.tensor(self._held, dtype=self._lengths.dtype))
            raise

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, e.g. to decode several continuations of one prompt. Shorter sequences
        stay as they are.

        Raises:
            ValueError: `length` is beyond what is held, or rings have overwritten what a context of that length sees.
        """
        if not 0 <= whole("length", length, 0) <= self.length:
            raise ValueError(f"cannot truncate to {length} tokens: the cache holds {self.length}")
        if 0 < length < self.oldest_length:
            raise ValueError(
                f"cannot truncate to {length} tokens: of {self.length} the layers with local windows have kept what a "
                f"context of {self.oldest_length} or more sees; make the cache with more slack, or with keep_all=True, "
                "or mark what to come back to"
            )
        self._lengths.clamp_(max=length)
        self._held = [min(held, length) for held in self._held]
        if length == 0:
            self._written = [0] * len(self._held)

    @torch.inference_mode()
    def mark(self) -> None:
        """Make `rewind` come back to these lengths, however many tokens follow. Rings are copied (`marked_bytes`);
        sinks, blocks of strides and dense layers only grow and need no copy. There is one mark at a time.

        Raises:
            ValueError: keys that the next token sees were overwritten, as `reserve` says.
        """
        self.reserve(len(self._held), 0)
        self._mark = None  # its memory first
        self._mark = _Mark(tuple(self._held), tuple(self._written), [ring.clone() for ring in self._rings])

    @torch.inference_mode()
    def rewind(self) -> None:
        """Hold what was held at the last `mark`, and nothing else; the mark stays.

        Raises:
            ValueError: there is none: nothing was marked, or this cache was fed from before it (after `truncate`), or
                another one in the memory.
        """
        if self._mark is None or self._is_lost:
            raise ValueError("the cache has no mark to go back to: mark it, and feed it from no further back than that")
        self._held = [0] * len(self._held)  # if something keeps the host from the rest
        with self.whole_steps():
            for ring, marked in zip(self._rings, self._mark.rings, strict=True):
                ring.copy_(marked)
            self._lengths.copy_(torch.tensor(self._mark.held, dtype=self._lengths.dtype))
            self._held, self._written, self._step = list(self._mark.held), list(self._mark.written), None

    @property
    def _rings(self) -> list[Tensor]:
        newest = (self._max_length - 1) // self._block_size
        return [ring for layer in self._layers for ring in layer.rings(newest)]

    def _oldest(self, row: int) -> int:
        """The shortest length, but for 0, at which all that is seen of a sequence is still held."""
        newest = (self._written[row] - 1) // self._block_size
        return max(group.oldest_block(newest) for group in self._groups) * self._block_size

    @property
    def _is_lost(self) -> bool:
        """Whether another cache has taken the memory since this one did."""
        return self._memory.taken != self._taken

    @property
    def _begun(self) -> Step:
        if self._step is None:
            raise ValueError("no call has begun: feed the cache through Transformer.forward(cache=), or call begin")
        return self._step


def _check_size(config: ModelConfig, batch_size: int, max_length: int) -> None:
    whole("batch_size", batch_size, 1)
    if whole("max_length", max_length, 1) > config.max_position_embeddings:
        raise ValueError(
            f"a cache of {max_length} tokens is longer than max_position_embeddings="
            f"{config.max_position_embeddings}; lower max_length, or load the model with a larger value"
        )
