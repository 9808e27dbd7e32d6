"""Shared checks: run a backend forward and backward, and hold it against the float64 definition."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2.attention import Pattern, call, s2_attention
from s2.attention.call import Call, call_of

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    pattern: Pattern
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    cu_seqlens: tuple[int, ...] | None = None
    rotation: int = 0
    head_offset: int = 0
    total_kv_heads: int | None = None
    cu_seqlens_k: tuple[int, ...] | None = None

    @property
    def pattern_heads(self) -> int:
        """Heads the pattern is written for: KV heads, or query heads for per-query-head patterns."""
        own = len(self.pattern.heads) or (0 if self.pattern.mask is None else self.pattern.mask.shape[0])
        return self.heads if own == self.heads else self.kv_heads

    def inputs(self, dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
        """Fresh random q, k, v, dout and dlse."""
        generator = torch.Generator().manual_seed(seed)

        def draw(tokens: int, heads: int) -> Tensor:
            shape = (tokens, heads, self.head_dim) if self.cu_seqlens else (self.batch, tokens, heads, self.head_dim)
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        lse_shape = (self.heads, self.q_len) if self.cu_seqlens else (self.batch, self.heads, self.q_len)
        dlse = torch.randn(lse_shape, generator=generator).to(device)
        lengths = ((self.q_len, self.heads), (self.kv_len, self.kv_heads), (self.kv_len, self.kv_heads))
        return [*(draw(n, h) for n, h in lengths), draw(self.q_len, self.heads), dlse]


def call_with(
    pattern: Pattern, kv_heads: int, rotation: int = 0, *, head_offset: int = 0, total: int | None = None,
    scale: float = 0.1, backend: str = "triton",
) -> Call:  # fmt: skip
    """As the op passes it to the kernels."""
    return call_of(pattern.key, rotation, head_offset, total or kv_heads, scale, backend)


def plans_kept() -> list[Any]:
    """By kernels, for all remembered calls, oldest first."""
    calls = {id(remembered): remembered for remembered in call.CALLS.values()}
    return [plan for remembered in calls.values() for plan in remembered.plans.values()]


def run(case: Case, inputs: list[Tensor], dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
    """Output, lse and the gradients of sum(out * dout) + sum(lse * dlse)."""
    q, k, v = (x.detach().clone().to(dtype).requires_grad_() for x in inputs[:3])
    dout, dlse = inputs[3].to(dtype), inputs[4]
    borders, borders_k = (
        torch.tensor(x, dtype=torch.int32, device=q.device) if x else None for x in (case.cu_seqlens, case.cu_seqlens_k)
    )
    out, lse = s2_attention(
        q, k, v, case.pattern, cu_seqlens=borders, cu_seqlens_k=borders_k, rotation=case.rotation,
        head_offset=case.head_offset, total_kv_heads=case.total_kv_heads, return_lse=True, backend=backend,
    )  # fmt: skip
    seen = torch.isfinite(lse)
    lse = torch.where(seen, lse, torch.zeros_like(lse))
    ((out * dout).sum(dtype=torch.float64) + (lse * dlse.to(lse.dtype)).sum()).backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    values = (out.detach(), lse.detach(), q.grad, k.grad, v.grad)
    return dict(zip(NAMES, values, strict=True))


def same_dtype(case: Case, inputs: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain torch attention with every product rounded to `dtype`: what the low-precision bound is made of."""
    from s2.attention.reference import token_mask

    q, k, v = (x.detach().clone().to(dtype).requires_grad_() for x in inputs[:3])
    dout, dlse = inputs[3].to(dtype), inputs[4]
    borders = case.cu_seqlens or (0, case.q_len)
    outs, lses = [], []
    borders_k = case.cu_seqlens_k or case.cu_seqlens or (0, case.kv_len)
    for (begin, end), (first, last) in zip(itertools.pairwise(borders), itertools.pairwise(borders_k), strict=True):
        qd, kd, vd = (q[None, begin:end], k[None, first:last], v[None, first:last]) if case.cu_seqlens else (q, k, v)
        group = case.heads // case.kv_heads
        own = call_with(
            case.pattern, case.pattern_heads, case.rotation, head_offset=case.head_offset, total=case.total_kv_heads
        )  # fmt: skip
        mask = token_mask(own, qd.shape[1], kd.shape[1], case.pattern_heads)
        mask = mask.repeat_interleave(case.heads // case.pattern_heads, 0).to(q.device)
        kd, vd = (x.repeat_interleave(group, 2) for x in (kd, vd))
        scores = torch.einsum("bqhd,bkhd->bhqk", qd, kd) * case.head_dim**-0.5
        empty = ~mask.any(-1)
        scores = scores.masked_fill(~mask, float("-inf")).masked_fill(empty[..., None], 0.0)
        probs = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
        outs.append(torch.einsum("bhqk,bkhd->bqhd", probs, vd))
        lses.append(scores.float().logsumexp(-1).masked_fill(empty, 0.0))
    out = torch.cat([o[0] for o in outs]) if case.cu_seqlens else outs[0]
    lse = torch.cat([x[0] for x in lses], dim=1) if case.cu_seqlens else lses[0]
    ((out * dout).sum(dtype=torch.float64) + (lse * dlse).sum()).backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return dict(zip(NAMES, (out.detach(), lse.detach(), q.grad, k.grad, v.grad), strict=True))


def assert_rows_close(ours: Tensor, wanted: Tensor, *, rtol: float = 2**-6, atol: float = 4e-3) -> None:
    """Two kernels' results `[..., D]` in bfloat16, by the norm of each row. Where a row sees a handful of keys the
    rounding of one score is in all its elements: of millions, a few elements differ by more than any tight bound."""
    error, size = (ours.double() - wanted.double()).norm(dim=-1), wanted.double().norm(dim=-1)
    over = error / (rtol * size + atol * ours.shape[-1] ** 0.5)
    assert (over <= 1).all(), f"a row is {over.nan_to_num(torch.inf).max():.2f} times as far off as it may be"


def assert_correct(
    case: Case, dtype: torch.dtype, *, backend: str | None = "triton", device: str = "cpu", seed: int = 0
):
    """The bound of the design: twice the error of plain torch in the same dtype, and a small relative RMSE."""
    inputs = case.inputs(dtype, device, seed)
    actual = run(case, inputs, dtype, backend)
    exact = run(case, [x.double() for x in inputs], torch.float64, "reference")
    plain = same_dtype(case, inputs, dtype)
    small = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for name in NAMES:
        if exact[name].numel() == 0:
            continue
        error = (actual[name].double() - exact[name]).abs()
        # float32 sums differ by their order: of n terms by sqrt(n) half units in the last place of the largest value
        terms = max(case.q_len * case.heads // case.kv_heads, case.kv_len)
        rounding = max(2e-6, 6e-8 * terms**0.5) * exact[name].abs().max() if dtype == torch.float32 else 0.0
        bound = 2 * (plain[name].double() - exact[name]).abs().max() + small + rounding
        label = f"{name} of {case} in {dtype}"
        assert not actual[name].isnan().any(), f"NaN in {label}"
        assert error.max() <= bound, f"{label}: error {error.max():.2e} above the bound {bound:.2e}"
        rms = exact[name].square().mean().sqrt()
        if rms > 1e-3:
            relative = error.square().mean().sqrt() / rms
            assert relative < 1e-2, f"{label}: relative RMSE {relative:.2e}"
