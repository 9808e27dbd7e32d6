"""Other libraries' kernels as `bench_attention.py --peer` calls them, where they are installed:

    --peer dkernel=bench_peers:dkernel --peer FA4=bench_peers:flash_attention_4@128

Each function takes q, k, v `[B, S, H, D]` and a pattern with one rule or mask a KV head, and returns the forward call.
"""

from functools import cache
from typing import Any

import torch
from bench_kernels import Forward, flex_mask
from torch import Tensor

from s2.attention import Pattern

FA4_TILE = (128, 128)  # queries and keys of its block lists on sm_90


def dkernel(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Forward:
    """The original S2-Attention library (github.com/linxihui/dkernel)."""
    from dkernel import SparseAttention
    from dkernel.ops import sparse_attn_bwd, sparse_attn_fwd

    # it keeps what it tuned by length and block, so a second pattern would run with the first one's configuration
    sparse_attn_fwd._sparse_fwd_kernel.cache.clear()
    sparse_attn_bwd._sparse_bwd_kernel.fn.cache.clear()
    num_blocks = -(-q.shape[1] // pattern.block_size)
    mask = pattern.block_mask(num_blocks, k.shape[2]).to(device=q.device, dtype=torch.uint8)
    attention = SparseAttention(pattern.block_size, mask, seq_dim=1).to(q.device)
    return lambda: attention(q, k, v, q.shape[-1] ** -0.5)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Forward:
    """FlashAttention-4's block-sparse CuTe kernels (flash-attn-4): lists of tiles that are visible as a whole, and of
    those on the diagonal, which get a causal mask. Its blocks are 128 tokens, so that must be the pattern's."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    if pattern.block_size % FA4_TILE[1]:
        raise ValueError(f"its tiles of {FA4_TILE[1]} keys do not divide blocks of {pattern.block_size}; use @128")

    heads, kv_heads = q.shape[2], k.shape[2]
    mask = flex_mask(pattern, q.shape[1], heads, kv_heads, FA4_TILE, with_backward=True, device=q.device)

    def tensors(way: str) -> Any:
        lists = (getattr(mask, f"{part}{way}_{of}") for part in ("", "full_") for of in ("num_blocks", "indices"))
        return BlockSparseTensorsTorch(*lists, block_size=FA4_TILE)

    settings = {
        "mask_mod": _causal(),
        "block_sparse_tensors": tensors("kv"),
        "block_sparse_tensors_bwd": tensors("q"),
    }

    def forward() -> Tensor:
        result = flash_attn_func(q, k, v, **settings)
        return result[0] if isinstance(result, tuple) else result

    return forward


@cache
def _causal() -> Any:
    import cutlass.cute as cute

    @cute.jit
    def causal(
        batch: cute.TensorSSA, head: cute.TensorSSA, query: cute.TensorSSA, key: cute.TensorSSA, lengths, tensors
    ) -> cute.TensorSSA:  # fmt: skip
        return key <= query

    return causal
