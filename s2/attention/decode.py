"""Decoding: the newest queries of each sequence against keys that were kept for them, and its definition.

Of a KV head are kept only the keys that some later query can still see, in `regions`: runs of slots, a block of tokens
each. A row of the table, int32:

    begin             first slot (index of a token in the head's storage), a multiple of the block
    capacity          blocks that the region holds
    stride, residue   it holds blocks j with j % stride == residue
    first, last       ... and first <= j < last (last 2**30: no end)
    near, far         a query in block i sees them where near <= i - j < far (far 2**30: for good)

Block j stands in slots `begin + ((j - residue) // stride) % capacity * block ...`: a ring, or a list where the capacity
is enough for all. It has to be enough for the blocks that the newest queries see and all that were written since. Rows
of zeros hold nothing. Near and far are such that of what a query sees each key is in one region; only the query's own
block is cut by causality.

Shapes: B batch, S new tokens, H KV heads, Hq query heads, C slots, R regions, D head dimension.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .decode_sdpa import masked_decode
from .kernels.triton.decode_launch import Grid, Workspace, run_decode, run_plan
from .pattern import BLOCK_SIZES
from .regions import Region

MAX_TOKENS = 8  # new ones of a call: they lie in two blocks at most
BACKENDS = ("reference", "sdpa", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@overload
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, *, block: int, scale: float,
    return_lse: Literal[False] = ..., workspace: Workspace | None = ..., shares: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, *, block: int, scale: float,
    return_lse: Literal[True], workspace: Workspace | None = ..., shares: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    block: int,
    scale: float,
    return_lse: bool = False,
    workspace: Workspace | None = None,
    shares: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last S tokens of each sequence to what its KV heads hold.

    Nothing is read on the host, so a CUDA graph of it may be replayed with other lengths. No gradients.

    Args:
        q: `[B, S, Hq, D]`, S at most 8: the queries of tokens `lengths - S` to `lengths - 1`. Those of a sequence with
            fewer tokens come first and see nothing.
        k, v: `[B, H, C, D]`, in any layout whose last dimension is dense; those of the new tokens are in it. Slots that
            hold no token may have any content, by "sdpa" any finite one.
        table: int32 `[H, R, 8]`, the regions of each head (`s2.attention.regions.Region`).
        lengths: int32 `[B]`, tokens of each sequence with the new ones; at most as many as the regions are made for.
        block: tokens in a block.
        scale: factor of the scores, usually D ** -0.5.
        return_lse: return the log-sum-exp of the scores too, to merge with attention to other keys.
        workspace: of `decode_workspace`; by default a new one for each call.
        shares: of `decode_shares`; by default each call works them out anew, by a kernel more.
        backend: "triton", the kernel; "sdpa", torch's attention under a mask, which gives no lse; "reference", the
            definition. None: the kernel for tensors on a GPU, else "sdpa", with `return_lse` the definition.

    Returns:
        out `[B, S, Hq, D]` in q's dtype, with `return_lse` also lse, float32 `[B, S, Hq]` (float64 where q is). A
        query that sees nothing gets zeros, and lse -inf. The kernel's results repeat bit for bit.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together or are not supported.
    """
    backend = backend or ("triton" if q.is_cuda else "reference" if return_lse else "sdpa")
    _check(q, k, v, table, lengths, block, scale, backend)
    if backend == "sdpa":
        if return_lse:
            raise ValueError("backend 'sdpa' gives no log-sum-exp: use 'triton' or 'reference' with return_lse")
        return masked_decode(q, k, v, table, lengths, block=block, scale=scale)
    if backend == "reference":
        out, lse = reference_decode(q, k, v, table, lengths, block=block, scale=scale)
    else:
        with torch.cuda.device_of(q):  # kernels are launched on the current device
            out, lse = run_decode(q, k, v, table, lengths, block, scale, workspace, shares=shares)
    return (out, lse) if return_lse else out


def decode_workspace(q: Tensor, k: Tensor, *, block: int) -> Workspace:
    """Memory that calls of `decode_attention` with tensors of these shapes and dtypes need while they run. Whoever
    keeps it spares them two allocations and a memset; calls that share it must follow each other on one stream.

    Args:
        q, k: as the calls will have; their values do not count.
        block: tokens in a block.
    """
    return Grid.of(q, k, block).workspace(q.device)


def decode_shares(q: Tensor, k: Tensor, table: Tensor, lengths: Tensor, *, block: int) -> Tensor:
    """Which keys each program of the kernel reads, int32 `[n, H, words]`, in calls of `decode_attention` with tensors
    of these shapes and dtypes, this table and these lengths: in a step, those of all layers with one pattern and
    rotation. A kernel works it out; nothing is read on the host.

    Args:
        q, k: as the calls will have; their values do not count.
        table, lengths, block: as of `decode_attention`.
    """
    with torch.cuda.device_of(q):  # kernels are launched on the current device
        return run_plan(q, k, table, lengths, block)


# ---------------------------------------------------------------- the definition


def held_positions(table: Tensor, lengths: Tensor, num_slots: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """What slots hold after `lengths` tokens: token positions `[B, H, C]`, -1 for none, and near and far `[H, C]` of
    their regions. A slot has the newest token that was written into it."""
    slot = torch.arange(num_slots, device=table.device)
    newest = (lengths.long() - 1).div(block, rounding_mode="floor")[:, None, None]  # block of the last token
    position = torch.full((len(lengths), len(table), num_slots), -1, device=table.device)
    bounds = torch.zeros(2, len(table), num_slots, dtype=torch.int64, device=table.device)
    for region in table.long().unbind(1):
        begin, capacity, stride, residue, first, last, near, far = region[..., None].unbind(1)  # [H, 1] each
        capacity, stride = capacity.clamp(min=1), stride.clamp(min=1)
        within = slot - begin
        # the newest block of the class, and the newest of those that stand in this slot
        count = (torch.minimum(newest, last - 1) - residue).div(stride, rounding_mode="floor") + 1
        member = within // block
        member = member + (count - 1 - member).div(capacity, rounding_mode="floor") * capacity
        held_block = residue + member * stride
        token = held_block * block + within % block
        here = (within >= 0) & (within < capacity * block) & (first < last)
        held = here & (member >= 0) & (held_block >= first) & (token < lengths[:, None, None])
        position = torch.where(held, token, position)
        bounds = torch.where(here, torch.stack([near, far]), bounds)
    return position, bounds[0], bounds[1]


def visible_slots(table: Tensor, lengths: Tensor, num_slots: int, block: int, tokens: int) -> Tensor:
    """Which slots the last `tokens` queries of each sequence see: bool `[B, H, S, C]`."""
    key, near, far = held_positions(table, lengths, num_slots, block)
    query = lengths.long()[:, None] - tokens + torch.arange(tokens, device=lengths.device)  # [B, S]
    key, query = key[:, :, None], query[:, None, :, None]
    distance = query.div(block, rounding_mode="floor") - key // block
    return (key >= 0) & (key <= query) & (distance >= near[:, None]) & (distance < far[:, None])


def reference_decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, *, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition: a masked softmax over all slots, in float64 for float64 inputs, else in float32."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[1]
    seen = visible_slots(table, lengths, k.shape[2], block, q.shape[1])
    used = seen.any(dim=2)[..., None]  # others may hold NaN
    keys, values = (torch.where(used, x, 0).to(compute).repeat_interleave(group, dim=1) for x in (k, v))
    seen = seen.repeat_interleave(group, dim=1)  # [B, Hq, S, C]
    scores = torch.einsum("bshd,bhcd->bhsc", q.to(compute), keys) * scale
    empty = ~seen.any(dim=-1)
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
    out = torch.einsum("bhsc,bhcd->bshd", probs, values)
    return out.to(q.dtype), lse.masked_fill(empty, float("-inf")).transpose(1, 2)


# ---------------------------------------------------------------- arguments


def _check(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, block: int, scale: float, backend: str
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; use one of {BACKENDS} or None")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            wanted = "[B, S, Hq, D]" if name == "q" else "[B, H, C, D]"
            raise ValueError(f"{name} must be {wanted}, got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"decode_attention has no gradients, but {name} wants one: call it under torch.no_grad")
    if q.dtype not in (*KERNEL_DTYPES, *([] if backend == "triton" else [torch.float64])):
        raise ValueError(f"q, k and v must be float32, float16 or bfloat16, got {q.dtype}")
    batch, tokens, num_heads, head_dim = q.shape
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"q has {tokens} tokens a sequence, but decoding takes 1 to {MAX_TOKENS}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k {list(k.shape)} does not fit q {list(q.shape)}: batch and head dimension must be the same")
    if k.shape[1] < 1 or num_heads % k.shape[1]:
        raise ValueError(f"{num_heads} query heads are not a multiple of {k.shape[1]} KV heads")
    if block not in BLOCK_SIZES:
        raise ValueError(f"block={block!r} is not supported; use one of {BLOCK_SIZES}")
    if not scale > 0:
        raise ValueError(f"scale={scale!r} must be positive")
    regions = max(1, table.shape[1]) if table.dim() == 3 else 1
    shapes = {"table [H, R, 8]": (table, [k.shape[1], regions, len(Region._fields)]), "lengths [B]": (lengths, [batch])}
    for name, (x, shape) in shapes.items():
        if x.dtype != torch.int32 or list(x.shape) != shape or x.device != q.device or not x.is_contiguous():
            raise ValueError(
                f"{name} must be int32 of shape {shape} on {q.device} and contiguous, got {x.dtype} {list(x.shape)} on "
                f"{x.device}"
            )
