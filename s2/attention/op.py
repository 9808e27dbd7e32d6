"""The attention op: `s2_attention` checks its arguments, picks a backend and calls it.

The kernels stand behind a pair of registered custom ops (`s2::attention_forward`, `s2::attention_backward`) with fakes,
so `torch.compile(fullgraph=True)`, `torch.library.opcheck` and selective activation checkpointing work on it.
Patterns travel through the ops by key (`pattern_from_key`).
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.hopper import launch as hopper_launch
from .kernels.triton.launch import Problem, run_backward, run_forward
from .modes import is_plain, without_autocast
from .pattern import Pattern, first_alike, pattern_from_key
from .reference import check_borders, reference_attention
from .sdpa import dense_attention, masked_attention

BACKENDS = ("reference", "sdpa", "triton", "hopper")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------- custom ops
# Defined through `torch.library.Library`: with gradients a call costs half of what `torch.library.custom_op` takes.

_library = torch.library.Library("s2", "DEF")
_SETTINGS = "str pattern, int layer, int head_offset, int total_kv_heads, float softmax_scale, bool hopper"
_library.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, {_SETTINGS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    f"Tensor? cu_seqlens, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
attention_forward = torch.ops.s2.attention_forward.default
attention_backward = torch.ops.s2.attention_backward.default


@torch.library.impl(_library, "attention_forward", "CompositeExplicitAutograd")
def _forward(q, k, v, cu_seqlens, pattern, layer, head_offset, total_kv_heads, softmax_scale, hopper):
    """Output (shape of q) and log-sum-exp (`[B, Hq, Sq]`, packed `[Hq, T]`, float32). With `hopper` the Hopper kernel
    runs; the caller has checked `hopper.supports`."""
    if _is_elsewhere(q):
        with torch.cuda.device(q.device):
            return _forward(q, k, v, cu_seqlens, pattern, layer, head_offset, total_kv_heads, softmax_scale, hopper)
    layer = first_alike(pattern, layer, total_kv_heads)  # what is kept serves all layers with these rules
    if hopper:
        heads = (layer, head_offset, total_kv_heads)
        return hopper_launch.run_forward(q, k, v, cu_seqlens, pattern_from_key(pattern), heads, softmax_scale)
    problem = Problem(pattern_from_key(pattern), layer, head_offset, total_kv_heads, softmax_scale, cu_seqlens)
    return run_forward(q, k, v, problem)


@torch.library.register_fake("s2::attention_forward", lib=_library)
def _forward_shapes(q, k, v, cu_seqlens, *settings):
    tokens, heads = q.shape[:-2], q.shape[-2]
    lse_shape = (heads, tokens[0]) if cu_seqlens is not None else (tokens[0], heads, tokens[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward(
    q, k, v, out, lse, dout, dlse, cu_seqlens, pattern, layer, head_offset, total_kv_heads, softmax_scale, hopper
):
    if _is_elsewhere(q):
        settings = (pattern, layer, head_offset, total_kv_heads, softmax_scale, hopper)
        with torch.cuda.device(q.device):
            return _backward(q, k, v, out, lse, dout, dlse, cu_seqlens, *settings)
    layer = first_alike(pattern, layer, total_kv_heads)
    if hopper:
        heads = (layer, head_offset, total_kv_heads)
        rule = pattern_from_key(pattern)
        return hopper_launch.run_backward(q, k, v, out, lse, dout, dlse, cu_seqlens, rule, heads, softmax_scale)
    problem = Problem(pattern_from_key(pattern), layer, head_offset, total_kv_heads, softmax_scale, cu_seqlens)
    return run_backward(q, k, v, out, lse, dout, dlse, problem)


@torch.library.register_fake("s2::attention_backward", lib=_library)
def _backward_shapes(q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _is_elsewhere(x: Tensor) -> bool:
    """Whether x is on another GPU than the current one, on which kernels would be launched."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, q, k, v, cu_seqlens, *settings):
        out, lse = run(q, k, v, cu_seqlens, *settings)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        none = (None,) * (1 + len(ctx.settings))
        if dout is None and dlse is None:
            return None, None, None, None, *none
        if dout is None:
            dout = torch.zeros_like(out)
        run = _backward if is_plain(q, k, v, dout) else attention_backward
        return None, *run(q, k, v, out, lse, dout, dlse, cu_seqlens, *ctx.settings), *none


def _needs_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


# `torch.autograd.Function.apply` without its look for functorch's wrappers, a tenth of a call; `is_plain` has looked
_apply_plain = super(torch.autograd.Function, _Attention).apply


def _below_autograd(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return attention_forward(*arguments)


@torch.library.impl(_library, "attention_forward", "Autograd")
def _differentiable(q, k, v, *rest):
    if _needs_gradient(q, k, v):
        return _Attention.apply(_below_autograd, q, k, v, *rest)
    return _below_autograd(q, k, v, *rest)


def _call(plain: bool, q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """The forward op, or what it does where nothing watches (`is_plain`)."""
    if not plain:
        return attention_forward(q, k, v, *rest)
    return _apply_plain(_forward, q, k, v, *rest) if _needs_gradient(q, k, v) else _forward(q, k, v, *rest)


# ---------------------------------------------------------------- public function


@overload
def s2_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, layer: int = 0, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None, return_lse: Literal[False] = False, head_offset: int = 0,
    total_kv_heads: int | None = None, backend: str | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def s2_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, layer: int = 0, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None, return_lse: Literal[True], head_offset: int = 0,
    total_kv_heads: int | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    layer: int = 0,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    head_offset: int = 0,
    total_kv_heads: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention under a block pattern, differentiable in q, k, v (and through the log-sum-exp).

    Args:
        q: `[B, Sq, Hq, D]`, or packed `[T, Hq, D]` with `cu_seqlens`.
        k: `[B, Skv, Hkv, D]`, or packed `[T, Hkv, D]`. `Hkv` divides `Hq`. `Skv >= Sq`: the queries are the last
            `Sq` positions (decoding, chunked prefill).
        v: as `k`.
        pattern: which blocks each KV head sees. A pattern with one rule (or mask) per *query* head is accepted too;
            K and V are then expanded to the query heads.
        layer: rotates residues when there are fewer KV heads than the stride (`LayerLayout.rotations`).
        cu_seqlens: int32 `[n + 1]`, borders of packed documents: 0 first, then never falling (repeats are empty
            documents), T at most. Blocks and residues count from the start of each document, and no document depends
            on what stands beside it, NaN included. Tokens behind the last border (padding to a static shape) belong to
            none: there the output and the gradients are 0 and the log-sum-exp is -inf, whatever q, k, v hold. int64
            borders, slices of tables and borders on another device are copied first. Borders on a GPU are not waited
            for: if they do not fit, the whole output and all gradients are NaN.
        softmax_scale: default `1 / sqrt(D)`.
        return_lse: also return the log-sum-exp of the scaled scores, `[B, Hq, Sq]` or packed `[Hq, T]`, in float32
            (float64 for the reference on float64); -inf where a query sees no key.
        head_offset: global index of the first KV head held here, under tensor or sequence parallelism.
        total_kv_heads: KV heads of the whole layer (default: those held here). Patterns use global head indices.
        backend: "reference", "sdpa", "triton" or "hopper". None picks by device: on CUDA the Hopper kernels where
            they apply (`hopper.launch.objection`), else Triton's (dense patterns: torch's own dense kernels, of those
            that are enabled), elsewhere "sdpa". Where only the strides of q, k or v keep a call from the Hopper
            kernels, a warning says so once.

    Returns:
        The output, shape and dtype of `q`; with `return_lse` the pair (output, lse). Autocast changes neither.

    Calls repeat bit for bit, forward and backward, with two exceptions: dQ on Hopper where queries see many keys
    (`hopper.launch._takes_one_pass`; L8V16 from 32k tokens on, dense from 3k), where float32 sums are added to in any
    order, and the backward of dense patterns where torch runs cuDNN, as it does on Hopper. With
    `torch.use_deterministic_algorithms(True)` kernels run that repeat there too.

    NaN and Inf in a document stay in it. Within one they reach the rows that see them, and may reach those of the same
    tile that do not, such as the 64 of the diagonal: the probability of a hidden key is 0, and 0 times NaN is NaN. The
    "sdpa" and "reference" backends have one tile, the document.

    CUDA graphs may capture calls, as `torch.compile(mode="reduce-overhead")` does, after a call with the same shapes
    has run; the tensors that such calls keep stay for the life of the process (`s2.attention.kept`).

    Raises:
        ValueError: a shape, dtype, head count, border tensor or backend that does not fit, by name.
    """
    asked, plain = None, is_plain(q, k, v)
    if plain and cu_seqlens is None and type(pattern) is Pattern:
        asked = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
            k.device, v.device, pattern.key, layer, softmax_scale, return_lse, head_offset, total_kv_heads, backend,
        )  # fmt: skip
        settings = _ANSWERED.get(asked)
        if settings is not None:
            out, lse = _call(plain, q, k, v, None, *settings)
            return (out, lse) if return_lse else out
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; use one of {BACKENDS} or None")
    _check(q, k, v, pattern, cu_seqlens, layer, head_offset, total_kv_heads)
    kv_heads = k.shape[-2]
    total = kv_heads if total_kv_heads is None else total_kv_heads
    group = q.shape[-2] // kv_heads
    if group > 1 and _is_per_query_head(pattern, total, group):
        asked = None
        k, v = (x.repeat_interleave(group, dim=-2) for x in (k, v))
        head_offset, total = head_offset * group, total * group
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)
    if not scale > 0:
        raise ValueError(f"softmax_scale={softmax_scale!r} must be positive")

    if backend is None and _prefers_dense_kernel(q, k, pattern, cu_seqlens, return_lse):
        with without_autocast(q):
            return dense_attention(q, k, v, scale)
    hopper = False
    if backend in (None, "hopper"):
        objection = hopper_launch.objection(q, k, v, pattern, packed=cu_seqlens is not None)
        hopper = not objection
        if objection and backend == "hopper":
            shown = ", ".join(
                f"{name} {list(x.shape)} with strides {list(x.stride())}" for name, x in (("q", q), ("k", k), ("v", v))
            )
            raise ValueError(
                f"the hopper backend does not take this call: {objection}; got {q.dtype} {shown} and pattern {pattern} "
                f"on {q.device}; use backend=None or 'triton'"
            )
        if objection in hopper_launch.AVOIDABLE:
            hopper_launch.warn_once(objection)
    backend = backend or _default_backend(q)
    if backend in ("triton", "hopper"):
        if q.dtype not in _KERNEL_DTYPES:
            raise ValueError(
                f"the triton backend takes float32, float16 or bfloat16, got {q.dtype}; use backend='sdpa' or "
                "'reference'"
            )
        borders = None if cu_seqlens is None else _as_kernels_read(cu_seqlens, q)
        settings = (pattern.key, layer, head_offset, total, scale, hopper)
        if asked is not None:
            if len(_ANSWERED) >= _MOST_ANSWERS:
                _ANSWERED.clear()
            _ANSWERED[asked] = settings
        out, lse = _call(plain, q, k, v, borders, *settings)
        return (out, lse) if return_lse else out
    with without_autocast(q):
        if backend == "sdpa" and not return_lse:
            return masked_attention(
                q, k, v, pattern,
                layer=layer, cu_seqlens=cu_seqlens, softmax_scale=scale, head_offset=head_offset, total_kv_heads=total,
            )  # fmt: skip
        out, lse = reference_attention(  # also for sdpa with the log-sum-exp, which torch's SDPA does not return
            q, k, v, pattern,
            layer=layer, cu_seqlens=cu_seqlens, softmax_scale=scale, head_offset=head_offset, total_kv_heads=total,
        )  # fmt: skip
    return (out, lse) if return_lse else out


# Calls that have been checked once and go to a kernel: their settings by everything that the checks look at
_ANSWERED: dict[tuple, tuple] = {}
_MOST_ANSWERS = 512


def _default_backend(q: Tensor) -> str:
    return "triton" if q.is_cuda else "sdpa"


def _prefers_dense_kernel(q: Tensor, k: Tensor, pattern: Pattern, cu_seqlens: Tensor | None, return_lse: bool) -> bool:
    """Dense sequences of one length go to cuDNN or flash SDPA. Packed ones stay with our kernels, which were faster
    on an H200 than torch's own for documents of mixed lengths (docs/log.md)."""
    low = q.dtype in (torch.float16, torch.bfloat16)
    plain = cu_seqlens is None and not return_lse and q.shape[1] == k.shape[1]
    return q.is_cuda and pattern.is_dense and low and plain


def _is_per_query_head(pattern: Pattern, total_kv_heads: int, group: int) -> bool:
    if pattern.heads:
        return len(pattern.heads) == total_kv_heads * group
    return pattern.mask is not None and pattern.mask.shape[0] == total_kv_heads * group


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    cu_seqlens: Tensor | None,
    layer: int,
    head_offset: int,
    total_kv_heads: int | None,
) -> None:
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be an int32 tensor of document borders, got {type(cu_seqlens).__name__}")
    if q.dtype not in (torch.float64, *_KERNEL_DTYPES):
        raise ValueError(f"q, k and v must be float64, float32, float16 or bfloat16, got {q.dtype}")
    if layer < 0:
        raise ValueError(f"layer={layer} must be 0 or more")
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a Pattern (see Pattern.parse), got {type(pattern).__name__}")
    dims = 4 if cu_seqlens is None else 3
    wanted = "[B, S, H, D]" if cu_seqlens is None else "packed [T, H, D] with cu_seqlens"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"{name} must be {wanted}, got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}: q, k and v need one dtype and "
                "one device (autocast does not change them here)"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[-1] < 1:
        raise ValueError(f"q has head dimension 0: shape {list(q.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]} but k and v have {k.shape[-1]}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if cu_seqlens is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"q has batch {q.shape[0]} but k and v have {k.shape[0]}")
        if k.shape[1] < q.shape[1]:
            raise ValueError(
                f"{q.shape[1]} queries cannot be the last of {k.shape[1]} keys: k must be at least as long"
            )
    else:
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"packed q has {q.shape[0]} tokens but k and v have {k.shape[0]}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be int32 [n + 1] document borders, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        # those on a GPU would have to be awaited: the kernels check them (`kernels.triton.documents`)
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            check_borders(cu_seqlens.tolist(), q.shape[0])
    if head_offset < 0:
        raise ValueError(f"head_offset={head_offset} must be 0 or more")
    if head_offset > 0 and total_kv_heads is None:
        raise ValueError(f"head_offset={head_offset} needs total_kv_heads, the KV heads of the whole layer")
    if total_kv_heads is not None and head_offset + kv_heads > total_kv_heads:
        raise ValueError(
            f"heads {head_offset} to {head_offset + kv_heads - 1} do not fit in total_kv_heads={total_kv_heads}"
        )


def _as_kernels_read(cu_seqlens: Tensor, q: Tensor) -> Tensor:
    """Borders as int32, one after the other, beside q."""
    if cu_seqlens.dtype == torch.int64:  # what int32 does not hold must not become a border that fits
        cu_seqlens = cu_seqlens.clamp(-1, q.shape[0] + 1)
    return cu_seqlens.to(device=q.device, dtype=torch.int32).contiguous()
