"""Count with Nsight Compute what the kernels of a call are busy with, and write a report.

    python scripts/bench_counters.py [--cases default,d64] [--lengths 8192,32768] [--patterns L1V15,L8V16]

Runs `ncu` over itself: each case of `bench_attention.py` once forward and backward after a warm-up, with the clocks
left as they are and an empty L2 cache before each kernel. A kernel's row says what share of its peak each unit reached,
which is the fullest, and what warps waited for. Writes docs/benchmarks/<date>-<machine>-counters.{md,json}.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from bench_attention import CASES, Case, attention_parser, check, entries, random_inputs
from bench_kernels import Entry
from bench_record import Record, new_record, require_gpu, save, stem
from bench_report import Row

from s2 import ending
from s2.ending import FailureError
from s2.tables import markdown

UNITS = {  # what may be full, and its counter: percent of what it could do in the kernel's time
    "tensor cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "shared memory": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
}
TIME, CLOCK = "gpu__time_duration.sum", "sm__cycles_elapsed.avg.per_second"
BYTES = {
    "DRAM read": "dram__bytes_read.sum",
    "DRAM written": "dram__bytes_write.sum",
    "L2 to SM": "l1tex__m_xbar2l1tex_read_bytes.sum",
}
STALLS = "regex:smsp__average_warps_issue_stalled_[a-z_]+_per_issue_active"
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active(\.\w+)?")
WAITS = 3  # reasons named
RANGE = "Start/Stop_Range"  # in the name of ncu's column for NVTX ranges of the whole process


# ---------------------------------------------------------------- what is counted


def labelled(args: argparse.Namespace) -> Iterator[tuple[str, Case, int, Entry]]:
    """`(label, case, length, kernel)` of all that is counted: ours, as `bench_attention.py` times them."""
    for case in args.cases:
        for length in case.lengths or args.lengths:
            for entry in entries(case, length, args):
                if entry.pattern is not None:
                    yield f"{case.name}, {length:,}, {entry.spec}", case, length, entry


def profiled(args: argparse.Namespace) -> None:
    """What runs under `ncu`: every forward, and after one the backward, in an NVTX range of its label."""
    for label, case, length, entry in labelled(args):
        inputs, dout = random_inputs(case, length, args)
        forward = entry.build(*inputs)
        backward = partial(torch.autograd.grad, forward(), inputs, dout, retain_graph=True)
        for call in (forward, backward):
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            named = torch.cuda.nvtx.range_start(f"<{label}>")  # of the process: autograd has threads of its own
            call()
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_end(named)
            torch.cuda.profiler.stop()


# ---------------------------------------------------------------- the profiler


def profiler_command(ncu: str, argv: list[str]) -> list[str]:
    metrics = ",".join([*UNITS.values(), TIME, CLOCK, *BYTES.values(), STALLS])
    return [
        ncu, "--profile-from-start", "off", "--clock-control", "none", "-k", "regex:attention_", "--nvtx", "--csv",
        "--page", "raw", "--print-units", "base", "--metrics", metrics,
        sys.executable, str(Path(__file__).resolve()), "--profiled", *argv,
    ]  # fmt: skip


def parse(text: str, labels: list[str]) -> list[Row]:
    """Rows of the table that `ncu` prints after other lines. Raises ValueError where there is none, or a kernel's
    label or a counter is missing."""
    begin = text.find('"ID"')
    if begin < 0:
        raise ValueError(f"ncu printed no table:\n{text[-2000:].strip()}")
    rows = []
    for cells in csv.DictReader(io.StringIO(text[begin:])):
        if not cells["ID"]:  # the line of units
            continue
        where = "".join(value or "" for name, value in cells.items() if RANGE in (name or ""))
        label = next((label for label in labels if f"<{label}>" in where), None)
        if label is None:
            raise ValueError(f"ncu names no call for kernel {cells['ID']}, {cells['Kernel Name']}: {where!r}")

        reasons = {name: match[1] for name in cells if (match := STALL.fullmatch(name or ""))}
        stalls = {reason: number(cells, name) for name, reason in reasons.items() if "not_issued" not in reason}
        rows.append(
            {
                "call": label,
                "kernel": cells["Kernel Name"].split("(")[0],
                "us": number(cells, TIME) / 1e3,
                "ghz": number(cells, CLOCK) / 1e9,
                **{unit: number(cells, metric) for unit, metric in UNITS.items()},
                **{name: number(cells, metric) / 1e9 for name, metric in BYTES.items()},
                "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])),
            }
        )
    return rows


def number(cells: dict[str, str], name: str) -> float:
    try:
        return float(cells[name].replace(",", ""))
    except (KeyError, ValueError) as error:
        raise ValueError(f"ncu has no figure {name} for {cells.get('Kernel Name')}: {error}") from error


# ---------------------------------------------------------------- the report


METHOD = [
    "one launch of each kernel after a warm-up, clocks left as they are, caches emptied before it",
    "per cent of what a unit could do in the kernel's time; shared memory: with L1, whose data path it has",
    "cycles waited an issue: of all warps of a scheduler for each instruction that it issues, the three largest "
    "reasons by Nsight Compute's names; selected is the instruction itself",
]


def table(rows: list[Row]) -> str:
    header = ("call", "kernel", "us", "GHz", *(f"{unit} %" for unit in UNITS), *(f"{name}, GB" for name in BYTES),
              "fullest", "cycles waited an issue")  # fmt: skip
    forms = {"us": ",.0f", "ghz": ".2f", **dict.fromkeys(UNITS, ".0f"), **dict.fromkeys(BYTES, ".2f")}
    body = []
    for row in rows:
        waits = [f"{name.replace('_', ' ')} {value:.1f}" for name, value in list(row["stalls"].items())[:WAITS]]
        figures = [f"{row[key]:{form}}" for key, form in forms.items()]
        fullest = max(UNITS, key=lambda unit: row[unit])
        body.append([row["call"], row["kernel"].removeprefix("attention_"), *figures, fullest, ", ".join(waits)])
    return markdown(header, body, numbers=range(2, len(header) - 2))


def parts(record: Record) -> list[str]:
    return ["\n".join(f"- {case}" for case in record["cases"]), table(record["rows"])]


# ---------------------------------------------------------------- the run


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = attention_parser(__doc__, "8192,32768,131072", "counters")
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    alone = {"backends": ["hopper"], "peers": [], "peer_lengths": [], "flex_lengths": []}  # of `entries`: ours
    args = parser.parse_args(argv, argparse.Namespace(device="cuda", **alone))
    args.cases = [CASES[name] for name in args.cases]
    check(args)
    return args


def main() -> None:
    args = parse_arguments()
    require_gpu("bench_counters")
    if args.profiled:
        profiled(args)
        return
    ncu = shutil.which("ncu")
    if ncu is None:
        raise FileNotFoundError("bench_counters needs Nsight Compute's ncu on the path")
    result = subprocess.run(profiler_command(ncu, sys.argv[1:]), capture_output=True, text=True, check=False)
    if result.returncode:
        raise FailureError(f"ncu ended with {result.returncode}: {(result.stdout + result.stderr)[-2000:].strip()}")
    rows = parse(result.stdout, [label for label, *_ in labelled(args)])
    said = subprocess.run([ncu, "--version"], capture_output=True, text=True, check=False).stdout.split()
    titles = [case.title(args.dtype) for case in args.cases]
    record = new_record(
        "bench_counters", sys.argv[1:], torch.cuda.get_device_name(), ("torch", "triton"), commit=args.commit,
        name=args.name, method=METHOD, cases=titles, rows=rows,
    )  # fmt: skip
    record["versions"]["Nsight Compute"] = next((word for word in said if re.fullmatch(r"20\d\d\.\S+", word)), "?")
    path = args.output / stem(record)
    save(record, path, "Counters of the Hopper kernels", parts(record))
    print(f"wrote {path}.md with its .json")


if __name__ == "__main__":
    ending.run(main)
