"""The Triton kernels on a CUDA device: every dtype, head dimension, block size, GQA ratio, packed and not, forward and
backward, within the bounds; no shared-memory overflow; indices beyond 2^31; dense dispatch; compile and checkpointing
run through test_op and test_kernels on the same device (`make test-gpu` runs them all).
"""

import itertools
import random

import pytest
import torch

from s2.attention import Pattern, s2_attention
from s2.attention.kernels.hopper import one_pass as one_pass_host
from s2.attention.kernels.hopper.two_pass import TwoPass
from tests.attention.checks import Case, assert_correct, plans_kept

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCKS = (16, 32, 64, 128, 256)
GROUPS = (1, 4, 8)
SPECS = ("L2V5", "L1V4+sink1", "L3V8", "W3", "dense")
PACKED = (0, 0, 1, 130, 130, 131, 400, 917)  # zero and one token long, not multiples of any block


def grid():
    """Every (dtype, head_dim, block) with GQA ratio, pattern and packing cycling so that each pair meets."""
    for n, (dtype, dim, block) in enumerate(itertools.product(DTYPES, HEAD_DIMS, BLOCKS)):
        yield dtype, dim, block, GROUPS[n % 3], SPECS[(n + n // 5) % 5], n % 2 == 1


@pytest.mark.parametrize(("dtype", "head_dim", "block", "group", "spec", "packed"), list(grid()))
def test_triton_within_bounds(dtype, head_dim, block, group, spec, packed):
    tokens = PACKED[-1] if packed else 700 + head_dim
    case = Case(
        Pattern.parse(spec, block), tokens, tokens, 2 * group, 2, head_dim,
        batch=1 if packed else 2, cu_seqlens=PACKED if packed else None,
    )  # fmt: skip
    assert_correct(case, dtype, device="cuda", seed=torch.seed() % (1 << 30))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_gqa_ratios_at_every_block_size(group, packed, block):
    tokens = PACKED[-1] if packed else 900
    borders = PACKED if packed else None
    case = Case(Pattern.parse("L2V3+sink1", block), tokens, tokens, 2 * group, 2, 128, cu_seqlens=borders)
    assert_correct(case, torch.bfloat16, device="cuda", seed=torch.seed() % (1 << 30))


@pytest.mark.parametrize("block", [16, 64, 128])
def test_other_patterns(block):
    size = -(-600 // block)
    patterns = [
        Pattern.from_ranges(2, [(2, 5), (4, None)], block_size=block, sinks=1),
        Pattern.from_ranges(1, [(2, 4), (3, None)], block_size=block),
        Pattern.per_head([Pattern.parse(s, block) for s in ("dense", "W2", "L1V4", "L2V3+sink1")]),
        Pattern.from_mask(torch.rand(4, size, size) < 0.4, block_size=block),
        Pattern.from_mask(torch.rand(8, size, size) < 0.4, block_size=block),  # one a query head
    ]
    for pattern in patterns:
        assert_correct(Case(pattern, 600, 600, 8, 4, 64), torch.bfloat16, device="cuda")


@pytest.mark.parametrize("q_len", [1, 5, 64, 333])
def test_queries_at_the_end_of_longer_keys(q_len):
    for spec in ("L2V5", "dense"):
        assert_correct(Case(Pattern.parse(spec, 64), q_len, 1001, 8, 2, 128, batch=2), torch.bfloat16, device="cuda")


def test_more_tiles_than_one_wave_and_many_heads():
    assert_correct(Case(Pattern.parse("L2V7", 16), 500, 500, 64, 16, 64, batch=5), torch.bfloat16, device="cuda")


def test_offsets_beyond_two_to_the_31():
    tokens, heads, dim = 1 << 20, 17, 128  # 2.3e9 elements
    q = torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
    pattern = Pattern.parse("W1", 64)
    out = s2_attention(q, q, q, pattern, backend="triton")
    tail = s2_attention(*(q[:, -64:].contiguous(),) * 3, pattern, backend="triton")
    assert torch.equal(out[:, -64:], tail)


def test_heads_beyond_two_to_the_31():
    tokens, heads, dim = 1 << 20, 20, 128  # head-major: the last heads start past 2^31 elements
    q = torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    pattern = Pattern.parse("W1", 64)
    out = s2_attention(q, q, q, pattern, backend="triton")
    last = s2_attention(*(q[:, :128, -1:].contiguous(),) * 3, pattern, backend="triton")
    assert torch.equal(out[:, :128, -1:], last)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_dense_dispatch_equals_the_kernels(kv_heads):
    q, k, v = (torch.randn(2, 500, h, 128, device="cuda", dtype=torch.bfloat16) for h in (8, kv_heads, kv_heads))
    dense = Pattern.parse("dense")
    fast = s2_attention(q, k, v, dense)
    torch.testing.assert_close(fast, s2_attention(q, k, v, dense, backend="triton"), atol=2e-2, rtol=2e-2)


def test_dense_dispatch_compiles_in_one_graph():
    q = torch.randn(1, 256, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dense = Pattern.parse("dense")

    def loss(q):
        return s2_attention(q, q, q, dense).square().sum()

    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q), q)
    (eager,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(grad, eager, atol=2e-2, rtol=2e-2)


def test_forward_and_backward_repeat_bit_for_bit():
    q, k, v = (torch.randn(1, 2000, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))
    runs = []
    for _ in range(3):
        out = s2_attention(q, k, v, Pattern.parse("L2V5"), backend="triton")
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 device"
)


def hopper_grid():
    """Every (head_dim, block, pattern), with dtype and packing cycling so that each pair meets."""
    specs = ("L1V15", "L8V16", "L2V5+sink1", "W3", "dense")
    for n, (dim, block, spec) in enumerate(itertools.product((64, 128), (64, 128, 256, 16, 32), specs)):
        yield DTYPES[n % 2], dim, block, spec, (n // 2) % 2 == 1


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", BLOCKS)
def test_queries_at_the_end_of_longer_keys_on_hopper(block, head_dim):
    """Whatever their first one's place in a block; with as many sinks as a chunk's frame has."""
    size = max(block, 64)
    for n, (spec, before) in enumerate(
        itertools.product(("L2V5+sink1", "L3V4+sink9", "dense"), (1, size, 5 * size + 17))
    ):
        case = Case(
            Pattern.parse(spec, block), 256 + 97 * n, before + 256 + 97 * n, 8, 2, head_dim, batch=2, rotation=n % 3
        )
        assert_correct(case, torch.bfloat16, backend="hopper", device="cuda", seed=n)


@hopper
@pytest.mark.parametrize(("dtype", "head_dim", "block", "spec", "packed"), list(hopper_grid()))
def test_hopper_within_bounds(dtype, head_dim, block, spec, packed):
    pattern = Pattern.parse(spec, block)
    for tokens, group in ((1, 1), (63, 4), (700, 1), (1111, 4), (2048, 8)):
        borders = None
        if packed:
            borders = (*sorted({0, tokens, *(b for b in (1, 65, 66, 260, 900) if b < tokens)}), tokens)
        batch = 1 if packed else 2
        group = max(group, 64 // block)  # small blocks need several heads a KV head
        case = Case(pattern, tokens, tokens, 2 * group, 2, head_dim, batch=batch, cu_seqlens=borders)
        assert_correct(case, dtype, device="cuda", backend="hopper", seed=torch.seed() % (1 << 30))


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("growth", [0.0, 3.0, 40.0])
def test_hopper_follows_maxima_that_rise(growth, dtype, head_dim):
    """Scores that grow or fall with the position, by more or less than a maximum may lag, in some rows only. The tiles
    at the edges come first, so falling ones rise among the others."""
    profile = torch.linspace(1, 1 + growth, 1500, device="cuda", dtype=dtype)[:, None, None]
    for spec, rises in itertools.product(("L2V3", "L1V4+sink1", "dense"), (profile, profile.flip(0))):
        q, k, v = (torch.randn(1, 1500, 4, head_dim, device="cuda", dtype=dtype) for _ in range(3))
        q[:, ::3] *= 0.01
        k *= rises
        pattern = Pattern.parse(spec)
        out, lse = s2_attention(q, k, v, pattern, backend="hopper", return_lse=True)
        exact = [x.double() for x in (q, k, v)]
        wanted, wanted_lse = s2_attention(*exact, pattern, backend="reference", return_lse=True)
        assert (out - wanted).norm() < 4e-3 * wanted.norm()
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=1e-5)


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_rows_do_not_depend_on_each_other(head_dim):
    """Rows of a warp decide together whether to look at their maxima; their results are their own, to the last bit."""
    q, k, v = (torch.randn(1, 1000, 4, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    pattern = Pattern.parse("L2V3")
    before = s2_attention(q, k, v, pattern, backend="hopper", return_lse=True)
    changed = torch.zeros(1000, dtype=torch.bool, device="cuda")
    changed[3::7] = True
    q[:, changed] *= 50
    q[:, 3::70] = float("nan")
    after = s2_attention(q, k, v, pattern, backend="hopper", return_lse=True)
    assert torch.equal(before[0][:, ~changed], after[0][:, ~changed])
    assert torch.equal(before[1][..., ~changed], after[1][..., ~changed])
    assert after[0][:, 3::70].isnan().all() and not torch.equal(before[0][:, changed], after[0][:, changed])


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_packed_equals_separate_bit_for_bit(head_dim):
    lengths = [0, 1, 64, 1000, 130, 0, 2049, 77, *[65] * 30]
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    q, k, v, dout = (torch.randn(sum(lengths), 4, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    pattern = Pattern.parse("L2V5+sink1")
    out = s2_attention(q, k, v, pattern, cu_seqlens=borders, backend="hopper")
    packed = (out, *torch.autograd.grad(out, (q, k, v), dout))
    for begin, end in itertools.pairwise(borders.tolist()):
        if begin == end:
            continue
        alone = [x[None, begin:end].detach().requires_grad_() for x in (q, k, v)]
        own = s2_attention(*alone, pattern, backend="hopper")
        gradients = torch.autograd.grad(own, alone, dout[None, begin:end])
        for whole, part in zip(packed, (own, *gradients), strict=True):
            assert torch.equal(whole[begin:end], part[0])


@hopper
def test_hopper_takes_other_numbers_of_documents_of_as_many_tokens():
    """What a call keeps for the next one does not depend on them: the room for statistics does."""
    for count in (2, 200, 1, 70, 2):
        borders = (0, *sorted(random.Random(count).sample(range(1, 4096), count - 1)), 4096)
        case = Case(Pattern.parse("L1V15"), 4096, 4096, 4, 4, 128, cu_seqlens=borders)
        assert_correct(case, torch.bfloat16, device="cuda", backend="hopper")


def plan_of(length):
    """The newest of the two passes for so many tokens, which no other test has."""
    return next(p for p in reversed(plans_kept()) if p.problem.length == length and TwoPass in p.kernels)


@hopper
@pytest.mark.parametrize(
    ("block", "spec"), [(64, "L1V15"), (64, "L2V5+sink1"), (16, "L4V15"), (128, "L1V3"), (32, "L1V3")]
)
def test_two_passes_divide_long_packed_documents(block, spec):
    lengths = random.sample([100, 3000, 0, 1500, 64, 1025, 700], 7)
    borders = (0, *itertools.accumulate(lengths))
    case = Case(Pattern.parse(spec, block), borders[-1], borders[-1], 8, 2, 128, cu_seqlens=borders)
    assert_correct(case, torch.bfloat16, device="cuda", backend="hopper", seed=torch.seed() % (1 << 30))
    assert plan_of(borders[-1]).kernels[TwoPass].scheduler.has_partials


@hopper
def test_divided_packed_documents_repeat_bit_for_bit():
    borders = torch.tensor([0, 5000, 5100, 9000], device="cuda", dtype=torch.int32)
    q, dout = (torch.randn(9000, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(9000, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = s2_attention(q, k, v, Pattern.parse("L1V15"), cu_seqlens=borders, backend="hopper")
    first, *others = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert plan_of(9000).kernels[TwoPass].scheduler.has_partials


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_runs_in_a_cuda_graph(head_dim):
    q, k, v = (torch.randn(1, 3000, 16, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    dout, pattern = torch.randn_like(q), Pattern.parse("L1V15")

    def step():
        out = s2_attention(q, k, v, pattern, backend="hopper")
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [x.clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for x in captured:
            x.detach().zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@hopper
def test_hopper_takes_ranges_and_mixed_heads_and_views():
    patterns = [
        Pattern.from_ranges(2, [(2, 5), (4, None)], sinks=1),
        Pattern.per_head([Pattern.parse(s) for s in ("dense", "W2", "L1V4", "L2V3+sink1")]),
    ]
    for pattern in patterns:
        assert_correct(Case(pattern, 1500, 1500, 8, 4, 128), torch.bfloat16, device="cuda", backend="hopper")
    q, k, v = torch.randn(1, 4, 900, 3, 128, device="cuda", dtype=torch.bfloat16).unbind(3)  # heads first
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = s2_attention(q, k, v, patterns[0], backend="hopper")
    torch.testing.assert_close(out, s2_attention(q, k, v, patterns[0], backend="triton"), atol=2e-2, rtol=2e-2)
    dout = torch.randn_like(out)

    def gradients(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(s2_attention(*leaves, patterns[0], backend="hopper"), leaves, dout)

    for of_view, of_copy in zip(gradients(q, k, v), gradients(*(x.contiguous() for x in (q, k, v))), strict=True):
        assert torch.equal(of_view, of_copy)


@hopper
@pytest.mark.parametrize(("block", "end"), [(64, 7), (128, None), (256, 7)])
def test_levels_that_end_come_to_their_end(block, end):
    """With blocks of 256 on the Triton kernels, which are the default there: `support.is_deadlock_free`."""
    pattern = Pattern.from_ranges(2, [(2, 5), (4, end)], block_size=block)
    assert_correct(Case(pattern, 2560, 2560, 4, 4, 128), torch.bfloat16, device="cuda", backend=None)


@pytest.fixture
def one_pass(monkeypatch):
    """The backward in one pass over the visible pairs, whatever the length; head dimension 128."""
    taken = []
    monkeypatch.setattr(one_pass_host, "is_taken", lambda *call: not taken.append(call))
    yield taken
    assert taken, "the backward did not ask"


def one_pass_grid():
    for index, spec in enumerate(("L1V15", "L8V16", "L2V5+sink1", "W3", "dense")):
        for block in (16, 32, 64, 128, 256):
            yield block, spec, (index + block // 16) % 2 == 0


@hopper
@pytest.mark.parametrize(("block", "spec", "packed"), list(one_pass_grid()))
def test_one_pass_within_bounds(one_pass, block, spec, packed):
    dtype = torch.bfloat16 if packed else torch.float16
    length = 2500
    cu_seqlens = (0, 1, 1, 300, 1400, 1463, length) if packed else None
    case = Case(Pattern.parse(spec, block), length, length, 8, 2, 128, cu_seqlens=cu_seqlens)
    assert_correct(case, dtype, device="cuda", backend="hopper")


@hopper
def test_one_pass_of_divided_columns_and_several_batches(one_pass):
    assert_correct(Case(Pattern.parse("L1V15"), 12000, 12000, 2, 2, 128, batch=1), torch.bfloat16, device="cuda",
                   backend="hopper")  # fmt: skip
    assert_correct(Case(Pattern.parse("L2V7"), 1500, 1500, 4, 1, 128, batch=3), torch.bfloat16, device="cuda",
                   backend="hopper")  # fmt: skip


@hopper
@pytest.mark.parametrize(("block", "stride", "end"), [(16, 160, 70), (32, 80, 40)])
def test_one_pass_with_segments_between_two_blocks_of_a_chunk(one_pass, block, stride, end):
    """Of which no part is written, and none may be read."""
    pattern = Pattern.from_ranges(1, [(stride, end)], block_size=block)
    unwritten = torch.full((1 << 26,), torch.nan, device="cuda")
    del unwritten  # what the parts are given next is not zero
    assert_correct(Case(pattern, 4096, 4096, 4, 1, 128), torch.bfloat16, device="cuda", backend="hopper")


@hopper
def test_one_pass_repeats_dk_and_dv_and_dq_within_rounding(one_pass):
    q, k, v = (torch.randn(1, 6000, 8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = s2_attention(q, k, v, Pattern.parse("L1V7"), backend="hopper")
    dout = torch.randn_like(out)
    runs = [torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(5)]
    for dq, dk, dv in runs[1:]:
        assert torch.equal(dk, runs[0][1]) and torch.equal(dv, runs[0][2])
        torch.testing.assert_close(dq, runs[0][0], rtol=2**-7, atol=1e-4)


@hopper
def test_one_pass_runs_in_a_cuda_graph(one_pass):
    q, k, v = (torch.randn(1, 3000, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)

    def gradients():
        return torch.autograd.grad(s2_attention(q, k, v, Pattern.parse("L1V7"), backend="hopper"), (q, k, v), dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    with torch.no_grad():
        for x in (q, k, v, dout):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, theirs in zip(captured, gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-4)


@hopper
def test_long_columns_take_one_pass_unless_algorithms_are_deterministic():
    q, k, v = (torch.randn(1, 65536, 1, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = s2_attention(q, k, v, Pattern.parse("L1V15"))
    dout = torch.randn_like(out)

    def gradients():
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    free = gradients()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(free[0], first[0]), "else the other kernels did not run"
    for ours, theirs in zip(free, first, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=1e-3)


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_repeats_bit_for_bit_and_is_the_default(head_dim):
    q, k, v = (torch.randn(1, 5000, 16, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    pattern = Pattern.parse("L1V15")
    first = s2_attention(q, k, v, pattern, backend="hopper")
    assert all(torch.equal(first, s2_attention(q, k, v, pattern)) for _ in range(10))
    assert not torch.equal(first, s2_attention(q, k, v, pattern, backend="triton")), "else this shows nothing"
    tensors = [x.requires_grad_() for x in (q, k, v)]
    runs = [torch.autograd.grad(s2_attention(q, k, v, pattern).float().square().sum(), tensors) for _ in range(5)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
