"""The decode step over kept keys by PyTorch's scaled_dot_product_attention: what a CPU decodes with. What is seen is
worked out block by block; only the mask that SDPA takes has a value for each slot.

Shapes: B sequences, S new tokens, Hq query heads, H KV heads, G = Hq / H, C slots, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .regions import held_blocks


def masked_decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, *, block: int, scale: float
) -> Tensor:
    """Attention of the last S tokens of each sequence to the keys that its heads keep.

    Args:
        q: `[B, S, Hq, D]`, S at most 8.
        k, v: `[B, H, C, D]`, slots, into which the new tokens have been written; C is a multiple of `block`.
        table: int32 `[H, R, 8]`, the regions of each head (`regions.Region`).
        lengths: int32 `[B]`, tokens of each sequence, the new ones included.
        block: tokens in a block.
        scale: factor of the scores.

    Returns:
        `[B, S, Hq, D]`.
    """
    B, S, Hq, D = q.shape
    H, C = k.shape[1:3]
    offset = torch.arange(block, dtype=torch.int32, device=q.device)
    position = lengths[:, None] - S + torch.arange(S, dtype=torch.int32, device=q.device)  # [B, S]
    held, near, far = held_blocks(table, lengths, C // block, block)
    distance = (position // block)[:, None, :, None] - held[:, :, None]  # [B, H, S, n]
    sees = (near[:, None] <= distance) & (distance < far[:, None])
    is_earlier = (distance > 0)[..., None] | (offset <= (position % block)[:, None, :, None, None])
    mask = (sees[..., None] & is_earlier).flatten(-2)  # [B, H, S, C]
    mask = mask[:, :, None].expand(-1, -1, Hq // H, -1, -1).flatten(2, 3)  # [B, H, G * S, C]
    rows = q.unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, H, G * S, D]
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.unflatten(2, (Hq // H, S)).permute(0, 3, 1, 2, 4).reshape(B, S, Hq, D)
