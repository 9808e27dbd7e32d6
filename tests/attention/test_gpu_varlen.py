"""Packed documents on a CUDA device, Hopper kernels included: rows of no document, NaN next door, borders that do not
fit, more documents than a grid's second dimension has programs.
"""

import itertools

import pytest
import torch

from s2.attention import Pattern, s2_attention
from s2.attention.kernels.hopper import one_pass as one_pass_host
from tests.attention.checks import assert_rows_close
from tests.attention.test_varlen import MISFITS, NAMES, borders_of, draw, results

pytestmark = pytest.mark.gpu
hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 device"
)
LENGTHS = [1, 63, 200, 65, 0, 700, 130, 64, 77, 1029]


@pytest.fixture(params=[False, True], ids=["two passes", "one pass"])
def one_pass(request, monkeypatch):
    monkeypatch.setattr(one_pass_host, "is_taken", lambda *call: request.param)
    return request.param


def pieces(found, name, lengths):
    """Of each document, `[tokens, ...]`."""
    x = found[name].T if name == "lse" else found[name]
    return x[: sum(lengths)].split(lengths)


def assert_same(a, b, name, one_pass):
    if name == "dq" and one_pass:  # float32 sums in any order
        assert not a.isnan().any() and not b.isnan().any()
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2e-3)
    else:
        assert torch.equal(a, b), name


def hopper_cases():
    specs = ("L1V15", "L2V5+sink1", "W3", "dense", "L8V16")
    for n, (block, dim) in enumerate(itertools.product((16, 32, 64, 128, 256), (64, 128))):
        yield block, dim, specs[n % 5], (torch.bfloat16, torch.float16)[n // 2 % 2]
        yield block, dim, specs[(n + 2) % 5], (torch.bfloat16, torch.float16)[n % 2]


@hopper
@pytest.mark.parametrize(("block", "dim", "spec", "dtype"), list(hopper_cases()))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hopper_documents_do_not_see_nan_next_door(one_pass, block, dim, spec, dtype, bad):
    if one_pass and dim == 64:
        pytest.skip("the one pass is for head dimension 128")
    group = max(2, 64 // block)
    tensors = draw(sum(LENGTHS), 2 * group, 2, dim, dtype, "cuda")
    before = results(*tensors, Pattern.parse(spec, block), borders_of(LENGTHS, "cuda"), "hopper")
    ends = list(itertools.accumulate(LENGTHS))
    for odd in (1, 0):  # every second document, then the others
        poisoned = [x.clone() for x in tensors]
        for x, (n, end) in itertools.product(poisoned, enumerate(ends)):
            if n % 2 == odd:
                x[end - LENGTHS[n] : end] = bad
        after = results(*poisoned, Pattern.parse(spec, block), borders_of(LENGTHS, "cuda"), "hopper")
        for name in NAMES:
            for n, (a, b) in enumerate(zip(pieces(before, name, LENGTHS), pieces(after, name, LENGTHS), strict=True)):
                if n % 2 != odd:
                    assert_same(a, b, name, one_pass)


@hopper
@pytest.mark.parametrize(("block", "dim", "spec", "dtype"), list(hopper_cases())[::3])
def test_hopper_rows_behind_the_last_border_are_zero_and_nobody_reads_them(one_pass, block, dim, spec, dtype):
    if one_pass and dim == 64:
        pytest.skip("the one pass is for head dimension 128")
    padding, tokens = 901, sum(LENGTHS)
    tensors = draw(tokens + padding, 8, 2, dim, dtype, "cuda")
    for x in tensors:
        x[tokens:] = float("nan")
    dirty = torch.full((1 << 26,), float("nan"), device="cuda")
    del dirty  # what results are allocated in
    padded = results(*tensors, Pattern.parse(spec, block), borders_of(LENGTHS, "cuda"), "hopper")
    exact = results(*(x[:tokens] for x in tensors), Pattern.parse(spec, block), borders_of(LENGTHS, "cuda"), "hopper")
    for name in NAMES:
        own, wanted = (x[name].T if name == "lse" else x[name] for x in (padded, exact))
        assert_same(own[:tokens], wanted, name, one_pass)
        assert (own[tokens:] == (float("-inf") if name == "lse" else 0.0)).all(), name


@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=hopper)])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [5]])
def test_little_but_padding(backend, lengths, one_pass):
    found = results(*draw(300, 4, 2, 128, torch.bfloat16, "cuda"), Pattern.parse("L1V3"), borders_of(lengths, "cuda"),
                    backend)  # fmt: skip
    assert all((found[name][sum(lengths) :] == 0).all() for name in ("out", "dq", "dk", "dv"))
    assert (found["lse"][:, sum(lengths) :] == float("-inf")).all()


@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=hopper)])
@pytest.mark.parametrize("borders", MISFITS, ids=str)
def test_borders_that_do_not_fit_give_nan(backend, borders, one_pass):
    cu_seqlens = torch.tensor(borders, dtype=torch.int64, device="cuda")
    found = results(*draw(100, 4, 2, 128, torch.bfloat16, "cuda"), Pattern.parse("L1V3"), cu_seqlens, backend)
    assert all(found[name].isnan().all() for name in NAMES)


@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=hopper)])
def test_borders_of_every_form_are_read_alike(backend, one_pass):
    borders = borders_of(LENGTHS, "cuda")
    table = torch.full((len(borders), 3), 7, dtype=torch.int32, device="cuda")
    table[:, 1] = borders
    shifted = torch.cat([borders[:1], borders])[1:]
    tensors = draw(sum(LENGTHS), 4, 2, 128, torch.bfloat16, "cuda")
    wanted = results(*tensors, Pattern.parse("L1V3"), borders, backend)
    for other in (table[:, 1], borders.long(), table.long()[:, 1], borders.cpu(), shifted):
        found = results(*tensors, Pattern.parse("L1V3"), other, backend)
        for name in NAMES:
            assert_same(found[name], wanted[name], name, one_pass)


@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=hopper)])
def test_more_documents_than_a_grid_has_rows(backend):
    lengths = [100] * 16_000 + [7] * 60_000
    tensors = draw(sum(lengths), 2, 2, 64, torch.bfloat16, "cuda")
    found = results(*tensors, Pattern.parse("L1V3"), borders_of(lengths, "cuda"), backend)
    begin = sum(lengths) - 7  # the last document, alone
    own = results(*(x[begin:] for x in tensors), Pattern.parse("L1V3"), borders_of([7], "cuda"), backend)
    for name in NAMES:
        a, b = (x[name].T if name == "lse" else x[name] for x in (found, own))
        torch.testing.assert_close(a[begin:], b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=hopper)])
def test_larger_batches_than_a_grid_has_rows(backend):
    q, k, v = (torch.randn(70_000, 20, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = s2_attention(*inputs, Pattern.parse("L1V3"), backend=backend)
    dout = torch.randn_like(out)
    last = [x[-1:].detach().requires_grad_() for x in (q, k, v)]
    own = s2_attention(*last, Pattern.parse("L1V3"), backend=backend)
    pairs = zip((out, *torch.autograd.grad(out, inputs, dout)), (own, *torch.autograd.grad(own, last, dout[-1:])),
                strict=True)  # fmt: skip
    for whole, part in pairs:
        torch.testing.assert_close(whole[-1:], part, atol=2e-2, rtol=2e-2)


# ---------------------------------------------------------------- queries at the end of longer keys

LATE_QUERIES = [1, 0, 200, 65, 300, 7, 0, 129, 64]
LATE_KEYS = [1000, 70, 200, 640, 301, 7, 0, 1030, 128]
ON_BOTH = pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=hopper)])


def draw_late(padding, heads, kv_heads, dim, dtype):
    """With as many queries, and twice as many keys, behind the last border."""
    tokens, keys = sum(LATE_QUERIES) + padding, sum(LATE_KEYS) + 2 * padding
    q, k, v, dout = draw(keys, heads, kv_heads, dim, dtype, "cuda")
    return [q[:tokens].clone(), k, v, dout[:tokens].clone()]


def late_results(tensors, pattern, backend):
    dirty = torch.full((1 << 26,), float("nan"), device="cuda")
    del dirty  # what results are allocated in
    borders, borders_k = borders_of(LATE_QUERIES, "cuda"), borders_of(LATE_KEYS, "cuda")
    return results(*tensors, pattern, borders, backend, cu_seqlens_k=borders_k)


def late_pieces(found):
    """Of each document by name, `[tokens, ...]`."""
    named = {name: pieces(found, name, LATE_KEYS if name in ("dk", "dv") else LATE_QUERIES) for name in NAMES}
    return [{name: named[name][n] for name in NAMES} for n in range(len(LATE_QUERIES))]


@ON_BOTH
@pytest.mark.parametrize(("block", "dim", "spec", "dtype"), list(hopper_cases()))
def test_documents_with_longer_keys_are_as_each_alone(backend, block, dim, spec, dtype):
    """Also where what belongs to no document, and keys of documents without queries, are NaN."""
    pattern, padding, group = Pattern.parse(spec, block), 77, max(2, 64 // block)
    tensors = draw_late(padding, 2 * group, 2, dim, dtype)
    q, k, v, dout = tensors
    for x in (q, dout):
        x[-padding:] = float("nan")
    for x in (k, v):
        x[-2 * padding :] = x[1000:1070] = float("nan")
    found = late_results(tensors, pattern, backend)
    for name in NAMES:
        behind = (found[name].T if name == "lse" else found[name])[-padding:]
        assert (behind == (float("-inf") if name == "lse" else 0)).all(), name
    begin = first = 0
    for queries, keys, own in zip(LATE_QUERIES, LATE_KEYS, late_pieces(found), strict=True):
        rows, columns = slice(begin, begin + queries), slice(first, first + keys)
        begin, first = begin + queries, first + keys
        if not queries:
            assert not own["dk"].any() and not own["dv"].any()
            continue
        alone = [q[None, rows], k[None, columns], v[None, columns], dout[None, rows]]
        for name, wanted in results(*alone, pattern, None, "triton").items():
            if name == "lse":
                torch.testing.assert_close(own[name], wanted[0].mT, rtol=1e-3, atol=2e-3)
            else:
                assert_rows_close(own[name], wanted[0])


@ON_BOTH
@pytest.mark.parametrize(("block", "dim", "spec", "dtype"), list(hopper_cases())[::2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_documents_with_longer_keys_do_not_see_nan_next_door(backend, block, dim, spec, dtype, bad):
    pattern, group = Pattern.parse(spec, block), max(2, 64 // block)
    tensors = draw_late(0, 2 * group, 2, dim, dtype)
    before = late_pieces(late_results(tensors, pattern, backend))
    for odd in (1, 0):  # every second document, then the others
        poisoned = [x.clone() for x in tensors]
        for x, lengths in zip(poisoned, (LATE_QUERIES, LATE_KEYS, LATE_KEYS, LATE_QUERIES), strict=True):
            for n, own in enumerate(x.split(lengths)):
                if n % 2 == odd:
                    own.fill_(bad)
        after = late_pieces(late_results(poisoned, pattern, backend))
        for n, name in itertools.product(range(len(LATE_QUERIES)), NAMES):
            assert n % 2 == odd or torch.equal(after[n][name], before[n][name]), (n, name)


@ON_BOTH
@pytest.mark.parametrize(
    ("borders", "borders_k"),
    [
        ([0, 100, 301], [0, 300, 500]), ([0, 100, 300], [0, 300, 601]), ([0, 100, 300], [0, 99, 600]),
        ([0, 100, 300], [0, 450, 600]), ([0, 100, 300], [1, 300, 600]), ([0, 100, 90], [0, 300, 600]),
    ],
    ids=str,
)  # fmt: skip
def test_borders_of_keys_that_do_not_fit_give_nan(backend, borders, borders_k):
    q, k, v, dout = draw(600, 4, 2, 128, torch.bfloat16, "cuda")
    borders, borders_k = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (borders, borders_k))
    found = results(q[:300], k, v, dout[:300], Pattern.parse("L1V3"), borders, backend, cu_seqlens_k=borders_k)
    assert all(found[name].isnan().all() for name in NAMES)
