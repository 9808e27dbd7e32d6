"""What the pictures of a report have in common: size, colours, labels at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from s2 import files

INK, PALE, GRID = "#1f2933", "#52606d", "#e4e7eb"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5f3f", "#000000")  # Okabe and Ito's
_DASHES = ("-", "--", ":")  # where there are more lines than colours
_LINE = 0.16  # inches that a label needs


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches (no display, no global state)."""
    return Figure(figsize=(width, height), facecolor="white")


def looks(count: int) -> list[dict[str, str]]:
    """A colour and a line style for each of so many lines."""
    n = len(COLOURS)
    return [{"color": COLOURS[i % n], "linestyle": _DASHES[i // n % len(_DASHES)]} for i in range(count)]


def style(axes: Any, xlabel: str = "", ylabel: str = "", title: str = "") -> None:
    """Pale grid, no frame on top and right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold", parse_math=False)


def label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names to the right of the axes, at the heights where their lines end and moved apart where they would overlap.

    ends: (y in data coordinates, text, colour) of each line.
    """
    if not ends:
        return
    height = axes.get_position().height * axes.figure.get_size_inches()[1]
    step = _LINE / height
    low, high = axes.get_ylim()
    places = sorted(((y - low) / (high - low), text, colour) for y, text, colour in ends)
    heights: list[float] = []
    for wanted, _, _ in places:
        heights.append(max(wanted, heights[-1] + step) if heights else wanted)
    over = heights[-1] - max(1.0, places[-1][0])
    heights = [height - max(0.0, over) for height in heights]
    for place, (wanted, text, colour) in zip(heights, places, strict=True):
        axes.annotate(
            text,
            xy=(1.0, min(max(wanted, 0.0), 1.0)),
            xytext=(1.03, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )


def save(figure: Figure, file: Path) -> None:
    """Write a picture whole; the same figure gives the same bytes."""
    import matplotlib

    form = file.suffix[1:].lower()
    with matplotlib.rc_context({"svg.hashsalt": "s2"}), files.whole(file) as stream:
        figure.savefig(stream, format=form, dpi=160, metadata={"Date": None} if form == "svg" else None)
