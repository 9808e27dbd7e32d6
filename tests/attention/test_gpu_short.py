"""The Hopper kernels in seconds: a case or two of each part, so that every fault of `tests/mutations` shows in one.
`test_gpu.py` has them all.
"""

import itertools

import pytest
import torch

from s2.attention import Pattern, s2_attention
from tests.attention.checks import Case, assert_correct, assert_rows_close
from tests.attention.test_gpu import hopper, one_pass  # noqa: F401  # a fixture

pytestmark = [pytest.mark.gpu, hopper]

LENGTHS = [1, 63, 200, 65, 0, 700, 130, 64, 77]


def draw(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def assert_forward(pattern, tokens, heads, kv_heads, dim):
    q, k, v = draw(2, tokens, heads, dim), draw(2, tokens, kv_heads, dim), draw(2, tokens, kv_heads, dim)
    out, lse = s2_attention(q, k, v, pattern, backend="hopper", return_lse=True)
    exact = [x.double() for x in (q, k, v)]
    wanted, wanted_lse = s2_attention(*exact, pattern, backend="reference", return_lse=True)
    assert (out - wanted).norm() < 4e-3 * wanted.norm()
    assert (out - wanted).abs().max() < 3e-2
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dim", [128, 64])
def test_forward(dim):
    assert_forward(Pattern.parse("L2V5+sink1"), 1111, 2, 2, dim)


def test_grouped_heads():
    assert_forward(Pattern.parse("L2V3"), 777, 8, 2, 128)


@pytest.mark.parametrize("growth", [3.0, 40.0])
def test_maxima_that_rise(growth):
    profile = torch.linspace(1, 1 + growth, 1500, device="cuda", dtype=torch.bfloat16)[:, None, None]
    for rises in (profile, profile.flip(0)):
        q, k, v = (draw(1, 1500, 2, 128) for _ in range(3))
        k *= rises
        out = s2_attention(q, k, v, Pattern.parse("L2V3"), backend="hopper")
        wanted = s2_attention(*(x.double() for x in (q, k, v)), Pattern.parse("L2V3"), backend="reference")
        assert (out - wanted).norm() < 4e-3 * wanted.norm()


@pytest.mark.parametrize("spec", ["L1V15", "dense"])
def test_long_forward(spec):
    q, k, v = (draw(1, 12_000, 16, 128) for _ in range(3))
    pattern = Pattern.parse(spec)
    first = s2_attention(q, k, v, pattern, backend="hopper", return_lse=True)
    assert_rows_close(first[0], s2_attention(q, k, v, pattern, backend="triton"))
    for _ in range(20):
        again = s2_attention(q, k, v, pattern, backend="hopper", return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def gradients(inputs, dout, pattern, borders=None, backend="hopper"):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = s2_attention(*leaves, pattern, cu_seqlens=borders, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def assert_documents_do_not_see_each_other(exact):
    """`exact`: what has the same bits every time, of out, dq, dk and dv."""
    borders = torch.tensor([0, *itertools.accumulate(LENGTHS)], device="cuda", dtype=torch.int32)
    ends = borders.tolist()
    tokens = ends[-1] + 333
    inputs, dout = [draw(tokens, heads, 128) for heads in (4, 2, 2)], draw(tokens, 4, 128)
    for x in (*inputs, dout):
        x[ends[-1] :] = float("nan")
    pattern = Pattern.parse("L2V5+sink1")
    before = gradients(inputs, dout, pattern, borders)
    for n, (begin, end) in enumerate(itertools.pairwise(ends)):
        if n % 2:
            for x in (*inputs, dout):
                x[begin:end] = float("nan")
    after = gradients(inputs, dout, pattern, borders)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert not a[ends[-1] :].any()
        for n, (begin, end) in enumerate(itertools.pairwise(ends)):
            if n % 2 == 0:
                assert torch.isfinite(a[begin:end]).all()
                if i in exact:
                    assert torch.equal(a[begin:end], b[begin:end])
                else:
                    assert_rows_close(a[begin:end], b[begin:end])


def test_documents():
    assert_documents_do_not_see_each_other((0, 1, 2, 3))


def test_documents_of_the_one_pass(one_pass):  # noqa: F811
    assert_documents_do_not_see_each_other((0, 2, 3))


@pytest.mark.parametrize("spec", ["L2V5+sink1", "dense"])
def test_two_passes(spec):
    assert_correct(Case(Pattern.parse(spec), 1111, 1111, 4, 2, 128), torch.bfloat16, device="cuda", backend="hopper")


def test_one_pass(one_pass):  # noqa: F811
    case = Case(Pattern.parse("L2V5+sink1"), 1500, 1500, 4, 2, 128)
    assert_correct(case, torch.bfloat16, device="cuda", backend="hopper")


def test_small_blocks(one_pass):  # noqa: F811
    case = Case(Pattern.parse("L3V5+sink1", 16), 900, 900, 8, 2, 128)
    assert_correct(case, torch.bfloat16, device="cuda", backend="hopper")


def test_divided_columns(one_pass):  # noqa: F811
    inputs, dout = [draw(1, 12_000, 2, 128) for _ in range(3)], draw(1, 12_000, 2, 128)
    found = gradients(inputs, dout, Pattern.parse("L1V15"))
    for ours, wanted in zip(found, gradients(inputs, dout, Pattern.parse("L1V15"), backend="triton"), strict=True):
        assert_rows_close(ours, wanted)


def test_long_one_pass(one_pass):  # noqa: F811
    inputs, dout = [draw(1, 8_000, heads, 128) for heads in (16, 16, 16)], draw(1, 8_000, 16, 128)
    pattern = Pattern.parse("L2V5")
    first = gradients(inputs, dout, pattern)
    for ours, wanted in zip(first, gradients(inputs, dout, pattern, backend="triton"), strict=True):
        assert_rows_close(ours, wanted)
    for _ in range(10):
        again = gradients(inputs, dout, pattern)
        torch.testing.assert_close(again[1], first[1], rtol=2**-7, atol=1e-3)
        assert torch.equal(again[2], first[2]) and torch.equal(again[3], first[3])


def test_long_two_passes():
    inputs, dout = [draw(1, 8_000, 16, 128) for _ in range(3)], draw(1, 8_000, 16, 128)
    pattern = Pattern.parse("L1V15")
    first = gradients(inputs, dout, pattern)
    for ours, wanted in zip(first, gradients(inputs, dout, pattern, backend="triton"), strict=True):
        assert_rows_close(ours, wanted)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(inputs, dout, pattern), strict=True))
