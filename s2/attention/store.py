"""Keys and values of one layer: written into the slots of their regions, and attended to.

How a layer attends depends on the call (`Step`):

- a prompt, with nothing before it: by `s2_attention` on its own keys and values, which are then written;
- a decode step: its few tokens are written, and see the slots by `decode_attention`;
- a further chunk: by `s2_attention` on what the slots hold, in the order of the chunk's frame (`s2.attention.chunks`),
  and its own keys and values behind it; then they are written. Keys in order (dense layers) are attended to in place.

Shapes: B sequences, S new tokens, Hq query heads, H KV heads, R regions, C slots, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from .chunks import frame_of
from .decode import MAX_TOKENS, decode_attention, decode_shares, decode_workspace
from .kernels.triton.write import run_write_slots
from .op import s2_attention
from .pattern import Pattern
from .regions import HeadGroup, held_blocks, slots_of


@dataclass
class Step:
    """The new tokens of one call, alike for all layers.

    Attributes:
        num_tokens: S, of each row; those behind a row's count are padding.
        starts, counts: of each sequence, its tokens before and its new ones.
        before, after: its tokens before and with the new ones, int32 `[B]` on the device.
        positions: of the tokens, int64 `[B, S]`, or `[1, S]` where all sequences have the same.
        kept: what calls share.
        memo: what layers share.
    """

    num_tokens: int
    starts: list[int]
    counts: list[int]
    before: Tensor
    after: Tensor
    positions: Tensor
    kept: dict[Any, Any] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def is_prompt(self) -> bool:
        return not any(self.starts)

    @cached_property
    def is_decode(self) -> bool:
        return self.num_tokens <= MAX_TOKENS and min(self.counts) == self.num_tokens

    @cached_property
    def chunks(self) -> list[tuple[int, slice | list[int], int]]:
        """Sequences that get tokens, by where these begin: where, which, and the most that one of them gets."""
        rows: dict[int, list[int]] = {}
        for row, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            if count:
                rows.setdefault(start, []).append(row)
        return [(start, _index(members), max(self.counts[row] for row in members)) for start, members in rows.items()]


def _index(rows: list[int]) -> slice | list[int]:
    """Of rows in order: neighbours need not be copied."""
    neighbours = slice(rows[0], rows[-1] + 1)
    return neighbours if len(rows) == neighbours.stop - neighbours.start else rows


class LayerStore:
    """What a cache holds of a layer.

    Args:
        pattern, rotation: what the layer attends by.
        groups: where each head's keys stand (`lay_out`), and the tables on the device.
        values: its keys and values, `[B * numel]`; finite, since what is not seen is multiplied by 0.
        batch_size, head_dim: B and D.
    """

    def __init__(
        self,
        pattern: Pattern,
        rotation: int,
        groups: Sequence[tuple[HeadGroup, Tensor]],
        values: Tensor,
        batch_size: int,
        head_dim: int,
    ) -> None:
        self.pattern, self.rotation = pattern, rotation
        self.parts = []
        total = sum(group.end - group.begin for group, _ in groups)
        for group, table in groups:
            shape = (2, batch_size, group.end - group.begin, group.num_blocks * pattern.block_size, head_dim)
            pair, values = values[: prod(shape)].view(shape), values[prod(shape) :]
            self.parts.append(_Part(pattern, rotation, total, group, table, pair[0], pair[1]))

    @staticmethod
    def numel(pattern: Pattern, groups: Sequence[HeadGroup], head_dim: int) -> int:
        """Elements of the keys and values of one sequence."""
        slots = sum((group.end - group.begin) * group.num_blocks * pattern.block_size for group in groups)
        return 2 * slots * head_dim

    @property
    def keys(self) -> tuple[int, int, torch.dtype]:
        """KV heads, head dimension and dtype of the keys."""
        return sum(part.k.shape[1] for part in self.parts), self.parts[0].k.shape[3], self.parts[0].k.dtype

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return sum(part.k.nbytes + part.v.nbytes for part in self.parts)

    def rings(self, newest: int) -> list[Tensor]:
        """Of the keys and values those that tokens up to block `newest` overwrite, `[B, H, c, D]` each; the others are
        written once."""
        return [
            x[:, :, slots] for part in self.parts for slots in part.group.rings(newest, part.block_size)
            for x in (part.k, part.v)
        ]  # fmt: skip

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the new tokens `[B, S, Hq, D]` see of their own keys and values `[B, S, H, D]`, which are kept, and of
        those before."""
        if step.is_prompt:
            out = s2_attention(q, k, v, self.pattern, rotation=self.rotation)
            for part in self.parts:
                part.write(step, k[:, :, part.heads], v[:, :, part.heads])
            return out
        q = q.unflatten(2, (k.shape[2], -1))  # [B, S, H, Hq / H, D]
        seen = [
            part.attend(step, q[:, :, part.heads].flatten(2, 3), k[:, :, part.heads], v[:, :, part.heads])
            for part in self.parts
        ]
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=2)


class _Part:
    """Slots of the heads of a group: `k` and `v` `[B, H, C, D]`. `pattern` and `rotation` are the layer's, `total` the
    number of its KV heads."""

    def __init__(
        self, pattern: Pattern, rotation: int, total: int, group: HeadGroup, table: Tensor, k: Tensor, v: Tensor
    ) -> None:
        self.pattern, self.rotation, self.total, self.block_size = pattern, rotation, total, pattern.block_size
        self.group, self.table, self.k, self.v = group, table, k, v
        self.heads = slice(group.begin, group.end)

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `LayerStore.attend`, of the group's heads."""
        takes_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if step.is_decode and not self.group.is_whole and not takes_gradients:
            self.write(step, k, v)
            return decode_attention(
                q, self.k, self.v, self.table, step.after, block=self.block_size, scale=q.shape[-1] ** -0.5,
                **self._shared(step, q),
            )  # fmt: skip
        in_place = self.group.is_in_order and not takes_gradients
        if in_place:
            self.write(step, k, v)
        if len(step.chunks) == 1:  # rows without new tokens give what nobody uses
            out = self._attend_chunk(step, q, k, v, step.chunks[0][0], self.k, self.v, in_place)
        else:
            out = q.new_zeros(q.shape)
            for start, rows, count in step.chunks:
                new_q, new_k, new_v = (x[rows, :count] for x in (q, k, v))
                old_k, old_v = self.k[rows], self.v[rows]
                out[rows, :count] = self._attend_chunk(step, new_q, new_k, new_v, start, old_k, old_v, in_place)
        if not in_place:
            self.write(step, k, v)
        return out

    def _shared(self, step: Step, q: Tensor) -> dict[str, Any]:
        """What the decode kernel shares with other calls, and with other layers of the step."""
        if not q.is_cuda:
            return {}
        shapes, layers = (q.shape, self.k.shape), (self.group, q.shape)
        if shapes not in step.kept:
            step.kept[shapes] = decode_workspace(q, self.k, block=self.block_size)
        if layers not in step.memo:
            step.memo[layers] = decode_shares(q, self.k, self.table, step.after, block=self.block_size)
        return {"workspace": step.kept[shapes], "shares": step.memo[layers]}

    def _attend_chunk(
        self, step: Step, q: Tensor, k: Tensor, v: Tensor, start: int, old_k: Tensor, old_v: Tensor, in_place: bool
    ) -> Tensor:
        """Of sequences with `start` tokens before these, which are among the old ones already if `in_place`."""
        if self.group.is_in_order:
            if in_place:
                k, v = (x[:, :, : start + q.shape[1]].transpose(1, 2) for x in (old_k, old_v))
            else:
                pairs = (old_k, k), (old_v, v)
                k, v = (torch.cat([old[:, :, :start].transpose(1, 2), new], dim=1) for old, new in pairs)
            pattern = self.pattern if self.group.is_whole else Pattern(self.block_size)  # dense
            return s2_attention(q, k, v, pattern, rotation=self.rotation)
        key = self.group, start
        if key not in step.memo:
            frame = frame_of(self.pattern, self.total, self.rotation, self.group, start, q.shape[1])
            slots = torch.from_numpy(frame.slots)
            slots = slots.pin_memory() if q.is_cuda else slots  # else the host may wait for the device
            step.memo[key] = frame.pattern, slots.to(q.device, non_blocking=True)
        pattern, slots = step.memo[key]
        before = slots.shape[1] * self.block_size - -start % self.block_size
        k, v = (torch.cat([self._kept(old, slots)[:, :before], new], dim=1) for old, new in ((old_k, k), (old_v, v)))
        return s2_attention(
            q, k, v, pattern, rotation=self.rotation, head_offset=self.group.begin, total_kv_heads=self.total
        )

    def _kept(self, store: Tensor, slots: Tensor) -> Tensor:
        """Blocks of slots `[H, n]` of keys or values `[B, H, C, D]`, as `[B, n * block_size, H, D]`."""
        head = torch.arange(len(slots), device=store.device)[:, None]
        return store.unflatten(2, (-1, self.block_size))[:, head, slots].flatten(2, 3).transpose(1, 2)

    @torch.no_grad()
    def write(self, step: Step, k: Tensor, v: Tensor) -> None:
        """Keep of the new keys and values what later queries see. On a GPU one kernel does it, which costs by what is
        kept and may be replayed by a CUDA graph with other lengths."""
        if k.is_cuda:
            with torch.cuda.device_of(k):  # kernels are launched on the current device
                run_write_slots(self.k, self.v, k, v, self.group, self.table, step.before, step.after, self.block_size)
        else:
            self.write_by_torch(step, k, v)

    def write_by_torch(self, step: Step, k: Tensor, v: Tensor) -> None:
        """`write` without the kernel: a prompt costs by slots."""
        if step.is_decode:
            self._write_few(step, k, v)
            return
        if self.group.is_in_order:
            for row, (start, count) in enumerate(zip(step.starts, step.counts, strict=True)):
                for store, new in ((self.k, k), (self.v, v)):
                    store[row, :, start : start + count] = new[row, :count].transpose(0, 1)
            return
        held, _, _ = held_blocks(self.table, step.after, self.group.num_blocks, self.block_size)
        offset = torch.arange(self.block_size, device=held.device)
        token = (held[..., None].long() * self.block_size + offset).flatten(2)  # [B, H, C]
        token = token - step.before[:, None, None]
        is_new = ((token >= 0) & (token < (step.after - step.before)[:, None, None]))[..., None]
        token = token.clamp(0, step.num_tokens - 1)[..., None].expand(-1, -1, -1, k.shape[-1])
        for store, new in ((self.k, k), (self.v, v)):
            store.copy_(torch.where(is_new, new.transpose(1, 2).gather(2, token), store))

    def _write_few(self, step: Step, k: Tensor, v: Tensor) -> None:
        """`write_by_torch`, of as many tokens in each sequence; what it takes depends on their number alone."""
        if self.group not in step.memo:
            B, H = self.k.shape[:2]
            rows, heads = torch.arange(B, device=k.device), torch.arange(H, device=k.device)
            slots = slots_of(self.table, step.positions, self.block_size)  # [B, H, R, S]
            step.memo[self.group] = rows[:, None, None, None], heads[:, None, None], slots
        for store, new in ((self.k, k), (self.v, v)):
            store[step.memo[self.group]] = new.transpose(1, 2)[:, :, None]
