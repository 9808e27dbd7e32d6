"""The needle heatmap: context length by depth, score 0 to 1 on a fixed red-yellow-green scale.

    python -m eval.heatmap runs/demo/extend-2k/results/needle.json needle.png --score exact
    python -m eval.heatmap published_sweep.jsonl sweep.png --score-range 1,10

Reads results of `eval.needle`, or JSON lines with `context_length`, `depth_percent` and `score` (the form
in which sweeps of other models are published); several files are drawn as one sweep.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.output import read_json, write_json

SCORE_NAMES = {
    "exact": "teacher-forced exact match",
    "partial": "teacher-forced token accuracy",
    "generated": "greedy generation, exact match",
}
_COLOURS = ("#d73a49", "#f6c945", "#2fa866")
_MISSING = "#eceef1"
_INK = "#1f2933"


@dataclass(frozen=True)
class Sweep:
    """Scores in 0..1 by (context length in tokens, depth in percent), with what the title needs to say."""

    cells: dict[tuple[int, float], list[float]]
    checkpoint: str
    scorer: str
    train_length: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def lengths(self) -> list[int]:
        return sorted({length for length, _ in self.cells})

    @property
    def depths(self) -> list[float]:
        return sorted({depth for _, depth in self.cells})

    def grid(self) -> np.ndarray:
        """Mean score [depths, lengths]; NaN where a cell was not run."""
        return np.array(
            [[np.mean(self.cells.get((length, depth), [np.nan])) for length in self.lengths] for depth in self.depths]
        )

    def counts(self) -> tuple[int, int]:
        """Fewest and most samples of a cell that was run."""
        sizes = [len(scores) for scores in self.cells.values()]
        return min(sizes), max(sizes)

    def mean(self) -> float:
        """Mean over cells, so that a cell with more samples does not count more."""
        return float(np.nanmean(self.grid()))


def read_sweep(files: Sequence[Path], score: str = "exact", score_range: tuple[float, float] | None = None) -> Sweep:
    """Read result files into one sweep; `score_range` (low, high) brings scores on another scale to 0..1.

    Raises FileNotFoundError; ValueError for an unknown form, a missing score, no samples, or scores outside
    the range.
    """
    cells: defaultdict[tuple[int, float], list[float]] = defaultdict(list)
    names: list[str] = []
    scorer, train_length = SCORE_NAMES.get(score, score), None
    notes: list[str] = []
    low, high = score_range or (0.0, 1.0)
    if low >= high:
        raise ValueError(f"--score-range {low:g},{high:g}: expected the lowest and the highest score, like 1,10")
    for file in map(Path, files):
        rows, about = _read(file, score)
        for length, depth, value in rows:
            if not low <= value <= high:
                raise ValueError(
                    f"{file}: score {value:g} is outside {low:g}..{high:g}; name the scale with"
                    " --score-range, like 1,10"
                )
            cells[length, depth].append((value - low) / (high - low))
        if about["checkpoint"] not in names:
            names.append(about["checkpoint"])
        train_length = about.get("train_length") or train_length
        notes += [note for note in about.get("notes", []) if note not in notes]
        scorer = about.get("scorer", scorer)
    if not cells:
        raise ValueError(f"{', '.join(map(str, files))}: no samples")
    return Sweep(dict(cells), ", ".join(names), scorer, train_length, tuple(notes))


def _read(file: Path, score: str) -> tuple[list[tuple[int, float, float]], dict[str, Any]]:
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return _published(file, rows)
    results = read_json(file)
    if isinstance(results, list):
        return _published(file, results)
    if results.get("kind") != "needle":
        raise ValueError(
            f"{file}: expected a result file of eval.needle or rows of context_length, depth_percent, score"
        )
    rows = []
    for sample in results["samples"]:
        if score not in sample["scores"]:
            raise ValueError(
                f"{file}: sample {sample['id']} has no score {score!r}; it has {', '.join(sample['scores'])}"
            )
        rows.append((sample["length"], sample["depth"], sample["scores"][score]))
    settings = results["settings"]
    notes = [f"haystack {settings['haystack']}"]
    if results.get("attention_layout"):
        notes.insert(0, f"attention {results['attention_layout']}")
    notes += [f"{settings[key]} {key}" for key in ("needles", "distractors") if settings[key] > (key == "needles")]
    about = {"checkpoint": results["checkpoint"], "train_length": results.get("train_length"), "notes": notes}
    return rows, about


def _published(file: Path, rows: list[Any]) -> tuple[list[tuple[int, float, float]], dict[str, Any]]:
    keys = ("context_length", "depth_percent", "score")
    for number, row in enumerate(rows, start=1):
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"{file}, row {number}: no {missing[0]!r}; a published sweep has {', '.join(keys)}")
    triples = [(int(row[keys[0]]), float(row[keys[1]]), float(row[keys[2]])) for row in rows]
    name = rows[0].get("model", file.stem) if rows else file.stem
    return triples, {"checkpoint": name, "scorer": "as published"}


def draw(sweep: Sweep, png: Path, title: str | None = None) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    lengths, depths, grid = sweep.lengths, sweep.depths, sweep.grid()
    columns, rows = len(lengths), len(depths)
    cell_width = float(np.clip(9.0 / columns, 0.30, 1.15))
    cell_height = float(np.clip(4.6 / rows, 0.16, 0.42))
    slanted = cell_width < 0.6
    below = 1.0 if slanted else 0.75
    width = max(6.4, columns * cell_width + 2.3)
    subtitle = _wrapped(describe(sweep), width)
    above = 1.0 + 0.17 * subtitle.count("\n")
    height = max(2.0, rows * cell_height) + above + below
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.95 / width, below / height, 1 - 2.15 / width, 1 - (above + below) / height))
    axes.set_facecolor(_MISSING)
    mesh = axes.pcolormesh(
        np.arange(columns + 1),
        np.arange(rows + 1),
        np.ma.masked_invalid(grid),
        cmap=LinearSegmentedColormap.from_list("needle", _COLOURS),
        vmin=0,
        vmax=1,
        edgecolor="white",
        linewidth=1.2 if columns * rows <= 400 else 0.5,
    )
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)  # the start of the context on top
    _label_axes(axes, lengths, depths, cell_width, cell_height, slanted)
    if cell_width >= 0.42 and cell_height >= 0.2:
        _write_cells(axes, grid, 8 if cell_width >= 0.6 else 7)
    if sweep.train_length is not None:
        _mark_training_length(axes, lengths, sweep.train_length)
    left = 0.95 / width
    heading = title or f"Needle in a haystack: {sweep.checkpoint}"
    figure.text(left, 1 - 0.34 / height, heading, fontsize=12, fontweight="bold", color=_INK, va="center")
    figure.text(left, 1 - 0.52 / height, subtitle, fontsize=8.5, color="#52606d", va="top", linespacing=1.3)
    bar = figure.add_axes((1 - 0.95 / width, below / height, 0.16 / width, 1 - (above + below) / height))
    colourbar = figure.colorbar(mesh, cax=bar, ticks=[0, 0.25, 0.5, 0.75, 1])
    colourbar.outline.set_visible(False)
    colourbar.ax.tick_params(labelsize=8, length=0, colors=_INK)
    colourbar.set_label(f"score: {sweep.scorer}", fontsize=8, color=_INK)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def _label_axes(
    axes: Any, lengths: list[int], depths: list[float], cell_width: float, cell_height: float, slanted: bool
) -> None:
    # At least 0.3 inch between length labels, 0.2 between depth labels.
    columns = range(0, len(lengths), max(1, round(0.3 / cell_width)))
    axes.set_xticks([c + 0.5 for c in columns])
    axes.set_xticklabels(
        [format_length(lengths[c]) for c in columns],
        rotation=45 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    step = max(1, int(np.ceil(0.2 / cell_height)))
    labelled = sorted({*range(0, len(depths), step), len(depths) - 1})
    if len(labelled) > 1 and labelled[-1] - labelled[-2] < step:
        labelled.pop(-2)
    axes.set_yticks([r + 0.5 for r in labelled])
    axes.set_yticklabels([f"{depths[r]:.3g}%" for r in labelled])
    axes.tick_params(length=0, labelsize=8, colors=_INK, pad=5)
    axes.set_xlabel("context length (tokens)", fontsize=9, color=_INK, labelpad=6)
    axes.set_ylabel("depth of the needle", fontsize=9, color=_INK, labelpad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_cells(axes: Any, grid: np.ndarray, size: float) -> None:
    for (row, column), value in np.ndenumerate(grid):
        text = "-" if np.isnan(value) else f"{value:.2f}".removesuffix(".00") if value in (0, 1) else f"{value:.2f}"
        dark = not np.isnan(value) and (value < 0.22 or value > 0.85)
        axes.text(
            column + 0.5,
            row + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color="white" if dark else _INK,
        )


def _mark_training_length(axes: Any, lengths: list[int], train_length: int) -> None:
    place = sum(length <= train_length for length in lengths)
    axes.axvline(place, color=_INK, linewidth=1.8, linestyle=(0, (4, 2)), clip_on=False)
    left_half = place <= len(lengths) / 2
    axes.annotate(
        f"trained on {train_length:,} tokens",
        xy=(place, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3 if left_half else -3, 4),
        textcoords="offset points",
        ha="left" if left_half else "right",
        va="bottom",
        fontsize=8,
        color=_INK,
    )


def _wrapped(line: str, width: float) -> str:
    """Break between the parts of a subtitle that is wider than the picture (`width` inches)."""
    room, lines = int((width - 1.2) / 0.068), [""]
    for part in line.split(" · "):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > room:
            lines.append(part)
        else:
            lines[-1] += f" · {part}" if lines[-1] else part
    return "\n".join(lines)


def describe(sweep: Sweep) -> str:
    """One line: mean score, samples per cell, notes."""
    low, high = sweep.counts()
    n = f"n = {low}" if low == high else f"n = {low} to {high}"
    return " · ".join([f"mean {sweep.mean():.3f}", f"{n} per cell", *sweep.notes])


def format_length(length: int) -> str:
    """2048 is 2k, 2560 is 2.5k; what 512 does not divide counts in thousands: 118059 is 118k."""
    if length % 512 == 0 and length >= 1024:
        return f"{length / 1024:g}k"
    return str(length) if length < 1000 else f"{length / 1000:.3g}k"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.heatmap", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="needle.json, or rows of a published sweep (.jsonl)")
    parser.add_argument("png", type=Path, help="picture to write; the numbers go beside it as .json")
    parser.add_argument("--score", default="exact", help=f"for eval.needle results: {', '.join(SCORE_NAMES)}")
    parser.add_argument("--score-range", help="lowest and highest possible score of the rows, e.g. 1,10")
    parser.add_argument("--train-length", type=int, help="draw the training length here")
    parser.add_argument("--title")
    args = parser.parse_args(argv)
    score_range = None
    if args.score_range:
        try:
            low, high = map(float, args.score_range.split(","))
        except ValueError:
            raise ValueError(f"--score-range {args.score_range}: expected two numbers like 1,10") from None
        score_range = (low, high)
    sweep = read_sweep(args.results, args.score, score_range)
    if args.train_length:
        sweep = replace(sweep, train_length=args.train_length)
    draw(sweep, args.png, args.title)
    numbers = args.png.with_suffix(".json")
    if numbers.resolve() not in {file.resolve() for file in args.results}:
        write_json(numbers, cells_json(sweep))
    print(f"{describe(sweep)}\n{args.png}")


def cells_json(sweep: Sweep) -> dict[str, Any]:
    """The picture's numbers: mean score and n of every cell."""
    return {
        "kind": "needle-heatmap",
        "checkpoint": sweep.checkpoint,
        "scorer": sweep.scorer,
        "train_length": sweep.train_length,
        "cells": [
            {"length": length, "depth": depth, "score": float(np.mean(scores)), "n": len(scores)}
            for (length, depth), scores in sorted(sweep.cells.items())
        ],
    }


if __name__ == "__main__":
    main()
