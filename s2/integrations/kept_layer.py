"""A cache layer of transformers that keeps what some later query sees, in the slots of `s2.attention.store`.

`DynamicCache(config=...)` makes one for each sparse layer of an `s2_llama` (`S2LlamaConfig.layer_types`). `update` is
given keys and values without queries, so it hands them on (`Arriving`), and the attention "s2", which knows the layer's
pattern, has the layer attend to what it keeps and to them. What cannot be dropped from the first call on is kept whole,
as by transformers' own `DynamicLayer`: see `KeptLayer.keep_all`.

Shapes: B sequences, S new tokens, Hq query heads, H KV heads, D head dimension. The tokens of a row stand behind its
padding: `start` is their first column.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, DynamicLayer

from s2.attention import Pattern
from s2.attention.chunks import places_of
from s2.attention.regions import HeadGroup, lay_out, regions_of
from s2.attention.store import LayerStore, Step

LAYER_TYPE = "s2_sparse_attention"
GROWTH = 32  # a full store grows by a part in so many: a copy now and then, and about 3 % of slots without a token


class Arriving:
    """New keys or values `[B, H, S, D]` on their way from a layer's `update` to the attention "s2"."""

    def __init__(self, layer: KeptLayer, states: Tensor) -> None:
        self.layer, self.states = layer, states

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(
            "this cache drops keys by the attention_layout of an s2_llama, which the attention 's2' alone can attend "
            "to; give another model or attention a DynamicCache() without this config"
        )


class KeptLayer(DynamicLayer):
    """Keys and values of a sparse layer.

    Attributes:
        seen: columns (tokens and padding on their left) that have been fed.
        record_past: what has been fed since the last `crop` can be taken back (`activate_past_recording`).
    """

    _layer_type = LAYER_TYPE
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = self._is_whole = False
        self.seen = self._written = self._floor = self._least = 0
        self._starts: list[int] | None = None
        self._store: LayerStore | None = None
        self._fed: tuple[Tensor, Tensor] | None = None  # by `update`, and not taken by the attention
        self._blocks = self._spare = 0

    # ---------------------------------------------------------------- what transformers asks for

    @property
    def keys(self) -> Tensor | None:
        """Of all tokens, `[B, H, S, D]`. ValueError: some were dropped."""
        return self._whole_of(self._keys)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = keys

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._whole_of(self._values)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = values

    def _whole_of(self, states: Tensor | None) -> Tensor | None:
        if self._store is not None:
            raise ValueError(
                "a sparse layer's cache has no keys and values of all tokens: it drops what no later query sees; a "
                "DynamicCache() without a config keeps them"
            )
        return states

    @property
    def num_bytes(self) -> int:
        """Of the keys and values held."""
        if self._store is not None:
            return self._store.num_bytes
        return 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Where keys are dropped, or are yet to be: what the attention "s2" alone takes (`Arriving`)."""
        self._keep_fed()
        if self._is_whole:
            return super().update(key_states, value_states)
        self._fed = key_states, value_states
        return Arriving(self, key_states), Arriving(self, value_states)

    def _keep_fed(self) -> None:
        """Keep whole what came without an attention to it, as in `DynamicCache(data, config=...)`.

        Raises:
            ValueError: keys were dropped before it.
        """
        if self._fed is not None:
            fed, self._fed = self._fed, None
            self.keep_all(*fed)

    def get_seq_length(self) -> int:
        self._keep_fed()
        return super().get_seq_length() if self._is_whole else self.seen

    def reset(self) -> None:
        self._forget()

    def offload(self) -> None:
        """Kept whole it goes to the host, as any layer; else it is small, and stays."""
        if self._is_whole:
            super().offload()

    def prefetch(self) -> None:
        if self._is_whole:
            super().prefetch()

    def activate_past_recording(self) -> None:
        self.record_past, self._floor = True, self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens. What was once written over stays so: crops one after the other
        reach back from the newest token ever fed.

        Raises:
            ValueError: a context so short sees keys that were dropped.
        """
        self._keep_fed()
        if self._is_whole:
            super().crop(tokens_to_remove)
        if self._store is None:
            return
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) must be negative: the number of tokens to remove")
        removed = -int(tokens_to_remove)  # a tensor in some versions
        length = max(0, self.seen - removed)
        if length == 0:
            self._forget()
            return
        oldest = self._oldest()
        if length < self.seen and length < oldest:
            raise ValueError(
                f"cannot crop {self.seen} tokens to {length}: sparse layers have kept what a context of {oldest} or "
                "more sees; call cache.activate_past_recording() before the tokens that may be taken back"
            )
        self.seen = self._floor = length
        spare = 2 + removed // self._store.pattern.block_size
        if self._spare > 4 * spare:  # as behind a prompt that came with tokens to be taken back
            self._lay_out(self._blocks, spare)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self._store is None:
            super().reorder_cache(beam_idx)
        else:
            self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._store is None:
            super().batch_repeat_interleave(repeats)
        else:
            self._take(torch.arange(self._batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        if self._store is None:
            super().batch_select_indices(indices)
        else:
            indices = indices.cpu() if isinstance(indices, Tensor) else indices
            self._take(torch.arange(self._batch_size)[indices])

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptLayer:
        twin = copy.copy(self)
        twin._keys, twin._values = copy.deepcopy(self._keys, memo), copy.deepcopy(self._values, memo)
        if self._store is not None:
            twin._take(torch.arange(self._batch_size))
        return twin

    # ---------------------------------------------------------------- what the attention "s2" asks for

    def received(self) -> None:
        """The attention has what `update` was given."""
        self._fed = None

    @property
    def is_empty(self) -> bool:
        return self._store is None

    def keep_all(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Be a `DynamicLayer` until `reset`, and update it.

        Raises:
            ValueError: keys were dropped.
        """
        if self._store is not None:
            raise ValueError(
                "padding between or behind tokens, packed documents, or keys that no attention was asked for cannot "
                "follow tokens whose keys were dropped; a DynamicCache() without a config keeps all keys. Where the "
                "pad token is in the text, transformers infers a mask with padding there: pass the attention_mask"
            )
        self._is_whole = True
        return super().update(key, value)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, rotation: int, *, scale: float,
        starts: Sequence[int] | None, memo: dict[Any, Any],
    ) -> Tensor:  # fmt: skip
        """What the new tokens see, `[B, S, Hq, D]`, of their own keys and values, which are kept, and of those before;
        zeros for padding.

        Args:
            q: `[B, S, Hq, D]`.
            k, v: `[B, S, H, D]`.
            pattern, rotation: the layer's.
            starts: the first column of each row's tokens (None: all 0), over all columns fed so far.
            memo: what the layers of one forward share.

        Raises:
            ValueError: a pattern, starts, rows or dtype other than those of the tokens before.
        """
        B, S, _, D = q.shape
        starts = None if starts is None else list(starts)
        if self._store is not None:
            self._check(pattern, rotation, starts, k)
        self._starts = starts
        end = self.seen + S
        self._make_room(k, pattern, rotation, end)
        assert self._store is not None
        key = q.device, self.seen, S, tuple(starts or ())
        if key not in memo:
            memo[key] = _Tokens(self.seen, S, starts or [0] * B, q.device)
        tokens = memo[key]
        if scale != D**-0.5:
            q = q * (scale * D**0.5)
        out = tokens.back(self._store.attend(tokens.step, *(tokens.front(x) for x in (q, k, v))))
        self.seen, self._written, self.is_initialized = end, max(self._written, end), True
        return out

    def _check(self, pattern: Pattern, rotation: int, starts: list[int] | None, k: Tensor) -> None:
        store = self._store
        assert store is not None
        if (pattern, rotation) != (store.pattern, store.rotation):
            raise ValueError(
                f"a layer attends by {pattern} (rotation {rotation}), but its cache was filled by {store.pattern} "
                f"(rotation {store.rotation})"
            )
        if (k.shape[0], k.dtype) != (self._batch_size, store.keys[2]):
            raise ValueError(
                f"{k.shape[0]} rows in {k.dtype} cannot continue a cache of {self._batch_size} in {store.keys[2]}"
            )
        pairs = zip(starts or [0] * len(k), self._starts or [0] * len(k), strict=True)
        if any(new != old and min(new, old) < self.seen for new, old in pairs):  # a row without a token may yet begin
            raise ValueError(
                f"the attention_mask has rows that begin at {starts or 0}, but those in the cache begin at "
                f"{self._starts or 0}; continue a cache with the mask of all its tokens"
            )

    # ---------------------------------------------------------------- room

    @property
    def _batch_size(self) -> int:
        assert self._store is not None
        return self._store.parts[0].k.shape[0]

    def _oldest(self) -> int:
        """The fewest columns at which all that is seen of every row is still held."""
        assert self._store is not None
        size, oldest = self._store.pattern.block_size, self._least
        for start in {start for start in self._starts or [0] if start < self._written}:
            newest = (self._written - start - 1) // size
            blocks = max(part.group.oldest_block(newest) for part in self._store.parts)
            oldest = max(oldest, start + blocks * size)
        return oldest

    def _make_room(self, k: Tensor, pattern: Pattern, rotation: int, end: int) -> None:
        """For tokens up to column `end`, and for as many of them in rings as `crop` may take back."""
        size = pattern.block_size
        blocks, spare = max(1, -(-(end - min(self._starts or [0])) // size)), 1
        if self.record_past:
            spare += -(-(end - self._floor) // size)
        if self._store is None:
            groups = _groups(pattern, k.shape[2], rotation, blocks, spare)
            self._store = _new_store(pattern, rotation, groups, k.shape[0], k)
            self._blocks, self._spare = blocks, spare
        elif blocks > self._blocks or spare > self._spare:
            if blocks > self._blocks:
                blocks += max(1, blocks // GROWTH)
            if spare > self._spare > 1:
                spare = max(spare, 2 * self._spare)
            self._lay_out(max(blocks, self._blocks), max(spare, self._spare))

    def _lay_out(self, blocks: int, spare: int) -> None:
        """Hold the same in other regions."""
        old = self._store
        assert old is not None
        like = old.parts[0].k
        self._least = self._oldest()  # rings that are longer now do not hold more of what was
        groups = _groups(old.pattern, old.keys[0], old.rotation, blocks, spare)
        self._store = _new_store(old.pattern, old.rotation, groups, len(like), like)
        starts = self._starts or [0] * len(like)
        _move(old, self._store, [(self._written - start, self.seen - start) for start in starts])
        self._blocks, self._spare, self._written = blocks, spare, self.seen

    @torch.no_grad()
    def _take(self, rows: Tensor) -> None:
        """Be a cache of these rows."""
        old = self._store
        assert old is not None
        like = old.parts[0].k
        groups = tuple(part.group for part in old.parts)
        self._store = _new_store(old.pattern, old.rotation, groups, len(rows), like)
        if self._starts is not None:
            starts = [self._starts[row] for row in rows.tolist()]
            self._starts = starts if any(starts) else None
        rows = rows.to(like.device)
        for source, target in zip(old.parts, self._store.parts, strict=True):
            torch.index_select(source.k, 0, rows, out=target.k)
            torch.index_select(source.v, 0, rows, out=target.v)


class _Tokens:
    """The new tokens of a call: their `Step`, and the order in which it takes them.

    Args:
        seen, num_tokens: columns before, and of the call.
        starts: the first column of each row's tokens.
    """

    def __init__(self, seen: int, num_tokens: int, starts: list[int], device: torch.device) -> None:
        padding = [min(num_tokens, max(0, start - seen)) for start in starts]
        before = [max(0, seen - start) for start in starts]
        counts = [num_tokens - pad for pad in padding]
        ends = [sum(pair) for pair in zip(before, counts, strict=True)]
        on_device = torch.tensor([before, ends, padding], dtype=torch.int32).to(device, non_blocking=True)
        first = on_device[0, :1] if len(set(before)) == 1 else on_device[0]
        column = torch.arange(num_tokens, device=device)
        self.step = Step(num_tokens, before, counts, on_device[0], on_device[1], first[:, None] + column)
        self._order = self._is_padding = None
        if any(padding):  # goes behind the tokens, where no token sees it
            shift = on_device[2][:, None]
            self._order = (column + shift) % num_tokens
            self._inverse, self._is_padding = (column - shift) % num_tokens, column < shift

    def front(self, x: Tensor) -> Tensor:
        """`[B, S, H, D]` with the tokens first."""
        return x if self._order is None else _gather(x, self._order)

    def back(self, x: Tensor) -> Tensor:
        """And back again, with zeros for padding."""
        if self._is_padding is None:
            return x
        return _gather(x, self._inverse).masked_fill(self._is_padding[..., None, None], 0)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x[torch.arange(len(x), device=x.device)[:, None], order]


@functools.lru_cache(maxsize=256)
def _groups(pattern: Pattern, num_kv_heads: int, rotation: int, num_blocks: int, spare: int) -> tuple[HeadGroup, ...]:
    """As `lay_out`, but every region holds its blocks up to `num_blocks`, since later tokens may see them: the same
    groups for all layers that attend alike."""
    reach = 0
    if pattern.mask is None:
        rules = pattern.rules(len(pattern.heads) or num_kv_heads, layer=rotation)
        reach = max(region.near for rule in rules for region in regions_of(rule))
    return lay_out(pattern, num_kv_heads, rotation, num_blocks + reach, spare)


@functools.lru_cache(maxsize=256)
def _table(group: HeadGroup, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return group.table.to(device)


def _new_store(
    pattern: Pattern, rotation: int, groups: tuple[HeadGroup, ...], batch_size: int, like: Tensor
) -> LayerStore:
    """An empty one, which may be written under any mode of autograd."""
    head_dim = like.shape[-1]
    with torch.inference_mode(False):
        numel = batch_size * LayerStore.numel(pattern, groups, head_dim)
        values = torch.zeros(numel, dtype=like.dtype, device=like.device)
        tables = [(group, _table(group, like.device)) for group in groups]
        return LayerStore(pattern, rotation, tables, values, batch_size, head_dim)


@torch.no_grad()
def _move(old: LayerStore, new: LayerStore, rows: list[tuple[int, int]]) -> None:
    """From one store into another what it holds of rows that have had so many tokens, and have so many."""
    size = old.pattern.block_size
    alike: dict[tuple[int, int], list[int]] = {}
    for row, (written, length) in enumerate(rows):
        if length > 0:
            alike.setdefault(((written - 1) // size, (length - 1) // size), []).append(row)
    for source, target in zip(old.parts, new.parts, strict=True):
        for (written, newest), members in alike.items():
            moves = torch.from_numpy(_moves(source.group, target.group, written, newest, size))
            head, here, there = moves.to(source.k.device)
            index = torch.tensor(members, device=source.k.device)[:, None]
            for x, y in ((source.k, target.k), (source.v, target.v)):
                y.unflatten(2, (-1, size))[index, head, there] = x.unflatten(2, (-1, size))[index, head, here]


def _moves(old: HeadGroup, new: HeadGroup, written: int, newest: int, size: int) -> np.ndarray:
    """Int64 `[3, n]`, of the blocks that a row holds whose last is `newest`: head, block of slots in the old store,
    which has had blocks up to `written`, and in the new one."""
    moves = []
    for head, regions in enumerate(new.regions):
        for region in regions:
            lost = region.overwritten(newest)
            blocks = np.array(region.blocks(0 if lost is None else lost + 1, newest + 1), dtype=np.int64)
            here = places_of(blocks, old.regions[head], written, size)
            there = region.begin // size + (blocks - region.residue) // region.stride % region.capacity
            moves.append(np.stack([np.full_like(here, head), here, there])[:, here >= 0])
    return np.concatenate(moves, axis=1)


def _no_static_layer(**_: Any) -> NoReturn:
    raise ValueError("a cache of fixed size is not supported for layers that drop keys; use DynamicCache")


STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = _no_static_layer  # type: ignore[assignment]
