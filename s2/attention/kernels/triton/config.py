"""Tile shapes of the Triton kernels: a pure function of dtype, head dimension, block size and chip, never of the
sequence length, so a new length costs no tuning. Measured on an H200; smaller chips get shapes that fit their shared
memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

MAX_PART = 128  # widest part of the head dimension (Split-D)
MIN_PART = 16  # narrowest operand of a matrix instruction
# wgmma operands narrower than 128 bytes come out wrong in triton 3.6 (checked on an H200 with parts of 16 and 32
# columns; 64 and 128 are right), so 16-bit parts on Hopper are at least this wide
MIN_PART_HOPPER = 64


@dataclass(frozen=True)
class TileConfig:
    block_m: int  # query rows of a tile
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int


def split_head_dim(head_dim: int, itemsize: int, capability: tuple[int, int]) -> tuple[int, int]:
    """Widths of the one or two parts a head dimension is processed in (the second may be 0), least padding first:
    64 -> 64, 80 -> 64 + 16, 96 -> 64 + 32, 128 -> 128, 256 -> 128 + 128.

    Raises:
        ValueError: the dimension is not a multiple of 8 up to 256.
    """
    if head_dim % 8 or not 8 <= head_dim <= 2 * MAX_PART:
        raise ValueError(
            f"head_dim={head_dim} is not supported by the triton backend; use a multiple of 8 up to {2 * MAX_PART}, "
            "or backend='sdpa'"
        )
    narrowest = MIN_PART_HOPPER if capability[0] == 9 and itemsize == 2 else MIN_PART
    whole = max(triton.next_power_of_2(head_dim), narrowest)
    first = max(whole // 2, narrowest)
    rest = max(triton.next_power_of_2(max(head_dim - first, 1)), narrowest)
    if whole > MAX_PART or first + rest < whole:
        return first, rest
    return whole, 0


def pack_heads(group: int, block_size: int, block_m: int) -> int:
    """Merge-Q: how many query heads of a KV head share a tile, so that its tokens do not outgrow one block."""
    pack = 1
    while group % (pack * 2) == 0 and pack * 2 * min(block_size, block_m) <= block_m:
        pack *= 2
    return pack


def small_shared_memory(capability: tuple[int, int]) -> bool:
    """Chips with about 100 KB of shared memory a block (sm_86, sm_89, sm_120)."""
    return capability[0] in (8, 12) and capability != (8, 0)


def forward_config(head_dim: int, itemsize: int, capability: tuple[int, int]) -> TileConfig:
    if itemsize == 4:
        return TileConfig(64, 32, 4, 1 if head_dim > 128 else 2)
    if small_shared_memory(capability):
        return TileConfig(64, 32, 4, 2) if head_dim > 128 else TileConfig(128, 32, 4 if head_dim <= 64 else 8, 3)
    if head_dim > 128:
        return TileConfig(128, 64, 8, 2) if capability[0] >= 9 else TileConfig(64, 64, 4, 2)
    if capability[0] == 9:
        return TileConfig(64, 64, 4, 3)
    return TileConfig(128, 64, 4 if head_dim <= 64 else 8, 3)


def backward_q_config(head_dim: int, itemsize: int, capability: tuple[int, int]) -> TileConfig:
    if itemsize == 4:
        return TileConfig(32, 32, 4, 1) if head_dim > 128 else TileConfig(64, 32, 4, 1)
    if small_shared_memory(capability):
        return TileConfig(32, 32, 4, 1) if head_dim > 128 else TileConfig(64, 32, 4, 2)
    if head_dim > 128:
        return TileConfig(64, 32, 4, 2)
    return TileConfig(128, 64, 8, 3 if capability[0] >= 9 else 2)


def backward_kv_config(head_dim: int, itemsize: int, capability: tuple[int, int]) -> TileConfig:
    if itemsize == 4:
        if head_dim > 128:
            return TileConfig(16, 32, 4, 1)
        return TileConfig(32, 32 if small_shared_memory(capability) else 64, 4, 1)
    if small_shared_memory(capability):
        return TileConfig(16, 32, 4, 1) if head_dim > 128 else TileConfig(32, 64, 4, 2)
    if head_dim > 128:
        return TileConfig(32, 64, 8, 2)
    return TileConfig(64, 128, 8, 2)


@dataclass(frozen=True)
class DecodeConfig:
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int
    per_processor: int  # programs that a multiprocessor runs at once
    few_warps: int | None = None  # with FEWEST_DECODE_ROWS rows, if not num_warps

    def warps(self, rows: int) -> int:
        return self.few_warps if self.few_warps is not None and rows <= FEWEST_DECODE_ROWS else self.num_warps


FEWEST_DECODE_ROWS = 16  # of a matrix instruction
LEAST_DECODE_TILES = 4  # of a program that shares a sequence: below, a merge costs more than it saves
TILE_BYTES = 32 << 10  # keys and values of a tile, about
MERGED_ELEMENTS = 8192  # that a merge reads at once
MERGED_BYTES = 256 << 10  # that one program should merge at most


def decode_config(head_dim: int, itemsize: int, capability: tuple[int, int]) -> DecodeConfig:
    """Tiles of 8 to 32 KB: with those on their way two programs a multiprocessor, or one of d 256, keep memory busy."""
    if itemsize == 4:
        return DecodeConfig(32, 8, 2, 1)
    if small_shared_memory(capability):
        return DecodeConfig(32 if head_dim > 128 else 64, 4, 2, 1)
    if head_dim > 128:
        return DecodeConfig(64, 8, 3, 1)
    if head_dim <= 64:
        return DecodeConfig(64, 4, 4, 2)
    # 16 rows with two warps rather than four: 10 to 16 % less time for a dense sequence of 8k or 32k, 19 % for a sparse
    # one of 128k, 16 % more for one of 8k (which varied as much), others within 4 % (H200), although their addresses do
    # not fit the registers. Tiles of 32 keys, which do, are no faster.
    return DecodeConfig(64, 4, 3, 2, few_warps=2)


def max_decode_rows(head_dim: int, itemsize: int) -> int:
    """Rows of a program. float32 products run on ordinary units, where a tall tile does not fit the registers."""
    if itemsize == 4:
        return FEWEST_DECODE_ROWS
    return 32 if head_dim > 128 else 64


def merge_chunk(stored: int, width: int) -> int:
    """Parts that a merge of so many rows and columns reads at once. Beside the sums of many rows there is room for
    fewer."""
    elements = MERGED_ELEMENTS if stored <= FEWEST_DECODE_ROWS else MERGED_ELEMENTS // 2
    return min(64, max(1, elements // (stored * width)))


def decode_splits(heads: int, batch: int, slots: int, row_bytes: int, config: DecodeConfig, processors: int) -> int:
    """Programs a sequence and KV head that fill a GPU of so many multiprocessors.

    Args:
        heads: KV heads, each as often as its rows fill programs.
        batch, slots: sequences, and what a head holds for each.
        row_bytes: what a program hands over to a merge.
    """
    pairs, room, tiles = heads * batch, processors * config.per_processor, slots / config.block_n
    most = max(1, slots // (config.block_n * LEAST_DECODE_TILES))
    most = min(most, max(-(-processors // pairs), MERGED_BYTES // row_bytes))
    # several sequences may differ in length: of one program each the longest would hold up the others
    least = min(2, most) if batch > 1 and pairs < 4 * room else 1

    def time(splits: int) -> float:
        """In what a tile takes where the GPU is full (2 us for 32 KB on an H200): a program begins with as much, and
        hands over what it found; few run up to five times as fast, and the end of few waves is uneven (12 % of two,
        measured)."""
        full, rest = divmod(pairs * splits, room)
        fixed = 1 + (2 * row_bytes / TILE_BYTES if splits > 1 else 0.0)
        spent = full * (fixed + tiles / splits)
        if rest:
            spent += fixed + tiles / splits * max(rest / room, 0.2)
        waves = full + (rest > 0)
        return spent * (1 + 0.48 / waves**2) if waves > 1 else spent

    return min(range(most, least - 1, -1), key=lambda splits: round(time(splits), 6))
