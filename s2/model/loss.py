"""Cross entropy straight from hidden states, a chunk of tokens at a time.

Logits of a 128k-token sequence over a 128k vocabulary are 67 GB in fp32, so they are never held: each chunk's
logits are turned at once into its loss and the gradients it contributes. The backward only scales what the
forward kept.

Shapes: N tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
_LOGITS_PER_CHUNK = 1 << 27  # 512 MiB of fp32 logits: enough rows a chunk to keep the matmul efficient


def chunk_rows(vocab_size: int) -> int:
    """Tokens in a chunk when the caller does not say: a multiple of 128 near `2**27 / vocab_size`."""
    return max(128, _LOGITS_PER_CHUNK // vocab_size // 128 * 128)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_size: int | None = None,
    compile_backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of `hidden @ weight.T` against `labels`; softmax in fp32.

    Args:
        hidden: `[N, E]`, any float dtype.
        weight: `[V, E]`, the language-model head.
        labels: int64 `[N]`; -100 is ignored.
        chunk_size: tokens a chunk, by default `chunk_rows(V)`.
        compile_backend: run the elementwise part of a chunk through torch.compile with this backend.

    Returns:
        Sum of the losses in nats (fp32 scalar, differentiable once in hidden and weight) and the number of
        labels that counted (int64 scalar). With nothing to count the sum and its gradients are 0.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit; want [N, E] and [V, E]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} must be [{hidden.shape[0]}], one for each row of hidden")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    # the graph is decided here: inside Function.forward gradients always look disabled
    track = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # the function below writes its gradients itself, in one dtype
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):
        loss = _ChunkedCrossEntropy.apply(
            hidden, weight, labels, chunk_size or chunk_rows(weight.shape[0]), compile_backend, track
        )
    return loss, (labels != IGNORE_INDEX).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_size: int,
        compile_backend: str | None,
        track: bool,
    ) -> Tensor:
        want_hidden, want_weight = track and ctx.needs_input_grad[0], track and ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # the sum over many chunks is kept in fp32: in bf16 late chunks would vanish in it
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if want_weight else None
        with_grad = want_hidden or want_weight
        chunk_loss = _chunk_loss if compile_backend is None else _compiled_chunk_loss(compile_backend)
        for begin in range(0, hidden.shape[0], chunk_size):
            rows = hidden[begin : begin + chunk_size]
            loss, grad_logits = chunk_loss(rows @ weight.t(), labels[begin : begin + chunk_size], with_grad)
            total += loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[begin : begin + chunk_size])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.chunk_size = weight.dtype, chunk_size
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad_loss, grad_hidden.dtype, ctx.chunk_size)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad_loss, ctx.weight_dtype, ctx.chunk_size)
        return grad_hidden, grad_weight, None, None, None, None


def _scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """`tensor * scale` in `dtype`, multiplied in fp32: a bf16 1/num_tokens would bias all gradients."""
    out = torch.empty_like(tensor, dtype=dtype)
    for source, target in zip(tensor.split(rows), out.split(rows), strict=True):
        target.copy_(source.to(_wide(source)) * scale)
    return out


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunk_loss(logits: Tensor, labels: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Loss (fp32 scalar) of a chunk's logits `[n, V]` and, where asked, its gradient in the logits' dtype."""
    counts = labels != IGNORE_INDEX
    target = labels.masked_fill(~counts, 0)[:, None]  # any other label that is no class fails in gather
    wide = logits.to(_wide(logits))
    lse = torch.logsumexp(wide, dim=-1, keepdim=True)  # [n, 1]
    losses = (lse - wide.gather(1, target)).squeeze(1)
    loss = losses.masked_fill(~counts, 0.0).sum().float()
    if not with_grad:
        return loss, logits.new_empty(0)
    grad = torch.exp(wide - lse)
    grad = grad.scatter_add(1, target, torch.full_like(lse, -1.0))
    return loss, grad.masked_fill(~counts[:, None], 0.0).to(logits.dtype)


@cache
def _compiled_chunk_loss(backend: str) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    return torch.compile(_chunk_loss, backend=backend, fullgraph=True)
