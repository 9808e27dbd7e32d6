"""One page of a run's results: `python -m eval.report runs/demo/extend-2k`, or several runs side by side.

Reads what the other programs left in a run folder (lm-eval results, needle sweeps, held-out losses of the
training log) and writes Markdown: `results/README.md` of the run, or for several runs the file that
`--output` names.
"""

import argparse
import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.utils import make_table

from eval.checkpoint import checkpoint_name
from eval.sweep import Sweep, describe, format_lengths, read_sweep
from s2 import ending
from s2.files import read_json, write_text


@dataclass(frozen=True)
class RunResults:
    """What one run folder holds.

    lm: lm-eval results. needle: sweep by file. losses: rows of {step, tokens, <held-out set>: loss in nats}.
    """

    folder: Path
    lm: tuple[dict[str, Any], ...]
    needle: dict[Path, Sweep]
    losses: tuple[dict[str, float], ...]

    @property
    def name(self) -> str:
        return checkpoint_name(self.folder)

    @classmethod
    def read(cls, folder: Path) -> "RunResults":
        """Raises FileNotFoundError for a folder without any result, ValueError for a broken file."""
        if not folder.is_dir():
            raise FileNotFoundError(f"run {folder}: no such folder; expected something like runs/demo/extend-2k")
        lm, needle = [], {}
        for file in sorted((folder / "results").glob("*.json")):
            content = read_json(file)
            if isinstance(content, dict) and "s2" in content and "results" in content:
                lm.append(content)
            elif isinstance(content, dict) and content.get("kind") == "needle" and ".old" not in file.name:
                needle[file] = read_sweep([file])
        losses = _validation_losses(folder / "logs" / "metrics.csv")
        if not (lm or needle or losses):
            raise FileNotFoundError(
                f"run {folder} has no results yet: neither results/*.json (`make eval`, `make needle`) nor"
                " held-out losses in logs/metrics.csv"
            )
        return cls(folder, tuple(lm), needle, tuple(losses))


def _validation_losses(file: Path) -> list[dict[str, float]]:
    """Rows of the training log that hold `val/<name>/loss` columns, as {step, tokens, <name>: loss}."""
    if not file.is_file():
        return []
    rows = []
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            losses = {
                key.split("/")[1]: float(value)
                for key, value in row.items()
                if key and value and key.startswith("val/") and key.endswith("/loss")
            }
            if losses:
                rows.append({"step": float(row["step"]), "tokens": float(row.get("tokens") or 0), **losses})
    return rows


def run_page(run: RunResults, page: Path) -> str:
    """Markdown of one run, with pictures linked relative to `page`."""
    parts = [f"# Results of {run.name}"]
    if run.losses:
        parts += ["## Held-out loss", _losses_table(run.losses)]
        if (run.folder / "loss.png").is_file():
            parts.append(_picture("loss over tokens", run.folder / "loss.png", page))
    for file, sweep in run.needle.items():
        parts += ["## Needle in a haystack", describe(sweep), _needle_table({run.name: sweep})]
        if file.with_suffix(".png").is_file():
            parts.append(_picture(f"needle heatmap of {run.name}", file.with_suffix(".png"), page))
    if run.lm:
        parts.append("## Downstream tasks")
    for results in run.lm:
        parts += [_lm_conditions(results), make_table(results).strip()]
    return "\n\n".join(parts) + "\n"


def comparison_page(runs: Sequence[RunResults], page: Path) -> str:
    """Markdown of several runs side by side, one column each; a dash where a run lacks the number."""
    parts = ["# Side by side: " + ", ".join(run.name for run in runs)]
    last = {run.name: run.losses[-1] for run in runs if run.losses}
    if last:
        names = list(dict.fromkeys(key for row in last.values() for key in row if key not in ("step", "tokens")))
        rows = [["tokens", *(f"{last[r.name]['tokens']:,.0f}" if r.name in last else "-" for r in runs)]]
        rows += [[name, *(_number(last.get(run.name, {}).get(name)) for run in runs)] for name in names]
        parts += ["## Held-out loss at the end", _markdown(["set", *(run.name for run in runs)], rows)]
    sweeps = {run.name: next(iter(run.needle.values())) for run in runs if run.needle}
    if sweeps:
        parts += ["## Needle in a haystack", _needle_table(sweeps)]
        for run in runs:
            pictures = [file.with_suffix(".png") for file in run.needle if file.with_suffix(".png").is_file()]
            parts += [_picture(f"needle heatmap of {run.name}", picture, page) for picture in pictures]
    metrics = {run.name: _metrics(run) for run in runs}
    keys = list(dict.fromkeys(key for values in metrics.values() for key in values))
    if keys:
        rows = [[*key, *(metrics[run.name].get(key, "-") for run in runs)] for key in keys]
        header = ["task", "n-shot", "metric", *(run.name for run in runs)]
        conditions = [f"{run.name}\n\n{_lm_conditions(results)}" for run in runs for results in run.lm]
        parts += ["## Downstream tasks", _markdown(header, rows), *conditions]
    return "\n\n".join(parts) + "\n"


def _losses_table(losses: Sequence[dict[str, float]]) -> str:
    names = list(dict.fromkeys(key for row in losses for key in row if key not in ("step", "tokens")))
    picked = losses if len(losses) <= 8 else [losses[round(i)] for i in np.linspace(0, len(losses) - 1, 8)]
    rows = [
        [f"{row['step']:,.0f}", f"{row['tokens']:,.0f}", *(_number(row.get(name)) for name in names)] for row in picked
    ]
    return _markdown(["step", "tokens", *names], rows)


def _needle_table(sweeps: dict[str, Sweep]) -> str:
    """Mean score over depths by length, one row per checkpoint, and the worst depth."""
    lengths = sorted({length for sweep in sweeps.values() for length in sweep.lengths})
    rows = []
    for name, sweep in sweeps.items():
        means = dict(zip(sweep.lengths, np.nanmean(sweep.grid(), axis=0), strict=True))
        worst = np.nanmean(sweep.grid(), axis=1)
        low = int(worst.argmin())
        rows.append(
            [
                name,
                *(_number(means.get(length)) for length in lengths),
                f"{worst[low]:.3f} at {sweep.depths[low]:g}%",
            ]
        )
    return _markdown(["checkpoint", *format_lengths(lengths), "worst depth"], rows)


def _metrics(run: RunResults) -> dict[tuple[str, str, str], str]:
    """{(task, shots, metric): value ± standard error}; a later file wins."""
    found = {}
    for results in run.lm:
        for task, values in results["results"].items():
            shots = str(results.get("n-shot", {}).get(task, ""))
            for key, value in values.items():
                name, _, filtered = key.partition(",")
                if not isinstance(value, float) or name.endswith("_stderr"):
                    continue
                error = values.get(f"{name}_stderr,{filtered}")
                label = name if filtered in ("", "none") else f"{name} ({filtered})"
                margin = f" ± {error:.4f}" if isinstance(error, float) else ""
                found[task, shots, label] = f"{value:.4f}{margin}"
    return found


def _lm_conditions(results: dict[str, Any]) -> str:
    about = results["s2"]
    return (
        f"{', '.join(about['tasks'])}: max_length {about['max_length']}, BOS {about['bos']},"
        f" limit {about['limit'] or 'none'}, cut inputs: {about['cut_inputs']}"
    )


def _picture(text: str, file: Path, page: Path) -> str:
    link = Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix()
    return f"![{text}]({link})"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, e.g. runs/demo/pretrain runs/demo/extend-2k")
    parser.add_argument("--output", type=Path, help="file to write (default, for one run: its results/README.md)")
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and args.output is None:
        raise ValueError("several runs need --output FILE, e.g. --output runs/demo/README.md")
    page = args.output or args.runs[0] / "results" / "README.md"
    runs = [RunResults.read(folder) for folder in args.runs]
    write_text(page, run_page(runs[0], page) if len(runs) == 1 else comparison_page(runs, page))
    print(page)


if __name__ == "__main__":
    ending.run(main)
