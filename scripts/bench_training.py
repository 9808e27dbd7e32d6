"""Training rates of the recipes on this machine's GPUs: tokens/s, MFU, and memory beside its estimate.

    python scripts/bench_training.py --data runs/1.3b/data --output docs/benchmarks/<date>-several-h200 \
        --cases 1.3b-8k:1,1.3b-8k:2,7b-8k:2,7b-8k-dense:2 [--steps 5] [--set trainer.strategy=zero_2_offload]

A case is `<recipe>-<length>[-dense]:<GPUs>`: the recipe's stage of that length as it ships, through its command line,
but for three things: it starts from random weights, all of its data are `--data` (a folder of `data.prepare` with the
recipe's vocabulary), and nothing is saved. `-dense` makes every layer dense. A step is `MICRO_BATCHES` micro-batches a
GPU. Each `--set KEY=VALUE` is a setting of the recipe on top, of all cases of this call, whose rows are named with it.
The first two steps, which compile, are left out; the rate is the median of the others.

Every case is a run of its own, one after the other. Results are added to <output>.json, which is written after each
case; cases that are there are not run again. <output>.md is the table of all of them. A case that fails is a row with
the sentence it ended in. Exit code 0 if all cases ran, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_record import Record, new_record, save

from data.shards.reader import MANIFEST
from s2 import ending, files
from s2.recipe import load_recipe
from s2.tables import markdown
from s2.training.metrics import read_metrics

MICRO_BATCHES = {8: 4, 32: 2, 128: 1}  # of a GPU in a step, by the length in thousands of tokens
COMPILING = 2  # steps at the start whose time says nothing
_CASE = re.compile(r"(?P<recipe>[\w.]+)-(?P<length>\d+)k(?P<dense>-dense)?:(?P<gpus>\d+)")


def recipe_file(recipe: str, length: int) -> Path:
    """The stage of `recipe` that trains at `length` thousand tokens.

    Raises:
        ValueError: there is none.
    """
    stages = {}
    for path in sorted(Path("recipes", recipe).glob("*.yaml")):
        stages[load_recipe(path)["data"]["init_args"]["seq_len"] // 1024] = path
    if length not in stages:
        raise ValueError(f"--cases {recipe}-{length}k: recipes/{recipe} trains at {[f'{known}k' for known in stages]}")
    return stages[length]


def overrides(case: re.Match[str], path: Path, data: Path, steps: int, root: str) -> list[str]:
    """Command line of a case behind the recipe's name."""
    length, gpus = int(case["length"]), int(case["gpus"])
    recipe = load_recipe(path)
    init, config = recipe["data"]["init_args"], recipe["model"]["config"]
    # an extension has the shape of the model it continues, which is that of the first stage
    shape = {k: v for k, v in load_recipe(path.parent / "pretrain.yaml")["model"]["config"].items() if k not in config}
    tokens = init["micro_batch_size"] * init["seq_len"] * gpus * MICRO_BATCHES.get(length, 1)
    train = f"{{path: {data / 'train'}, weight: 1.0}}"
    return [
        f"trainer.devices={gpus}",
        f"trainer.max_steps={steps}",
        "trainer.log_every_n_steps=1",
        "model.schedule={name: constant, warmup_steps: 1}",
        "model.init_from=null",
        *(f"model.config.{key}={json.dumps(value)}" for key, value in shape.items()),
        *(["model.config.attention_layout=dense"] if case["dense"] else []),
        "data.prepare=null",
        f"data.mixture=[{train}]",
        "data.validation=[]",
        f"run.tokens_per_step={tokens}",
        "run.checkpoint_every=null",
        "run.resume=never",
        f"run.root={root}",
    ]


def measure(name: str, data: Path, steps: int, changes: list[str]) -> dict[str, Any]:
    """Run one case with `changes`, settings as `KEY=VALUE`; its row."""
    case = _CASE.fullmatch(name)
    if case is None:
        raise ValueError(f"--cases: expected <recipe>-<length>k[-dense]:<GPUs>, such as 7b-8k:2, got {name!r}")
    path = recipe_file(case["recipe"], int(case["length"]))
    stage = load_recipe(path)["run"]["stage"]
    with files.temporary_folder() as root:
        settings = overrides(case, path, data, steps, str(root)) + changes
        command = [sys.executable, "-m", "s2.training.cli", str(path), *settings]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        metrics = Path(root, case["recipe"], stage, "logs", "metrics.csv")
        rows = [row for row in read_metrics(metrics) if "train/loss" in row] if metrics.exists() else []
    estimate = re.search(r"memory estimate: ([\d.]+) GiB", done.stdout)
    row = {
        "case": name,
        "command": " ".join(["python", *command[1:]]).replace(str(root), "<folder>"),
        "exit_code": done.returncode,
        "said": "" if done.returncode == 0 else next(iter(done.stderr.strip().split("\n")[-1:]), ""),
        "steps": len(rows),
        "estimate_gib": float(estimate[1]) if estimate else None,
        "memory_gib": max((row["memory_gib"] for row in rows), default=None),
        "loss": [row["train/loss"] for row in rows],
    }
    timed = rows[COMPILING:]
    for key in ("tokens_per_second_per_device", "mfu_executed", "mfu_dense_equivalent"):
        values = [row[key] for row in timed if key in row]
        row[key] = statistics.median(values) if values else None
        row[f"{key}_all"] = values
    return row


def parts(record: Record) -> list[str]:
    """The page's table."""
    header = ("case", "GPUs", "tokens/s/GPU", "over dense", "MFU executed / dense-equivalent", "peak GiB", "estimate",
              "steps")  # fmt: skip
    rates = {name: row["tokens_per_second_per_device"] for name, row in record["rows"].items()}
    body = []
    for name, row in record["rows"].items():
        case, *changes = name.split(maxsplit=1)
        kind, gpus = case.split(":")
        if (rate := row["tokens_per_second_per_device"]) is None:
            body.append([" ".join([kind, *changes]), gpus, f"exit code {row['exit_code']}: {row['said']}", *[""] * 5])
            continue
        dense = rates.get(" ".join([f"{kind}-dense:{gpus}", *changes]))
        mfu = [f"{row[key]:.3f}" for key in ("mfu_executed", "mfu_dense_equivalent") if row[key] is not None]
        over, steps = f"{rate / dense:.2f}x" if dense else "", len(row["tokens_per_second_per_device_all"])
        memory = [f"{row['memory_gib']:.1f}", f"{row['estimate_gib'] or ''}"]
        body.append([" ".join([kind, *changes]), gpus, f"{rate:,.0f}", over, " / ".join(mfu), *memory, str(steps)])
    return [markdown(header, body)]


def method(rows: dict[str, Any]) -> list[str]:
    tried: dict[str, list[str]] = {}  # cases may come from several days
    for name, row in rows.items():
        tried.setdefault(row["commit"], []).append(name)
    return [
        *(f"at {commit}: {', '.join(names)}" for commit, names in tried.items()),
        "random weights, real text, documents masked, nothing saved; medians of the steps after the first "
        f"{COMPILING}; MFU counts the causal half",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", required=True, help="comma-separated, such as 1.3b-8k:1,7b-128k-dense:2")
    parser.add_argument("--data", type=Path, required=True, help="folder that data.prepare has made train/ in")
    parser.add_argument("--output", type=Path, required=True, help="without a suffix")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="repeatable; a setting of the recipe"
    )
    parser.add_argument("--commit", help="commit to name in the report (default: git)")
    args = parser.parse_args()
    if args.steps <= COMPILING:
        raise ValueError(f"--steps {args.steps} must be above {COMPILING}, the steps that are not timed")
    if not (args.data / "train" / MANIFEST).is_file():
        raise FileNotFoundError(f"--data {args.data}: expected the folder that data.prepare has made train/ in")
    import torch

    file = Path(f"{args.output}.json")
    rows: dict[str, Any] = files.read_json(file)["rows"] if file.exists() else {}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["the CPU"]
    packages = ("torch", "triton", "lightning", "deepspeed")
    machine = f"{len(names)} x {names[0]}"
    record = new_record("bench_training", sys.argv[1:], machine, packages, commit=args.commit, rows=rows)
    for case in args.cases.split(","):
        name = " ".join([case, *args.set])
        if rows.get(name, {}).get("exit_code") == 0:
            continue
        row = rows[name] = measure(case, args.data, args.steps, args.set) | {"commit": record["commit"]}
        print(name, row["exit_code"], row["tokens_per_second_per_device"], row["memory_gib"], row["said"], flush=True)
        save(record | {"method": method(rows)}, args.output, "Training rates", parts(record))
    print(*parts(record))
    return int(any(row["exit_code"] != 0 for row in rows.values()))


if __name__ == "__main__":
    ending.run(main)
