"""A model's attention layout for people: which layers see how much, and what a KV cache has to keep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from s2.attention import HeadRule
from s2.attention.regions import regions_of

from .config import ModelConfig


def layout_table(config: ModelConfig, seq_len: int) -> str:
    """`layout_rows` as text."""
    rows = [("layers", "pattern", "density", "its heads see together"), *layout_rows(config, seq_len)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"  {a:>{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows)


def layout_rows(config: ModelConfig, seq_len: int) -> list[tuple[str, str, str, str]]:
    """Layers that attend alike in one row each: pattern, density at `seq_len`, and the share of the causal context
    that a layer's heads see together (and over how many layers it is all of it). The last row is that of all layers."""
    layout, heads = config.layout, config.layout.ruled_heads(config.num_key_value_heads)
    num_blocks = -(-seq_len // config.block_size)
    alike: dict[tuple, list[int]] = {}  # layers whose heads follow the same rules
    for layer, (pattern, rotation) in enumerate(zip(layout.patterns, layout.rotations, strict=True)):
        alike.setdefault((pattern, pattern.rules(heads, layer=rotation)), []).append(layer)
    rows = []
    for (pattern, _), layers in alike.items():
        rotation = layout.rotations[layers[0]]
        covered = pattern.union_coverage(num_blocks, heads, layer=rotation)
        together = f"{covered:.1%}"
        if covered < 1:
            needed = pattern.layers_to_cover(heads)
            together += f", all of it over {needed} layers" if needed else ", never all of it"
        density = pattern.density(seq_len, heads, layer=rotation)
        rows.append((ranges(layers), str(pattern), f"{density:.2%}", together))
    whole = layout.density(seq_len, heads)
    return [*rows, ("all", config.attention_layout, f"{whole:.2%}", f"at {seq_len:,} tokens")]


def ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5"""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def kv_bytes_per_token(config: ModelConfig, seq_len: int) -> float:
    """Bytes of bf16 keys and values that the next token or a later one sees after `seq_len` tokens, all layers
    together, for each of those tokens: dense layers need all, a sparse head its sinks, its window and every V-th block.

    `s2.inference.KVCache` has room for a block or two more in each ring (`seq_len` within the first block gives what a
    dense model keeps).
    """
    layout, kv_heads = config.layout, config.num_key_value_heads
    num_blocks = -(-seq_len // config.block_size)
    kept = 0
    for pattern, rotation in zip(layout.patterns, layout.distinct_rotations(kv_heads), strict=True):
        rules = pattern.rules(layout.ruled_heads(kv_heads), layer=rotation)
        seen = torch.stack([_kept_blocks(rule, num_blocks) for rule in rules])
        kept += int(seen.view(kv_heads, -1, num_blocks).any(1).sum())  # a KV head keeps what any of its queries sees
    return kept / num_blocks * 2 * config.head_dim * 2


def _kept_blocks(rule: HeadRule, num_blocks: int) -> torch.Tensor:
    """Bool [num_blocks]: key blocks that the newest query block or a later one sees."""
    block = torch.arange(num_blocks)
    keep = torch.zeros(num_blocks, dtype=torch.bool)
    for region in regions_of(rule):
        holds = (block % region.stride == region.residue) & (region.first <= block) & (block < region.last)
        keep |= holds & (num_blocks - 1 - block < region.far)
    return keep
