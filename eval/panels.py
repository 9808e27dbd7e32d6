"""Coloured grids side by side in one picture: scores from red to green, differences from orange over white to blue."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2 import files

_SCORES = ("#d73a49", "#f6c945", "#2fa866")
_DIFFERENCES = ("#b35806", "#f1a340", "#ffffff", "#67a9cf", "#2166ac")
_MISSING = "#eceef1"
_INK = "#1f2933"
_PALE = "#52606d"
PICTURES = (".png", ".pdf", ".svg")
_EDGE = 0.15  # inches: before the labels of a table below
_TOP, _NARROW = 0.14, 0.6  # inches: above the titles; columns whose labels are slanted
_LEFT, _BAR = 0.95, 1.2  # inches: for the labels of the rows, for a colour bar
_LABELS, _ROW, _LINE = 2.6, 0.1, 0.135  # inches: for the labels of a table below, around and for a line of its rows
_MOST_LINES = 4  # of a cell of it
FEW = 3  # cells of fewer samples say how many they have
_HARD_SPACE = "\u00a0"

Measure = Callable[[str], float]


@dataclass(frozen=True)
class Panel:
    """One grid.

    Attributes:
        grid, counts: values and numbers of samples [rows, columns]; NaN and 0 where there is none.
        columns, rows: labels.
        line, note: a dashed line behind so many columns (None: none), and what it is.
        is_difference: values of -1 to 1 instead of 0 to 1.
    """

    title: str
    caption: str
    grid: np.ndarray
    counts: np.ndarray
    columns: list[str]
    rows: list[str]
    line: int | None = None
    note: str = ""
    is_difference: bool = False


def check_picture(picture: Path) -> None:
    """Refuse a name that is no picture's. Raises ValueError."""
    if picture.suffix.lower() not in PICTURES:
        raise ValueError(f"{picture}: a picture ends in {', '.join(PICTURES)}")


def draw_panels(
    panels: Sequence[Panel],
    picture: Path,
    bar: str,
    xlabel: str,
    ylabel: str,
    *,
    share_rows: bool,
    table: Sequence[Sequence[str]] = (),
) -> None:
    """Write panels as one figure, whole or not at all.

    Args:
        bar: what the scores are.
        share_rows: the rows are the same, so that the first panel's labels do for all.
        table: lines of a label and a text under each panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    check_picture(picture)
    columns, rows = max(len(panel.columns) for panel in panels), max(len(panel.rows) for panel in panels)
    alone = len(panels) == 1 and not panels[0].is_difference

    # inches
    cell_width = float(np.clip((9.0 if alone else 11.0 / max(2, len(panels))) / columns, 0.30, 1.15))
    panel_width = max(4.25 if alone else 3.4, columns * cell_width)
    panel_height = max(2.0, rows * float(np.clip(4.6 / rows, 0.16, 0.42)))
    below = 1.0 if panel_width / columns < _NARROW else 0.75
    left = _LABELS if table else max(_LEFT, 0.35 + 0.065 * max(len(row) for panel in panels for row in panel.rows))
    places, width = _places(panels, left, panel_width, 0.35 if share_rows else _LEFT)

    figure = Figure(dpi=160, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    rows_below = _fitted(table, left, panel_width, _measure(canvas, 8.5))
    heights = [_ROW + _LINE * max(map(_lines, row)) for row in rows_below]
    below += sum(heights) + (0.3 if table else 0.0)
    room = panel_width + (0.9 if alone else 0.0)
    titles = [_wrapped(panel.title, room, _measure(canvas, 12, bold=True), 3) for panel in panels]
    captions = [_wrapped_notes(panel.caption, room, _measure(canvas, 8.5)) for panel in panels]
    title_height = 0.21 * max(map(_lines, titles)) + 0.06
    height = _TOP + title_height + 0.165 * max(map(_lines, captions)) + 0.32 + panel_height + below
    figure.set_size_inches(width, height)

    def write(x: float, y: float, text: str, **style: Any) -> None:  # inches from the top left corner
        figure.text(x / width, 1 - y / height, text, va="top", parse_math=False, **style)

    for i, (panel, x) in enumerate(zip(panels, places, strict=True)):
        axes = figure.add_axes((x / width, below / height, panel_width / width, panel_height / height))
        mesh = _draw(axes, panel, panel_width / len(panel.columns), panel_height / len(panel.rows))
        axes.set_xlabel(xlabel, fontsize=9, color=_INK, labelpad=6)
        if i and share_rows:
            axes.set_yticks([])
        else:
            axes.set_ylabel(ylabel, fontsize=9, color=_INK, labelpad=6)
        write(x, _TOP, titles[i], fontsize=12, fontweight="bold", color=_INK, linespacing=1.25)
        write(x, _TOP + title_height, captions[i], fontsize=8.5, color=_PALE, linespacing=1.3)
        if _has_bar(panels, i):
            place = ((x + panel_width + 0.25) / width, below / height, 0.16 / width, panel_height / height)
            ticks = [-1, -0.5, 0, 0.5, 1] if panel.is_difference else [0, 0.25, 0.5, 0.75, 1]
            colours = figure.colorbar(mesh, cax=figure.add_axes(place), ticks=ticks)
            colours.outline.set_visible(False)
            colours.ax.tick_params(labelsize=8, length=0, colors=_INK)
            label = "difference" if panel.is_difference else bar
            label = _wrapped(label, panel_height, _measure(canvas, 8), 2)
            colours.set_label(label, fontsize=8, color=_INK, parse_math=False)
    for i, row in enumerate(rows_below):
        y = height - sum(heights[i:]) - 0.12
        for x, text in zip((_EDGE, *places), row, strict=True):
            write(x, y, text, fontsize=8.5, color=_PALE if x == _EDGE else _INK, linespacing=1.1)
        if i:
            line = [1 - (y - 0.055) / height] * 2
            figure.add_artist(Line2D([_EDGE / width, 1 - _EDGE / width], line, color=_MISSING))
    with files.whole(picture) as stream:
        form = picture.suffix[1:].lower()
        figure.savefig(stream, format=form, metadata={"Date": None} if form == "svg" else None)


def _has_bar(panels: Sequence[Panel], i: int) -> bool:
    """The last panel of each scale has its colour bar."""
    return i + 1 == len(panels) or panels[i + 1].is_difference != panels[i].is_difference


def _places(panels: Sequence[Panel], left: float, panel_width: float, gap: float) -> tuple[list[float], float]:
    """Left edges of the panels, and the width of all, in inches."""
    places, x = [], left
    for i in range(len(panels)):
        places.append(x)
        x += panel_width + (_BAR if _has_bar(panels, i) else gap)
    return places, x


def _draw(axes: Any, panel: Panel, cell_width: float, cell_height: float) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    axes.set_facecolor(_MISSING)
    grid = panel.grid
    mesh = axes.pcolormesh(
        np.arange(len(panel.columns) + 1),
        np.arange(len(panel.rows) + 1),
        np.ma.masked_invalid(grid),
        cmap=LinearSegmentedColormap.from_list("cells", _DIFFERENCES if panel.is_difference else _SCORES),
        vmin=-1 if panel.is_difference else 0,
        vmax=1,
        edgecolor="white",
        linewidth=1.2 if grid.size <= 400 else 0.5,
    )
    axes.set_xlim(0, len(panel.columns))
    axes.set_ylim(len(panel.rows), 0)  # the start of the context on top
    _label_axes(axes, panel, cell_width, cell_height)
    if cell_width >= 0.42 and cell_height >= 0.2:
        size = 8 if cell_width >= 0.6 else 7
        few = (panel.counts[panel.counts > 0] < FEW).any()
        _write_cells(axes, panel, min(size, 26 * cell_height) if few else size)
    _mark_line(axes, panel)
    return mesh


def _label_axes(axes: Any, panel: Panel, cell_width: float, cell_height: float) -> None:
    slanted = cell_width < _NARROW
    # At least 0.3 inch between labels of columns, 0.2 between those of rows.
    columns = range(0, len(panel.columns), max(1, round(0.3 / cell_width)))
    style = {"rotation": 45, "ha": "right"} if slanted else {"ha": "center"}
    axes.set_xticks([c + 0.5 for c in columns], [panel.columns[c] for c in columns], rotation_mode="anchor", **style)
    step = max(1, int(np.ceil(0.2 / cell_height)))
    labelled = sorted({*range(0, len(panel.rows), step), len(panel.rows) - 1})
    if len(labelled) > 1 and labelled[-1] - labelled[-2] < step:
        labelled.pop(-2)
    axes.set_yticks([r + 0.5 for r in labelled], [panel.rows[r] for r in labelled])
    axes.tick_params(length=0, labelsize=8, colors=_INK, pad=5)
    axes.spines[:].set_visible(False)


def _write_cells(axes: Any, panel: Panel, size: float) -> None:
    for (row, column), value in np.ndenumerate(panel.grid):
        count = panel.counts[row, column]
        text = f"{value:.2f}".removesuffix(".00") if value in (0, 1) else f"{value:.2f}"
        if panel.is_difference:
            text = f"{value:+.2f}" if value else "0"
        if count < FEW:
            text = f"{text}\nn={count}" if count else "-"
        dark = abs(value) > 0.6 if panel.is_difference else not 0.22 <= value <= 0.85
        colour = "white" if count and dark else _INK
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour)


def _mark_line(axes: Any, panel: Panel) -> None:
    """A dashed line behind a column, and what it is; in words alone where there is no line."""
    shown = panel.line is not None
    place = len(panel.columns) if panel.line is None else panel.line
    if shown:
        axes.axvline(place, color=_INK, linewidth=1.8, linestyle=(0, (4, 2)), clip_on=False)
    left_half = place <= len(panel.columns) / 2
    axes.annotate(
        panel.note,
        xy=(place, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=((3 if left_half else -3) if shown else 0, 4),
        textcoords="offset points",
        ha="left" if left_half else "right",
        va="bottom",
        fontsize=8,
        color=_INK,
    )


# --- texts ------------------------------------------------------------------------------------------------------------


def _measure(canvas: Any, size: float, bold: bool = False) -> Measure:
    """Width in inches of a text at this font size."""
    from matplotlib.font_manager import FontProperties

    renderer = canvas.get_renderer()
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return lambda text: renderer.get_text_width_height_descent(text, font, False)[0] / renderer.dpi


def _fitted(table: Sequence[Sequence[str]], left: float, width: float, measure: Measure) -> list[list[str]]:
    """Rows of a table in lines that fit their columns: the labels `left` inches, each other one under its panel."""
    rooms = [left - 2 * _EDGE, *[width] * max((len(row) - 1 for row in table), default=0)]
    return [
        [_wrapped(text, room, measure, _MOST_LINES) for text, room in zip(row, rooms, strict=True)] for row in table
    ]


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _wrapped_notes(caption: str, room: float, measure: Measure) -> str:
    """In lines, broken between its notes only; a break stands for the dot there."""
    whole = caption.replace(" ", _HARD_SPACE).replace(f"·{_HARD_SPACE}", "· ")
    return _wrapped(whole, room, measure, 12).replace(f"{_HARD_SPACE}·\n", "\n")


def _wrapped(text: str, width: float, measure: Measure, most: int) -> str:
    """In at most `most` lines of at most `width` inches; what has no room is left out of the middle, where paths and
    names say least."""
    text = text.replace("\n", " ")
    if not text.strip():
        return ""
    count = max(4, int(0.92 * width * len(text) / measure(text)))
    while count > 4 and max(map(measure, textwrap.wrap(text, count))) > width:
        count -= 1
    lines = textwrap.wrap(text, count)
    if len(lines) > most:
        keep = most - most // 2
        lines = [*lines[: keep - 1], f"{lines[keep - 1][:-4]} ...", *lines[len(lines) - most // 2 :]]
    return "\n".join(lines)
