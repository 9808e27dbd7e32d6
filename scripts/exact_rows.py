"""Exact attention of some rows and some columns: what `verify.py` holds the kernels against.

Rows of the output and of dQ need only their own keys, columns of dK and dV only their own queries, so 128k tokens are
checked in seconds. Everything is computed twice: in float64, and with every product rounded to the dtype of the call,
as plain torch does; the error of the second is what a kernel's error is measured by.

Shapes: T tokens of all sequences, H query heads, G KV heads, D head dimension; R sampled rows, C sampled columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from s2.attention import HeadRule, Pattern

# Of plain torch's error, twice is allowed, and this much of what one key weighs: results are sums of random values
# times probabilities, and as large as the norm of these. That holds for the norm of a row; the largest of its elements
# may be MOST_OUTLYING times as far off: where few keys are seen (the second token of a document sees two), one rounded
# dscore is in all elements of a row, and plain torch's own error happens to be small.
SMALL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MOST_OUTLYING = 4
MOST_RMS = 1e-2  # relative, of all that is sampled
PAIRS_AT_ONCE = {"cuda": 1 << 25, "cpu": 1 << 20}  # query and key, of one head

Segment = tuple[int, int]  # tokens [begin, end) of a document, or of a row of a batch


@dataclass(frozen=True)
class Sample:
    """Sampled values of one tensor, `[n, heads, D]`: exact, and as plain torch in the dtype of the call has them."""

    tokens: Tensor  # [n]
    heads: Tensor  # [heads]
    exact: Tensor
    plain: Tensor
    weight: Tensor  # [n, heads]: norm of the probabilities that the values are sums of


@dataclass(frozen=True)
class Verdict:
    """The error of the worst row or column over its bound, and where that is."""

    ratio: float
    token: int
    head: int
    error: float
    bound: float
    kind: str  # of error: on average over the row, or in an element
    rms: float  # relative to the exact values, over all samples

    @property
    def is_right(self) -> bool:
        return self.ratio <= 1 and self.rms <= MOST_RMS


def judge(sample: Sample, got: Tensor, dtype: torch.dtype) -> Verdict:
    """Hold the tensor `got` `[T, all heads, D]` against a sample of what it should be. NaN is as wrong as can be."""
    values = got[sample.tokens][:, sample.heads].double()
    error = (values - sample.exact).abs().nan_to_num(torch.inf, posinf=torch.inf)
    rounding = 2e-6 * sample.exact.abs().max() if dtype == torch.float32 else 0.0
    small = SMALL[dtype] * sample.weight + rounding  # of an element
    plain = (sample.plain - sample.exact).abs()
    root = error.shape[-1] ** 0.5
    kinds = (  # of error: what, per row and head; what is allowed
        ("on average", error.norm(dim=-1) / root, 2 * plain.norm(dim=-1) / root + small),
        ("in an element", error.amax(-1), MOST_OUTLYING * (2 * plain.amax(-1) + small)),
    )
    kind, worst, bound = max(kinds, key=lambda kind: float((kind[1] / kind[2].clamp_min(1e-30)).max()))
    ratio = worst / bound.clamp_min(1e-30)
    at = int(ratio.argmax())
    weight = sample.weight[..., None].clamp_min(1e-30)
    rms = float((error / weight).square().mean().sqrt() / (sample.exact / weight).square().mean().sqrt())
    row, head = divmod(at, len(sample.heads))
    return Verdict(
        float(ratio.flatten()[at]), int(sample.tokens[row]), int(sample.heads[head]), float(worst.flatten()[at]),
        float(bound.flatten()[at]), kind, rms,
    )  # fmt: skip


def exact_samples(
    q: Tensor,  # [T, H, D]
    k: Tensor,  # [T, G, D]
    v: Tensor,
    dout: Tensor,  # [T, H, D]
    pattern: Pattern,
    rotation: int,
    segments: Sequence[Segment],
    rows: Tensor,  # int64 [R]
    columns: Tensor,  # int64 [C]
    column_heads: Tensor,  # int64, of the KV heads
) -> dict[str, Sample]:
    """Samples of out and dQ at `rows` of all heads, and of dK and dV at `columns` of `column_heads`."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    group = heads // kv_heads
    ruled = len(pattern.heads) or kv_heads  # a rule for each of them, or one for each query head
    rules = pattern.rules(ruled, layer=rotation)
    at_rows = _Samples(("out", "dq"), rows, torch.arange(heads, device=q.device), dim)
    at_columns = _Samples(("dv", "dk"), columns, column_heads, dim)
    chosen = {int(head): n for n, head in enumerate(column_heads)}
    for head in range(heads):
        kv_head = head // group
        mine = [x[:, h] for x, h in ((q, head), (k, kv_head), (v, kv_head), (dout, head))]
        rule = rules[head * ruled // heads]
        for (begin, end), is_plain in itertools.product(segments, (False, True)):
            attend = partial(_attend, mine, rule, pattern.block_size, begin, is_plain)
            inside = ((rows >= begin) & (rows < end)).nonzero()[:, 0]
            if len(inside):
                part = attend(rows[inside])
                at_rows.put(is_plain, inside, head, (part.out, part.dq), part.probs)
            inside = ((columns >= begin) & (columns < end)).nonzero()[:, 0]
            if len(inside) and kv_head in chosen:
                wanted = columns[inside]
                after = torch.arange(int(wanted.min()), end, device=q.device)  # queries that may see them
                for queries in after.split(max(64, PAIRS_AT_ONCE[q.device.type] // (end - begin))):
                    keys = (wanted - begin).clamp_max(int(queries[-1]) - begin)
                    later = wanted > queries[-1]
                    part = attend(queries)
                    probs, dscores = (x[:, keys].double().masked_fill(later, 0.0).T for x in (part.probs, part.dscores))
                    sums = (probs @ part.dout.double(), dscores @ part.q.double())
                    at_columns.put(is_plain, inside, chosen[kv_head], sums, probs)
    return {**at_rows.finish(q.dtype), **at_columns.finish(q.dtype)}


class _Samples:
    """Sums of two tensors, in float64."""

    def __init__(self, names: tuple[str, str], tokens: Tensor, heads: Tensor, dim: int) -> None:
        self.names, self.tokens, self.heads = names, tokens, heads
        shape = (2, 2, len(tokens), len(heads), dim)  # name, exact or plain
        self.sums = torch.zeros(shape, dtype=torch.float64, device=tokens.device)
        self.weights = torch.zeros(shape[2:4], dtype=torch.float64, device=tokens.device)

    def put(self, is_plain: bool, at: Tensor, head: int, values: tuple[Tensor, Tensor], probs: Tensor) -> None:
        for n, value in enumerate(values):
            self.sums[n, int(is_plain), at, head] += value.double()
        if not is_plain:
            self.weights[at, head] += probs.square().sum(-1)

    def finish(self, dtype: torch.dtype) -> dict[str, Sample]:
        return {
            name: Sample(self.tokens, self.heads, exact, plain.to(dtype).double(), self.weights.sqrt())
            for name, (exact, plain) in zip(self.names, self.sums, strict=True)
        }


class _Part(NamedTuple):
    """Of some queries `[R]` of one head to the keys `[N]` of their document up to the last of them."""

    q: Tensor
    dout: Tensor
    probs: Tensor  # [R, N]
    dscores: Tensor
    out: Tensor
    dq: Tensor


def _attend(mine: Sequence[Tensor], rule: HeadRule, size: int, begin: int, is_plain: bool, queries: Tensor) -> _Part:
    """`mine`: q, k, v, dout of one head, `[T, D]`, with blocks of `size`. Exact, or as plain torch computes in their
    dtype."""
    q, k, v, dout = mine
    end = int(queries.max()) + 1
    compute = q.dtype if is_plain else torch.float64
    q, k, v, dout = (x.to(compute) for x in (q[queries], k[begin:end], v[begin:end], dout[queries]))
    scale = q.shape[1] ** -0.5
    place, key = (queries - begin)[:, None], torch.arange(end - begin, device=q.device)
    block = key[::size] // size
    kept = rule.visible(place // size - block, block).repeat_interleave(size, 1)[:, : len(key)]
    scores = (q @ k.T * scale).masked_fill_(~(kept & (key <= place)), float("-inf"))
    probs = scores.softmax(-1)
    dscores = torch.ops.aten._softmax_backward_data(dout @ v.T, probs, -1, compute).mul_(scale)
    return _Part(q, dout, probs, dscores, probs @ v, dscores @ k)
