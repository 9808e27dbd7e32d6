"""The rows and the page that `scripts/bench_counters.py` makes of what Nsight Compute prints."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_counters
from bench_record import save, stem

from s2.attention import Pattern

LABELS = ["default, 8,192, L1V15", "d64, 8,192, L1V15"]
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
FIGURES = {
    bench_counters.TIME: "93,000",
    bench_counters.CLOCK: "1700000000",
    **dict.fromkeys(bench_counters.BYTES.values(), "200000000"),
    **{metric: str(10 * i) for i, metric in enumerate(bench_counters.UNITS.values(), start=1)},
    STALLED.format("barrier"): "1.5",
    STALLED.format("long_scoreboard"): "2.5",
    STALLED.format("wait"): "0.5",
    STALLED.format("selected"): "1",
    STALLED.format("barrier_not_issued"): "9",
}


def printed(*rows: dict[str, str]) -> str:
    names = ["ID", "Id:Domain:Start/Stop_Range:Color:Msg", "Kernel Name", *FIGURES]
    lines = [names, ["", "", "", *["unit"] * len(FIGURES)], *([row.get(name, "") for name in names] for row in rows)]
    return "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in cells) for cells in lines) + "\n"


def launched(label: str, kernel: str = "attention_forward", **others: str) -> dict[str, str]:
    return {"ID": "0", "Id:Domain:Start/Stop_Range:Color:Msg": f"1:<default>:<{label}>", "Kernel Name": kernel,
            **FIGURES, **others}  # fmt: skip


def test_rows_have_the_figures_of_their_call():
    second = launched(LABELS[1], "attention_backward_q(int)")
    rows = bench_counters.parse(printed(launched(LABELS[0]), second), LABELS)
    assert [(row["call"], row["kernel"]) for row in rows] == [
        (LABELS[0], "attention_forward"),
        (LABELS[1], "attention_backward_q"),
    ]
    assert rows[0]["us"] == 93.0 and rows[0]["ghz"] == 1.7 and rows[0]["DRAM read"] == 0.2
    assert [rows[0][unit] for unit in bench_counters.UNITS] == [10, 20, 30, 40, 50]
    assert list(rows[0]["stalls"]) == ["long_scoreboard", "barrier", "selected", "wait"]


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"(?s)no table.*no permission"):
        bench_counters.parse("==ERROR== no permission", LABELS)
    with pytest.raises(ValueError, match="names no call for kernel 0, attention_forward"):
        bench_counters.parse(printed(launched("another")), LABELS)
    with pytest.raises(ValueError, match=f"no figure {bench_counters.CLOCK}"):
        bench_counters.parse(printed(launched(LABELS[0], **{bench_counters.CLOCK: "n/a"})), LABELS)


def test_the_page_names_the_fullest_unit_and_the_longest_waits(tmp_path):
    rows = bench_counters.parse(printed(launched(LABELS[0])), LABELS)
    record = {
        "machine": "GPU 9", "name": "counters", "date": "2026-01-02", "commit": "abc", "command": "python x.py",
        "versions": {"torch": "2"}, "method": bench_counters.METHOD, "cases": ["default: batch 1"], "rows": rows,
    }  # fmt: skip
    assert stem(record) == "2026-01-02-gpu-9-counters"
    line = save(record, tmp_path / "x", "Counters", bench_counters.parts(record)).splitlines()[-1]
    assert "| forward | 93 | 1.70 | 10 | 20 | 30 | 40 | 50 |" in line
    assert line.endswith("| issue slots | long scoreboard 2.5, barrier 1.5, selected 1.0 |")
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == rows


def test_what_is_counted_is_what_the_benchmark_times():
    args = bench_counters.parse_arguments(["--cases", "block16,packed", "--lengths", "8192", "--patterns", "L8V16"])
    (small, *_, blocks), (packed, *_, documents) = bench_counters.labelled(args)
    assert small == "block16, 8,192, L8V16" and blocks.pattern == Pattern.parse("L32V16", 16), "as many tokens"
    assert packed == "packed, 32,768, L8V16" and documents.pattern == Pattern.parse("L8V16") and documents.pairs


def test_the_profiler_is_given_the_same_arguments():
    command = bench_counters.profiler_command("ncu", ["--cases", "d64"])
    assert command[0] == "ncu" and command[-3:] == ["--profiled", "--cases", "d64"]
    assert set(bench_counters.UNITS.values()) <= set(command[command.index("--metrics") + 1].split(","))


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--cases", "other"], "other"), (["--patterns", "Q1"], "Q1"), (["--lengths", "0"], "below 1")],
)
def test_bad_arguments_are_named(words, named, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        bench_counters.parse_arguments(words)
    assert named in capsys.readouterr().err + str(caught.value)
