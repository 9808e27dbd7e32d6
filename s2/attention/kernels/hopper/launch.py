"""How a call reaches the Hopper kernels: what is known of it but its pointers is a `Problem`, made once for a shape and
kept with the kernels that it has used, their TMA descriptors, grids and parameters. After that a call allocates its
results, fills in the pointers and launches."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...call import Call
from ...kept import remember
from ..triton.documents import unowned
from . import one_pass
from .forward import Forward
from .one_pass import OnePass
from .problem import BackwardTensors, Problem, align16, contiguous16, empty_like
from .two_pass import TwoPass

K = TypeVar("K", bound=Forward | OnePass | TwoPass)


class Plan(NamedTuple):
    """The kernels that calls of one shape have used."""

    problem: Problem
    kernels: dict[type, Any]

    def kernel(self, kind: type[K], q: Tensor, k: Tensor, v: Tensor) -> K:
        return self.kernels.get(kind) or self.kernels.setdefault(kind, kind(self.problem, q, k, v))


def plan_of(q: Tensor, k: Tensor, v: Tensor, call: Call, packed: bool, late: bool = False) -> Plan:
    """Kept with the call, the oldest goes first. `late`: packed queries at the end of longer keys."""
    key = (q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.device, packed, late)
    return call.plans.get(key) or remember(call.plans, key, Plan(Problem.of(q, k, call, packed, late), {}))


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """q `[B, Sq, Hq, D]`, k/v `[B, Skv, Hkv, D]` -> out and lse `[B, Hq, Sq]`; packed `[Tq, Hq, D]`, `[Tk, Hkv, D]`
    with int32 borders -> lse `[Hq, Tq]`."""
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:  # no document
        return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    q, k, v = align16(q), align16(k), align16(v)
    out = empty_like(q)
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    lse = lse[0] if packed else lse
    fill = unowned(out, lse=lse) if packed else None
    plan = plan_of(q, k, v, call, packed, cu_seqlens_k is not None)
    plan.kernel(Forward, q, k, v)(q, k, v, out, lse, cu_seqlens, cu_seqlens_k, fill)
    return out, lse


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output and (if used) of the log-sum-exp. Bitwise repeatable, except dQ
    where `one_pass.is_taken`. ValueError: lse is not float32, as the forward's is."""
    if lse.dtype != torch.float32:
        raise ValueError(f"lse must be float32, got {lse.dtype}")
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:  # no document
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    q, k, v = align16(q), align16(k), align16(v)
    gradients = (empty_like(q), empty_like(k), empty_like(v))
    packed = cu_seqlens is not None
    fill = unowned(*gradients) if packed else None
    if packed:
        q, k, v = q[None], k[None], v[None]
    dlse = None if dlse is None else contiguous16(dlse)
    tensors = BackwardTensors(q, k, v, contiguous16(out), contiguous16(lse), contiguous16(dout), dlse, *gradients)
    plan = plan_of(q, k, v, call, packed)
    kind: type[OnePass | TwoPass] = OnePass if one_pass.is_taken(plan.problem, cu_seqlens) else TwoPass
    plan.kernel(kind, q, k, v)(tensors, cu_seqlens, fill)
    return gradients
