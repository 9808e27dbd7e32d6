"""Attention to pages on a CUDA device: every dtype, head dimension and block size within the bounds of `checks`, CUDA
graphs replayed with other lengths and tables, the same bits every time, long sequences, and pages beyond 2^31 elements.
"""

import itertools

import pytest
import torch

from s2.attention import Pattern, s2_attention
from s2.attention.kernels.triton import paged as kernels
from s2.attention.paged import paged_attention, warm_up, write_pages
from tests.attention.checks import assert_rows_close
from tests.attention.paged_cases import PagedCase

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SPECS = ("L2V5", "L1V4+sink1", "L3V3<8V6", "W3+sink1", "dense")
DECODING = ((1301, 1), (640, 1), (0, 0), (7, 1), (1290, 1))
MIXED = ((900, 1), (33, 1), (1301, 200), (500, 500), (0, 0), (70, 3))


def grid():
    """Every head dimension and block in bfloat16, every fifth of them in the others; GQA ratio, pattern, batch and
    separate tables cycle beside them."""
    for n, (dtype, dim, block) in enumerate(itertools.product(DTYPES, (32, 64, 80, 128, 256), (16, 32, 64, 128, 256))):
        if dtype == torch.bfloat16 or not (n + n // 5) % 5:
            yield dtype, dim, block, (1, 4, 8, 3)[n % 3 + n % 2], SPECS[n % 5], (DECODING, MIXED)[n % 2], n % 3 == 0


@pytest.mark.parametrize(("dtype", "head_dim", "block", "group", "spec", "sequences", "apart"), list(grid()))
def test_attention_to_pages_within_bounds(dtype, head_dim, block, group, spec, sequences, apart):
    case = PagedCase(Pattern.parse(spec, block), sequences, 2 * group, 2, head_dim, apart=apart)
    seed = torch.seed() % (1 << 30)
    q, *places = case.inputs(dtype, "cuda", seed)
    out, lse = paged_attention(q, *places, case.pattern, **case.limits, return_lse=True)
    exact, exact_lse = (x.cuda() for x in case.exact(dtype, seed))
    plain = paged_attention(q, *places, case.pattern, **case.limits, backend="reference")
    error, rounding = (out.double() - exact).abs(), (plain.double() - exact).abs().max()
    bound = 4 * rounding + SMALL[dtype]
    assert not out.isnan().any() and error.max() <= bound, f"{case} in {dtype}: {error.max():.2e} above {bound:.2e}"
    assert error.square().mean().sqrt() < 1e-2 * exact.square().mean().sqrt()
    torch.testing.assert_close(lse.double(), exact_lse, atol=SMALL[dtype], rtol=1e-5)
    again = paged_attention(q, *places, case.pattern, **case.limits)
    assert torch.equal(out, again), "the same bits every time"


def long_pages(length, kv_heads, block=64, dtype=torch.bfloat16, spare=0):
    """Keys of one sequence, and pages in another order that hold them."""
    num_blocks = -(-length // block)
    cache = torch.zeros(num_blocks + spare, 2, block, kv_heads, 128, device="cuda", dtype=dtype)
    table = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)[None] + spare
    k, v = torch.randn(2, length, kv_heads, 128, device="cuda", dtype=dtype)
    return k, v, cache, table


def int32(*values):
    return torch.tensor(values, device="cuda", dtype=torch.int32)


@pytest.mark.parametrize("queries", [1, 3, 257])
@pytest.mark.parametrize("spec", ["dense", "L8V16+sink1"])
def test_the_last_queries_of_a_long_sequence_see_what_they_see_elsewhere(spec, queries):
    length, pattern = 70_001, Pattern.parse(spec)
    k, v, cache, table = long_pages(length, 2)
    write_pages(k, v, *cache.unbind(1), table, int32(length), int32(0, length))
    q = torch.randn(queries, 8, 128, device="cuda", dtype=torch.bfloat16)
    out = paged_attention(
        q, *cache.unbind(1), table, int32(length), int32(0, queries), pattern, max_query_len=queries,
        max_seq_len=length,
    )  # fmt: skip
    wanted = s2_attention(q[None], k[None], v[None], pattern, backend="triton")[0]
    assert_rows_close(out, wanted)


def test_pages_beyond_two_billion_elements():
    length, spare = 1000, (1 << 31) // (2 * 64 * 2 * 128) + 5
    k, v, cache, table = long_pages(length, 2, spare=spare)
    assert cache[:spare].numel() > 1 << 31
    write_pages(k, v, *cache.unbind(1), table, int32(length), int32(0, length))
    q = torch.randn(1, 8, 128, device="cuda", dtype=torch.bfloat16)
    place = (*cache.unbind(1), table, int32(length), int32(0, 1), Pattern.parse("L2V4"))
    out = paged_attention(q, *place, max_query_len=1, max_seq_len=length)
    assert_rows_close(out, s2_attention(q[None], k[None], v[None], Pattern.parse("L2V4"), backend="triton")[0])


@pytest.mark.parametrize("apart", [False, True])
def test_a_graph_is_replayed_with_other_lengths_and_tables(apart):
    pattern, longest = Pattern.parse("L2V4+sink1"), 4096
    rounds = [((4096, 1), (64, 1), (1, 1)), ((65, 1), (0, 0), (3000, 1)), ((700, 1), (701, 1), (2, 1))]
    cases = [PagedCase(pattern, sequences, 8, 2, 128, apart=apart) for sequences in rounds]
    given = [case.inputs(torch.bfloat16, "cuda", 7) for case in cases]
    width = longest // 64 + 1

    def padded(table):
        return torch.nn.functional.pad(table, (0, width - table.shape[1]))

    def room(places):
        size = max(place.shape[0] for place in places)
        return torch.zeros(size, *places[0].shape[1:], device="cuda", dtype=torch.bfloat16)

    q = torch.zeros(3, 8, 128, device="cuda", dtype=torch.bfloat16)
    heads = range(2) if apart else [...]
    caches = [[room([x[n][h] if apart else x[n] for x in given]) for h in heads] for n in (1, 2)]
    tables = [padded(given[0][3][h] if apart else given[0][3]).clone() for h in heads]
    seq_lens, cu_seqlens = given[0][4].clone(), given[0][5].clone()
    out = torch.zeros_like(q)

    def fill(x):
        q.zero_()
        q[: len(x[0])] = x[0]
        for cache, places in zip(caches, x[1:3], strict=True):
            for h, place in zip(heads, cache, strict=True):
                source = places[h] if apart else places
                place[: len(source)] = source
        for h, table in zip(heads, tables, strict=True):
            table.copy_(padded(x[3][h] if apart else x[3]))
        seq_lens.copy_(x[4])
        cu_seqlens.copy_(x[5])

    def run():
        k, v, table = (x if apart else x[0] for x in (*caches, tables))
        paged_attention(q, k, v, table, seq_lens, cu_seqlens, pattern, max_query_len=1, max_seq_len=longest, out=out)

    fill(given[0])
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for case, x in zip(cases, given, strict=True):
        fill(x)
        graph.replay()
        assert_rows_close(out[: len(x[0])], case.exact(torch.bfloat16, 7)[0].cuda())


@pytest.mark.parametrize("apart", [False, True])
def test_after_a_warm_up_no_batch_needs_another_kernel(apart):
    pattern, device = Pattern.parse("L1V3+sink1", 32), torch.cuda.current_device()
    warm_up(pattern, 6, 2, 72, dtype=torch.float16, device="cuda", apart=apart)
    before = [len(kernel.device_caches[device][0]) for kernel in (kernels.attention_paged, kernels.write_pages)]
    for sequences in (((700, 1),) * 5, ((90, 1), (33, 20)), ((5000, 1),), ((60, 1), (400, 300)), ((700, 1),) * 300):
        case = PagedCase(pattern, sequences, 6, 2, 72, apart=apart)
        q, k, v, tables, seq_lens, cu_seqlens = case.inputs(torch.float16, "cuda", 0)
        new = torch.zeros(len(q), 2, 72, dtype=torch.float16, device="cuda")
        write_pages(new, new, k, v, tables, seq_lens, cu_seqlens)
        for first in range(min(2, len(sequences))):  # and what follows, which begins at any address
            part = [table[first:] for table in tables] if apart else tables[first:]
            paged_attention(q, k, v, part, seq_lens[first:], cu_seqlens[first:], pattern, **case.limits)
    assert before == [len(kernel.device_caches[device][0]) for kernel in (kernels.attention_paged, kernels.write_pages)]
