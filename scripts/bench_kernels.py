"""The kernels that `bench_attention.py` times, ours and their baselines, all of one shape: an `Entry`.

FlexAttention's block mask is built here from a pattern's closed form, rule by rule: its own builder evaluates the mask
for every pair of tokens, which at 128k and per-head masks takes terabytes.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from s2.attention import HeadRule, Pattern, s2_attention
from s2.attention.kernels.hopper.support import objection
from s2.attention.pattern import UNBOUNDED

Forward = Callable[[], Tensor]  # -> [B, S, H, D]

FLEX_ROWS = 128  # queries of a FlexAttention tile
MAX_FLEX_LENGTH = 131072
MAX_FLEX_LISTS = 4 * 2**30  # bytes of block lists that one mask may take


class Skipped(Exception):  # noqa: N818
    """A kernel that cannot run here; the message is the reason for the report."""


@dataclass(frozen=True)
class Entry:
    """A kernel to time. `build(q, k, v)` (`[B, S, H, D]`) gives the forward call; a forward whose result has no
    gradient gets no backward figure. `pattern` None is dense causal attention."""

    name: str
    build: Callable[[Tensor, Tensor, Tensor], Forward]
    pattern: Pattern | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    graph: bool = False  # also time the forward in a CUDA graph
    note: str = ""
    spec: str = ""  # of our kernels: the pattern as it was asked for
    pairs: float | None = None  # visible ones a head, if not those of one sequence


# ---------------------------------------------------------------- ours and dense


def dense_entries() -> list[Entry]:
    flash = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    cudnn = partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
    return [
        Entry("dense FlashAttention-2", _dense, context=flash),
        Entry("dense cuDNN", _dense, context=cudnn, graph=True),
    ]


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Forward:
    gqa = q.shape[2] != k.shape[2]
    return partial(_heads_first, F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=gqa)


def _heads_first(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """A call of a function that takes `[B, H, S, D]`."""
    inputs = (x.transpose(1, 2) for x in (q, k, v))
    return attend(*inputs, **options).transpose(1, 2)


def s2_entry(spec: str, pattern: Pattern, backend: str, asked: str = "") -> Entry:
    """`asked`: the pattern in the words of --patterns, where `spec` says it in other blocks."""

    def build(q: Tensor, k: Tensor, v: Tensor) -> Forward:
        _check_hopper(backend, q, k, v, pattern, packed=False)
        return partial(s2_attention, q, k, v, pattern, backend=backend)

    return Entry(f"S2 {spec} {backend}", build, pattern, graph=backend == "hopper", spec=asked or spec)


def packed_entry(spec: str, pattern: Pattern, backend: str, borders: list[int], kv_heads: int) -> Entry:
    """Our kernels on a sequence of packed documents."""

    def build(q: Tensor, k: Tensor, v: Tensor) -> Forward:
        rows = [x.flatten(0, 1) for x in (q, k, v)]  # views, whose gradients cost nothing
        _check_hopper(backend, *rows, pattern, packed=True)
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=q.device)
        return lambda: s2_attention(*rows, pattern, cu_seqlens=cu_seqlens, backend=backend).unflatten(0, q.shape[:2])

    lengths = [end - begin for begin, end in itertools.pairwise(borders)]
    name, pairs = f"S2 {spec} {backend}, {len(lengths)} documents", visible_pairs(pattern, lengths, kv_heads)
    return Entry(name, build, pattern, graph=backend == "hopper", spec=spec, pairs=pairs)


def _check_hopper(backend: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, packed: bool) -> None:
    if backend == "hopper" and (reason := objection(q, k, v, pattern, packed=packed)):
        raise Skipped(f"the Hopper kernels do not take this case: {reason}")


def visible_pairs(pattern: Pattern, lengths: list[int], kv_heads: int) -> float:
    """Of documents of some lengths, a head."""
    return sum(sum(pattern.visible_pairs(n, kv_heads)) for n in lengths) / kv_heads


def peer_entry(name: str, target: str, spec: str, pattern: Pattern) -> Entry:
    """A kernel of another library: `module:function` gets (q, k, v, pattern) and returns the forward call."""

    def build(q: Tensor, k: Tensor, v: Tensor) -> Forward:
        module, _, function = target.partition(":")
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise Skipped(f"cannot import {target}: {error}") from error
        try:
            return make(q, k, v, pattern)
        except ImportError as error:
            raise Skipped(f"{target} cannot import what it calls: {error}") from error

    return Entry(f"{name} {spec}", build, pattern)


# ---------------------------------------------------------------- FlexAttention


def flex_entries(spec: str, pattern: Pattern) -> list[Entry]:
    """FlexAttention with key tiles of the pattern's block where it can have them: its forward takes 128x64 tiles, its
    backward needs 128x128."""
    entries = []
    if pattern.block_size < 128:
        build = partial(_flex, pattern=pattern, tile=(FLEX_ROWS, 64), differentiable=False)
        note = "forward only: FlexAttention's backward does not take 128x64 blocks"
        entries.append(Entry(f"Flex {spec} 128x64", build, pattern, note=note))
    build = partial(_flex, pattern=pattern, tile=(FLEX_ROWS, 128), differentiable=True)
    entries.append(Entry(f"Flex {spec} 128x128", build, pattern))
    return entries


def _flex(q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, tile: tuple[int, int], differentiable: bool) -> Forward:
    if q.shape[1] > MAX_FLEX_LENGTH:
        raise Skipped(f"FlexAttention is timed up to {MAX_FLEX_LENGTH:,} tokens")
    if not differentiable:
        q, k, v = (x.detach() for x in (q, k, v))
    mask = flex_mask(pattern, q.shape[1], q.shape[2], k.shape[2], tile, with_backward=q.requires_grad, device=q.device)
    # Each mask is another graph. Past its limit of graphs torch.compile would run FlexAttention unfused, which makes
    # the whole score matrix: forget the graphs before, and raise instead (fullgraph).
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the timed backward runs many times on one forward
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    options = {"BLOCK_M": FLEX_ROWS, "BLOCK_N": 64} if tile[1] == 64 else None
    gqa = q.shape[2] != k.shape[2]
    return partial(_heads_first, compiled, q, k, v, block_mask=mask, enable_gqa=gqa, kernel_options=options)


def flex_mask(
    pattern: Pattern, seq_len: int, heads: int, kv_heads: int, tile: tuple[int, int], *, with_backward: bool,
    device: Any,
) -> BlockMask:  # fmt: skip
    """The pattern as a FlexAttention mask with tiles of `tile` (queries, keys), for `heads` query heads: of each tile
    of queries the tiles of keys that need the mask, and those that are visible as a whole; `with_backward` the other
    way round too.

    Like FlexAttention's own builder it counts a tile that reaches past the end of the sequence as partial.
    """
    queries, keys = (-(-seq_len // size) for size in tile)
    # As wide as the mask although a sparse row is short: FlexAttention takes the strides of the partial lists for the
    # full ones too (torch 2.11), and on CPUs checks the width.
    size = 2 * 4 * heads * queries * keys
    if size > MAX_FLEX_LISTS:
        raise Skipped(f"the block lists would take {size / 2**30:.1f} GiB, more than {MAX_FLEX_LISTS / 2**30:.0f}")
    rules = pattern.rules(kv_heads)
    masks = {rule: _tiles(rule, pattern.block_size, seq_len, tile, device) for rule in set(rules)}
    lists = []
    for kind in range(2):
        mask = torch.stack([masks[rule][kind] for rule in rules]).repeat_interleave(heads // kv_heads, dim=0)[None]
        lists += [mask.sum(dim=3).int(), mask.byte().argsort(dim=3, descending=True, stable=True).int()]
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=tile, mask_mod=mask_mod(pattern, heads, kv_heads, device), seq_lengths=(seq_len, seq_len),
        compute_q_blocks=with_backward,
    )  # fmt: skip


def _tiles(rule: HeadRule, block: int, seq_len: int, tile: tuple[int, int], device: Any) -> tuple[Tensor, Tensor]:
    """Which tiles are visible in part, and which as a whole: bool `[nq, nk]`."""
    unit = min(block, *tile)
    counts = [-(-seq_len // size) for size in tile]
    query, key = (torch.arange(n * (size // unit), device=device) for n, size in zip(counts, tile, strict=True))
    query = query[:, None]
    kept = rule.visible(query * unit // block - key * unit // block, key * unit // block)
    seen = kept & (key <= query) & (query * unit < seq_len)
    whole = kept & (key < query) & ((query + 1) * unit <= seq_len)
    seen, whole = (x.view(counts[0], tile[0] // unit, counts[1], tile[1] // unit) for x in (seen, whole))
    full = whole.all(3).all(1)
    return seen.any(3).any(1) & ~full, full


def mask_mod(pattern: Pattern, heads: int, kv_heads: int, device: Any) -> Callable[..., Tensor]:
    """The pattern's rule for single tokens: whether query `i` of query head `h` sees key `j`."""
    rules = [rule for rule in pattern.rules(kv_heads) for _ in range(heads // kv_heads)]
    block, depth = pattern.block_size, max(len(rule.levels) for rule in rules)

    def per_head(values: list[int]) -> int | Tensor:
        """One number where all heads agree, so that the kernel has it as a constant."""
        return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=torch.int32, device=device)

    def level(n: int, field: str, absent: int) -> int | Tensor:
        return per_head([getattr(rule.levels[n], field) if n < len(rule.levels) else absent for rule in rules])

    local, sinks = per_head([rule.local for rule in rules]), per_head([rule.sinks for rule in rules])
    # an absent level ends at once
    strided = [(level(n, "stride", 1), level(n, "residue", 0), level(n, "end", 0)) for n in range(depth)]

    def of_head(value: int | Tensor, h: Tensor) -> int | Tensor:
        return value[h] if isinstance(value, Tensor) else value

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        key = j // block
        distance = i // block - key
        begin = of_head(local, h)
        keep = distance < begin
        for stride, residue, end in strided:
            matches = key % of_head(stride, h) == of_head(residue, h)
            end = of_head(end, h)
            in_range = distance >= begin
            if isinstance(end, Tensor) or end < UNBOUNDED:
                in_range = in_range & (distance < end)
            keep = keep | (in_range & matches)
            begin = end
        if isinstance(sinks, Tensor) or sinks:
            keep = keep | (key < of_head(sinks, h))
        return keep & (i >= j)

    return visible
