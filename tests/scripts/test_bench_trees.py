"""Two checkouts side by side: `scripts/bench_trees.py`, with benchmarks that say what they are told to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BENCH = """
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
for name in ("commit", "name", "output", "lengths"):
    parser.add_argument(f"--{name}")
args = parser.parse_args()
print("no GPU here")
if args.lengths == "0":
    raise SystemExit(3)
times = pathlib.Path(os.environ["TIMES"])
left = json.loads(times.read_text())
ms = left[args.name].pop(0)
times.write_text(json.dumps(left))
row = {"name": "S2 L1V15 hopper", "seq_len": int(args.lengths), "forward_ms": ms, "graph_ms": None,
       "backward_ms": 2 * ms, "peak_gib": 1.5}
host = {"name": "dense cuDNN", "seq_len": 256, "forward_us": 10.0, "forward_grad_us": 20.0, "backward_us": None,
        "backward_layer_us": 5.0}
record = {"machine": "a GPU", "versions": {"torch": "9"}, "limits": {}, "host": [host],
          "sections": [{"name": "default", "rows": [row]}, {"name": "default", "rows": [row | {"seq_len": 1024}]}]}
pathlib.Path(args.output, "x.json").write_text(json.dumps(record))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A checkout with the benchmark above, and `bench_trees` of one with the same."""
    trees = [tmp_path / "base", tmp_path / "this"]
    for tree in trees:
        (tree / "scripts").mkdir(parents=True)
        (tree / "scripts" / "bench_attention.py").write_text(BENCH)
    for name in ("bench_trees.py", "bench_record.py", "bench_report.py"):
        (trees[1] / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    for tree in trees:
        (tree / "s2").symlink_to(ROOT / "s2")
    (tmp_path / "times.json").write_text(json.dumps({"base": [4.0, 5.0], "this": [2.0, 4.0]}))
    monkeypatch.setenv("TIMES", str(tmp_path / "times.json"))

    def run(*options):
        command = [sys.executable, "scripts/bench_trees.py", "../base", "--output", str(tmp_path / "out"), *options]
        return subprocess.run(command, cwd=trees[1], capture_output=True, text=True)

    run.out = tmp_path / "out"
    return run


def test_figures_of_the_base_stand_over_ours(run):
    done = run("--", "--lengths", "512")
    assert done.returncode == 0, done.stderr
    (page,) = run.out.glob("*.md")
    rows = [line.split(" | ") for line in page.read_text().splitlines() if "| 512 |" in line or "| 256 |" in line]
    default, host = ([cell.strip("| ") for cell in row] for row in rows)
    spread = "1.50 (1.00 to 2.50)"
    assert default == ["default", "S2 L1V15 hopper", "512", spread, "-", spread, "1.00"]
    assert host == ["host", "dense cuDNN", "256", "1.00", "1.00", "-", "1.00"]
    assert "| default | S2 L1V15 hopper | 1,024 |" in page.read_text()  # a case may have several sections
    record = json.loads(page.with_suffix(".json").read_text())
    assert record["command"] == "python scripts/bench_trees.py ../base -- --lengths 512"
    assert len(record["base"]) == len(record["this"]) == 2


def test_a_benchmark_that_fails_is_said(run):
    done = run("--", "--lengths", "0")
    assert done.returncode != 0
    assert "base ended with 3: no GPU here" in done.stderr


def test_a_folder_that_is_not_a_checkout_is_refused(run):
    done = run("--rounds", "0")
    assert done.returncode == 2 and "--rounds: 0 is less than 1" in done.stderr
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench_trees.py", str(run.out)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "is not a checkout" in done.stderr
