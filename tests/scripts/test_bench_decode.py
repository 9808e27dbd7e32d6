"""The decoding benchmark without a GPU: what a layout keeps and reads, calls, the check, arguments, report."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as `python scripts/bench_decode.py` has it

import bench_decode
import decode_calls
from bench_record import save
from decode_calls import Shape

from s2.attention import Pattern
from s2.attention.decode import visible_slots
from s2.ending import FailureError

LAYOUTS = ("dense", "L8V16+sink1", "L1V15", "W3", "L2V2<5V4+sink2", "L1V3<7")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_of_the_keys_that_the_layout_shows(layout):
    for block, length in ((16, 16 * 41 + 5), (64, 64 * 30), (64, 1)):
        group, lengths = decode_calls.kept(layout, 4, length, block), torch.tensor([length], dtype=torch.int32)
        seen = visible_slots(group.table, lengths, group.num_blocks * block, block, 1)
        num_blocks = -(-length // block)
        tokens = Pattern.parse(layout, block).block_mask(num_blocks, 4)[:, -1].repeat_interleave(block, 1)[:, :length]
        assert seen.sum() == tokens.sum() == decode_calls.visible_tokens(group, length, block)
        shape = Shape(8, 4, 3, length, layout, 32, block)
        assert decode_calls.bytes_of(shape) == int(tokens.sum()) * 3 * 32 * 2 * 2


def test_mixed_lengths_fall_to_a_sixteenth():
    shape = Shape(8, 4, 5, 1600, "dense", 32, 64, mixed=True)
    assert shape.lengths == [1600, 800, 400, 200, 100] and shape.name == "dense, mixed"
    assert decode_calls.bytes_of(shape) == 4 * 3100 * 32 * 2 * 2


def test_calls_go_around_as_many_keys_as_a_cache_does_not_hold():
    small, large = Shape(32, 8, 1, 8192, "L1V15"), Shape(32, 32, 32, 131072, "SDPA")
    assert decode_calls.copies_of(large, 1 << 35, 1 << 35) == 1
    copies = decode_calls.copies_of(small, 1 << 20, 1 << 30)
    assert (
        (copies - 1) * decode_calls.bytes_of(small) < decode_calls.COLD_BYTES <= copies * decode_calls.bytes_of(small)
    )
    assert decode_calls.copies_of(small, 1 << 28, 1 << 29) == 2, "no more than fit"


def test_calls_attend_to_the_keys_of_the_pool(monkeypatch):
    monkeypatch.setattr(decode_calls, "DTYPE", torch.float32)
    pool = torch.randn(2 * 2 * 2 * 128 * 32 * 3)
    outputs = {}
    for layout in ("dense", "SDPA", "L1V2"):
        torch.manual_seed(0)
        found = decode_calls.calls_of(Shape(4, 2, 2, 128, layout, 32, 16), pool)
        calls = found.attend
        assert layout == "SDPA" or torch.equal(found.plan(), calls[0].keywords["shares"])
        turn = bench_decode.in_turn(calls)
        outputs[layout] = [turn() for _ in range(len(calls) + 1)]
        assert len(calls) >= 3 and torch.equal(outputs[layout][0], outputs[layout][-1])
        assert not torch.equal(outputs[layout][0], outputs[layout][1])
    for ours, torchs in zip(outputs["dense"], outputs["SDPA"], strict=True):
        torch.testing.assert_close(ours, torchs.transpose(1, 2))
    assert bench_decode.chosen_kernel(*calls_args()) == "flash"
    with pytest.raises(FailureError, match="do not fit"):
        decode_calls.calls_of(Shape(4, 2, 2, 4096, "dense", 32, 16), pool)


def calls_args():
    return [torch.randn(1, heads, tokens, 32) for heads, tokens in ((4, 1), (4, 64), (4, 64))]


def test_the_check_notices_a_wrong_result(monkeypatch):
    monkeypatch.setattr(decode_calls, "DTYPE", torch.float16)  # the interpreter gets bfloat16 wrong
    shape = Shape(2, 1, 3, 100, "L1V3+sink1", 32, 16)
    assert 0 < decode_calls.check(shape, "cpu") < 2e-3
    monkeypatch.setattr(decode_calls, "decode_attention", lambda q, *_, **__: q * 0)
    with pytest.raises(FailureError, match=r"layout='L1V3\+sink1'.*1 new tokens: relative RMSE 1 "):
        decode_calls.check(shape, "cpu")


def test_what_fails_is_a_row():
    row = bench_decode.measure(Shape(4, 2, 2, 128, "dense", 32, 16), torch.zeros(8), 4.0, bench_decode.Timing(1, 4))
    assert row["status"] == "failed" and "do not fit" in row["note"] and row["bytes"] > 0


def rows():
    sdpa, ours, failed, skipped = (bench_decode.blank_row(name, 8192, bench_decode.FIGURES) for name in "abcd")
    sdpa |= {"name": "SDPA", "us": 20.0, "share": 0.5, "note": "flash"}
    ours |= {"name": "L1V15", "us": 8.0, "plan_us": 3.21, "share": 0.25}
    failed |= {"name": "dense", "status": "failed", "note": "no kernel"}
    skipped |= {"name": "SDPA", "seq_len": 32768, "status": "skipped"}
    return [row | {"heads": "32/8", "batch": 16, "bytes": 4_000_000} for row in (sdpa, ours, failed, skipped)]


def test_the_page_sets_ours_beside_sdpa(tmp_path):
    record = {
        "machine": "GPU 9", "name": "decode", "date": "2026-01-02", "commit": "abc", "command": "python x.py",
        "versions": {"torch": "2"}, "method": list(bench_decode.METHOD), "limits": {"copy_tb_s": 4.321}, "rows": rows(),
    }  # fmt: skip
    page = save(record, tmp_path / "x", "Decoding", bench_decode.parts(record))
    assert "A copy moves 4.32 TB/s." in page
    assert page.splitlines()[-4:] == [
        "| 32/8 | 16 | 8,192 | SDPA | 20.0 | - | 4.0 | 0.20 | 0.50 | - | flash |",
        "| 32/8 | 16 | 8,192 | L1V15 | 8.0 | 3.2 | 4.0 | 0.50 | 0.25 | 2.50 |  |",
        "| 32/8 | 16 | 8,192 | dense | failed | - | 4.0 | - | - | - | no kernel |",
        "| 32/8 | 16 | 32,768 | SDPA | skipped | - | 4.0 | - | - | - |  |",
    ]
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == rows()


def test_shapes_are_all_that_was_asked_for():
    args = bench_decode.parse_arguments(
        ["--heads", "32/8,4/4", "--batches", "1,2", "--lengths", "64", "--layouts", "W2"]
    )
    found = [(s.heads, s.kv_heads, s.batch, s.length, s.layout) for s in bench_decode.shapes(args)]
    assert found[:3] == [(32, 8, 1, 64, "SDPA"), (32, 8, 1, 64, "W2"), (32, 8, 2, 64, "SDPA")] and len(found) == 10
    assert found[-1] == (4, 4, 2, 64, "L8V16+sink1")
    assert len(list(bench_decode.shapes(bench_decode.parse_arguments([])))) == 3 * 3 * (3 * 4 + 2)
    whole = bench_decode.pool_size(bench_decode.parse_arguments([]), 140 << 30)
    assert whole == 2 * 32 * 32 * 131072 * 128, "the largest dense keys"
    assert bench_decode.pool_size(bench_decode.parse_arguments([]), 40 << 30) == int(0.9 * (40 << 30)) // 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--heads", "8/32"], "'8/32' is not <query heads>/<KV heads>"),
        (["--heads", "8"], "'8' is not"),
        (["--batches", "0"], "0 is less than 1"),
        (["--layouts", "Q1"], "Q1"),
        (["--lengths", ""], "no name"),
    ],
)
def test_bad_arguments_are_named(words, named, capsys):
    with pytest.raises(SystemExit):
        bench_decode.parse_arguments(words)
    assert named in capsys.readouterr().err


def test_a_run_writes_all_rows_and_leaves_out_what_has_no_time(monkeypatch, tmp_path):
    words = [
        "--heads",
        "2/1",
        "--batches",
        "2",
        "--lengths",
        "64,192",
        "--layouts",
        "dense,L1V2",
        "--output",
        str(tmp_path),
    ]
    args = bench_decode.parse_arguments(words)
    args.device = "cpu"
    clock = iter([0.0, *range(7, 100)])  # the start, and a second before each row
    for module, name, stand_in in (
        (bench_decode, "parse_arguments", lambda: args),
        (bench_decode, "machine_limits", lambda *_: {"copy_tb_s": 4.0}),
        (bench_decode, "graph_ms", lambda call, _: call() is None or 0.002),
        (bench_decode, "COLD_BYTES", 1 << 16),
        (decode_calls, "COLD_BYTES", 1 << 16),
        (bench_decode, "perf_counter", lambda: next(clock)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_name", lambda: "GPU 9"),
        (torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30)),
        (sys, "argv", ["bench_decode.py", *words]),
    ):
        monkeypatch.setattr(module, name, stand_in)
    args.seconds = 11.0
    bench_decode.main()
    (page,) = tmp_path.glob("*-gpu-9-decode.md")
    found = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [(row["seq_len"], row["name"], row["status"]) for row in found] == [
        (64, "SDPA", "ok"), (64, "dense", "ok"), (64, "L1V2", "ok"),
        (64, "L8V16+sink1, mixed", "ok"),
        (192, "SDPA", "ok"), (192, "dense", "skipped"), (192, "L1V2", "skipped"),
        (192, "L8V16+sink1, mixed", "skipped"),
    ]  # fmt: skip
    assert found[0]["bytes"] == 2 * 2 * 64 * 128 * 2 and found[0]["us"] == pytest.approx(2.0)
    assert found[0]["plan_us"] is None and found[1]["plan_us"] == pytest.approx(2.0)
    assert found[0]["share"] == pytest.approx(found[0]["bytes"] / 2e6 / 4.0)
    assert "no time left" in page.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_decode.py"])
    with pytest.raises(ValueError, match="needs a CUDA device"):  # the exit code of bad input, not of a crash
        bench_decode.main()
