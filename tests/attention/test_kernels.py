"""The Triton kernels (in the interpreter on a CPU) and the masked SDPA path against the definition, forward and
backward, and the identities that hold between patterns. bfloat16 is left to the GPU: the interpreter gets it wrong.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2.attention import Pattern, s2_attention
from tests.attention.checks import Case, assert_correct, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def patterns(draw, heads, query_heads, blocks):
    size = draw(st.sampled_from([16, 32, 64, 128, 256]))
    kind = draw(st.sampled_from(["parse", "parse", "ranges", "odd ranges", "mixed", "mask"]))
    sinks = draw(st.integers(0, 2))
    local, stride = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    if kind == "parse":
        text = draw(st.sampled_from(["dense", f"W{local}", f"L{local}V{stride}"]))
        return Pattern.parse(text + (f"+sink{sinks}" if sinks else ""), size)
    if kind == "ranges":
        ranges = [(stride, local + 3), (stride * 2, draw(st.sampled_from([local + 6, None])))]
        return Pattern.from_ranges(local, ranges, block_size=size, sinks=sinks)
    if kind == "odd ranges":
        return Pattern.from_ranges(local, [(2, local + 2), (3, None)], block_size=size, sinks=sinks)
    if kind == "mixed":
        choices = ["dense", "W2", f"L1V{stride}", f"L{local}V{stride}+sink1"]
        count = draw(st.sampled_from([heads, query_heads]))
        return Pattern.per_head([Pattern.parse(draw(st.sampled_from(choices)), size) for _ in range(count)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    count = draw(st.sampled_from([1, heads, query_heads]))
    count = heads if count == 1 else count
    return Pattern.from_mask(torch.rand(count, blocks, blocks, generator=generator) < 0.5, block_size=size)


@st.composite
def cases(draw, max_tokens=150, dims=(64, 80, 96, 128, 256), late=False):
    """`late`: packed queries may be the last of longer keys."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    pattern = draw(patterns(kv_heads, kv_heads * group, -(-max_tokens // 16)))
    head_dim = draw(st.sampled_from(dims))
    rotation = draw(st.integers(0, 2))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.sampled_from([0, 1, 7, 16, 33, 64]), min_size=1, max_size=4))
        borders = (0, *torch.tensor(lengths).cumsum(0).tolist())
        tokens = max(borders[-1], 1)
        borders = (*borders[:-1], tokens)
        more = draw(st.none() | st.lists(st.sampled_from([0, 9, 50]), min_size=4, max_size=4)) if late else None
        borders_k = more and (0, *(n + sum(more[: i + 1]) for i, n in enumerate(borders[1:])))
        keys = borders_k[-1] if borders_k else tokens
        return Case(
            pattern, tokens, keys, kv_heads * group, kv_heads, head_dim, cu_seqlens=borders, rotation=rotation,
            cu_seqlens_k=borders_k,
        )  # fmt: skip
    kv_len = draw(st.integers(1, max_tokens))
    q_len = draw(st.sampled_from([1, max(1, kv_len // 3), kv_len]))
    return Case(
        pattern, q_len, kv_len, kv_heads * group, kv_heads, head_dim, draw(st.integers(1, 2)), rotation=rotation
    )


@settings(max_examples=8, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 1 << 20))
def test_triton_matches_the_definition(case, dtype, seed):
    assert_correct(case, dtype, device=DEVICE, seed=seed)


@settings(max_examples=40, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(case=cases(late=True), seed=st.integers(0, 1 << 20))
def test_sdpa_matches_the_definition(case, seed):
    inputs = case.inputs(torch.float64, DEVICE, seed)
    exact = run(case, inputs, torch.float64, "reference")
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    borders, borders_k = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) if x else None for x in (case.cu_seqlens, case.cu_seqlens_k)
    )
    out = s2_attention(
        q, k, v, case.pattern, cu_seqlens=borders, cu_seqlens_k=borders_k, rotation=case.rotation, backend="sdpa"
    )
    torch.testing.assert_close(out, exact["out"])
    grads = torch.autograd.grad(out, (q, k, v), inputs[3])
    wanted = run(case, [*inputs[:4], torch.zeros_like(inputs[4])], torch.float64, "reference")
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        torch.testing.assert_close(grad, wanted[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, pytest.param(256, marks=pytest.mark.nightly)])
def test_every_block_size(block_size):
    assert_correct(Case(Pattern.parse("L1V2", block_size), 290, 290, 2, 1, 64), torch.float32, device=DEVICE)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 160, 256])
def test_every_head_dimension(head_dim):
    assert_correct(Case(Pattern.parse("L2V3", 16), 70, 70, 1, 1, head_dim), torch.float16, device=DEVICE)


@pytest.mark.parametrize("group", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.nightly)])
def test_grouped_query_heads_share_the_pattern_of_their_kv_head(group):
    assert_correct(Case(Pattern.parse("L1V3", 16), 100, 100, 2 * group, 2, 64), torch.float32, device=DEVICE)


OF_QUERY_HEADS = Pattern.per_head([Pattern.parse(f"L1V{stride}", 16) for stride in (2, 3, 4, 5, 6, 7, 4, 2)])


@pytest.mark.parametrize("pattern", [Pattern.parse("L1V4", 16), OF_QUERY_HEADS], ids=["of KV heads", "of query heads"])
@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_head_offset_selects_global_heads(backend, pattern):
    whole = Case(pattern, 120, 120, 8, 4, 64)
    q, k, v = (x.float() for x in whole.inputs(torch.float32, DEVICE, 3)[:3])
    out = s2_attention(q, k, v, whole.pattern, backend=backend)
    for rank in range(2):
        part = s2_attention(
            q[:, :, 4 * rank : 4 * rank + 4], k[:, :, 2 * rank : 2 * rank + 2], v[:, :, 2 * rank : 2 * rank + 2],
            whole.pattern, backend=backend, head_offset=2 * rank, total_kv_heads=4,
        )  # fmt: skip
        torch.testing.assert_close(part, out[:, :, 4 * rank : 4 * rank + 4])


# ---------------------------------------------------------------- identities


def inputs(tokens, heads, kv_heads, dim=32, batch=1):
    shapes = ((batch, tokens, heads, dim), (batch, tokens, kv_heads, dim), (batch, tokens, kv_heads, dim))
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_stride_one_is_dense_causal_attention(backend):
    q, k, v = inputs(100, 4, 2)
    out = s2_attention(q, k, v, Pattern.parse("L2V1", 16), backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, dense.transpose(1, 2), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_no_stride_is_a_sliding_window_of_blocks(backend):
    q, k, v = inputs(100, 2, 2)
    out = s2_attention(q, k, v, Pattern.parse("W3", 16), backend=backend)
    index = torch.arange(100, device=DEVICE)
    mask = (index[None] <= index[:, None]) & (index[:, None] // 16 - index[None] // 16 < 3)
    window = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(out, window.transpose(1, 2), atol=2e-5, rtol=1e-4)


def test_permuting_heads_permutes_the_output():
    q, k, v = inputs(90, 4, 4)
    patterns = [Pattern.parse(s, 16) for s in ("dense", "W2", "W1", "dense")]
    order = [2, 0, 3, 1]
    out = s2_attention(q, k, v, Pattern.per_head(patterns), backend="triton")
    permuted = s2_attention(
        q[:, :, order],
        k[:, :, order],
        v[:, :, order],
        Pattern.per_head([patterns[h] for h in order]),
        backend="triton",
    )
    torch.testing.assert_close(permuted, out[:, :, order])


def test_packed_equals_separate():
    q, k, v = (x[0] for x in inputs(150, 2, 1))
    pattern, borders = Pattern.parse("L1V3", 16), [0, 40, 40, 41, 150]
    packed = s2_attention(
        q, k, v, pattern, cu_seqlens=torch.tensor(borders, dtype=torch.int32, device=DEVICE), backend="triton"
    )
    for begin, end in itertools.pairwise(borders):
        if end > begin:
            alone = s2_attention(*(x[None, begin:end] for x in (q, k, v)), pattern, backend="triton")
            torch.testing.assert_close(packed[begin:end], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_chunked_prefill_and_decoding_equal_one_pass(backend):
    q, k, v = inputs(75, 2, 1, batch=2)
    pattern = Pattern.parse("L1V3+sink1", 16)
    whole = s2_attention(q, k, v, pattern, backend=backend)
    for begin, end in ((0, 30), (30, 71), (71, 72), (72, 73), (73, 75)):
        part = s2_attention(q[:, begin:end], k[:, :end], v[:, :end], pattern, backend=backend)
        torch.testing.assert_close(part, whole[:, begin:end], atol=1e-5, rtol=1e-4)


def test_split_keys_merged_by_lse_equal_the_whole():
    q, k, v = inputs(64, 2, 2)
    near = torch.tril(torch.ones(2, 4, 4, dtype=torch.bool)) & ~torch.tril(torch.ones(4, 4, dtype=torch.bool), -2)
    far = torch.tril(torch.ones(2, 4, 4, dtype=torch.bool), -2)
    parts = [
        s2_attention(q, k, v, Pattern.from_mask(m, block_size=16), backend="triton", return_lse=True)
        for m in (near, far)
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * torch.exp(part - lse).transpose(1, 2)[..., None] for out, part in parts)
    whole, whole_lse = s2_attention(q, k, v, Pattern.parse("dense", 16), backend="triton", return_lse=True)
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-4)


def test_rows_without_keys_give_zero_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in inputs(40, 1, 1))
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    mask[0, 1] = False
    for backend in ("triton", "reference", "sdpa"):
        out = s2_attention(q, k, v, Pattern.from_mask(mask, block_size=16), backend=backend)
        assert torch.count_nonzero(out[:, 16:32]) == 0, backend
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in grads), backend
        assert torch.count_nonzero(grads[0][:, 16:32]) == 0, backend


def test_strided_views_are_read_in_place():
    packed = torch.randn(1, 60, 3, 2, 32, device=DEVICE)
    v, dout = (torch.randn(1, 2, 60, 32, device=DEVICE).transpose(1, 2) for _ in range(2))  # heads first
    views = [packed[:, :, 0], packed[:, :, 1], v, dout]

    def results(*tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = s2_attention(*leaves, Pattern.parse("L1V2", 16), backend="triton")
        return out, *torch.autograd.grad(out, leaves, tensors[3])

    for of_views, of_copies in zip(results(*views), results(*(x.contiguous() for x in views)), strict=True):
        torch.testing.assert_close(of_views, of_copies)


def test_gradients_are_the_same_bits_every_time():
    q, k, v = (x.requires_grad_() for x in inputs(100, 4, 2))
    grads = []
    for _ in range(2):
        out = s2_attention(q, k, v, Pattern.parse("L2V3", 16), backend="triton")
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
