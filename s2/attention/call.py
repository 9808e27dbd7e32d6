"""One object for the settings of a call, from `s2_attention` to the kernels.

Custom ops take plain values: `Call.settings` are a call as their arguments (`SCHEMA`), and `call_of` makes the call of
them again, in any process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .kept import remember
from .pattern import HeadRule, Pattern, pattern_from_key

SCHEMA = "str pattern, int rotation, int head_offset, int total_kv_heads, float softmax_scale, str backend"


@dataclass(frozen=True)
class Call:
    """All that a call of `s2_attention` says but its tensors.

    Attributes:
        pattern: what each head sees.
        rotation: turns residues where there are fewer KV heads than the stride.
        head_offset: global index of the first KV head held here.
        total_kv_heads: KV heads of the whole layer.
        softmax_scale: factor of the scores.
        backend: what runs: "reference", "sdpa", "dense" (torch's own dense kernels), "triton" or "hopper".
        plans: what kernels keep for this call, by shapes; it goes when the call is forgotten.
    """

    pattern: Pattern
    rotation: int
    head_offset: int
    total_kv_heads: int
    softmax_scale: float
    backend: str
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rules_key(self) -> tuple[str, int, int, int]:
        """What the blocks that heads see depend on, without the pattern itself, since masks can be large."""
        return self.pattern.key, self.rotation, self.head_offset, self.total_kv_heads

    @property
    def settings(self) -> tuple[str, int, int, int, float, str]:
        return *self.rules_key, self.softmax_scale, self.backend

    def rules(self, num_heads: int) -> tuple[HeadRule, ...]:
        """Of the `num_heads` KV heads held here. ValueError: the pattern is a mask."""
        rules = self.pattern.rules(self.total_kv_heads, layer=self.rotation)
        return rules[self.head_offset : self.head_offset + num_heads]

    def block_mask(self, num_blocks: int, num_heads: int) -> Tensor:
        """Bool `[num_heads, num_blocks, num_blocks]` of the KV heads held here."""
        mask = self.pattern.block_mask(num_blocks, self.total_kv_heads, layer=self.rotation)
        return mask[self.head_offset : self.head_offset + num_heads]


CALLS: dict[tuple, Call] = {}  # by settings; not of masks, which live as long as somebody has them


def call_of(*settings: Any) -> Call:
    """The call of these `Call.settings`, the same one as long as it is remembered. Its rotation is the first with the
    same rules: what is kept for it serves all layers that attend alike."""
    call = CALLS.get(settings)
    if call is None:
        key, rotation, head_offset, total, *rest = settings
        pattern = pattern_from_key(key)
        first = pattern.first_alike(rotation, total)
        if first == rotation:
            call = Call(pattern, rotation, head_offset, total, *rest)
        else:
            call = call_of(key, first, head_offset, total, *rest)
        if pattern.mask is None:
            call = remember(CALLS, settings, call)
    return call
