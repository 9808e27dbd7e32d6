"""The attention op: `s2_attention` checks its arguments, picks a backend and calls it.

The kernels stand behind a pair of registered custom ops (`s2::attention_forward`, `s2::attention_backward`) with fakes,
so `torch.compile(fullgraph=True)`, `torch.library.opcheck` and selective activation checkpointing work on it. What a
call says but its tensors is a `Call`; where nothing watches (`is_plain`) it goes to the kernels as it is, else through
the ops as plain values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import SCHEMA, Call, call_of
from .kept import remember
from .kernels.hopper import launch as hopper_launch
from .kernels.hopper import support as hopper_support
from .kernels.triton.launch import run_backward, run_forward
from .modes import apply_function, is_plain, without_autocast
from .pattern import Pattern
from .reference import check_documents, reference_attention
from .sdpa import dense_attention, masked_attention

BACKENDS = ("reference", "sdpa", "triton", "hopper")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------- kernels


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """Output (shape of q) and log-sum-exp (`[B, Hq, Sq]`, packed `[Hq, Tq]`, float32), by the kernels of
    `call.backend`, which the caller has checked to take it."""
    run = hopper_launch.run_forward if call.backend == "hopper" else run_forward
    return _run(run, q, k, v, cu_seqlens, cu_seqlens_k, call)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as of `run_backward`. For queries at the end of longer keys only Triton has
    kernels."""
    *tensors, cu_seqlens_k, call = arguments
    is_late = tensors[0].shape[-3] != tensors[1].shape[-3] or cu_seqlens_k is not None
    if call.backend == "hopper" and not is_late:
        return _run(hopper_launch.run_backward, *tensors, call)
    return _run(run_backward, *arguments)


def _run(kernels: Callable[..., Any], q: Tensor, *rest: Any) -> Any:
    """On the device of q."""
    if _is_elsewhere(q):
        with torch.cuda.device(q.device):
            return kernels(q, *rest)
    return kernels(q, *rest)


def _is_elsewhere(x: Tensor) -> bool:
    """Whether x is on another GPU than the current one, on which kernels would be launched."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


# ---------------------------------------------------------------- custom ops

_library = torch.library.Library("s2", "DEF")
_library.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, {SCHEMA}, Tensor? cu_seqlens_k=None) -> "
    "(Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    f"Tensor? cu_seqlens, {SCHEMA}, Tensor? cu_seqlens_k=None) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
attention_forward = torch.ops.s2.attention_forward.default
attention_backward = torch.ops.s2.attention_backward.default


@torch.library.impl(_library, "attention_forward", "CompositeExplicitAutograd")
def _forward_op(q, k, v, cu_seqlens, *rest):
    return _forward(q, k, v, cu_seqlens, *_made_of(*rest))


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward_op(q, k, v, out, lse, dout, dlse, cu_seqlens, *rest):
    return _backward(q, k, v, out, lse, dout, dlse, cu_seqlens, *_made_of(*rest))


def _made_of(pattern, rotation, offset, total, scale, backend, cu_seqlens_k=None):
    return cu_seqlens_k, call_of(pattern, rotation, offset, total, scale, backend)


@torch.library.register_fake("s2::attention_forward", lib=_library)
def _forward_shapes(q, k, v, cu_seqlens, *settings):
    tokens, heads = q.shape[:-2], q.shape[-2]
    lse_shape = (heads, tokens[0]) if cu_seqlens is not None else (tokens[0], heads, tokens[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("s2::attention_backward", lib=_library)
def _backward_shapes(q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_op(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, (*inputs[:4], inputs[-1], *inputs[4:-1]), output)  # the borders of keys are the op's last


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k)
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx: Any, *gradients: Tensor | None) -> tuple:
    """Of the arguments of `_forward` or, where `ctx` comes from the op, of `attention_forward`."""
    dout, dlse = gradients
    q, k, v, out, lse, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
    none = (None,) * (2 + len(ctx.settings))
    if dout is None and dlse is None:
        return None, None, None, *none
    if dout is None:
        dout = torch.zeros_like(out)
    tensors, settings = (q, k, v, out, lse, dout, dlse, cu_seqlens), ctx.settings
    if isinstance(settings[0], Call):
        if is_plain(q, k, v, dout):
            return *_backward(*tensors, cu_seqlens_k, *settings), *none
        settings = settings[0].settings
    return *attention_backward(*tensors, *settings, cu_seqlens_k), *none


torch.library.register_autograd("s2::attention_forward", _gradients, setup_context=_save_op, lib=_library)


class _Attention(torch.autograd.Function):
    """`_forward` where nothing watches: half of the op's time with gradients."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)  # type: ignore[assignment]


_attend = apply_function(_Attention)


# ---------------------------------------------------------------- public function


@overload
def s2_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, rotation: int = 0, cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, softmax_scale: float | None = None, return_lse: Literal[False] = False,
    head_offset: int = 0, total_kv_heads: int | None = None, backend: str | None = None, layer: int | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def s2_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, rotation: int = 0, cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, softmax_scale: float | None = None, return_lse: Literal[True],
    head_offset: int = 0, total_kv_heads: int | None = None, backend: str | None = None, layer: int | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    rotation: int = 0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    head_offset: int = 0,
    total_kv_heads: int | None = None,
    backend: str | None = None,
    layer: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention under a block pattern, differentiable in q, k, v (and through the log-sum-exp).

    Args:
        q: `[B, Sq, Hq, D]`, or packed `[Tq, Hq, D]` with `cu_seqlens`.
        k: `[B, Skv, Hkv, D]`, or packed `[Tk, Hkv, D]`. `Hkv` divides `Hq`. `Skv >= Sq`: the queries are the last
            `Sq` positions (decoding, chunked prefill).
        v: as `k`.
        pattern: which blocks each KV head sees. A pattern with one rule (or mask) per *query* head is accepted too;
            K and V are then expanded to the query heads.
        rotation: turns residues where there are fewer KV heads than the stride, so that layers which follow each other
            are complete together (`LayerLayout.rotations`).
        cu_seqlens: int32 `[n + 1]`, borders of packed documents: 0 first, then never falling (repeats are empty
            documents), Tq at most. Blocks and residues count from the start of each document, and no document depends
            on what stands beside it, NaN included. Tokens behind the last border (padding to a static shape) belong to
            none: there the output and the gradients are 0 and the log-sum-exp is -inf, whatever q, k, v hold. int64
            borders, slices of tables and borders on another device are copied first. Borders on a GPU are not waited
            for: if they do not fit, the whole output and all gradients are NaN.
        cu_seqlens_k: int32 `[n + 1]`, borders of the documents' keys, Tk at most (default: `cu_seqlens`, with Tk = Tq).
            A document has at least as many keys as queries, and its queries are the last ones; it may have none. All
            that is said of `cu_seqlens` holds here too; the gradients of keys that no query sees are 0.
        softmax_scale: default `1 / sqrt(D)`.
        return_lse: also return the log-sum-exp of the scaled scores, `[B, Hq, Sq]` or packed `[Hq, Tq]`, in float32
            (float64 for the reference on float64); -inf where a query sees no key.
        head_offset: global index of the first KV head held here, under tensor or sequence parallelism.
        total_kv_heads: KV heads of the whole layer (default: those held here). Patterns use global head indices.
        backend: "reference", "sdpa", "triton" or "hopper". None picks by device: on CUDA the Hopper kernels where
            they apply (`hopper.support.objection`), else Triton's (dense patterns: torch's own dense kernels, of those
            that are enabled), elsewhere "sdpa". Where only the strides of q, k or v keep a call from the Hopper
            kernels, a warning says so once.
        layer: the old name of `rotation`, deprecated.

    Returns:
        The output, shape and dtype of `q`; with `return_lse` the pair (output, lse). Autocast changes neither.

    Calls repeat bit for bit, forward and backward, with two exceptions: dQ on Hopper where queries see many keys
    (`hopper.one_pass.is_taken`; L8V16 from 32k tokens on, dense from 3k), where float32 sums are added to in any
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
    if layer is not None:
        if rotation:
            raise ValueError(f"rotation={rotation} and layer={layer}: layer is the old name of rotation; leave it out")
        _warn_of_layer()
        rotation = layer
    key = call = None
    plain = is_plain(q, k, v) if cu_seqlens is None else is_plain(q, k, v, cu_seqlens)
    if cu_seqlens_k is not None:
        if cu_seqlens_k is cu_seqlens and q.shape[0] == k.shape[0]:
            cu_seqlens_k = None
        elif plain:
            plain = is_plain(cu_seqlens_k)
    if plain and type(pattern) is Pattern:
        borders: tuple | None = None
        if cu_seqlens is not None:  # their number changes from batch to batch
            borders = (cu_seqlens.dtype, cu_seqlens.device, cu_seqlens.dim(), cu_seqlens.numel() > 0)
        if cu_seqlens_k is not None:
            alike = cu_seqlens is not None and cu_seqlens_k.shape == cu_seqlens.shape
            borders = (borders, cu_seqlens_k.dtype, cu_seqlens_k.device, alike)
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
            k.device, v.device, pattern.key, rotation, softmax_scale, return_lse, head_offset, total_kv_heads, backend,
            borders,
        )  # fmt: skip
        call = _CHECKED.get(key)
    if call is None:
        _check(q, k, v, pattern, cu_seqlens, cu_seqlens_k, rotation, head_offset, total_kv_heads, backend)
        kv_heads = k.shape[-2]
        total = kv_heads if total_kv_heads is None else total_kv_heads
        group = q.shape[-2] // kv_heads
        ruled = len(pattern.heads) if pattern.mask is None else pattern.mask.shape[0]
        if group > 1 and ruled == total * group:  # one rule a query head
            key = None
            k, v = (x.repeat_interleave(group, dim=-2) for x in (k, v))
            head_offset, total = head_offset * group, total * group
        scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)
        if not scale > 0:
            raise ValueError(f"softmax_scale={softmax_scale!r} must be positive")
        backend = _choose(backend, q, k, v, pattern, cu_seqlens is not None, return_lse, late=cu_seqlens_k is not None)
        call = Call(pattern, rotation, head_offset, total, scale, backend)
        if plain:
            call = call_of(*call.settings)
            if key is not None and pattern.mask is None:
                remember(_CHECKED, key, call)
    elif cu_seqlens is not None and (cu_seqlens.device.type == "cpu" or cu_seqlens_k is not None):
        check_documents(cu_seqlens, cu_seqlens_k, q, k)
    if call.backend in ("triton", "hopper"):
        if cu_seqlens is not None:
            cu_seqlens = _as_kernels_read(cu_seqlens, q)
        if cu_seqlens_k is not None:
            cu_seqlens_k = _as_kernels_read(cu_seqlens_k, k)
        if not plain:
            out, lse = attention_forward(q, k, v, cu_seqlens, *call.settings, cu_seqlens_k)
        elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out, lse = _attend(q, k, v, cu_seqlens, cu_seqlens_k, call)
        else:
            out, lse = _forward(q, k, v, cu_seqlens, cu_seqlens_k, call)
        return (out, lse) if return_lse else out
    with without_autocast(q):
        if call.backend == "dense":
            return dense_attention(q, k, v, call.softmax_scale)
        if call.backend == "sdpa" and not return_lse:
            return masked_attention(q, k, v, cu_seqlens, cu_seqlens_k, call)
        # torch's SDPA does not return the log-sum-exp
        out, lse = reference_attention(q, k, v, cu_seqlens, cu_seqlens_k, call)
    return (out, lse) if return_lse else out


_CHECKED: dict[tuple, Call] = {}  # by everything that the checks look at, but for masks, which can be large


@torch.compiler.assume_constant_result
def _warn_of_layer() -> None:
    warnings.warn("s2_attention(layer=) is now called rotation=", DeprecationWarning, stacklevel=3)


def _choose(
    backend: str | None, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: bool, return_lse: bool, late: bool
) -> str:
    """What runs for the caller's `backend` (`Call.backend`). ValueError: it does not take the call."""
    if backend is None and _prefers_dense_kernel(q, k, pattern, packed, return_lse):
        return "dense"
    if backend in (None, "hopper"):
        objection = hopper_support.objection(q, k, v, pattern, packed=packed, late=late)
        if not objection:
            return "hopper"
        if backend == "hopper":
            shown = ", ".join(
                f"{name} {list(x.shape)} with strides {list(x.stride())}" for name, x in (("q", q), ("k", k), ("v", v))
            )
            raise ValueError(
                f"the hopper backend does not take this call: {objection}; got {q.dtype} {shown} and pattern {pattern} "
                f"on {q.device}; use backend=None or 'triton'"
            )
        if objection in hopper_support.AVOIDABLE:
            hopper_support.warn_once(objection)
    backend = backend or _default_backend(q)
    if backend == "triton" and q.dtype not in _KERNEL_DTYPES:
        raise ValueError(
            f"the triton backend takes float32, float16 or bfloat16, got {q.dtype}; use backend='sdpa' or 'reference'"
        )
    return backend


def _default_backend(q: Tensor) -> str:
    return "triton" if q.is_cuda else "sdpa"


def _prefers_dense_kernel(q: Tensor, k: Tensor, pattern: Pattern, packed: bool, return_lse: bool) -> bool:
    """Dense sequences of one length go to cuDNN or flash SDPA. Packed ones stay with our kernels, which were faster
    on an H200 than torch's own for documents of mixed lengths (docs/ideas.md)."""
    low = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and pattern.is_dense and low and not packed and not return_lse and q.shape[1] == k.shape[1]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    rotation: int,
    head_offset: int,
    total_kv_heads: int | None,
    backend: str | None,
) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; use one of {BACKENDS} or None")
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be an int32 tensor of document borders, got {type(cu_seqlens).__name__}")
    if cu_seqlens_k is not None and not isinstance(cu_seqlens_k, Tensor):
        raise ValueError(f"cu_seqlens_k must be an int32 tensor of document borders, got {type(cu_seqlens_k).__name__}")
    if cu_seqlens_k is not None and cu_seqlens is None:
        raise ValueError("cu_seqlens_k needs cu_seqlens, the borders of the queries")
    if q.dtype not in (torch.float64, *_KERNEL_DTYPES):
        raise ValueError(f"q, k and v must be float64, float32, float16 or bfloat16, got {q.dtype}")
    if rotation < 0:
        raise ValueError(f"rotation={rotation} must be 0 or more")
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
        if q.shape[0] != k.shape[0] and cu_seqlens_k is None:
            raise ValueError(
                f"packed q has {q.shape[0]} tokens but k and v have {k.shape[0]}: queries at the end of longer keys "
                "need cu_seqlens_k"
            )
        for name, borders in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
            if borders is None:
                continue
            if borders.dim() != 1 or borders.shape[0] < 1 or borders.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{name} must be int32 [n + 1] document borders, got {borders.dtype} {list(borders.shape)}"
                )
        if cu_seqlens_k is not None and cu_seqlens_k.shape[0] != cu_seqlens.shape[0]:
            raise ValueError(
                f"cu_seqlens has {cu_seqlens.shape[0] - 1} documents but cu_seqlens_k has {cu_seqlens_k.shape[0] - 1}"
            )
        if not torch.compiler.is_compiling():
            check_documents(cu_seqlens, cu_seqlens_k, q, k)
    if head_offset < 0:
        raise ValueError(f"head_offset={head_offset} must be 0 or more")
    if head_offset > 0 and total_kv_heads is None:
        raise ValueError(f"head_offset={head_offset} needs total_kv_heads, the KV heads of the whole layer")
    if total_kv_heads is not None and head_offset + kv_heads > total_kv_heads:
        raise ValueError(
            f"heads {head_offset} to {head_offset + kv_heads - 1} do not fit in total_kv_heads={total_kv_heads}"
        )


def _as_kernels_read(borders: Tensor, x: Tensor) -> Tensor:
    """Borders of x as int32, one after the other, beside it."""
    if borders.dtype == torch.int64:  # what int32 does not hold must not become a border that fits
        borders = borders.clamp(-1, x.shape[0] + 1)
    return borders.to(device=x.device, dtype=torch.int32).contiguous()
