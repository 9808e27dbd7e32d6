"""The decode step: a few new tokens of each sequence attend to the keys that its heads keep."""

from __future__ import annotations

from torch import Tensor

from .decode_sdpa import masked_decode

MAX_TOKENS = 8  # new ones of a step


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, *, block: int, scale: float
) -> Tensor:
    """Arguments and result as of `masked_decode`, which runs everywhere."""
    return masked_decode(q, k, v, table, lengths, block=block, scale=scale)
