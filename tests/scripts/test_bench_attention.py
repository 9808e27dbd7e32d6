"""The attention benchmark without a GPU: FlexAttention's block lists, rows of what cannot run, arguments, report."""

import itertools
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as `python scripts/bench_attention.py` has it

import bench_attention
import bench_kernels
import bench_measure
import bench_record
import bench_report
from torch.nn.attention.flex_attention import create_block_mask

from s2.attention import Pattern, s2_attention

SPECS = ("L1V15", "L8V16", "L2V5+sink1", "dense", "W3")


def parse(*argv):
    return bench_attention.parse_arguments(list(argv))


def tokens(pattern, seq_len, kv_heads):
    """The definition, for single tokens: bool [H, S, S]."""
    size = pattern.block_size
    blocks = pattern.block_mask(-(-seq_len // size), kv_heads)
    return blocks.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :seq_len, :seq_len].tril()


def tiles(visible, tile):
    """Which tiles are visible in part and which as a whole: bool [H, nq, nk] each."""
    heads, seq_len, _ = visible.shape
    nq, nk = (-(-seq_len // size) for size in tile)
    padded = torch.zeros(heads, nq * tile[0], nk * tile[1], dtype=torch.bool)
    padded[:, :seq_len, :seq_len] = visible
    grid = padded.view(heads, nq, tile[0], nk, tile[1])
    whole = grid.all(4).all(2)
    return grid.any(4).any(2) & ~whole, whole


def dense_of(mask, kind, columns):
    """Lists back to a mask; the columns of each row must ascend."""
    (counts,), (indices,) = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    assert bool((indices.diff() > 0)[listed[..., 1:]].all())
    dense = torch.zeros(*counts.shape, columns, dtype=torch.bool)
    return dense.scatter(2, indices.long(), listed)


# ---------------------------------------------------------------- FlexAttention's block mask


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("block_size", "seq_len", "heads", "tile"),
    [(64, 1000, 4, (128, 64)), (64, 1024, 4, (128, 128)), (16, 333, 5, (128, 64)), (256, 900, 4, (128, 128))],
)
def test_flex_lists_are_the_pattern_both_ways_round(spec, block_size, seq_len, heads, tile):
    pattern = Pattern.parse(spec, block_size)
    nq, nk = (-(-seq_len // size) for size in tile)
    mask = bench_kernels.flex_mask(pattern, seq_len, heads, heads, tile, with_backward=True, device="cpu")
    for kind, wanted in zip(("", "full_"), tiles(tokens(pattern, seq_len, heads), tile), strict=True):
        assert torch.equal(dense_of(mask, f"{kind}kv", nk), wanted)
        assert torch.equal(dense_of(mask, f"{kind}q", nq), wanted.transpose(1, 2))


def test_flex_mask_is_the_one_that_flex_attention_would_build():
    pattern, tile = Pattern.parse("L3V4+sink1", 64), (128, 128)
    mine = bench_kernels.flex_mask(pattern, 700, 8, 4, tile, with_backward=True, device="cpu")
    theirs = create_block_mask(mine.mask_mod, 1, 8, 700, 700, device="cpu", BLOCK_SIZE=tile)
    assert mine.shape == theirs.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(mine, f"{kind}_{part}") for part in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(theirs, f"{kind}_num_blocks"))
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices[listed], getattr(theirs, f"{kind}_indices")[listed])


def rules_of_several_kinds():
    two_levels = Pattern.from_ranges(2, [(2, 6), (4, None)], block_size=64, sinks=1)
    return Pattern.per_head([two_levels, Pattern.parse("dense"), Pattern.parse("W2"), Pattern.parse("L1V3")])


@pytest.mark.parametrize("pattern", [*(Pattern.parse(spec, 64) for spec in SPECS), rules_of_several_kinds()], ids=str)
def test_flex_mask_rule_is_exact_for_every_token_and_query_head(pattern):
    seq_len, heads, kv_heads = 1000, 8, 4
    rule = bench_kernels.mask_mod(pattern, heads, kv_heads, "cpu")
    index = torch.arange(seq_len)
    seen = rule(None, torch.arange(heads)[:, None, None], index[None, :, None], index[None, None])
    expected = tokens(pattern, seq_len, kv_heads).repeat_interleave(2, dim=0)
    assert torch.equal(seen.expand(heads, -1, -1), expected)


def test_flex_lists_that_take_too_much_memory_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(bench_kernels, "MAX_FLEX_LISTS", 1000)
    with pytest.raises(bench_kernels.Skipped, match=r"block lists would take .* GiB"):
        bench_kernels.flex_mask(Pattern.parse("L1V15"), 8192, 4, 4, (128, 64), with_backward=False, device="cpu")


@pytest.mark.nightly
def test_compiled_flex_attention_with_our_mask_is_the_reference():
    pattern = Pattern.parse("L2V3", 64)
    q, k, v = torch.randn(1, 640, 4, 32), torch.randn(1, 640, 2, 32), torch.randn(1, 640, 2, 32)
    for entry in bench_kernels.flex_entries("L2V3", pattern):
        out = entry.build(q, k, v)()
        torch.testing.assert_close(out, s2_attention(q, k, v, pattern, backend="reference"), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- one row


@pytest.fixture
def no_clock(monkeypatch):
    """Figures without a device: every call takes two milliseconds, and is made."""

    def call(value):
        def figure(function, *_):
            function()
            return value

        return figure

    for name, value in (("median_ms", 2.0), ("graph_ms", 1.0), ("peak_gib", 0.5), ("issue_us", 30.0)):
        monkeypatch.setattr(bench_measure, name, call(value))
    monkeypatch.setattr(bench_measure, "COPIED_BYTES", 1000)
    monkeypatch.setattr(bench_measure, "MATRIX_SIZE", 16)


def measure(build, pattern=None, known=None, **fields):
    inputs = tuple(torch.randn(1, 128, 2, 16, requires_grad=True) for _ in range(3))
    entry = bench_kernels.Entry("kernel", build, pattern, **fields)
    known = {} if known is None else known
    return bench_measure.measure(entry, inputs, torch.randn(1, 128, 2, 16), 4e9, bench_measure.Timing(1, 1), known)


def test_row_has_useful_rates_with_the_backward_counted_two_and_a_half_times(no_clock):
    row = measure(lambda q, k, v: lambda: q + k + v, graph=True)
    assert (row["status"], row["note"], row["graph_ms"], row["peak_gib"]) == ("ok", "", 1.0, 0.5)
    assert row["forward_tflops"] == pytest.approx(2.0)
    assert row["backward_tflops"] == pytest.approx(5.0)
    assert (row["flops"], row["bytes"]) == (4e9, 4 * 128 * 2 * 16 * 4)


def test_kernel_without_gradient_gets_a_forward_row_and_says_so(no_clock):
    row = measure(lambda q, k, v: lambda: (q + k + v).detach(), note="forward only: because")
    assert row["forward_ms"] == 2.0
    assert row["backward_ms"] is None
    assert row["note"] == "forward only: because"


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (bench_kernels.Skipped("needs other hardware"), "skipped", "needs other hardware"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory", ""),
        (RuntimeError("No kernel\nmore | text"), "failed", "RuntimeError: No kernel"),
    ],
)
def test_kernel_that_cannot_run_becomes_a_row_with_the_reason(no_clock, error, status, note):
    def build(q, k, v):
        raise error

    row = measure(build)
    assert (row["status"], row["note"], row["forward_ms"]) == (status, note, None)


def test_kernel_whose_backward_runs_out_of_memory_keeps_its_forward(no_clock):
    class Heavy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    row = measure(lambda q, k, v: lambda: Heavy.apply(q + k + v))
    assert (row["status"], row["forward_ms"], row["backward_ms"]) == ("ok", 2.0, None)
    assert row["note"] == "backward: out of memory"


def test_kernel_that_computes_something_else_is_marked(no_clock):
    pattern = Pattern.parse("W1")
    base = torch.randn(1, 128, 2, 16)
    known = {pattern.key: ("S2 W1 triton", base)}
    row = measure(lambda q, k, v: lambda: base * 1.5, pattern, known)
    assert row["difference"] == pytest.approx(0.5)
    assert "WRONG? its result differs from that of S2 W1 triton" in row["note"]
    assert "WRONG" not in measure(lambda q, k, v: lambda: base * 1.001, pattern, known)["note"]
    assert "WRONG" in measure(lambda q, k, v: lambda: base * float("nan"), pattern, known)["note"]
    assert "shape" in measure(lambda q, k, v: lambda: base[:, :64], pattern, known)["note"]


def test_calls_in_a_graph_begin_when_their_inputs_are_made(monkeypatch):
    """They go on a stream of their own."""
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("inputs"))
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", lambda call, **_: order.append(call()) or 0.5)
    assert bench_measure.graph_ms(lambda: "calls", bench_measure.Timing(1, 4)) == 0.5
    assert order == ["inputs", "calls"]


# ---------------------------------------------------------------- arguments


def test_cases_and_sizes_combine():
    default, gqa, small = parse("--cases", "default,gqa,small", "--head-dim", "64", "--lengths", "8192").cases
    assert (default.head_dim, gqa.head_dim) == (64, 64)
    assert (gqa.heads, gqa.kv_heads, gqa.lengths) == (32, 8, (8192,))
    assert (small.batch, small.lengths) == (4, (4096,))


def test_long_lengths_are_a_section_of_few_heads_with_our_kernels_and_cudnn():
    args = parse("--cases", "gqa", "--lengths", "4096", "--long-lengths", "262144,1048576", "--peer", "other=a:b")
    case = args.cases[1]
    assert (case.name, case.heads, case.kv_heads, case.lengths) == ("gqa-long", 8, 2, (262144, 1048576))
    ours = [f"S2 {spec} {backend}" for spec in ("L1V15", "L8V16") for backend in ("triton", "hopper")]
    names = [[entry.name for entry in bench_attention.entries(case, n, args)] for n in case.lengths]
    assert names == [["dense cuDNN", *ours], ours]


def test_flex_and_peers_run_beside_ours_at_their_lengths():
    args = parse("--patterns", "L8V16", "--peer", "other=a:b")
    names = [[entry.name for entry in bench_attention.entries(args.cases[0], n, args)] for n in (4096, 8192)]
    ours = ["dense FlashAttention-2", "dense cuDNN", "S2 L8V16 triton", "S2 L8V16 hopper"]
    assert names[0] == [*ours, "other L8V16"]
    assert names[1] == [*ours, "Flex L8V16 128x64", "Flex L8V16 128x128", "other L8V16"]
    args = parse("--patterns", "L8V16", "--flex-lengths", "", "--peer", "other=a:b@128", "--peer-lengths", "8192")
    names = [[entry.name for entry in bench_attention.entries(args.cases[0], n, args)] for n in (4096, 8192)]
    assert names == [ours, [*ours, "S2 L4V8/128 hopper", "other L4V8/128"]]


def test_a_peer_with_blocks_of_its_own_gets_the_nearest_pattern_and_a_row_of_ours_beside_it():
    args = parse("--patterns", "L1V15,L8V16", "--backends", "hopper", "--flex-lengths", "", "--peer", "other=a:b@128")
    found = list(bench_attention.entries(args.cases[0], 8192, args))
    assert [entry.name for entry in found[2:]] == [
        "S2 L1V15 hopper", "S2 L1V8/128 hopper", "other L1V8/128", "S2 L8V16 hopper", "S2 L4V8/128 hopper",
        "other L4V8/128",
    ]  # fmt: skip
    assert [entry.pattern.block_size for entry in found[2:5]] == [64, 128, 128]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--cases", "default,huge"],
            "--cases: there is no 'huge' in 'default,huge'; choose from default, gqa,",
        ),
        (["--cases", ""], "--cases: there is no name in ''; choose from default"),
        (["--peer", "dkernel"], "'dkernel' is not understood; write NAME=module:function"),
        (["--peer", "dkernel=module"], "'dkernel=module' is not understood; write NAME=module:function"),
        (["--peer", "a=b:c", "--peer", "a=d:e"], "two peers have one name"),
        (["--peer", "a=b:c@128", "--patterns", "W3"], "W3 cannot be written in a peer's blocks of 128"),
        (["--lengths", "8k"], "'8k' is not a list of whole numbers like 8192,32768"),
        (["--lengths", "0"], "'0' has a length below 1"),
        (["--lengths", ""], "--lengths is empty"),
        (["--flex-lengths", "262144"], "--flex-lengths: 262144 is more than 131072"),
        (["--backends", "cuda"], "--backends: there is no 'cuda' in 'cuda'; choose from triton, hopper"),
        (["--patterns", "L0V4"], "the local window is 0 blocks"),
        (["--block-size", "48"], "block_size=48 is not supported"),
        (["--heads", "12"], "case default: 12 heads are not a multiple of 32 KV heads"),
        (["--batch", "0"], "every size must be 1 or more"),
    ],
)
def test_bad_arguments_are_named(argv, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        parse(*argv)
    assert message in capsys.readouterr().err + str(caught.value)


def test_small_blocks_take_patterns_of_the_same_density():
    args = parse("--cases", "gqa,block16,d64", "--patterns", "L1V15,L8V16", "--lengths", "4096")
    small = args.cases[1]
    ours = [entry for entry in bench_attention.entries(small, 4096, args) if entry.spec]
    assert [(entry.name, entry.spec) for entry in ours] == [
        (f"S2 {own} {backend}", spec)
        for own, spec in (("L4V15", "L1V15"), ("L32V16", "L8V16"))
        for backend in ("triton", "hopper")
    ]
    for entry, block in zip(ours[::2], ("L1V15", "L8V16"), strict=True):
        density = entry.pattern.density(65536, 16) / Pattern.parse(block, 64).density(65536, 16)
        assert density == pytest.approx(1, abs=0.03)
    assert [case.block_size for case in parse("--cases", "d64", "--block-size", "128").cases] == [128]
    (d64,) = [case for case in args.cases if case.name == "d64"]
    assert [entry.spec for entry in bench_attention.entries(d64, 4096, args) if entry.spec] == ["L1V15"] * 2 + [
        "L8V16"
    ] * 2


def test_packed_documents_come_with_one_sequence_of_as_many_pairs():
    args = parse("--cases", "packed-gqa", "--patterns", "L1V15,L8V16")
    packed, *ones = args.cases
    assert packed.over == "packed-gqa-one" and [case.spec for case in ones] == ["L1V15", "L8V16"]
    borders = bench_attention.document_borders(32768)
    lengths = [end - begin for begin, end in itertools.pairwise(borders)]
    assert borders[0] == 0 and borders[-1] == 32768 and all(256 <= n <= 16384 for n in lengths[:-1])
    for spec, one, entry in zip(
        ("L1V15", "L8V16"), ones, list(bench_attention.entries(packed, 32768, args))[::2], strict=True
    ):
        assert entry.spec == spec and f"{len(lengths)} documents" in entry.name
        assert one.lengths[0] % 64 == 0 and one.lengths[0] < 32768
        wanted = sum(sum(Pattern.parse(spec, 64).visible_pairs(n, 8)) for n in lengths) / 8
        assert entry.pairs == wanted
        found = [sum(Pattern.parse(spec, 64).visible_pairs(n, 8)) / 8 for n in (one.lengths[0] - 64, one.lengths[0])]
        assert found[0] < wanted <= found[1]


def test_packed_documents_give_what_they_give_apart():
    borders, pattern = [0, 300, 310, 700], Pattern.parse("L1V3")
    q, k, v = (torch.randn(1, 700, 2, 16) for _ in range(3))
    out = bench_kernels.packed_entry("L1V3", pattern, "reference", borders, 2).build(q, k, v)()
    assert out.shape == q.shape
    for begin, end in itertools.pairwise(borders):
        own = s2_attention(*(x[:, begin:end] for x in (q, k, v)), pattern, backend="reference")
        torch.testing.assert_close(out[:, begin:end], own)


def test_the_peers_that_come_along_are_skipped_where_their_libraries_are_missing():
    q = torch.zeros(1, 256, 2, 128)
    for target in ("bench_peers:dkernel", "bench_peers:flash_attention_4"):
        entry = bench_kernels.peer_entry("other", target, "W2", Pattern.parse("W2", 128))
        row = bench_measure.measure(entry, (q, q, q), q, 1.0, bench_measure.Timing(1, 1), {})
        assert row["status"] == "skipped" and "cannot import what it calls" in row["note"]


def test_the_command_is_told_without_the_place_it_wrote_to():
    argv = ["--cases", "gqa", "--output", "/some/where", "--rep", "5", "--output=x", "--flex-lengths", ""]
    wanted = "python scripts/bench_attention.py --cases gqa --rep 5 --flex-lengths ''"
    assert bench_record.new_record("bench_attention", argv, "cpu", ())["command"] == wanted


def test_a_package_without_a_version_does_not_end_a_benchmark():
    record = bench_record.new_record("bench_attention", [], "cpu", ("torch", "s2-no-such-package"))
    assert record["versions"] == {"torch": version("torch"), "s2-no-such-package": "unknown"}


def test_peer_that_cannot_be_imported_is_skipped_and_one_that_can_gets_the_pattern(tmp_path, monkeypatch):
    (tmp_path / "my_peer.py").write_text("def make(q, k, v, pattern):\n    return lambda: (q, str(pattern))\n")
    monkeypatch.syspath_prepend(tmp_path)
    pattern = Pattern.parse("W2")
    assert bench_kernels.peer_entry("mine", "my_peer:make", "W2", pattern).build(1, 2, 3)() == (1, "W2")
    for target in ("no_such_module:make", "my_peer:missing"):
        with pytest.raises(bench_kernels.Skipped, match=f"cannot import {target}"):
            bench_kernels.peer_entry("mine", target, "W2", pattern).build(1, 2, 3)


# ---------------------------------------------------------------- report


def row(name, seq_len, forward=None, backward=None, **fields):
    """A row whose useful work takes 100 TFLOP/s at one millisecond."""
    figures = {"forward_ms": forward, "backward_ms": backward}
    rates = {f"{way}_tflops": 100 / ms for way, ms in (("forward", forward), ("backward", backward)) if ms}
    return bench_report.blank_row(name, seq_len) | figures | rates | fields


ROWS = [
    row("dense FlashAttention-2", 8192, 2.0, 6.0, peak_gib=0.25),
    row("dense cuDNN", 8192, 1.0, 3.0, graph_ms=0.9),
    row("S2 L1V15 hopper", 8192, 0.5, 1.5),
    row("Flex L1V15 128x64", 8192, 0.8, note="forward only"),
    row("peer L1V15", 8192, status="skipped", note="cannot import it"),
    row("S2 L1V15 hopper", 16384, 1.0, 3.0),
    row("dense FlashAttention-2", 32768, status="out of memory"),
    row("dense cuDNN", 32768, status="out of memory"),
    row("S2 L1V15 hopper", 32768, 2.0, 6.0),
]


def test_table_has_ratios_where_both_figures_are_there():
    lines = bench_report.table(ROWS).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 13
    assert lines[2] == (
        "| 8,192 | dense FlashAttention-2 | 2.000 | - | 50 | 6.000 | 17 | 0.25 | 1.00x | 1.00x | 0.50 | 0.50 |"
    )
    assert lines[3].startswith("| 8,192 | dense cuDNN | 1.000 | 0.900 | 100 |")
    assert lines[4].endswith("| 4.00x | 4.00x | 2.00 | 2.00 |")
    assert lines[5] == "| 8,192 | Flex L1V15 128x64 | 0.800 | - | 125 | - | - | - | 2.50x | - | 1.25 | - |"
    assert lines[6] == "| 8,192 | peer L1V15 | skipped" + " | -" * 9 + " |"
    assert lines[7].endswith("| 1.000 | - | 100 | 3.000 | 33 | - | - | - | - | - |")  # no baseline at this length
    assert lines[8].startswith("| 32,768 | dense FlashAttention-2 | out of memory | - |")
    assert lines[10].endswith("| - | - | - | - | - |")


def test_notes_gather_the_lengths_of_one_reason():
    noted = bench_report.notes([*ROWS, row("peer L1V15", 16384, status="skipped", note="cannot import it")])
    assert noted.splitlines() == [
        "- Flex L1V15 128x64 at 8,192: forward only",
        "- peer L1V15 at 8,192, 16,384: skipped: cannot import it",
        "- dense FlashAttention-2 at 32,768: out of memory",
        "- dense cuDNN at 32,768: out of memory",
    ]


def test_targets_are_rates_of_the_hopper_rows_over_cudnn():
    lines = bench_report.targets([{"name": "default", "rows": ROWS}]).splitlines()
    assert lines[0] == "| case | pattern | way | 8k | 32k | 128k |"
    assert lines[2:] == [
        "| default | L1V15 | forward | 2.00 | - | - |",
        "| default | L1V15 | backward | 2.00 | - | - |",
    ]


def test_rates_are_put_over_those_of_another_case():
    def section(name, rows, **case):
        rows = [{"name": n, "spec": spec, "seq_len": length, "forward_tflops": f, "backward_tflops": b}
                for n, spec, length, f, b in rows]  # fmt: skip
        return {"name": name, "case": case, "rows": rows}

    sections = [
        section("gqa", [("S2 L1V15 hopper", "L1V15", 8192, 400.0, 200.0),
                        ("S2 L1V15 triton", "L1V15", 8192, 9.0, 9.0)]),
        section("block16", [("S2 L4V15 hopper", "L1V15", 8192, 300.0, None)], over="gqa"),
        section("packed", [("S2 L8V16 hopper, 3 documents", "L8V16", 32768, 90.0, 80.0)], over="packed-one",
                packed=True, lengths=[32768]),
        section("packed-one", [("S2 L1V15 hopper", "L1V15", 100, 1.0, 1.0)], spec="L1V15"),
        section("packed-one", [("S2 L8V16 hopper", "L8V16", 200, 100.0, 100.0)], spec="L8V16"),
    ]  # fmt: skip
    lines = bench_report.comparisons(sections).splitlines()[2:]
    assert lines == [
        "| block16 | gqa | L1V15 | hopper | 8,192 | 0.75 | - |",
        "| packed | packed-one | L8V16 | hopper | 32,768 | 0.90 | 0.80 |",
    ]
    assert bench_report.comparisons(sections[:1]) == ""


def test_shares_are_of_the_limit_that_is_reached_first():
    limits = {"copy_tb_s": 4.0, "product_tflop_s": 800.0}
    rows = [
        row("dense cuDNN", 4096, 1.0, 3.0, flops=4e11, bytes=1e9, spec=None),
        row("S2 L1V15 hopper", 4096, 0.5, 2.0, flops=8e10, bytes=1e9, spec="L1V15"),
        row("S2 L1V15 hopper", 8192, 1.0, None, flops=4e11, bytes=1e9, spec="L1V15"),
        row("S2 L1V15 hopper", 16384, status="failed", flops=4e11, bytes=1e9, spec="L1V15"),
    ]
    lines = bench_report.shares([{"name": "small", "rows": rows}], limits).splitlines()[2:]
    assert lines == [
        "| small | S2 L1V15 hopper | 4,096 | 0.50 | memory | 0.25 | memory |",
        "| small | S2 L1V15 hopper | 8,192 | 0.50 | products | - | - |",
    ]
    assert bench_report.shares([{"name": "small", "rows": rows[:1]}], limits) == ""


@pytest.mark.parametrize(("builds", "status"), [(0, "failed"), (1, "ok")])
def test_a_host_row_keeps_what_was_measured_before_a_failure(no_clock, builds, status):
    left = [None] * builds

    def build(q, k, v):
        if not left:
            raise RuntimeError("no more")
        left.pop()
        return lambda: q + k + v

    inputs = tuple(torch.randn(1, 128, 2, 16, requires_grad=True) for _ in range(3))
    entry = bench_kernels.Entry("kernel", build)
    row = bench_measure.measure_host(entry, inputs, torch.randn(1, 128, 2, 16))
    assert (row["status"], row["backward_us"], row["backward_layer_us"]) == (status, 30.0 if builds else None, None)
    assert row["note"] == ("host time: failed: RuntimeError: no more" if builds else "RuntimeError: no more")


def test_report_holds_the_tables_and_plots_and_json_every_row(tmp_path):
    record = bench_attention.new_record(parse("--targets", "--commit", "abc"), "NVIDIA H200", ["--targets"])
    record["sections"] = [
        {"name": "default", "title": "default: batch 1", "rows": ROWS},
        {"name": "small", "title": "small: batch 4", "rows": ROWS[:3]},
        {"name": "gqa", "title": "gqa: batch 1", "rows": [row("S2 L1V15 hopper", n, status="failed") for n in (1, 2)]},
    ]
    record["host"] = [bench_report.blank_row("S2 L1V15 hopper", 256, bench_report.HOST_FIGURES) | {"forward_us": 31.26}]
    page = Path(f"{bench_report.write(record, tmp_path, with_plots=True)}.md")
    text = page.read_text()
    assert page.name == f"{record['date']}-nvidia-h200-attention.md"
    for wanted in (
        "# S2-Attention on NVIDIA H200",
        "`python scripts/bench_attention.py --targets`",
        "- commit: abc",
        "## default: batch 1",
        "## small: batch 4",
        "| S2 L1V15 hopper | 31.3 | - | - | - |",
        "## Targets",
    ):
        assert wanted in text  # fmt: skip
    assert [p.name for p in tmp_path.glob("*.png")] == [f"{page.stem}-default.png"]  # the others have no two lengths
    assert text.count(".png)") == 1
    assert json.loads(page.with_suffix(".json").read_text()) == json.loads(json.dumps(record))


def test_plot_leaves_out_what_nothing_was_measured_for(tmp_path):
    bench_report.plot([row("S2 L1V15 hopper", n, 1.0) for n in (262144, 524288)], "long", tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 10_000


def test_whole_run_without_a_gpu_reports_what_runs_and_what_does_not(tmp_path, monkeypatch, no_clock):
    for module, name, small in ((bench_attention, "HOST_LENGTH", 64), (bench_attention, "HOST_HEADS", 1),
                                (bench_measure, "LAYERS", 1)):  # fmt: skip
        monkeypatch.setattr(module, name, small)
    sizes = "--lengths 64,128 --heads 2 --kv-heads 2 --head-dim 16 --dtype float16 --patterns L1V2"
    args = parse(*sizes.split(), "--output", str(tmp_path), "--targets", "--peer", "other=no_such_module:f")
    args.device = "cpu"
    record = bench_attention.new_record(args, "cpu", [])
    page = Path(f"{bench_attention.run(args, record)}.md").read_text()
    (section,) = record["sections"]
    status = {(r["name"], r["seq_len"]): r["status"] for r in section["rows"]}
    assert status["dense FlashAttention-2", 64] == status["S2 L1V2 triton", 128] == "ok"
    assert status["dense cuDNN", 64] == "failed"
    assert status["S2 L1V2 hopper", 64] == status["other L1V2", 128] == "skipped"
    pairs = 2 * sum(Pattern.parse("L1V2").visible_pairs(128, 2)) / 2
    ours = next(r for r in section["rows"] if (r["name"], r["seq_len"]) == ("S2 L1V2 triton", 128))
    assert ours["forward_tflops"] == pytest.approx(4 * 16 * pairs / 2.0 / 1e9)
    assert record["limits"] == pytest.approx({"copy_tb_s": 1e-6, "product_tflop_s": 2 * 16**3 / 2e9})
    assert "## Share of the machine's limits" in page
    assert [r["name"] for r in record["host"]] == [
        "dense FlashAttention-2", "dense cuDNN", "S2 L1V2 triton", "S2 L1V2 hopper",
    ]  # fmt: skip
    assert all(record["host"][2][key] is not None for key in bench_report.HOST_FIGURES)
    assert "other L1V2 at 64, 128: skipped: cannot import no_such_module:f" in page


def test_inputs_that_do_not_fit_give_rows_for_every_kernel(monkeypatch):
    args = parse("--patterns", "L1V15")

    def too_large(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(bench_attention, "random_inputs", too_large)
    rows = list(bench_attention.measure_length(args.cases[0], 4096, args))
    assert [r["name"] for r in rows][2:] == ["S2 L1V15 triton", "S2 L1V15 hopper"]
    assert {r["status"] for r in rows} == {"out of memory"}
