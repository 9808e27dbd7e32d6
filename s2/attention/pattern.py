"""What each head may see: block patterns of sparsely-sharded attention (S2-Attention, arXiv 2407.17678).

Tokens are grouped in blocks of `block_size`. A pattern says, for every KV head, which key blocks a query block
attends to; inside a kept block attention is causal at token level. Two families:

- *Rules* (`Pattern.parse`, `Pattern.from_ranges`, `Pattern.per_head`): a local window plus strides by block distance,
  given in closed form by a few integers a head (`HeadRule`). Kernels never see a mask tensor for these.
- *Masks* (`Pattern.from_mask`, `Pattern.from_masks`): any boolean block mask, for exploration.

`Pattern.block_mask` is the definition in executable form; everything else is tested against it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import math
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grammar import UNBOUNDED, Reader, Rule, spell_heads

BLOCK_SIZES = (16, 32, 64, 128, 256)
_HOST = torch.device("cpu")  # of masks, whatever the default device is
_MASK = "mask:"

# Patterns by key, as long as somebody has them, since masks can be large
_PATTERNS: weakref.WeakValueDictionary[str, Pattern] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Level:
    """Key blocks `b % stride == residue` are visible up to (not including) block distance `end`."""

    stride: int
    residue: int
    end: int


@dataclass(frozen=True)
class HeadRule:
    """One head's rule: the last `local` blocks, the strided `levels` beyond, and the first `sinks` blocks.

    Levels are ordered by `end`; level k applies to block distances from the previous end (`local` for the
    first) up to its own.
    """

    local: int
    levels: tuple[Level, ...] = ()
    sinks: int = 0

    @property
    def is_dense(self) -> bool:
        return self.local >= UNBOUNDED

    @property
    def is_nested(self) -> bool:
        """Each stride divides the next, so that a key block's queries are one contiguous run (KV-efficiency)."""
        return all(far.stride % near.stride == 0 for near, far in itertools.pairwise(self.levels))

    def visible(self, distance: Tensor, key_block: Tensor) -> Tensor:
        """Whether a key block is kept, from its block distance to the query and its index (broadcast, bool)."""
        keep = distance < self.local
        begin = self.local
        for level in self.levels:
            in_range = (distance >= begin) & (distance < level.end)
            keep = keep | (in_range & (key_block % level.stride == level.residue))
            begin = level.end
        return (keep | (key_block < self.sinks)) & (distance >= 0)

    def most_visible(self, num_blocks: int) -> int:
        """A bound, close from above, on the key blocks that a query in one of so many blocks sees."""
        seen, begin = self.local + self.sinks, self.local
        for level in self.levels:
            seen += -(-max(0, min(level.end, num_blocks) - begin) // level.stride)
            begin = level.end
        return min(seen, num_blocks)

    def mask(self, num_blocks: int) -> Tensor:
        """Bool `[num_blocks, num_blocks]`: which key blocks each query block keeps."""
        block = torch.arange(num_blocks, device=_HOST)
        return self.visible(block[:, None] - block, block)


@dataclass(frozen=True, eq=False)
class Pattern:
    """A block pattern for all KV heads of a layer. Build one with `parse`, `from_ranges`, `per_head` or `from_mask`.

    Attributes:
        block_size: tokens in a block, one of `BLOCK_SIZES`.
        local: blocks in the local window, the query's own block included (`UNBOUNDED`: dense).
        ranges: `(stride, end)` pairs by block distance; the last `end` is usually `UNBOUNDED`.
        sinks: leading blocks that every query keeps.
        heads: one pattern a head, for heads that differ in kind.
        mask: bool `[H, nq, nk]` for mask patterns, else None.
        key: the pattern written out, from which `pattern_from_key` makes it again in any process; equal patterns have
            equal keys.
    """

    block_size: int
    local: int = UNBOUNDED
    ranges: tuple[tuple[int, int], ...] = ()
    sinks: int = 0
    heads: tuple[Pattern, ...] = ()
    mask: Tensor | None = None
    key: str = ""

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size={self.block_size!r} is not supported; use one of {BLOCK_SIZES}")
        object.__setattr__(self, "key", self._make_key())
        _PATTERNS.setdefault(self.key, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _PATTERNS.setdefault(self.key, self)

    # ---------------------------------------------------------------- constructors

    @classmethod
    def parse(cls, spec: str, block_size: int = 64) -> Pattern:
        """Read `dense`, `L8V16` (8 local blocks, stride 16), `W16` (window of 16 blocks), `L8V4<64V16+sink2`,
        `2*dense|6*L8V16` and whatever else `str` prints of rules: see `grammar`.

        Windows are of whole blocks, the query's own included, of which it sees the part up to itself: with blocks of B
        tokens `W4` is 3 B + 1 to 4 B tokens (16: 49 to 64), not always 4 B.

        Raises:
            ValueError: names the spec, and what is wrong at which character.
        """
        reader = Reader(spec, "attention pattern")
        pattern = cls.read(reader, block_size)
        reader.finish("'+sink<blocks>', '|' and the next head's rule")
        return pattern

    @classmethod
    def read(cls, reader: Reader, block_size: int) -> Pattern:
        """The pattern that begins where `reader` is."""
        rules, one_a_head = reader.rules()
        heads = [cls(block_size, *rule) for rule in rules]
        return cls.per_head(heads) if one_a_head else heads[0]

    @classmethod
    def from_ranges(
        cls, local: int, ranges: Sequence[tuple[int, int | None]] = (), *, block_size: int = 64, sinks: int = 0
    ) -> Pattern:
        """Build a pattern from a window and strides by context range.

        Args:
            local: window in blocks, the diagonal block included; at least 1.
            ranges: `(stride, end)` by block distance, `end` exclusive and growing, None for "to the beginning";
                `[(4, 64), (16, None)]` is stride 4 within 64 blocks and stride 16 beyond.
            block_size: tokens in a block.
            sinks: leading blocks that every query keeps.

        Raises:
            ValueError: says which number is wrong.
        """
        return cls(block_size, *Rule.checked(local, ranges, sinks))

    @classmethod
    def per_head(cls, heads: Sequence[Pattern]) -> Pattern:
        """Give every head its own rule pattern: one a KV head, or one a query head for training experiments.

        Strided heads keep the residue of their global head index. All heads share one block size.
        """
        if not heads:
            raise ValueError("per_head needs one pattern a head, got none")
        if any(head.mask is not None or head.heads for head in heads):
            raise ValueError("per_head takes rule patterns ('dense', 'W..', 'L..V..'), not masks or nested per_head")
        sizes = sorted({head.block_size for head in heads})
        if len(sizes) > 1:
            raise ValueError(f"per_head patterns must share one block_size, got {sizes}")
        if len({head.key for head in heads}) == 1 and heads[0].is_dense:
            return heads[0]
        return cls(block_size=sizes[0], heads=tuple(heads))

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_size: int = 64) -> Pattern:
        """Use a boolean block mask `[H, nq, nk]`, H the number of KV heads (or of query heads, or 1 for all).

        Only the causal half counts. The mask must be square and cover the longest sequence used with it; shorter
        sequences use its top-left corner.
        """
        if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[1] != mask.shape[2] or not mask.shape[0]:
            raise ValueError(f"a block mask must be bool with shape [H, n, n], got {mask.dtype} {list(mask.shape)}")
        return cls(block_size=block_size, local=0, mask=torch.tril(mask.detach().cpu()).contiguous())

    @classmethod
    def from_masks(cls, masks: Sequence[tuple[Tensor, int | None]], *, block_size: int = 64) -> Pattern:
        """Use a different mask for each context range: `(mask, end)` by block distance, `end` exclusive, growing."""
        if not masks:
            raise ValueError("from_masks needs at least one (mask, end) pair")
        shape = masks[0][0].shape
        combined = torch.zeros(shape, dtype=torch.bool, device=_HOST)
        block = torch.arange(shape[-1], device=_HOST)
        begin = 0
        for mask, end in masks:
            if mask.dim() != 3 or mask.dtype != torch.bool or mask.shape != shape:
                raise ValueError(f"all masks must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
            end = UNBOUNDED if end is None else end
            if end <= begin:
                raise ValueError(f"the range up to distance {end} must reach beyond {begin} blocks")
            distance = block[:, None] - block
            combined |= mask.cpu() & (distance >= begin) & (distance < end)
            begin = end
        return cls.from_mask(combined, block_size=block_size)

    # ---------------------------------------------------------------- what the pattern is

    @property
    def is_dense(self) -> bool:
        # torch.compile does not trace `not` of a tuple
        return self.mask is None and len(self.heads) == 0 and self.local >= UNBOUNDED

    @property
    def max_stride(self) -> int:
        """The widest stride (1 when no head has one)."""
        if self.heads:
            return max(head.max_stride for head in self.heads)
        return self.ranges[-1][0] if self.ranges else 1

    def rules(self, num_heads: int, *, layer: int = 0) -> tuple[HeadRule, ...]:
        """The rule of every head, by global head index. Mask patterns have none (ValueError).

        Residues cover every block between them: `floor(h * V / H)` where `H >= V`, else `(h + layer * H) % V`,
        which rotates so that `ceil(V / H)` consecutive layers are complete together.
        """
        if self.mask is not None:
            raise ValueError("a mask pattern has no closed-form rules")
        _check_heads(num_heads)
        if self.heads:
            if len(self.heads) != num_heads:
                raise ValueError(
                    f"the pattern has {len(self.heads)} per-head rules but the layer has {num_heads} heads"
                )
            return tuple(head.rules(num_heads, layer=layer)[h] for h, head in enumerate(self.heads))
        widest = self.max_stride
        rules = []
        for head in range(num_heads):
            covers = num_heads >= widest
            residue = head * widest // num_heads if covers else (head + layer * num_heads) % widest
            levels = tuple(Level(stride, residue % stride, end) for stride, end in self.ranges)
            rules.append(HeadRule(self.local, levels, self.sinks))
        return tuple(rules)

    def first_alike(self, layer: int, num_heads: int) -> int:
        """The first layer whose heads have the same rules as those of `layer`: what is kept for one serves both."""
        if self.mask is not None:
            return 0
        strides = [pattern.max_stride for pattern in self.heads or (self,)]
        turns = [stride // math.gcd(stride, num_heads) for stride in strides if stride > num_heads]
        return layer % math.lcm(*turns)

    def block_mask(self, num_blocks: int, num_kv_heads: int, *, layer: int = 0) -> Tensor:
        """The definition: bool `[num_kv_heads, num_blocks, num_blocks]`, True where query block i keeps key block b."""
        if not isinstance(num_blocks, int) or num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks!r} must be a whole number, 0 or more")
        _check_heads(num_kv_heads)
        if self.mask is not None:
            heads, size, _ = self.mask.shape
            if heads not in (1, num_kv_heads):
                raise ValueError(f"the block mask has {heads} heads but the layer has {num_kv_heads}")
            if num_blocks > size:
                raise ValueError(f"the block mask covers {size} blocks but {num_blocks} are needed")
            return self.mask[:, :num_blocks, :num_blocks].expand(num_kv_heads, -1, -1).clone()
        return torch.stack([rule.mask(num_blocks) for rule in self.rules(num_kv_heads, layer=layer)])

    def is_kv_efficient(
        self, num_blocks: int | None = None, num_kv_heads: int | None = None, *, layer: int = 0
    ) -> bool:
        """Whether each key block is attended by one contiguous run of query blocks, starting at itself.

        Without `num_blocks` the answer holds at every length (strides nest); with it, for that many blocks exactly.
        """
        num_kv_heads = num_kv_heads or self._own_heads()
        if num_blocks is None:
            if self.mask is None:
                return all(rule.is_nested for rule in self.rules(num_kv_heads, layer=layer))
            num_blocks = self.mask.shape[1]
        mask = self.block_mask(num_blocks, num_kv_heads, layer=layer)
        # a key that comes back: not visible for query i - 1 (or i == key) yet visible for a later one
        came_back = mask[:, 1:] & ~mask[:, :-1]
        return not bool(torch.tril(came_back, diagonal=0).any())

    def union_coverage(self, num_blocks: int, num_kv_heads: int, *, layer: int = 0, num_layers: int = 1) -> float:
        """Share of the causal block pairs that some head keeps in `num_layers` consecutive layers from `layer`.

        1.0 is union-complete: between them the heads see the whole context.
        """
        if num_blocks < 1 or num_layers < 1:
            raise ValueError(f"num_blocks={num_blocks} and num_layers={num_layers} must be at least 1")
        _check_heads(num_kv_heads)
        if self.mask is not None:
            covered = self.block_mask(num_blocks, num_kv_heads).any(dim=0)
        else:
            distinct = {rule for i in range(num_layers) for rule in self.rules(num_kv_heads, layer=layer + i)}
            covered = functools.reduce(torch.logical_or, (rule.mask(num_blocks) for rule in distinct))
        return int(covered.sum()) / (num_blocks * (num_blocks + 1) // 2)

    def layers_to_cover(self, num_kv_heads: int) -> int | None:
        """Consecutive layers that are union-complete together; None when no number of them is (windows)."""
        if self.mask is not None:
            return 1 if self.union_coverage(self.mask.shape[1], num_kv_heads) == 1.0 else None
        if any(rule.is_dense for rule in self.rules(num_kv_heads)):
            return 1
        widest = self.max_stride
        num_blocks = 2 * (max(rule.local for rule in self.rules(num_kv_heads)) + widest)
        for num_layers in range(1, widest + 1):
            if self.union_coverage(num_blocks, num_kv_heads, num_layers=num_layers) == 1.0:
                return num_layers
        return None

    def density(self, seq_len: int, num_kv_heads: int | None = None, *, layer: int = 0) -> float:
        """Visible query-key token pairs over causal pairs `S (S + 1) / 2`, averaged over heads."""
        if not isinstance(seq_len, int) or seq_len < 1:
            raise ValueError(f"seq_len={seq_len!r} must be a positive whole number")
        if self.is_dense:
            return 1.0
        heads = num_kv_heads or self._own_heads()
        pairs = sum(self.visible_pairs(seq_len, heads, layer=layer)) / heads
        return pairs / (seq_len * (seq_len + 1) / 2)

    def visible_pairs(self, seq_len: int, num_kv_heads: int, *, layer: int = 0) -> list[int]:
        """Visible query-key token pairs of each head for one sequence of `seq_len` tokens."""
        size = self.block_size
        num_blocks = -(-seq_len // size)
        rows = torch.full((num_blocks,), size, dtype=torch.int64, device=_HOST)
        rows[-1] = seq_len - (num_blocks - 1) * size  # tokens in the last block
        diagonal = rows * (rows + 1) // 2
        if self.mask is not None:
            mask = self.block_mask(num_blocks, num_kv_heads)
            below = torch.tril(mask, diagonal=-1).sum(dim=2)  # [H, nq]
            own = torch.diagonal(mask, dim1=1, dim2=2)
            return [int(((b * rows * size) + o * diagonal).sum()) for b, o in zip(below, own, strict=True)]
        query = torch.arange(num_blocks, device=_HOST)
        rules = self.rules(num_kv_heads, layer=layer)
        blocks = {rule: _kept_blocks(rule, query) - 1 for rule in set(rules)}  # without the diagonal block
        pairs = {rule: int((below * rows * size + diagonal).sum()) for rule, below in blocks.items()}
        return [pairs[rule] for rule in rules]

    def _own_heads(self) -> int:
        """The head count of patterns that have one; else as many as show every residue."""
        return self.mask.shape[0] if self.mask is not None else len(self.heads) or self.max_stride

    # ---------------------------------------------------------------- naming

    def _make_key(self) -> str:
        if self.mask is None:
            return f"{self}/{self.block_size}"
        bits = zlib.compress(np.packbits(self.mask.numpy()).tobytes(), 1)
        heads, size, _ = self.mask.shape
        return f"{_MASK}{self.block_size}:{heads}x{size}:{base64.b64encode(bits).decode()}"

    def __str__(self) -> str:
        """What `parse` reads, but for masks, which are named by a digest."""
        if self.mask is not None:
            digest = hashlib.sha256(self.key.encode()).hexdigest()[:8]
            return f"mask{list(self.mask.shape)} of blocks of {self.block_size} ({digest})"
        return spell_heads(self.heads) if self.heads else str(Rule(self.local, self.ranges, self.sinks))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def pattern_from_key(key: str) -> Pattern:
    """The pattern whose key this is (custom ops, and programs exported with them, carry patterns by key).

    Raises:
        ValueError: it is no key.
    """
    pattern = _PATTERNS.get(key)
    if pattern is not None:
        return pattern
    try:
        if not key.startswith(_MASK):
            spec, block_size = key.split("/")
            return Pattern.parse(spec, int(block_size))
        block_size, shape, text = key.removeprefix(_MASK).split(":")
        heads, size = (int(number) for number in shape.split("x"))
        bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
        mask = np.unpackbits(bits, count=heads * size * size).astype(bool).reshape(heads, size, size)
        return Pattern.from_mask(torch.from_numpy(mask), block_size=int(block_size))
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{key[:80]!r} is not the key of a pattern: {error}") from None


def _kept_blocks(rule: HeadRule, query: Tensor) -> Tensor:
    """How many blocks each query block keeps under `rule`, in closed form. `query`: int64 `[nq]` block indices."""
    first_local = (query - rule.local + 1).clamp(min=0)
    kept = query - first_local + 1
    near_end = first_local  # blocks before this are beyond what was counted
    for level in rule.levels:
        low = (query - level.end + 1).clamp(min=0).clamp(max=near_end)
        kept = kept + _members(near_end, level) - _members(low, level)
        near_end = low
    if rule.sinks:
        sink = torch.arange(rule.sinks, device=_HOST)[None, :]
        distance = query[:, None] - sink
        missing = ~HeadRule(rule.local, rule.levels).visible(distance, sink) & (distance >= 0)
        kept = kept + missing.sum(dim=1)
    return kept


def _members(bound: Tensor, level: Level) -> Tensor:
    """Number of blocks `b < bound` with `b % stride == residue`."""
    return (bound - level.residue + level.stride - 1).div(level.stride, rounding_mode="floor").clamp(min=0)


def _check_heads(num_heads: int) -> None:
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_kv_heads={num_heads!r} must be a positive whole number")
