"""Losses as pictures: over tokens, over hours, over positions in the document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from eval.grid import format_length
from eval.report.figures import label_ends, looks, new_figure, style
from eval.report.run import Run

_SMOOTH = 40  # parts of a training curve that are averaged over, so that runs can be told apart


def loss_curves(runs: Sequence[Run], sets: Sequence[str]) -> Figure:
    """Training and held-out losses, one line a set, over tokens on the left and over hours on the right."""
    lines = [("train/loss", "training")] if any(run.series("train/loss", "tokens") for run in runs) else []
    lines += [(f"val/{name}/loss", f"held-out {name}") for name in sets]
    row = 2.3
    figure = new_figure(9.6, row * len(lines) + 0.3)
    grid = figure.subplots(len(lines), 2, squeeze=False, sharey="row")
    figure.subplots_adjust(left=0.07, right=0.85, top=1 - 0.3 / figure.get_figheight(), hspace=0.42, wspace=0.06)
    figure.subplots_adjust(bottom=0.45 / figure.get_figheight())
    for (key, title), pair in zip(lines, grid, strict=True):
        ends = []
        for over, axes in zip(("tokens", "seconds"), pair, strict=True):
            first = over == "tokens"
            scale, unit = (1.0, "tokens") if first else _unit(runs)
            xlabel = unit if key == lines[-1][0] else ""
            style(axes, xlabel, "nats a token" if first else "", title if first else "")
            if first:
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            for run, look in zip(runs, looks(len(runs)), strict=True):
                curve = np.array(run.series(key, over)).reshape(-1, 2)
                if not len(curve):
                    continue
                x, y = curve[:, 0] / scale, curve[:, 1]
                if key == "train/loss":
                    axes.plot(x, y, **look, linewidth=0.6, alpha=0.3)
                    y = _smooth(y)
                axes.plot(x, y, **look, linewidth=1.6, marker="o" if key != "train/loss" else "", markersize=3)
                ends += [(float(y[-1]), run.name, look["color"])] if over == "seconds" else []
        _limit(pair[0], [run.series(key, "tokens") for run in runs])
        label_ends(pair[1], ends)
    return figure


def loss_by_position(tables: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]]) -> Figure:
    """Loss by position of the token that is predicted, one panel a length.

    tables: buckets {from, to, loss, interval} by length by run.
    """
    lengths = sorted({length for found in tables.values() for length in found})
    figure = new_figure(9.6, 2.9)
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    figure.subplots_adjust(left=0.07, right=0.85, top=0.88, bottom=0.17, wspace=0.06)
    for length, axes in zip(lengths, panels, strict=True):
        first = axes is panels[0]
        title = f"documents of {format_length(length)}"
        style(axes, "position in the document, up to", "nats a token" if first else "", title)
        spans = sorted({(b["from"], b["to"]) for found in tables.values() for b in found.get(length, ())})
        ends = []
        for name, look in zip(tables, looks(len(tables)), strict=True):
            found = {(b["from"], b["to"]): b for b in tables[name].get(length, ())}
            x = [i for i, span in enumerate(spans) if span in found]
            if not x:
                continue
            losses = [found[spans[i]]["loss"] for i in x]
            low, high = zip(*(found[spans[i]].get("interval") or [math.nan] * 2 for i in x), strict=True)
            axes.plot(x, losses, **look, linewidth=1.6, marker="o", markersize=3)
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
            ends.append((float(losses[-1]), name, look["color"]))
        axes.set_xticks(range(len(spans)), [format_length(int(high)) for _, high in spans])
        if axes is panels[-1]:
            label_ends(axes, ends)
    return figure


def _unit(runs: Sequence[Run]) -> tuple[float, str]:
    most = max((run.log[-1].get("seconds", 0.0) for run in runs if run.log), default=0.0)
    return (3600.0, "hours") if most > 5400 else (60.0, "minutes")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over a window of a fortieth of the curve, shorter at its ends."""
    half = max(1, len(values) // _SMOOTH)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _limit(axes: object, curves: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Leave the first steep tenth of the curves out of the scale where it would flatten the rest."""
    late = [y for curve in curves for _, y in curve[len(curve) // 10 :]]
    every = [y for curve in curves for _, y in curve]
    if late and max(every) - min(every) > 2.5 * (max(late) - min(late)) > 0:
        room = 0.08 * (max(late) - min(late))
        axes.set_ylim(min(late) - room, max(late) + room)  # type: ignore[attr-defined]
