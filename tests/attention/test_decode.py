"""Decoding from kept keys: its definition against that of `s2_attention`, and the kernel (in the interpreter on a CPU)
against its definition. bfloat16 is left to the GPU: the interpreter gets it wrong."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2.attention import Pattern
from s2.attention.decode import decode_attention, decode_shares, decode_workspace, reference_decode
from s2.attention.kernels.triton.decode_launch import Grid, run_decode
from tests.attention.decode_cases import DecodeCase, table_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNHURRIED = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}


@st.composite
def patterns(draw, kv_heads, sizes=(16, 32, 64, 128, 256)):
    size, sinks = draw(st.sampled_from(sizes)), draw(st.integers(0, 2))
    local, stride = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    kind = draw(st.sampled_from(["parse", "parse", "ranges", "odd ranges", "mixed"]))
    if kind == "parse":
        text = draw(st.sampled_from(["dense", f"W{local}", f"L{local}V{stride}"]))
        return Pattern.parse(text + (f"+sink{sinks}" if sinks else ""), size)
    if kind == "ranges":
        ranges = [(stride, local + 3), (stride * 2, draw(st.sampled_from([local + 6, None])))]
        return Pattern.from_ranges(local, ranges, block_size=size, sinks=sinks)
    if kind == "odd ranges":
        return Pattern.from_ranges(local, [(2, local + 2), (3, None)], block_size=size, sinks=sinks)
    choices = ["dense", "W2", f"L1V{stride}", f"L{local}V{stride}+sink1"]
    return Pattern.per_head([Pattern.parse(draw(st.sampled_from(choices)), size) for _ in range(kv_heads)])


@st.composite
def cases(draw, most_blocks=30, most_tokens=700, kv_heads=(1, 2, 3), sequences=4):
    kv_heads = draw(st.sampled_from(kv_heads))
    pattern = draw(patterns(kv_heads))
    size = pattern.block_size
    longest = min(most_blocks * size, most_tokens)
    border = st.integers(0, longest // size).flatmap(lambda n: st.sampled_from([n * size, n * size + 1, n * size + 3]))
    lengths = draw(st.lists(st.one_of(st.integers(0, longest), border), min_size=1, max_size=sequences))
    group, head_dim = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([32, 64, 80, 128, 256]))
    tokens, rotation = draw(st.integers(1, 8)), draw(st.integers(0, 2))
    return DecodeCase(pattern, tuple(lengths), tokens, kv_heads * group, kv_heads, head_dim, rotation)


def assert_kernel(case, dtype=torch.float32, splits=1, seed=0):
    """The kernel against the definition; twice, since a launch leaves the workspace for the next."""
    given, _ = case.inputs(dtype, DEVICE, seed)
    block = case.pattern.block_size
    exact = [x.double() if x.is_floating_point() else x for x in given]
    wanted, wanted_lse = reference_decode(*exact, block=block, scale=case.scale)
    workspace = Grid.of(given[0], given[1], block, splits).workspace(given[0].device)
    out, lse = run_decode(*given, block, case.scale, workspace, splits)
    assert not workspace.arrivals.any()
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(out.double(), wanted, **close)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4 if dtype == torch.float32 else 2e-3, rtol=1e-5)
    return out, lse


# ---------------------------------------------------------------- the definition


@settings(max_examples=40, **UNHURRIED)
@given(case=cases(), seed=st.integers(0, 1 << 20))
def test_the_definition_is_that_of_s2_attention(case, seed):
    given, whole = case.inputs(torch.float64, DEVICE, seed)
    out, lse = decode_attention(
        *given, block=case.pattern.block_size, scale=case.scale, return_lse=True, backend="reference"
    )
    wanted, wanted_lse = (x.to(DEVICE) for x in case.exact(whole))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    finite = [x.nan_to_num() if x.is_floating_point() else x for x in given]
    sdpa = decode_attention(*finite, block=case.pattern.block_size, scale=case.scale, backend="sdpa")
    torch.testing.assert_close(sdpa, wanted)


def test_sdpa_gives_no_log_sum_exp():
    case = DecodeCase(Pattern.parse("L2V3+sink1", 16), (40,), 1, 2, 1, 32)
    given, _ = case.inputs(torch.float32, DEVICE, 3)
    with pytest.raises(ValueError, match="'sdpa' gives no log-sum-exp"):
        decode_attention(*given, block=16, scale=case.scale, return_lse=True, backend="sdpa")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_decoding_of_two_halves_of_the_regions_merges_to_the_whole(backend):
    case = DecodeCase(Pattern.parse("L2V3+sink1", 16), (200,), 1, 2, 1, 32)
    (q, k, v, table, lengths), _ = case.inputs(torch.float32, DEVICE, 3)
    settings = {"block": 16, "scale": case.scale, "return_lse": True, "backend": backend}
    parts = [table.clone(), table.clone()]
    parts[0][:, 1:] = 0
    parts[1][:, :1] = 0
    (whole, lse), *halves = (decode_attention(q, k, v, x, lengths, **settings) for x in (table, *parts))
    logs = torch.stack([log for _, log in halves])
    merged = sum(out * (log - logs.logsumexp(0)).exp()[..., None] for out, log in halves)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(logs.logsumexp(0), lse)


# ---------------------------------------------------------------- the kernel


CASES = {"case": cases(20, 400, kv_heads=(1, 1, 2), sequences=2), "splits": st.sampled_from([1, 2, 3]),
         "dtype": st.sampled_from([torch.float32, torch.float16]), "seed": st.integers(0, 1 << 20)}  # fmt: skip


@settings(max_examples=3, **UNHURRIED)
@given(**CASES)
def test_the_kernel_matches_the_definition(case, dtype, splits, seed):
    assert_kernel(case, dtype, splits, seed)


@pytest.mark.nightly
@settings(max_examples=60, **UNHURRIED)
@given(**CASES)
def test_the_kernel_matches_the_definition_in_many_cases(case, dtype, splits, seed):
    assert_kernel(case, dtype, splits, seed)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_every_block_size_with_rings_that_wrap(block):
    assert_kernel(DecodeCase(Pattern.parse("L2V3+sink1", block), (9 * block + 5,), 1, 2, 1, 64), torch.float16, 2)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("shift", range(4))
def test_tiles_of_several_blocks_wrap_at_any_of_them(block, shift):
    assert_kernel(DecodeCase(Pattern.parse("W9", block), ((20 + 3 * shift) * block + 5,), 1, 1, 1, 32))


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_every_head_dimension(head_dim):
    assert_kernel(DecodeCase(Pattern.parse("L2V3", 16), (130,), 1, 2, 1, head_dim), torch.float16, 1)


@pytest.mark.parametrize("length", [160, 161, 163, 168])
@pytest.mark.parametrize("spec", ["L2V3<5+sink1", "W1"])
def test_new_tokens_on_both_sides_of_a_border(spec, length):
    assert_kernel(DecodeCase(Pattern.parse(spec, 16), (length,), 8, 2, 1, 32), splits=1)


@pytest.mark.parametrize("splits", [1, 3])
def test_empty_sequences_give_zeros_and_the_others_what_they_give_alone(splits):
    out, lse = assert_kernel(DecodeCase(Pattern.parse("L2V3", 32), (0, 300, 2), 3, 1, 1, 32), splits=splits)
    assert not out[0].any() and bool((lse[0] == -torch.inf).all())
    assert not out[2, 0].any() and lse[2, 0] == -torch.inf, "two tokens are fewer than the queries"
    assert torch.isfinite(lse[2, 1:]).all()


def test_rows_beyond_one_program():
    assert_kernel(DecodeCase(Pattern.parse("L1V2", 16), (50,), 8, 10, 1, 32), torch.float16, 1)


def test_strided_views_are_read_in_place():
    case = DecodeCase(Pattern.parse("L2V3", 16), (140,), 2, 4, 2, 32)
    (q, k, v, table, lengths), _ = case.inputs(torch.float32, DEVICE, 5)
    wanted = reference_decode(q, k, v, table, lengths, block=16, scale=case.scale)[0]
    padded = [torch.nn.functional.pad(x, (0, 8))[..., :32] for x in (q, v)]
    tokens_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    out, _ = run_decode(padded[0], tokens_first, padded[1], table, lengths, 16, case.scale, splits=1)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_parts_of_a_sequence_give_the_same_bits_every_time():
    case = DecodeCase(Pattern.parse("dense", 32), (700,), 1, 2, 1, 32)
    given, _ = case.inputs(torch.float32, DEVICE, 6)
    first, again = (run_decode(*given, 32, case.scale, splits=4) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


# ---------------------------------------------------------------- arguments


def small():
    case = DecodeCase(Pattern.parse("W2", 16), (40,), 1, 2, 1, 32)
    return case.inputs(torch.float32, DEVICE, 0)[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": lambda q: q.repeat(1, 9, 1, 1)}, "9 tokens a sequence, but decoding takes 1 to 8"),
        ({"q": lambda q: q[0]}, r"q must be \[B, S, Hq, D\]"),
        ({"k": lambda k: k.half()}, "k is torch.float16"),
        ({"v": lambda v: v[:, :, 1:]}, "one shape"),
        ({"k": lambda k: k[..., 1:], "v": lambda v: v[..., 1:]}, "batch and head dimension"),
        (
            {"k": lambda k: k.repeat(1, 4, 1, 1), "v": lambda v: v.repeat(1, 4, 1, 1)},
            "2 query heads are not a multiple",
        ),
        ({"table": lambda x: x.long()}, r"table \[H, R, 8\] must be int32 of shape \[1, 1, 8\].*int64"),
        ({"table": lambda x: x[:, :0]}, r"shape \[1, 1, 8\].*got torch.int32 \[1, 0, 8\]"),
        ({"lengths": lambda x: x.repeat(2)}, r"lengths \[B\] must be int32 of shape \[1\]"),
        ({"q": lambda q: q.requires_grad_()}, "no gradients, but q"),
        ({"block": lambda _: 48}, "block=48"),
        ({"scale": lambda _: 0.0}, "scale=0.0"),
        ({"backend": lambda _: "flash"}, "backend 'flash' does not exist"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    names = ("q", "k", "v", "table", "lengths")
    arguments = {**dict(zip(names, small(), strict=True)), "block": 16, "scale": 1.0, "backend": None}
    arguments |= {name: edit(arguments[name]) for name, edit in change.items()}
    tensors = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=said):
        decode_attention(*tensors, **arguments)


def test_a_workspace_serves_calls_that_need_no_more_of_it():
    case = DecodeCase(Pattern.parse("dense", 16), (300, 10), 1, 1, 1, 32)
    given, _ = case.inputs(torch.float32, DEVICE, 1)
    settings = {"block": 16, "scale": case.scale, "backend": "triton"}
    workspace = decode_workspace(*given[:2], block=16)
    assert len(workspace.logs) >= 2
    wanted = decode_attention(*given, **settings)
    assert torch.equal(decode_attention(*given, workspace=workspace, **settings), wanted)
    small = Grid.of(given[0][:1], given[1][:1], 16, 2).workspace(given[0].device)
    with pytest.raises(ValueError, match=f"holds 2 rows, but .* need {len(workspace.logs)} of 32"):
        decode_attention(*given, workspace=small, **settings)


@pytest.mark.parametrize("lengths", [(300,), (300, 10, 0, 77)])
def test_layers_of_a_step_share_what_programs_do(lengths):
    """Of other keys, of the same shape, table and lengths."""
    case = DecodeCase(Pattern.parse("L2V3+sink1", 16), lengths, 2, 4, 2, 32)
    first, _ = case.inputs(torch.float32, DEVICE, 1)
    settings = {"block": 16, "scale": case.scale, "backend": "triton"}
    shares = decode_shares(*first[:2], *first[3:], block=16)
    for seed in (1, 2):
        given, _ = case.inputs(torch.float32, DEVICE, seed)
        assert torch.equal(decode_attention(*given, shares=shares, **settings), decode_attention(*given, **settings))
    with pytest.raises(ValueError, match=r"shares \[.*\] on .* must be \[.*decode_shares"):
        decode_attention(*given, shares=shares[:, :1], **settings)


def test_empty_tensors_give_empty_results():
    table, slots = table_of(list(Pattern.parse("W2", 16).rules(1)), 4, 16)
    k = torch.zeros(0, 1, slots, 32, device=DEVICE)
    q, table, lengths = k.new_zeros(0, 1, 2, 32), table.to(DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE)
    shares = decode_shares(q, k, table, lengths, block=16)
    assert len(shares) == 0
    for shared in ({}, {"workspace": decode_workspace(q, k, block=16), "shares": shares}):
        out = decode_attention(q, k, k, table, lengths, block=16, scale=1.0, backend="triton", **shared)
        assert out.shape == (0, 1, 2, 32)
