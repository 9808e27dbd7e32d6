"""Time S2-Attention beside its baselines on this GPU and write a report.

    python scripts/bench_attention.py [--cases default,gqa,d64] [--lengths 8192,32768] [--patterns L1V15,L8V16] ...

All figures come from one process, on the same random inputs: dense causal attention through SDPA (FlashAttention-2 and
cuDNN), our kernels, FlexAttention with a block mask made from the pattern, and the peers named with --peer. Useful
TFLOP/s count visible query-key pairs only: 4 D per pair and head forward, 10 D backward. A kernel that cannot run
gets a row with the reason. Writes docs/benchmarks/<date>-<machine>-<name>.{md,json} and a plot for each case.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import bench_kernels as kernels
import bench_record
import torch
from bench_kernels import Entry
from bench_measure import GRAPH_LENGTHS, Inputs, Timing, free_memory, machine_limits, measure, measure_host, noted
from bench_record import Record
from bench_report import Row, blank_row, table, write
from torch import Tensor

from s2 import ending
from s2.attention import Pattern
from s2.ending import FailureError

HOST_LENGTH, HOST_HEADS = 256, 4
BACKENDS = ("triton", "hopper")
LONGEST_DENSE = 1 << 18
LONG_HEADS = 8  # query heads of --long-lengths
SIZES = ("batch", "heads", "kv_heads", "head_dim", "block_size")


@dataclass(frozen=True)
class Case:
    """One set-up of heads and sizes. `lengths` None: those of --lengths. `only_ours`: our kernels, and cuDNN up to
    `LONGEST_DENSE` tokens, beyond which a dense backward takes minutes. `over`: the case over whose rates of the same
    pattern ours are put; in smaller blocks a pattern is as dense as there, with as many tokens in its window. `packed`:
    documents of log-uniform lengths, over one sequence of as many visible pairs."""

    name: str
    batch: int = 1
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    block_size: int = 64
    lengths: tuple[int, ...] | None = None
    only_ours: bool = False
    over: str | None = None
    packed: bool = False
    spec: str | None = None  # instead of --patterns

    def title(self, dtype: str) -> str:
        sizes = f"batch {self.batch}, {self.heads}/{self.kv_heads} heads, d {self.head_dim}, block {self.block_size}"
        return f"{self.name}: {sizes}, {dtype}{', packed documents' if self.packed else ''}"


CASES = {
    case.name: case
    for case in (
        Case("default"),
        Case("gqa", kv_heads=8),
        Case("gqa70b", heads=64, kv_heads=8),
        Case("d64", head_dim=64, over="default"),
        Case("small", batch=4, lengths=(4096,)),
        Case("block32", kv_heads=8, block_size=32, only_ours=True, over="gqa"),
        Case("block16", kv_heads=8, block_size=16, only_ours=True, over="gqa"),
        Case("packed", lengths=(32768,), packed=True),
        Case("packed-gqa", kv_heads=8, lengths=(32768,), packed=True),
    )
}


# ---------------------------------------------------------------- what is measured


def entries(case: Case, seq_len: int, args: argparse.Namespace) -> Iterator[Entry]:
    specs = [case.spec] if case.spec else args.patterns
    if case.packed:
        borders = document_borders(seq_len)
        for spec in specs:
            for backend in args.backends:
                yield kernels.packed_entry(spec, Pattern.parse(spec, case.block_size), backend, borders, case.kv_heads)
        return
    if seq_len <= LONGEST_DENSE or not case.only_ours:
        yield from kernels.dense_entries()[1 if case.only_ours else 0 :]
    for spec in specs:
        own = in_blocks_of(case, spec)
        pattern = Pattern.parse(own, case.block_size)
        for backend in args.backends:
            yield kernels.s2_entry(own, pattern, backend, spec)
        if case.only_ours:
            continue
        if seq_len in args.flex_lengths:
            yield from kernels.flex_entries(spec, pattern)
        peers = args.peers if not args.peer_lengths or seq_len in args.peer_lengths else []
        for block in dict.fromkeys(block for _, _, block in peers if block):  # ours with a peer's blocks
            theirs = nearest(spec, case.block_size, block)
            yield kernels.s2_entry(f"{theirs}/{block}", Pattern.parse(theirs, block), args.backends[-1])
        for name, target, block in peers:
            theirs = nearest(spec, case.block_size, block) if block else spec
            label = f"{theirs}/{block}" if block else spec
            yield kernels.peer_entry(name, target, label, Pattern.parse(theirs, block or case.block_size))


def scaled(spec: str, local: float, stride: float, what: str) -> str:
    """A local-stride pattern with its window and its stride multiplied, each at least one block (a stride two)."""
    match = re.fullmatch(r"L(\d+)V(\d+)", spec)
    if match is None:
        raise ValueError(f"--patterns: {spec} cannot be written in {what}; use L<local>V<stride>")
    return f"L{max(1, round(int(match[1]) * local))}V{max(2, round(int(match[2]) * stride))}"


def nearest(spec: str, block_size: int, other: int) -> str:
    """The local-stride pattern in blocks of `other` tokens that is nearest to `spec` in tokens."""
    return scaled(spec, block_size / other, block_size / other, f"a peer's blocks of {other}")


def in_blocks_of(case: Case, spec: str) -> str:
    """A pattern in the case's blocks; where they are smaller than those of the case it is compared with, every
    stride-th of them, and as many tokens in the window."""
    block_size = CASES[case.over].block_size if case.over in CASES else case.block_size
    if block_size <= case.block_size:
        return spec
    return scaled(spec, block_size / case.block_size, 1, f"blocks of {case.block_size}")


def document_borders(tokens: int) -> list[int]:
    """Of documents of log-uniform lengths, 256 to 16k, always the same ones."""
    rng, borders = random.Random(0), [0]
    while borders[-1] < tokens:
        borders.append(min(borders[-1] + int(2 ** rng.uniform(8, 14)), tokens))
    return borders


def as_long(spec: str, case: Case, tokens: int) -> int:
    """Tokens of one sequence with as many visible pairs as packed documents have, in whole blocks."""
    pattern = Pattern.parse(spec, case.block_size)
    lengths = [end - begin for begin, end in itertools.pairwise(document_borders(tokens))]
    wanted = kernels.visible_pairs(pattern, lengths, case.kv_heads)

    def has_enough(blocks: int) -> bool:
        return kernels.visible_pairs(pattern, [blocks * case.block_size], case.kv_heads) >= wanted

    blocks = range(1, -(-tokens // case.block_size) + 1)
    return blocks[bisect.bisect_left(blocks, True, key=has_enough)] * case.block_size


def random_inputs(case: Case, seq_len: int, args: argparse.Namespace) -> tuple[Inputs, Tensor]:
    """q, k, v and the gradient of the output."""
    shape, kv_shape = ((case.batch, seq_len, heads, case.head_dim) for heads in (case.heads, case.kv_heads))
    dtype = getattr(torch, args.dtype)
    q, k, v, dout = (torch.randn(s, device=args.device, dtype=dtype) for s in (shape, kv_shape, kv_shape, shape))
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), dout


def measure_length(case: Case, seq_len: int, args: argparse.Namespace) -> Iterator[Row]:
    free_memory()
    wanted = list(entries(case, seq_len, args))
    failed = blank_row("", seq_len) | {"note": "inputs"}
    with noted(failed, "forward_ms"):  # too large, or a kernel before broke the device
        inputs, dout = random_inputs(case, seq_len, args)
    if failed["status"] != "ok":
        yield from (failed | {"name": entry.name} for entry in wanted)
        return
    known: dict[str, tuple[str, Tensor]] = {}
    for entry in wanted:
        density = entry.pattern.density(seq_len, case.kv_heads) if entry.pattern else 1.0
        pairs = entry.pairs or density * seq_len * (seq_len + 1) / 2
        flops = 4 * case.head_dim * case.batch * case.heads * pairs
        yield measure(entry, inputs, dout, flops, Timing(args.warmup, args.rep), known)
        free_memory()


def host_costs(case: Case, args: argparse.Namespace) -> Iterator[Row]:
    """At a size where the device is never behind the host."""
    small = replace(case, batch=1, heads=HOST_HEADS, kv_heads=HOST_HEADS)
    inputs, dout = random_inputs(small, HOST_LENGTH, args)
    spec = args.patterns[0]
    pattern = Pattern.parse(spec, case.block_size)
    for entry in (*kernels.dense_entries(), *(kernels.s2_entry(spec, pattern, backend) for backend in args.backends)):
        yield measure_host(entry, inputs, dout)


# ---------------------------------------------------------------- arguments


def whole_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 8192,32768") from None
    if any(number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} has a length below 1")
    return numbers


def peer(text: str) -> tuple[str, str, int | None]:
    match = re.fullmatch(r"([^=]+)=([\w.]+:\w+)(?:@(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; write NAME=module:function or ...@BLOCK")
    name, target, block = match.groups()
    return name, target, int(block) if block else None


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = attention_parser(__doc__, "4096,8192,16384,32768,65536,131072", "attention")
    add = parser.add_argument
    add("--long-lengths", default="", type=whole_numbers,
        help=f"also these, with {LONG_HEADS} heads: our kernels; cuDNN up to 256k")  # fmt: skip
    add("--flex-lengths", default="8192,32768,131072", type=whole_numbers, help="which lengths FlexAttention runs at")
    add("--backends", default=",".join(BACKENDS), type=bench_record.names(BACKENDS))
    add("--peer", dest="peers", action="append", default=[], type=peer, metavar="NAME=module:function[@BLOCK]",
        help="another kernel: function(q, k, v, pattern) returns a forward call; may be repeated; with @BLOCK it gets "
        "the pattern nearest in tokens that has such blocks, and so do our kernels in another row")  # fmt: skip
    add("--peer-lengths", default="", type=whole_numbers, help="which lengths peers run at (default: all)")
    for field in SIZES:
        add(f"--{field.replace('_', '-')}", type=int, help="instead of the cases' own")
    add("--warmup", type=int, default=50, help="ms of calls before each figure (default 50)")
    add("--rep", type=int, default=200, help="ms of calls for each figure (default 200)")
    add("--targets", action="store_true", help="end with our rates over cuDNN's at 8k, 32k and 128k")
    args = parser.parse_args(argv, argparse.Namespace(device="cuda"))
    args.cases = chosen_cases(args)
    check(args)
    return args


def attention_parser(description: str | None, lengths: str, name: str) -> argparse.ArgumentParser:
    """With the options that every benchmark of attention has."""
    parser = bench_record.new_parser(description, name=name)
    add = parser.add_argument
    add("--cases", default="default", type=bench_record.names(CASES),
        help=f"any of {', '.join(CASES)}, each a table (default: default)")  # fmt: skip
    add("--lengths", default=lengths, type=whole_numbers, help="of cases without lengths of their own")
    add("--patterns", default="L1V15,L8V16", type=bench_record.names())
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    return parser


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The cases with the sizes asked for, and after each its long lengths."""
    sizes = {field: getattr(args, field) for field in SIZES if getattr(args, field) is not None}
    cases = []
    for name in args.cases:
        case = replace(CASES[name], **sizes)
        case = replace(case, lengths=case.lengths or tuple(args.lengths))
        if case.packed:
            one = replace(case, name=f"{case.name}-one", packed=False, only_ours=True)
            cases.append(replace(case, over=one.name))
            for spec in args.patterns:
                lengths = tuple(as_long(spec, case, tokens) for tokens in case.lengths or ())
                cases.append(replace(one, lengths=lengths, spec=spec))
            continue
        cases.append(case)
        if args.long_lengths:
            fewer = {"heads": LONG_HEADS, "kv_heads": max(1, case.kv_heads * LONG_HEADS // case.heads)}
            lengths = tuple(args.long_lengths)
            cases.append(replace(case, name=f"{case.name}-long", lengths=lengths, only_ours=True, **fewer))
    return cases


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what does not fit together."""
    if not args.lengths:
        raise ValueError("--lengths is empty")
    if len({name for name, _, _ in args.peers}) < len(args.peers):
        raise ValueError("--peer: two peers have one name")
    if over := [length for length in args.flex_lengths if length > kernels.MAX_FLEX_LENGTH]:
        raise ValueError(f"--flex-lengths: {over[0]} is more than {kernels.MAX_FLEX_LENGTH}, where FlexAttention ends")
    for case in args.cases:
        if min(case.batch, case.heads, case.kv_heads, case.head_dim) < 1:
            raise ValueError(f"{case.title(args.dtype)}: every size must be 1 or more")
        if case.packed and case.batch > 1:
            raise ValueError(f"case {case.name}: packed documents are one sequence, so --batch must be 1")
        if case.heads % case.kv_heads:
            raise ValueError(f"case {case.name}: {case.heads} heads are not a multiple of {case.kv_heads} KV heads")
        for spec in args.patterns:
            Pattern.parse(in_blocks_of(case, spec), case.block_size)  # names the spec and what is wrong
            for _, _, block in args.peers:
                if block:
                    Pattern.parse(nearest(spec, case.block_size, block), block)


# ---------------------------------------------------------------- the run


METHOD = [
    "medians of `triton.testing.do_bench`, which empties the L2 cache before each call (calls of over a second: median "
    "of three); all rows of one length share inputs and process",
    "useful TFLOP/s count visible pairs only: 4 D a pair and head forward, 10 D backward",
    f"fwd graph ms: the forward without gradients in a CUDA graph, with a warm cache, up to {GRAPH_LENGTHS:,} tokens",
    "time vs FA2: time of dense FlashAttention-2 over the row's; rate / cuDNN: the row's TFLOP/s over dense cuDNN's",
    "L1V8/128 and the like: blocks of 128, in which a peer's kernels come; the pattern is the nearest in tokens, and "
    "ours has a row with it too",
    "Flex: FlexAttention under torch.compile, its block mask (queries x keys) built from the pattern, tiles that are "
    "visible as a whole marked so",
    "our rates over another case's: useful TFLOP/s of the same pattern; in smaller blocks it is as dense, with as many "
    "tokens in its window; packed documents (log-uniform, 256 to 16k tokens) are put over one sequence of as many "
    "visible pairs",
    "share of the machine's limits: the least time in which a copy moves q, k, v and the output (backward: twice that) "
    "or a matrix product does the useful operations, whichever is more, over the time taken",
]


def new_record(args: argparse.Namespace, machine: str, argv: list[str]) -> Record:
    setup = {k: v for k, v in vars(args).items() if k not in ("output", "commit", "cases", "device", "name")}
    record = bench_record.new_record(
        "bench_attention", argv, machine, ("torch", "triton"), commit=args.commit, name=args.name, method=METHOD,
        targets=args.targets, setup=setup, sections=[], host=[], limits={},
    )  # fmt: skip
    record["versions"] |= {"cuda": torch.version.cuda or "none", "cudnn": str(torch.backends.cudnn.version())}
    return record


def run(args: argparse.Namespace, record: Record) -> Path:
    """Measure every case into `record`. The page is written after each length, so a stopped run keeps its rows."""
    record["host"] = list(host_costs(args.cases[0], args))
    with contextlib.suppress(torch.cuda.OutOfMemoryError):  # then the report has no shares of them
        record["limits"] = machine_limits(args.device, Timing(args.warmup, args.rep))
    free_memory()
    for case in args.cases:
        section = {"name": case.name, "title": case.title(args.dtype), "case": asdict(case), "rows": []}
        record["sections"].append(section)
        print(section["title"], table([]), sep="\n", flush=True)
        for seq_len in case.lengths:
            for row in measure_length(case, seq_len, args):
                section["rows"].append(row)
                print(table(section["rows"]).splitlines()[-1], row["note"], flush=True)
            write(record, args.output, with_plots=False)
    return write(record, args.output, with_plots=True)


def main() -> None:
    args = parse_arguments()
    bench_record.require_gpu("bench")
    record = new_record(args, torch.cuda.get_device_name(), sys.argv[1:])
    print(f"wrote {run(args, record)}.md with its .json and plots")
    rows = [row for section in record["sections"] for row in section["rows"]]
    if failed := [row["name"] for row in rows if row["status"] == "failed" and row["name"].startswith("S2 ")]:
        raise FailureError(f"{len(failed)} of our own rows failed: {', '.join(dict.fromkeys(failed))}")


if __name__ == "__main__":
    ending.run(main)
