"""Time decoding from kept keys beside torch's attention to all keys on this GPU and write a report.

    python scripts/bench_decode.py [--check] [--batches 1,16] [--lengths 8192,32768] [--layouts dense,L8V16+sink1] ...

One new token a sequence, bfloat16, a layer alone: microseconds of a call in a CUDA graph of many, each with other keys
than the calls before it, so that all come from memory; the bytes of keys and values that the layout makes it read, and
what share of the rate of a plain copy that is. Beside it torch's SDPA, by whatever kernel it takes, on dense keys of
the same length. `--check` first compares with the definition. Writes docs/benchmarks/<date>-<machine>-decode.{md,json}.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import torch
from bench_measure import Timing, graph_ms, machine_limits, noted
from bench_record import Record, names, new_parser, new_record, require_gpu, save, stem
from bench_report import Row, blank_row
from decode_calls import COLD_BYTES, DTYPE, Shape, bytes_of, calls_of, check, chosen_kernel
from torch import Tensor

from s2 import ending
from s2.attention import Pattern
from s2.tables import markdown

FIGURES = ("us", "plan_us", "bytes", "share")

METHOD = (
    "one new token a sequence, all of one length; us: one call among many in a CUDA graph, which go around "
    f"{COLD_BYTES >> 20} MB of keys or all that are there, so that they come from memory",
    "plan: us of the kernel that says which keys each program reads, once in a step for all layers of one kind; not in "
    "the figure before it",
    "read: keys and values that the layout shows the token; share: of the rate of a copy in the same process, "
    "whose bytes count as they are read and as they are written",
    "mixed: sequences of the length down to a sixteenth of it, each shorter by the same factor",
    "SDPA: torch's attention to all keys of the length, by the kernel in its note; over SDPA: its time over ours",
)


# ---------------------------------------------------------------- figures


def in_turn(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def measure(shape: Shape, pool: Tensor, copy_tb_s: float, timing: Timing) -> Row:
    """The row of a shape; what goes wrong is a note in it."""
    row = blank_row(shape.name, shape.length, FIGURES)
    row |= {"heads": f"{shape.heads}/{shape.kv_heads}", "batch": shape.batch, "bytes": bytes_of(shape)}
    with noted(row, "us"), torch.inference_mode():
        calls = calls_of(shape, pool)
        if calls.plan:
            row["plan_us"] = 1e3 * graph_ms(calls.plan, timing)
        else:
            row["note"] = chosen_kernel(*calls.attend[0].args)
        row["us"] = 1e3 * graph_ms(in_turn(calls.attend), timing)
        row["share"] = row["bytes"] / row["us"] / 1e6 / copy_tb_s
    return row


# ---------------------------------------------------------------- the report


def table(rows: list[Row]) -> str:
    header = (
        "heads", "batch", "length", "layout", "us", "plan", "read, MB", "TB/s", "share of copy", "over SDPA", "note",
    )  # fmt: skip
    dense_us = {(r["heads"], r["batch"], r["seq_len"]): r["us"] for r in rows if r["name"] == "SDPA"}
    body = []
    for row in rows:
        at = [row["heads"], str(row["batch"]), f"{row['seq_len']:,}", row["name"]]
        read = f"{row['bytes'] / 1e6:,.1f}"
        if row["us"] is None:
            body.append([*at, row["status"], "-", read, "-", "-", "-", row["note"]])
            continue
        base = dense_us.get((row["heads"], row["batch"], row["seq_len"]))
        over = "-" if base is None or row["name"] == "SDPA" or "mixed" in row["name"] else f"{base / row['us']:.2f}"
        rate = f"{row['bytes'] / row['us'] / 1e6:.2f}"
        plan = "-" if row["plan_us"] is None else f"{row['plan_us']:.1f}"
        body.append([*at, f"{row['us']:,.1f}", plan, read, rate, f"{row['share']:.2f}", over, row["note"]])
    return markdown(header, body, numbers=(1, 2, *range(4, 10)))


def parts(record: Record) -> list[str]:
    return [f"A copy moves {record['limits']['copy_tb_s']:.2f} TB/s.", table(record["rows"])]


def shapes(args: argparse.Namespace) -> Iterator[Shape]:
    """SDPA first of each length, to compare with."""
    for heads, batch, length in itertools.product(args.heads, args.batches, args.lengths):
        for layout in ("SDPA", *args.layouts):
            yield Shape(*heads, batch, length, layout)
        for layout in args.mixed if batch > 1 else []:
            yield Shape(*heads, batch, length, layout, mixed=True)


# ---------------------------------------------------------------- the run


def sizes(text: str) -> list[int]:
    found = [int(part) for part in names()(text)]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: {min(found)} is less than 1")
    return found


def head_counts(text: str) -> list[tuple[int, int]]:
    """`32/8`: 32 query heads on 8 KV heads."""
    found = []
    for part in names()(text):
        heads, _, kv_heads = part.partition("/")
        if not (heads.isdigit() and kv_heads.isdigit()) or int(kv_heads) < 1 or int(heads) % int(kv_heads):
            raise argparse.ArgumentTypeError(f"{part!r} is not <query heads>/<KV heads>, such as 32/8")
        found.append((int(heads), int(kv_heads)))
    return found


def layouts(text: str) -> list[str]:
    found = names()(text)
    for layout in found:
        Pattern.parse(layout)
    return found


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, name="decode")
    add = parser.add_argument
    add("--batches", type=sizes, default=[1, 16, 32], help="sequences (default 1,16,32)")
    add("--lengths", type=sizes, default=[8192, 32768, 131072], help="tokens of each (default 8192,32768,131072)")
    add("--layouts", type=layouts, default=["dense", "L8V16+sink1", "L1V15"], help="what is kept (default %(default)s)")
    add(
        "--mixed",
        type=layouts,
        default=["L8V16+sink1"],
        help="also with sequences of mixed lengths (default L8V16+sink1)",
    )
    add("--heads", type=head_counts, default=[(32, 8), (32, 32), (16, 16)], help="default 32/8,32/32,16/16")
    add("--check", action="store_true", help="first compare with the definition")
    add("--seconds", type=float, default=160.0, help="rows that do not begin within it are left out (default 160)")
    return parser.parse_args(argv, argparse.Namespace(device="cuda"))


def pool_size(args: argparse.Namespace, free: int) -> int:
    """Elements of the pool: what the largest shape holds, within `free` bytes."""
    largest = max(2 * kv * batch * length * 128 for (_, kv), batch, length in itertools.product(
        args.heads, args.batches, args.lengths))  # fmt: skip
    return min(max(largest, 2 * COLD_BYTES), int(0.9 * free) // DTYPE.itemsize)


def main() -> None:
    args = parse_arguments()
    require_gpu("bench_decode")
    begin = perf_counter()
    torch.manual_seed(0)
    record = new_record(
        "bench_decode", sys.argv[1:], torch.cuda.get_device_name(), ("torch", "triton"), commit=args.commit,
        name=args.name, method=[*METHOD], limits=machine_limits(args.device, Timing(20, 100)), rows=[],
    )  # fmt: skip
    if args.check:
        ratios = {heads // kv_heads: (heads, kv_heads) for heads, kv_heads in args.heads}  # each is a kernel of its own
        tried = [Shape(*heads, 3, 4096 - 60, layout) for heads in ratios.values() for layout in args.layouts]
        record["check"] = max(check(shape, args.device) for shape in tried)
        record["method"].append(
            f"before: relative RMSE to the definition at most {record['check']:.1g}, with lengths of 1 to "
            f"{tried[0].length:,}, one new token and four"
        )
        print(f"as the definition: relative RMSE at most {record['check']:.1g}", flush=True)
    pool = torch.empty(pool_size(args, torch.cuda.mem_get_info()[0]), dtype=DTYPE, device=args.device)
    for piece in pool.split(1 << 28):
        piece.normal_()
    path = args.output / stem(record)
    for shape in shapes(args):
        if perf_counter() - begin > args.seconds:
            row = blank_row(shape.name, shape.length, FIGURES) | {"status": "skipped", "note": "no time left"}
            row |= {"heads": f"{shape.heads}/{shape.kv_heads}", "batch": shape.batch, "bytes": bytes_of(shape)}
        else:
            row = measure(shape, pool, record["limits"]["copy_tb_s"], Timing(20, 40))
        record["rows"].append(row)
        print(shape, row["status"], row["us"], row["share"], row["note"], flush=True)
        save(record, path, "Decoding from kept keys", parts(record))
    print(f"wrote {path}.md with its .json")


if __name__ == "__main__":
    ending.run(main)
