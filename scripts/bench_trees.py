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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_report import HOST_FIGURES, ROOT, heading, origin, save

from s2 import ending, files
from s2.ending import FailureError
from s2.tables import markdown

FIGURES = ("forward_ms", "graph_ms", "backward_ms", "peak_gib")
TREES = ("base", "this")
RECORDED = ("machine", "versions", "limits", "host", "sections")  # of a tree's benchmark
Key = tuple[str, str, int]  # section, kernel, length

METHOD = (
    "base over this tree: medians over the rounds (host time, to which others on the machine only add: least of them) "
    "and, in brackets, the smallest and largest ratio of any two rounds",
    "torch's own kernels (dense ...) are the same in both trees: their ratios are the noise",
    "a cell without brackets is the same in all rounds; fwd graph: the forward in a CUDA graph, without host time",
)


def bench(tree: Path, options: Sequence[str], name: str, folder: Path) -> dict[str, Any]:
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


def figures(record: dict[str, Any]) -> dict[Key, dict[str, float]]:
    """All that a record has measured."""
    sections = {section["name"]: (section["rows"], FIGURES) for section in record["sections"]}
    sections["host"] = (record["host"], HOST_FIGURES)
    return {
        (name, row["name"], row["seq_len"]): {key: row[key] for key in keys if row[key] is not None}
        for name, (rows, keys) in sections.items()
        for row in rows
    }


def ratios(base: Sequence[dict[Key, dict[str, float]]], this: Sequence[dict[Key, dict[str, float]]]) -> Iterator[
    tuple[Key, dict[str, tuple[float, float, float]]]
]:  # fmt: skip
    """Of each row that every record has: by figure, the ratio (`METHOD`), and the least and the largest ratio."""
    for key in base[0]:
        if not all(key in record for record in (*base, *this)):
            continue
        found = {}
        for figure in base[0][key]:
            theirs, ours = ([r[key][figure] for r in side if figure in r[key]] for side in (base, this))
            if ours and min(ours) > 0:
                typical = min if figure in HOST_FIGURES else statistics.median
                middle = typical(theirs) / typical(ours)
                found[figure] = (middle, min(theirs) / max(ours), max(theirs) / min(ours))
        yield key, found


def page(record: dict[str, Any]) -> str:
    """Of a record with `base` and `this`, lists of benchmarks' records."""
    rows = list(ratios(*([figures(r) for r in record[tree]] for tree in TREES)))
    parts = [heading("This tree beside another", record)]
    for title, keys, is_host in (("Times and memory", FIGURES, False), ("Host time", HOST_FIGURES, True)):
        body = [
            [section, kernel, f"{length:,}", *(_cell(found.get(key)) for key in keys)]
            for (section, kernel, length), found in rows
            if (section == "host") == is_host
        ]
        header = ("case", "kernel", "length", *keys)
        parts.append(f"## {title}, base over this tree\n\n{markdown(header, body, numbers=range(2, len(header)))}")
    return "\n\n".join(parts) + "\n"


def _cell(ratio: tuple[float, float, float] | None) -> str:
    if ratio is None:
        return "-"
    middle, low, high = (f"{value:.2f}" for value in ratio)
    return middle if low == high else f"{middle} ({low} to {high})"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] BASE [-- options of bench_attention.py]",
    )  # fmt: skip
    add = parser.add_argument
    add("base", type=Path, help="root of the other checkout")
    add("--rounds", type=int, default=2, help="runs of each tree (default 2)")
    add("--base-commit", default="base", help="commit of the other checkout, for the report")
    add("--commit", default=None, help="commit of this tree (default: git)")
    add("--name", default="trees", help="last part of the report's file name (default: %(default)s)")
    add("--output", type=Path, default=ROOT / "docs" / "benchmarks")
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
    found: dict[str, list[dict[str, Any]]] = {tree: [] for tree in TREES}
    for n in range(args.rounds):
        for tree in TREES if n % 2 == 0 else TREES[::-1]:
            with files.temporary_folder() as folder:
                found[tree].append(bench(trees[tree], args.options, tree, folder))
            print(f"round {n + 1} of {args.rounds}: {tree} is measured", flush=True)
            first = found["base"][0]
            record = origin("bench_trees", sys.argv[1:], first["machine"], first["versions"], args.commit)
            record |= {"name": args.name, "method": [f"base: {args.base_commit}", *METHOD], **found}
            if all(found.values()):
                path = save(record, args.output, page(record))
    print(f"wrote {path} with its .json")


if __name__ == "__main__":
    ending.run(main)
