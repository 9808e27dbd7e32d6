"""Host side of the kernels over pages: where the pages of each KV head are, tiles, grid and launch. Nothing is read
from the device, so that a CUDA graph may be replayed with other lengths and tables."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ... import schedule
from ...call import Call
from ...kept import Kept
from .config import (
    FEWEST_DECODE_ROWS,
    LEAST_DECODE_TILES,
    MERGED_ELEMENTS,
    decode_config,
    decode_splits,
    forward_config,
    max_decode_rows,
    merge_chunk,
    pack_heads,
    split_head_dim,
)
from .forward import LOG2E
from .paged import SLACK, attention_paged, write_pages

_UNIT = 8  # elements: offsets that are multiples of it keep loads of 16 bytes
_WRITTEN = 16  # tokens that a program of `write_pages` writes
_OFFSETS: Kept[Tensor] = Kept(lambda offsets: (offsets,))


@dataclass(frozen=True)
class Pages:
    """Pages and tables of each KV head, all of one shape and with the same strides.

    Attributes:
        keys, values: of each head `[pages, block, D]`, whose last dimension is dense.
        tables: of each head int32 `[B, n]`, whose last dimension is dense.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]

    @property
    def offsets(self) -> tuple[Tensor, int]:
        """Int64 `[H, 3]`: how far keys, values and tables of each head are behind those of the first, in units and
        (tables) in elements; and the elements of a unit."""
        size = self.keys[0].element_size()
        rows = [
            [x.data_ptr() - first.data_ptr() for x, first in zip(places, self._first, strict=True)]
            for places in zip(self.keys, self.values, self.tables, strict=True)
        ]
        fits = all(x % (size * _UNIT) == 0 for row in rows for x in row[:2])
        unit = _UNIT if fits else 1
        counts = tuple((k // (size * unit), v // (size * unit), table // 4) for k, v, table in rows)
        device = self.keys[0].device
        return _OFFSETS.get(counts, device, lambda: torch.tensor(counts, dtype=torch.int64, device=device)), unit

    @property
    def _first(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys[0], self.values[0], self.tables[0]

    @property
    def strides(self) -> list[int]:
        """Of pages and tokens of keys and values, and of the rows of tables."""
        keys, values, tables = self._first
        return [*keys.stride()[:2], *values.stride()[:2], tables.stride(0)]


def heads_of(x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Pages `[pages, block, H, D]` as those of each head."""
    return x.unbind(2) if isinstance(x, Tensor) else tuple(x)


@dataclass(frozen=True)
class Grid:
    """Of calls with one shape. `units`, tiles times packs of heads, of `splits` programs each."""

    num_tiles: int
    num_packs: int
    splits: int
    constants: dict[str, int]
    num_warps: int

    @property
    def units(self) -> int:
        return self.num_tiles * self.num_packs

    @classmethod
    def of(
        cls, q: Tensor, kv_heads: int, sequences: int, block: int, max_query_len: int, visible: int,
        splits: int | None = None,
    ) -> Grid:  # fmt: skip
        """`visible`: keys that a query of the longest sequence sees; `splits`: if not the best for the device."""
        return _grid(tuple(q.shape), q.dtype, q.device, kv_heads, sequences, block, max_query_len, visible, splits)


@functools.lru_cache(maxsize=1024)
def _grid(
    q_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kv_heads: int, sequences: int, block: int,
    max_query_len: int, visible: int, splits: int | None,
) -> Grid:  # fmt: skip
    num_tokens, num_heads, head_dim = q_shape
    group = num_heads // kv_heads
    capability, processors = _chip(device)
    chip = (head_dim, dtype.itemsize, capability)
    decode, forward = decode_config(*chip), forward_config(*chip)
    stored, is_decode = _decode_rows(group, max_query_len, head_dim, dtype)
    if is_decode:  # all queries of a sequence and of a KV head's group are one tile
        rows, pack, block_n, num_stages, num_warps = (
            max(FEWEST_DECODE_ROWS, stored), group, decode.block_n, decode.num_stages, decode.num_warps,
        )  # fmt: skip
    else:
        rows = stored = forward.block_m
        pack, block_n = pack_heads(group, block, rows), forward.block_n
        num_stages, num_warps = forward.num_stages, forward.num_warps
    tokens = rows // pack
    num_tiles = sequences if is_decode else num_tokens // tokens + SLACK.value * sequences  # as many as there may be
    num_packs = num_heads // pack
    busy = sequences if is_decode else -(-num_tokens // tokens)
    width = triton.next_power_of_2(head_dim)
    may_split = is_decode or (busy * num_packs < processors and _merges(stored, width))
    if splits is None and may_split:
        splits = decode_splits(num_packs, busy, visible, stored * head_dim * 4, decode, processors)
    splits = splits or 1
    d0, d1 = split_head_dim(*chip)
    constants = {
        "TABLE": schedule.TABLE_COLUMNS,
        "GROUP": group,
        "PACK": pack,
        "TOKENS": tokens,
        "WHOLE": is_decode,
        "D": head_dim,
        "D0": d0,
        "D1": d1,
        "WIDTH": width,
        "BLOCK": block,
        "BLOCK_M": rows,
        "BLOCK_N": block_n,
        "STORED": stored,
        "SPLIT": splits > 1,
        "LEAST": LEAST_DECODE_TILES,
        "CHUNK": merge_chunk(stored, width),
        "STAGES": num_stages,
    }
    return Grid(num_tiles, num_packs, splits, constants, num_warps)


def _chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and multiprocessors; on a CPU those that the interpreter stands for."""
    if device.type != "cuda":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _decode_rows(group: int, max_query_len: int, head_dim: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Rows of all queries of a sequence and of a KV head's group, and whether one tile takes them."""
    rows = triton.next_power_of_2(group * max_query_len)
    return rows, rows <= max_decode_rows(head_dim, dtype.itemsize)


def _merges(rows: int, width: int) -> bool:
    return rows * width <= MERGED_ELEMENTS


def kernels_of(q: Tensor, kv_heads: int) -> list[tuple[int, int]]:
    """`(max_query_len, splits)` of calls that take, one each, all kernels that calls with such heads may take."""
    num_heads, head_dim = q.shape[1:]
    group, queries, found = num_heads // kv_heads, 1, []
    while _decode_rows(group, queries, head_dim, q.dtype)[1]:
        found += [(queries, 1), (queries, 2)]
        queries *= 2
    rows = forward_config(head_dim, q.dtype.itemsize, _chip(q.device)[0]).block_m
    return [*found, (queries, 1), *([(queries, 2)] if _merges(rows, triton.next_power_of_2(head_dim)) else [])]


def _levels(call: Call, kv_heads: int, device: torch.device) -> tuple[Tensor, dict[str, int | bool]]:
    """Table of the rules, and what of them kernels are compiled for. ValueError: the pattern has no closed form."""
    if not schedule.has_closed_form(call.pattern):
        raise ValueError(
            f"paged attention takes windows, sinks and up to {schedule.MAX_LEVELS} levels whose strides divide each "
            f"other, not {call.pattern}; use backend='reference'"
        )
    table, _, levels, sinks = schedule.rule_schedule(call, kv_heads, device)
    return table, {"LEVELS": levels, "SINKS": sinks}


def run_paged(
    q: Tensor, pages: Pages, seq_lens: Tensor, cu_seqlens: Tensor, out: Tensor, call: Call, max_query_len: int,
    visible: int, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Writes the rows of all sequences into `out` and returns their lse, `[T, Hq]`; other rows are left as they are.

    Raises:
        ValueError: the pattern or the head dimension is not supported.
    """
    kv_heads, sequences = len(pages.keys), len(seq_lens)
    rules, levels = _levels(call, kv_heads, q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not (q.numel() and sequences and max_query_len):
        return lse
    grid = Grid.of(q, kv_heads, sequences, call.pattern.block_size, max_query_len, visible, splits)
    offsets, unit = pages.offsets
    programs = grid.units * grid.splits if grid.splits > 1 else 0
    rows = programs * grid.constants["STORED"]
    partials = torch.empty(rows * q.shape[2], dtype=torch.float32, device=q.device)
    logs = torch.empty(rows, dtype=torch.float32, device=q.device)
    arrivals = torch.zeros(grid.units if programs else 0, dtype=torch.int32, device=q.device)
    attention_paged[(grid.units * grid.splits,)](
        q, pages.keys[0], pages.values[0], out, lse, pages.tables[0], offsets, rules, seq_lens, cu_seqlens, partials,
        logs, arrivals, sequences, grid.num_tiles, grid.num_packs, grid.splits, call.softmax_scale * LOG2E.value,
        *q.stride()[:2], *pages.strides, *out.stride()[:2], lse.stride(0),
        UNIT=unit, **levels, **grid.constants, num_warps=grid.num_warps,
    )  # fmt: skip
    return lse


def run_write(k: Tensor, v: Tensor, pages: Pages, seq_lens: Tensor, cu_seqlens: Tensor) -> None:
    """k, v `[T, H, D]` into the pages of the sequences whose last tokens they are."""
    kv_heads, sequences, head_dim = len(pages.keys), len(seq_lens), k.shape[2]
    if not (k.numel() and sequences):
        return
    offsets, unit = pages.offsets
    num_tiles = len(k) // _WRITTEN + SLACK.value * sequences
    write_pages[(num_tiles * kv_heads,)](
        k, v, pages.keys[0], pages.values[0], pages.tables[0], offsets, seq_lens, cu_seqlens, sequences, kv_heads,
        *k.stride()[:2], *v.stride()[:2], *pages.strides,
        UNIT=unit, D=head_dim, WIDTH=triton.next_power_of_2(head_dim), BLOCK=pages.keys[0].shape[1], TOKENS=_WRITTEN,
    )  # fmt: skip
