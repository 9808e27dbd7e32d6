"""The definition of S2-Attention: masked softmax attention, in float32 or float64. Every other path is tested
against it, forward and backward. It materialises the mask and the scores: use it for small shapes.

Shapes: B batch, S sequence, T packed tokens (Tq queries, Tk keys), Hq query heads, Hkv KV heads, G = Hq / Hkv, D head
dimension.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .call import Call


def token_mask(call: Call, q_len: int, kv_len: int, num_heads: int) -> Tensor:
    """Bool `[num_heads, q_len, kv_len]`: which key tokens each query token sees (query at the end of the keys)."""
    size = call.pattern.block_size
    blocks = call.block_mask(-(-kv_len // size), num_heads)
    query = torch.arange(kv_len - q_len, kv_len, device=blocks.device)
    key = torch.arange(kv_len, device=blocks.device)
    kept = blocks[:, query // size][:, :, key // size]
    return kept & (key[None, :] <= query[:, None])


def reference_attention(
    q: Tensor,  # [B, Sq, Hq, D] or [Tq, Hq, D]
    k: Tensor,  # [B, Skv, Hkv, D] or [Tk, Hkv, D]
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Attention output (dtype and shape of `q`) and log-sum-exp (`[B, Hq, Sq]` or `[Hq, Tq]`).

    Computes in float64 for float64 inputs, else in float32. A row that sees no key, as those behind the last border,
    gives 0 and lse = -inf.
    """
    if cu_seqlens is None:
        return _attend(q, k, v, call)
    results = [_attend(*document, call) for document in documents_of(cu_seqlens, cu_seqlens_k, q, k, v)]
    out = torch.cat([out[0] for out, _ in results])
    lse = torch.cat([lse[0] for _, lse in results], dim=1)
    rest = q.shape[0] - out.shape[0]
    no_lse = lse.new_full((q.shape[1], rest), float("-inf"))
    return torch.cat([out, q.new_zeros(rest, *q.shape[1:])]), torch.cat([lse, no_lse], dim=1)


def documents_of(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Packed tensors `[T, H, D]` as a batch of one for each document that has queries; one empty batch if none has."""
    of_queries = of_keys = check_borders(cu_seqlens.tolist(), q.shape[0])
    if cu_seqlens_k is not None:
        of_keys = check_borders(cu_seqlens_k.tolist(), k.shape[0], "cu_seqlens_k")
        check_lengths(of_queries, of_keys)
    pairs = zip(_slices(of_queries), _slices(of_keys), strict=True)
    bounds = [(rows, keys) for rows, keys in pairs if rows.stop > rows.start] or [(slice(0), slice(0))]
    return [(q[None, rows], k[None, keys], v[None, keys]) for rows, keys in bounds]


def _slices(borders: list[int]) -> list[slice]:
    return [slice(begin, end) for begin, end in itertools.pairwise(borders)]


def check_borders(borders: list[int], num_tokens: int, name: str = "cu_seqlens") -> list[int]:
    """The borders of packed documents. ValueError: they do not begin with 0, fall, or exceed the tokens."""
    if borders[0] != 0 or borders[-1] > num_tokens or borders != sorted(borders):
        wanted = f"begin with 0, never fall and end at {num_tokens} tokens or before"
        raise ValueError(f"{name} must {wanted}, got {_shown(borders)}")
    return borders


def check_lengths(of_queries: list[int], of_keys: list[int]) -> None:
    """ValueError: a document between these borders has more queries than keys."""
    documents = zip(itertools.pairwise(of_queries), itertools.pairwise(of_keys), strict=True)
    for nth, ((begin, end), (first, last)) in enumerate(documents):
        if end - begin > last - first:
            raise ValueError(
                f"document {nth} has {end - begin} queries, which cannot be the last of its {last - first} keys: "
                f"cu_seqlens is {_shown(of_queries)}, cu_seqlens_k {_shown(of_keys)}"
            )


def _shown(borders: list[int]) -> str:
    return f"{borders}" if len(borders) <= 20 else f"{borders[:10]} ... {borders[-10:]}"


def check_documents(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q: Tensor, k: Tensor) -> None:
    """ValueError: borders on the CPU that do not fit the tokens or each other. Those on a GPU would have to be awaited:
    the kernels check them (`kernels.triton.documents`)."""
    of_queries = of_keys = None
    if cu_seqlens.device.type == "cpu":
        of_queries = check_borders(cu_seqlens.tolist(), q.shape[0])
    if cu_seqlens_k is not None and cu_seqlens_k.device.type == "cpu":
        of_keys = check_borders(cu_seqlens_k.tolist(), k.shape[0], "cu_seqlens_k")
    if of_queries is not None and of_keys is not None:
        check_lengths(of_queries, of_keys)


def _attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    mask = token_mask(call, q.shape[1], k.shape[1], k.shape[2])
    mask = mask.repeat_interleave(group, dim=0).to(q.device)  # [Hq, Sq, Skv]
    k = k.repeat_interleave(group, dim=2).to(compute)
    v = v.repeat_interleave(group, dim=2).to(compute)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(compute), k) * call.softmax_scale
    empty = ~mask.any(dim=-1)  # [Hq, Sq]
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=-1)  # [B, Hq, Sq]
    probs = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probs, v)
    return out.to(q.dtype), lse.masked_fill(empty, float("-inf"))
