"""The memory of keys and values, in one piece: where each layer's stand in it, and whose they are.

How much a sequence takes follows from its longest length alone, so that a piece serves few long sequences as well as
many short ones, one cache after another.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from s2.attention import Pattern
from s2.attention.decode import MAX_TOKENS
from s2.attention.regions import HeadGroup, lay_out, whole_group
from s2.attention.store import LayerStore
from s2.model.config import ModelConfig


class Memory:
    """Keys and values of one cache at a time.

    Attributes:
        values: of all layers, one behind the other.
        taken: how often caches have taken it; each remembers which time was its own.
    """

    def __init__(self, values: Tensor) -> None:
        self.values, self.taken = values, 0


class Plan:
    """Which slots each layer has for sequences of up to `num_blocks` blocks.

    Attributes:
        groups: heads whose keys stand alike, each once, although layers that attend alike share them.
        numel: elements of keys and values that one sequence takes.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, spare: int, keep_all: bool, device: torch.device) -> None:
        self._head_dim, self._device = config.head_dim, device
        kv_heads = config.num_key_value_heads
        laid_out: dict[tuple[Pattern, int], tuple[HeadGroup, ...]] = {}
        self._layers: list[tuple[Pattern, int, tuple[HeadGroup, ...]]] = []
        for pattern, rotation in zip(config.layout, config.layout.distinct_rotations(kv_heads), strict=True):
            key = pattern, rotation
            if key not in laid_out:
                whole = (whole_group(pattern, kv_heads, num_blocks),)
                laid_out[key] = whole if keep_all else lay_out(pattern, kv_heads, rotation, num_blocks, spare)
            self._layers.append((*key, laid_out[key]))
        self.groups = [group for groups in laid_out.values() for group in groups]
        self._sizes = [LayerStore.numel(pattern, groups, config.head_dim) for pattern, _, groups in self._layers]
        self.numel = sum(self._sizes)

    @cached_property
    def tables(self) -> dict[HeadGroup, Tensor]:
        """Of each group, on the device."""
        return {group: group.table.to(self._device) for group in self.groups}

    def stores(self, values: Tensor, batch_size: int) -> list[LayerStore]:
        """Of each layer, for `batch_size` sequences, in `values` `[batch_size * numel]`."""
        pieces = values.split([batch_size * size for size in self._sizes])
        return [
            LayerStore(
                pattern, rotation, [(group, self.tables[group]) for group in groups], piece, batch_size, self._head_dim
            )
            for (pattern, rotation, groups), piece in zip(self._layers, pieces, strict=True)
        ]


class Plans:
    """`Plan`s for the lengths that are asked for, of caches in one memory.

    Args:
        slack, keep_all: as `s2.inference.cache.KVCache`.
    """

    def __init__(self, config: ModelConfig, slack: int, keep_all: bool, device: torch.device) -> None:
        self.config, self._keep_all, self._device = config, keep_all, device
        self._spare = -(-max(slack, MAX_TOKENS) // config.block_size)
        self._plans: dict[int, Plan] = {}

    def of(self, max_length: int) -> Plan:
        """For sequences of up to `max_length` tokens."""
        num_blocks = -(-max_length // self.config.block_size)
        if num_blocks not in self._plans:
            self._plans[num_blocks] = Plan(self.config, num_blocks, self._spare, self._keep_all, self._device)
        return self._plans[num_blocks]
