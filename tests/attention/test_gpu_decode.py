"""The decode kernel on a CUDA device: every dtype, head dimension, block size and number of new tokens within the
bounds of `checks`, CUDA graphs replayed with other lengths, the same bits every time, and indices beyond 2^31.
"""

import itertools

import pytest
import torch

from s2.attention import Pattern
from s2.attention.decode import decode_attention, decode_workspace, reference_decode, visible_slots
from s2.attention.kernels.triton.decode_launch import Grid, run_decode
from tests.attention.checks import assert_rows_close
from tests.attention.decode_cases import DecodeCase, table_of

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SPECS = ("L2V5", "L1V4+sink1", "L3V2<8V6", "W3+sink1", "dense")
LENGTHS = (1301, 0, 640, 7, 1290)


def plain_decode(q, k, v, table, lengths, *, block, scale):
    """Plain torch with every product rounded to the dtype: what the bound is made of."""
    group = q.shape[2] // k.shape[1]
    seen = visible_slots(table, lengths, k.shape[2], block, q.shape[1])
    keys, values = (torch.where(seen.any(2)[..., None], x, 0).repeat_interleave(group, 1) for x in (k, v))
    seen = seen.repeat_interleave(group, 1)
    scores = (torch.einsum("bshd,bhcd->bhsc", q, keys) * scale).masked_fill(~seen, float("-inf"))
    empty = ~seen.any(-1, keepdim=True)
    return torch.einsum("bhsc,bhcd->bshd", scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0), values)


def assert_within_bounds(case, dtype, splits=None):
    given, _ = case.inputs(dtype, "cuda", torch.seed() % (1 << 30))
    settings = {"block": case.pattern.block_size, "scale": case.scale}
    workspace = Grid.of(given[0], given[1], settings["block"], splits).workspace(given[0].device)
    out, lse = run_decode(*given, *settings.values(), workspace, splits)
    exact, exact_lse = reference_decode(*(x.double() if x.is_floating_point() else x for x in given), **settings)
    plain = plain_decode(*given, **settings)
    error = (out.double() - exact).abs()
    bound = 2 * (plain.double() - exact).abs().max() + SMALL[dtype]
    assert not workspace.arrivals.any()
    assert not out.isnan().any() and error.max() <= bound, f"{case} in {dtype}: {error.max():.2e} above {bound:.2e}"
    assert error.square().mean().sqrt() < 1e-2 * exact.square().mean().sqrt()
    torch.testing.assert_close(lse.double(), exact_lse, atol=SMALL[dtype], rtol=1e-5)


def grid():
    """Every head dimension and block in bfloat16, every fifth of them in the others; new tokens, GQA ratio, pattern and
    splits cycle beside them."""
    for n, (dtype, dim, block) in enumerate(itertools.product(DTYPES, (32, 64, 80, 128, 256), (16, 32, 64, 128, 256))):
        if dtype != torch.bfloat16 and (n + n // 5) % 5:
            continue
        yield dtype, dim, block, (1, 8, 3, 2)[n % 4], (1, 4, 8, 12)[n % 3 + n % 2], SPECS[n % 5], (None, 1, 5)[n % 3]


@pytest.mark.parametrize(("dtype", "head_dim", "block", "tokens", "group", "spec", "splits"), list(grid()))
def test_decoding_within_bounds(dtype, head_dim, block, tokens, group, spec, splits):
    case = DecodeCase(Pattern.parse(spec, block), LENGTHS, tokens, 2 * group, 2, head_dim)
    assert_within_bounds(case, dtype, splits)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_every_number_of_new_tokens(tokens):
    for length in (1023, 1024, 1025, 1028, 1031):
        assert_within_bounds(DecodeCase(Pattern.parse("L2V3+sink1"), (length,), tokens, 8, 2, 128), torch.bfloat16)


def long_inputs(batch, kv_heads, group, length, spec, tokens=1, block=64):
    """Random keys in every slot, for lengths up to `length`."""
    table, slots = table_of(list(Pattern.parse(spec, block).rules(kv_heads)), -(-length // block), block)
    k, v = (torch.randn(batch, kv_heads, slots, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, tokens, kv_heads * group, 128, device="cuda", dtype=torch.bfloat16)
    return q, k, v, table.cuda()


@pytest.mark.parametrize("spec", ["dense", "L8V16+sink1"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_long_sequences_of_any_lengths(spec, tokens):
    q, k, v, table = long_inputs(4, 2, 4, 40_000, spec, tokens)
    lengths = torch.tensor([40_000, 3, 12_345, 64], device="cuda", dtype=torch.int32)
    out, lse = decode_attention(q, k, v, table, lengths, block=64, scale=0.1, return_lse=True)
    wanted, wanted_lse = reference_decode(
        *(x.double() for x in (q, k, v)), table, lengths, block=64, scale=0.1
    )  # fmt: skip
    assert_rows_close(out, wanted)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("spec", ["dense", "L8V16+sink1"])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_graph_replays_with_other_lengths(spec, batch):
    q, k, v, table = long_inputs(batch, 4, 4, 20_000, spec)
    lengths = torch.full((batch,), 20_000, device="cuda", dtype=torch.int32)
    workspace = decode_workspace(q, k, block=64)

    def step():
        return decode_attention(q, k, v, table, lengths, block=64, scale=0.1, return_lse=True, workspace=workspace)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for longest in (20_000, 1, 64, 9_999, 0, 130):
        lengths.copy_(torch.arange(batch).mul(777).neg().add(longest).clamp(min=0))
        q.normal_()
        graph.replay()
        found = [x.clone() for x in captured]
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True)), longest
        wanted = reference_decode(*(x.double() for x in (q, k, v)), table, lengths, block=64, scale=0.1)
        assert_rows_close(found[0], wanted[0])
        assert torch.equal(found[1].isinf(), wanted[1].isinf())
    assert not workspace.arrivals.any()


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "tokens"), [(1, 8, 4, 1), (3, 2, 1, 1), (1, 1, 8, 8), (16, 8, 4, 1)]
)
def test_results_repeat_bit_for_bit(batch, kv_heads, group, tokens):
    q, k, v, table = long_inputs(batch, kv_heads, group, 20_000, "L8V4", tokens)
    lengths = torch.randint(0, 20_000, (batch,), device="cuda", dtype=torch.int32)
    lengths[0] = 20_000
    settings = {"block": 64, "scale": 0.1, "return_lse": True, "workspace": decode_workspace(q, k, block=64)}
    first = decode_attention(q, k, v, table, lengths, **settings)
    wanted = reference_decode(*(x.float() for x in (q, k, v)), table, lengths, block=64, scale=0.1)
    assert_rows_close(first[0], wanted[0])
    for _ in range(300):
        again = decode_attention(q, k, v, table, lengths, **settings)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_indices_beyond_two_to_the_31():
    q, k, v, table = long_inputs(3, 8, 1, 720_000, "dense")
    assert k.numel() > 2**31
    lengths = torch.tensor([64, 100, 720_000], device="cuda", dtype=torch.int32)
    out = decode_attention(q, k, v, table, lengths, block=64, scale=0.1)
    last = [x[2:, 7:] for x in (k, v)]
    wanted, _ = reference_decode(
        q[2:, :, 7:].float(), *(x.float() for x in last), table[7:], lengths[2:], block=64, scale=0.1
    )  # fmt: skip
    assert_rows_close(out[2:, :, 7:], wanted)
