"""Attention to pages: its definition against that of `s2_attention`, and the kernel (in the interpreter on a CPU)
against both. Pages that nobody sees are NaN. bfloat16 is left to the GPU: the interpreter gets it wrong."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2.attention import Pattern, paged
from s2.attention.call import call_of
from s2.attention.kernels.triton import paged_launch
from s2.attention.kernels.triton.paged_launch import Grid, Pages, heads_of, run_paged
from s2.attention.paged import paged_attention, write_pages
from tests.attention.paged_cases import PagedCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNHURRIED = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}


@st.composite
def patterns(draw, kv_heads, sizes=(16, 32, 64, 128, 256)):
    size, sinks = draw(st.sampled_from(sizes)), draw(st.integers(0, 2))
    local, stride = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    kind = draw(st.sampled_from(["parse", "parse", "ranges", "mixed"]))
    if kind == "parse":
        text = draw(st.sampled_from(["dense", f"W{local}", f"L{local}V{stride}"]))
        return Pattern.parse(text + (f"+sink{sinks}" if sinks and text != "dense" else ""), size)
    if kind == "ranges":
        ranges = [(stride, local + 3), (stride * 2, draw(st.sampled_from([local + 6, None])))]
        return Pattern.from_ranges(local, ranges, block_size=size, sinks=sinks)
    choices = ["dense", "W2", f"L1V{stride}", f"L{local}V{stride}+sink1"]
    return Pattern.per_head([Pattern.parse(draw(st.sampled_from(choices)), size) for _ in range(kv_heads)])


@st.composite
def cases(draw, most_tokens=400, most_queries=150, sequences=4):
    kv_heads, before, after = draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 2)), draw(st.integers(0, 1))
    total = before + kv_heads + after
    pattern = draw(patterns(total))
    size = pattern.block_size
    border = st.integers(0, most_tokens // size).flatmap(lambda n: st.sampled_from([n * size, n * size + 1]))
    lengths = draw(st.lists(st.one_of(st.integers(0, most_tokens), border), min_size=1, max_size=sequences))
    few = draw(st.booleans())
    queries = [min(n, draw(st.integers(0, 3 if few else most_queries))) for n in lengths]
    queries[0], lengths[0] = max(queries[0], 1), max(lengths[0], 1)
    group, head_dim = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([32, 64, 80, 128]))
    return PagedCase(
        pattern, tuple(zip(lengths, queries, strict=True)), kv_heads * group, kv_heads, head_dim,
        draw(st.integers(0, 2)), before, total, apart=draw(st.booleans()),
    )  # fmt: skip


def assert_kernel(case, dtype=torch.float32, splits=None, seed=0):
    """The kernel against `s2_attention`'s definition."""
    q, k, v, tables, seq_lens, cu_seqlens = case.inputs(dtype, DEVICE, seed)
    wanted, wanted_lse = (x.to(DEVICE) for x in case.exact(dtype, seed))
    keys = heads_of(k)
    pages = Pages(keys, heads_of(v), tuple(tables) if case.apart else (tables,) * len(keys))
    total = case.total_kv_heads or case.kv_heads
    call = call_of(case.pattern.key, case.rotation, case.head_offset, total, case.head_dim**-0.5, "triton")
    limits = case.limits
    out = torch.full_like(q, torch.nan)
    lse = run_paged(q, pages, seq_lens, cu_seqlens, out, call, limits["max_query_len"], limits["max_seq_len"], splits)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(out.double(), wanted, **close)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4 if dtype == torch.float32 else 2e-3, rtol=1e-5)


# ---------------------------------------------------------------- the definition


@settings(max_examples=40, **UNHURRIED)
@given(case=cases(), seed=st.integers(0, 1 << 20))
def test_the_definition_is_that_of_s2_attention(case, seed):
    q, *places = case.inputs(torch.float64, DEVICE, seed)
    out, lse = paged_attention(
        q, *places, case.pattern, **case.limits, **case.how, return_lse=True, backend="reference"
    )
    wanted, wanted_lse = (x.to(DEVICE) for x in case.exact(torch.float64, seed))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


# ---------------------------------------------------------------- the kernel


CASES = {"case": cases(), "splits": st.sampled_from([None, 1, 3]),
         "dtype": st.sampled_from([torch.float32, torch.float16]), "seed": st.integers(0, 1 << 20)}  # fmt: skip


@settings(max_examples=3, **UNHURRIED)
@given(**CASES)
def test_the_kernel_matches_the_definition(case, splits, dtype, seed):
    assert_kernel(case, dtype, splits, seed)


@pytest.mark.nightly
@settings(max_examples=80, **UNHURRIED)
@given(**CASES)
def test_the_kernel_matches_the_definition_in_many_cases(case, splits, dtype, seed):
    assert_kernel(case, dtype, splits, seed)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_every_block_size(block):
    sequences = ((7 * block + 5, 1), (4 * block, 40), (block - 1, block - 1))
    assert_kernel(PagedCase(Pattern.parse("L2V3+sink1", block), sequences, 2, 1), torch.float16)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_every_head_dimension(head_dim):
    assert_kernel(PagedCase(Pattern.parse("L2V3", 16), ((70, 1), (40, 7)), 2, 1, head_dim), torch.float16)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("queries", [(1, 1), (1, 90)])
def test_decoding_and_prefill_side_by_side(group, queries):
    case = PagedCase(Pattern.parse("L2V3+sink1", 16), tuple(zip((180, 133), queries, strict=True)), group, 1, 32)
    assert_kernel(case, splits=1)


@pytest.mark.parametrize("first", [15, 16, 17, 33])
def test_queries_that_begin_anywhere_in_a_block(first):
    assert_kernel(PagedCase(Pattern.parse("L1V2<4", 16), ((first + 100, 100), (first + 70, 70)), 1, 1, 32))


def test_parts_of_a_sequence_give_the_same_bits_every_time():
    case = PagedCase(Pattern.parse("dense", 32), ((700, 1), (90, 1), (0, 0)), 4, 1, 32)
    q, k, v, table, seq_lens, cu_seqlens = case.inputs(torch.float32, DEVICE, 6)
    pages, call = Pages(heads_of(k), heads_of(v), (table,)), call_of("dense/32", 0, 0, 1, 0.2, "triton")
    outs = [torch.empty_like(q) for _ in range(3)]
    for out, splits in zip(outs, (4, 4, 1), strict=True):
        run_paged(q, pages, seq_lens, cu_seqlens, out, call, 1, 700, splits)
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[0], outs[2])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("apart", [False, True])
def test_pages_in_the_layout_of_servers(backend, apart):
    """`[P, 2, block, H, D]`, of which keys and values are views, and a table that is wider than the sequences."""
    case = PagedCase(Pattern.parse("L1V3+sink1", 16), ((150, 1), (90, 20)), 6, 3, 32, apart=apart)
    q, k, v, table, seq_lens, cu_seqlens = case.inputs(torch.float32, DEVICE, 2)
    if apart:
        both = [torch.stack(pair, dim=1) for pair in zip(k, v, strict=True)]
        k, v = [x[:, 0] for x in both], [x[:, 1] for x in both]
    else:
        k, v = torch.stack((k, v), dim=1).unbind(1)
    out = paged_attention(q, k, v, table, seq_lens, cu_seqlens, case.pattern, **case.limits, backend=backend)
    torch.testing.assert_close(out.double(), case.exact(torch.float32, 2)[0].to(DEVICE), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_part_of_a_batch_leaves_the_others_rows_alone(backend):
    case = PagedCase(Pattern.parse("L1V3", 16), ((60, 1), (90, 20), (33, 2)), 2, 1, 32)
    q, k, v, table, seq_lens, cu_seqlens = case.inputs(torch.float32, DEVICE, 3)
    out = torch.full_like(q, 7.0)
    given = (q, k, v, table[1:2], seq_lens[1:2], cu_seqlens[1:3])
    paged_attention(*given, case.pattern, **case.limits, out=out, backend=backend)
    wanted = case.exact(torch.float32, 3)[0].to(DEVICE)
    torch.testing.assert_close(out[1:21].double(), wanted[1:21], atol=1e-5, rtol=1e-5)
    assert bool((out[:1] == 7).all()) and bool((out[21:] == 7).all())
    fresh = paged_attention(*given, case.pattern, **case.limits, backend=backend)
    assert not fresh[:1].any() and not fresh[21:].any()


def test_entries_of_blocks_that_nobody_sees_are_not_followed():
    case = PagedCase(Pattern.parse("L1V4", 16), ((300, 1), (260, 40)), 2, 2, 32, apart=True)
    q, k, v, tables, seq_lens, cu_seqlens = case.inputs(torch.float32, DEVICE, 4)
    wild = [torch.where(table == 0, 1 << 30, table) for table in tables]
    assert all((table == 1 << 30).any() for table in wild)
    out = paged_attention(q, k, v, wild, seq_lens, cu_seqlens, case.pattern, **case.limits, backend="triton")
    torch.testing.assert_close(out.double(), case.exact(torch.float32, 4)[0].to(DEVICE), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_new_keys_are_written_where_the_table_says(backend, apart):
    sequences = ((40, 1), (0, 0), (70, 35), (16, 16))
    case = PagedCase(Pattern.parse("dense", 16), sequences, 2, 2, 40, apart=apart)
    _, *wanted, tables, seq_lens, cu_seqlens = case.inputs(torch.float32, DEVICE, 5)
    _, *places, _, _, _ = case.inputs(torch.float32, DEVICE, 5, written=False)
    new, begin = [], 0
    for length, queries in sequences:
        new.append([x[0, begin + length - queries : begin + length] for x in case.whole(torch.float32, 5)[1:]])
        begin += length
    k, v = (torch.cat(parts).to(DEVICE) for parts in zip(*new, strict=True))
    padded = [torch.nn.functional.pad(x, (0, 8, 0, 0, 0, 5))[..., :40] for x in (k, v)]  # rows of no sequence behind
    write_pages(*padded, *places, tables, seq_lens, cu_seqlens, backend=backend)
    torch.testing.assert_close(places, wanted, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_chunks_written_one_after_the_other_attend_as_the_whole(backend):
    length, pattern = 170, Pattern.parse("L2V3+sink1", 16)
    case = PagedCase(pattern, ((length, length),), 2, 1, 32)
    q, k, v = case.whole(torch.float32, 7)
    cache = torch.full((12, 2, 16, 1, 32), torch.nan, device=DEVICE)
    table = torch.randperm(12, device=DEVICE, dtype=torch.int32)[None]
    outs, begin = [], 0
    for count in (50, 1, 64, 1, 1, 53):
        where = {"dtype": torch.int32, "device": DEVICE}
        place = (*cache.unbind(1), table, torch.tensor([begin + count], **where), torch.tensor([0, count], **where))
        rows = [x[0, begin : begin + count].to(DEVICE) for x in (q, k, v)]
        write_pages(*rows[1:], *place, backend=backend)
        outs.append(paged_attention(rows[0], *place, pattern, max_query_len=count, max_seq_len=length, backend=backend))
        begin += count
    torch.testing.assert_close(torch.cat(outs).double().cpu(), case.exact(torch.float32, 7)[0], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- grid


def test_few_queries_are_divided_among_programs_and_many_are_not():
    q = torch.empty(4096, 32, 128, dtype=torch.bfloat16, device="meta")
    decode = Grid.of(q[:1], 1, 1, 64, 1, 131072)  # of the four multiprocessors that a CPU stands for
    assert decode.splits > 1 and decode.constants["SPLIT"]
    decode = Grid.of(q[:1], 8, 1, 64, 1, 131072)
    assert decode.constants["STORED"] == 4 and decode.constants["BLOCK_M"] == 16
    assert Grid.of(q[:64], 8, 64, 64, 1, 131072).num_tiles == 64, "a tile is a sequence"
    prefill = Grid.of(q, 8, 1, 64, 4096, 131072)
    assert prefill.splits == 1 and not prefill.constants["SPLIT"]


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [(1, 64, torch.float16), (3, 64, torch.float16), (8, 256, torch.float16), (4, 32, torch.float32)],
)
def test_whatever_a_batch_is_its_kernel_has_been_warmed_up(monkeypatch, seed, group, head_dim, dtype):
    """A CUDA graph cannot capture a kernel that has not been loaded."""
    warm, written, pattern = set(), [], Pattern.parse("L2V3+sink1", 16)

    class Launches:
        def __init__(self, note):
            self.note = note

        def __getitem__(self, grid):
            return lambda *arguments, **constants: self.note(arguments, constants)

    monkeypatch.setattr(paged_launch, "attention_paged", Launches(lambda _, c: warm.add(tuple(sorted(c.items())))))
    monkeypatch.setattr(paged_launch, "write_pages", Launches(lambda _, c: written.append(c)))
    paged.warm_up(pattern, 2 * group, 2, head_dim, dtype=dtype, device=DEVICE, apart=True)
    assert len(written) == 1 and len({dict(kernel)["SPLIT"] for kernel in warm}) == 2
    draw, taken = random.Random(seed), set()
    for _ in range(300):
        longest = draw.choice([1, 1, 2, 5, 16, 60, 500])
        queries = [longest] + [draw.randint(1, longest) for _ in range(draw.choice([0, 1, 7, 60]))]
        q = torch.empty(sum(queries), 2 * group, head_dim, dtype=dtype, device="meta")
        grid = Grid.of(q, 2, len(queries), 16, longest, draw.choice([1, 100, 5000, 131072]))
        constants = grid.constants | {"UNIT": 8, "LEVELS": 1, "SINKS": True, "num_warps": grid.num_warps}
        taken.add(tuple(sorted(constants.items())))
    assert taken <= warm
    assert len(taken) > 3


@pytest.mark.parametrize("apart", [False, True])
def test_warming_up_calls_kernels_as_they_are(apart):
    pattern, launched = Pattern.parse("L1V2+sink1", 16), {"attention_paged": [], "write_pages": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, kernels in launched.items():
            kernel = getattr(paged_launch, name)

            class Launches:
                def __getitem__(self, grid, kernel=kernel, kernels=kernels):
                    kernels.append(grid)
                    return kernel[grid]

            patch.setattr(paged_launch, name, Launches())
        where = {"rotation": 1, "head_offset": 1, "total_kv_heads": 4}
        paged.warm_up(pattern, 4, 2, 32, dtype=torch.float32, device=DEVICE, apart=apart, **where)
    assert len(launched["attention_paged"]) == 10 and len(launched["write_pages"]) == 1


# ---------------------------------------------------------------- arguments


def small():
    case = PagedCase(Pattern.parse("W2", 16), ((40, 3),), 2, 1, 32)
    names = ("q", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")
    given = dict(zip(names, case.inputs(torch.float32, DEVICE, 0), strict=True))
    return given | {"pattern": case.pattern, **case.limits}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": lambda q: q[0]}, r"q must be \[T, Hq, D\]"),
        ({"q": lambda q: q.double()}, "q must be float32, float16 or bfloat16, got torch.float64"),
        ({"q": lambda q: q.requires_grad_()}, "no gradients, but q"),
        ({"k_cache": lambda k: k.half()}, "k_cache is torch.float16"),
        ({"k_cache": lambda k: k[..., :16]}, "head dimension 16, but q is torch.float32 on .* with 32"),
        ({"k_cache": lambda k: k[0]}, r"k_cache must be \[P, block, H, D\], got shape"),
        ({"v_cache": lambda v: v[:, :8]}, "pages hold 16 keys, but 8 values"),
        ({"k_cache": lambda k: k.repeat(1, 1, 3, 1), "v_cache": lambda v: v.repeat(1, 1, 3, 1)}, "2 query heads are"),
        ({"k_cache": lambda k: [k[:, :, 0], k[:, :8, 0]], "v_cache": lambda v: [v[:, :, 0]] * 2}, "strides and dtype"),
        ({"k_cache": lambda k: [k[:, :, 0]] * 2}, "pages of 2 heads of keys, 1 of values and tables for 2"),
        ({"block_table": lambda x: x.long()}, "block_table must be int32"),
        ({"block_table": lambda x: x.repeat(2, 1)}, r"block_table must be int32 on .* with shape \[1, 4\]"),
        ({"seq_lens": lambda x: x[None]}, r"block_table must be int32 on .* with shape \['B'"),
        ({"cu_seqlens_q": lambda x: x[:1]}, r"cu_seqlens_q must be int32 on .* with shape \[2\]"),
        ({"pattern": lambda _: Pattern.parse("W2", 32)}, "pages hold 16 tokens, but the pattern's blocks 32"),
        ({"pattern": lambda _: Pattern.parse("L1V2<4V3", 16)}, "strides divide each other, not L1V2<4V3"),
        ({"head_offset": lambda _: 1}, "heads 1 to 1 do not fit in total_kv_heads=1"),
        ({"softmax_scale": lambda _: 0.0}, "softmax_scale=0.0"),
        ({"out": lambda _: torch.empty(3, 2, 16)}, "out must be like q"),
        ({"backend": lambda _: "flash"}, "backend 'flash' does not exist"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    arguments = {"backend": "triton", **small()}
    arguments |= {name: edit(arguments.get(name)) for name, edit in change.items()}
    with pytest.raises(ValueError, match=said):
        paged_attention(**arguments)


def test_new_keys_of_other_heads_are_refused():
    given = small()
    places = [given[name] for name in ("k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")]
    with pytest.raises(ValueError, match=r"k \[3, 2, 32\] and v \[3, 1, 32\] must be of the 1 heads"):
        write_pages(torch.zeros(3, 2, 32, device=DEVICE), torch.zeros(3, 1, 32, device=DEVICE), *places)
