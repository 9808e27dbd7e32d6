"""Compare the attention of this tree with that of another checkout, on this GPU.

    git worktree add /tmp/base v1
    python scripts/bench_trees.py /tmp/base --rounds 2 -- --cases default,gqa --lengths 8192,32768

Runs `scripts/bench_attention.py` of both trees with the options behind `--`, in turn and every second round in reverse,
each in a process of its own, and writes the base's figures over this tree's: above 1, this tree is faster or smaller.
Torch's own kernels are in both trees: how far their ratios are from 1 is the noise. Writes
docs/benchmarks/<date>-<machine>-<name>.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bench_record import ROOT, Record, new_parser, new_record, save, stem
from bench_report import HOST_FIGURES, Row

from s2 import ending, files
from s2.ending import FailureError
from s2.tables import markdown

FIGURES = ("forward_ms", "graph_ms", "backward_ms", "peak_gib")
TREES = ("base", "this")
RECORDED = ("machine", "versions", "limits", "host", "sections")  # of a tree's benchmark

METHOD = (
    "base over this tree: medians over the rounds (host time, to which others on the machine only add: least of them) "
    "and, in brackets, the smallest and largest ratio of any two rounds",
    "torch's own kernels (dense ...) are the same in both trees: their ratios are the noise",
    "a cell without brackets is the same in all rounds; fwd graph: the forward in a CUDA graph, without host time",
)


def bench(tree: Path, options: Sequence[str], name: str, folder: Path) -> Record:
    """The record of one run of a tree's benchmark. Raises FailureError with its last lines if it fails."""
    command = [sys.executable, str(tree / "scripts" / "bench_attention.py"), *options]
    command += ["--commit", name, "--name", name, "--output", str(folder)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, env=env, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    records = list(folder.glob("*.json"))
    if done.returncode or len(records) != 1:
        raise FailureError(f"the benchmark of {tree} ended with {done.returncode}: {done.stdout[-2000:]}")
    record = json.loads(records[0].read_text())
    return {key: record[key] for key in RECORDED}


def parts(record: Record) -> Iterator[str]:
    """Of the page of a record with `base` and `this`, lists of benchmarks' records."""
    for title, keys, typical in (("Times and memory", FIGURES, statistics.median), ("Host time", HOST_FIGURES, min)):
        base, this = ([_rows(r, is_host=keys == HOST_FIGURES) for r in record[tree]] for tree in TREES)
        both = [at for at in base[0] if all(at in rows for rows in (*base, *this))]
        cells = ([_ratio([r[at][k] for r in base], [r[at][k] for r in this], typical) for k in keys] for at in both)
        body = [[*at[:2], f"{at[2]:,}", *row] for at, row in zip(both, cells, strict=True)]
        header = ("case", "kernel", "length", *keys)
        yield from (f"## {title}, base over this tree", markdown(header, body, numbers=range(2, len(header))))


def _rows(record: Record, *, is_host: bool) -> dict[tuple[str, str, int], Row]:
    """All of a benchmark by case, kernel and length."""
    sections = [{"name": "host", "rows": record["host"]}] if is_host else record["sections"]
    return {(section["name"], row["name"], row["seq_len"]): row for section in sections for row in section["rows"]}


def _ratio(base: Iterable[float | None], this: Iterable[float | None], typical: Callable[..., float]) -> str:
    """Of one figure in all rounds (`METHOD`)."""
    theirs, ours = ([figure for figure in side if figure] for side in (base, this))
    if not theirs or not ours:
        return "-"
    ratios = (typical(theirs) / typical(ours), min(theirs) / max(ours), max(theirs) / min(ours))
    middle, low, high = (f"{ratio:.2f}" for ratio in ratios)
    return middle if low == high else f"{middle} ({low} to {high})"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__, name="trees")
    parser.usage = "%(prog)s [options] BASE [-- options of bench_attention.py]"
    add = parser.add_argument
    add("base", type=Path, help="root of the other checkout")
    add("--rounds", type=int, default=2, help="runs of each tree (default 2)")
    add("--base-commit", default="base", help="commit of the other checkout, for the report")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end], argparse.Namespace(options=argv[end + 1 :]))
    if not (args.base / "scripts" / "bench_attention.py").is_file():
        parser.error(f"{args.base} is not a checkout: it has no scripts/bench_attention.py")
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is less than 1")
    return args


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    trees = dict(zip(TREES, (args.base.resolve(), ROOT), strict=True))
    found: dict[str, list[Record]] = {tree: [] for tree in TREES}
    for n in range(args.rounds):
        for tree in TREES if n % 2 == 0 else TREES[::-1]:
            with files.temporary_folder() as folder:
                found[tree].append(bench(trees[tree], args.options, tree, folder))
            print(f"round {n + 1} of {args.rounds}: {tree} is measured", flush=True)
            if all(found.values()):
                first = found["base"][0]
                record = new_record(
                    "bench_trees", sys.argv[1:], first["machine"], (), commit=args.commit, name=args.name,
                    method=[f"base: {args.base_commit}", *METHOD], **found,
                ) | {"versions": first["versions"]}  # fmt: skip
                path = args.output / stem(record)
                save(record, path, "This tree beside another", parts(record))
    print(f"wrote {path}.md with its .json")


if __name__ == "__main__":
    ending.run(main)
