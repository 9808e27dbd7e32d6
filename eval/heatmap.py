"""The needle heatmap: context length by depth, score 0 to 1 on a fixed red-yellow-green scale.

    python -m eval.heatmap results/needle.json --output needle.png --score exact
    python -m eval.heatmap before.json after.json --output before-after.png --titles before after
    python -m eval.heatmap published_sweep.jsonl --output sweep.png --score-range 1,10

Each file, or folder of files that are parts of one sweep, is a panel of its own. What can be read, `eval.sweep` says.
The numbers of the picture, with their intervals, go beside it as `<name>.cells.json`.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.arguments import new_parser, path
from eval.grid import format_lengths, parse_length
from eval.sweep import SCORE_NAMES, Sweep, describe, read_sweep
from s2 import ending, files

_COLOURS = ("#d73a49", "#f6c945", "#2fa866")
_MISSING = "#eceef1"
_INK = "#1f2933"
_PALE = "#52606d"
_PICTURES = (".png", ".pdf", ".svg")
_MOST_PANELS = 6
_KINDS = ("needle-heatmap", "needle-heatmaps")  # of files of a picture's numbers
_TOP, _NARROW = 0.14, 0.6  # inches: above the titles; columns whose labels are slanted
_FEW = 3  # cells of fewer samples say how many they have
_HARD_SPACE = "\u00a0"

Measure = Callable[[str], float]


def draw(sweeps: Sequence[Sweep], picture: Path, titles: Sequence[str] | None = None) -> None:
    """Write sweeps as panels of one figure, with one colour scale of 0 to 1.

    Sweeps of the same depths get the same columns, so that a cell is found again at its place: the lengths of all of
    them, grey where a sweep has no samples. Others keep their own. Each panel has a line at its own `train_length`.

    Args:
        picture: .png, .pdf or .svg; an old one is replaced in one step.
        titles: one a panel; default: the checkpoints' names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    check_picture(picture)
    single = "Needle in a haystack: " if len(sweeps) == 1 else ""
    titles = list(titles or [single + sweep.checkpoint for sweep in sweeps])
    if len(titles) != len(sweeps):
        raise ValueError(f"{len(titles)} titles for {len(sweeps)} panels")
    lengths = sorted({length for sweep in sweeps for length in sweep.lengths})
    alike = all(sweep.depths == sweeps[0].depths for sweep in sweeps)
    scales = [(lengths if alike else sweep.lengths, sweep.depths) for sweep in sweeps]
    columns, rows = (max(len(scale[i]) for scale in scales) for i in (0, 1))
    panels = len(sweeps)

    # inches
    cell_width = float(np.clip((9.0 if panels == 1 else 11.0 / panels) / columns, 0.30, 1.15))
    panel_width = max(4.25 if panels == 1 else 3.4, columns * cell_width)
    panel_height = max(2.0, rows * float(np.clip(4.6 / rows, 0.16, 0.42)))
    left, right, gap = 0.95, 1.2, 0.35 if alike else 0.95
    width = left + panels * panel_width + (panels - 1) * gap + right
    below = 1.0 if panel_width / columns < _NARROW else 0.75

    figure = Figure(dpi=160, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    room = panel_width + (0.9 if panels == 1 else 0.0)
    panel_titles = [_wrapped(title, room, _measure(canvas, 12, bold=True), 3) for title in titles]
    captions = [_wrapped(_whole_notes(describe(sweep)), room, _measure(canvas, 8.5), 12) for sweep in sweeps]
    title_height = 0.21 * max(map(_lines, panel_titles)) + 0.06
    height = _TOP + title_height + 0.165 * max(map(_lines, captions)) + 0.32 + panel_height + below
    figure.set_size_inches(width, height)

    def write(x: float, y: float, text: str, **style: Any) -> None:  # inches from the top left corner
        figure.text(x / width, 1 - y / height, text, va="top", parse_math=False, **style)

    for i, sweep in enumerate(sweeps):
        x = left + i * (panel_width + gap)
        axes = figure.add_axes((x / width, below / height, panel_width / width, panel_height / height))
        axes.set_facecolor(_MISSING)
        lengths, depths = scales[i]
        grid = sweep.grid(lengths, depths)
        cell_width, cell_height = panel_width / len(lengths), panel_height / len(depths)
        mesh = axes.pcolormesh(
            np.arange(len(lengths) + 1),
            np.arange(len(depths) + 1),
            np.ma.masked_invalid(grid),
            cmap=LinearSegmentedColormap.from_list("needle", _COLOURS),
            vmin=0,
            vmax=1,
            edgecolor="white",
            linewidth=1.2 if grid.size <= 400 else 0.5,
        )
        axes.set_xlim(0, len(lengths))
        axes.set_ylim(len(depths), 0)  # the start of the context on top
        _label_axes(axes, lengths, depths, cell_width, cell_height)
        if i and alike:
            axes.set_yticks([])
            axes.set_ylabel("")
        if cell_width >= 0.42 and cell_height >= 0.2:
            counts = np.array([[len(sweep.cells.get((length, depth), ())) for length in lengths] for depth in depths])
            size = 8 if cell_width >= 0.6 else 7
            _write_cells(axes, grid, counts, min(size, 26 * cell_height) if (counts[counts > 0] < _FEW).any() else size)
        _mark_training_length(axes, lengths, sweep)
        write(x, _TOP, panel_titles[i], fontsize=12, fontweight="bold", color=_INK, linespacing=1.25)
        write(x, _TOP + title_height, captions[i], fontsize=8.5, color=_PALE, linespacing=1.3)
    bar = figure.add_axes((1 - (right - 0.25) / width, below / height, 0.16 / width, panel_height / height))
    colourbar = figure.colorbar(mesh, cax=bar, ticks=[0, 0.25, 0.5, 0.75, 1])
    colourbar.outline.set_visible(False)
    colourbar.ax.tick_params(labelsize=8, length=0, colors=_INK)
    scorers = " / ".join(dict.fromkeys(sweep.scorer for sweep in sweeps))
    label = _wrapped(f"score: {scorers}", panel_height, _measure(canvas, 8), 2)
    colourbar.set_label(label, fontsize=8, color=_INK, parse_math=False)
    with files.whole(picture) as stream:
        figure.savefig(stream, format=picture.suffix[1:].lower())


def check_picture(picture: Path) -> None:
    """Refuse a name that is no picture's. Raises ValueError."""
    if picture.suffix.lower() not in _PICTURES:
        raise ValueError(f"{picture}: a picture ends in {', '.join(_PICTURES)}")


def _label_axes(axes: Any, lengths: list[int], depths: list[float], cell_width: float, cell_height: float) -> None:
    slanted = cell_width < _NARROW
    # At least 0.3 inch between length labels, 0.2 between depth labels.
    columns = range(0, len(lengths), max(1, round(0.3 / cell_width)))
    labels = format_lengths(lengths)
    style = {"rotation": 45, "ha": "right"} if slanted else {"ha": "center"}
    axes.set_xticks([c + 0.5 for c in columns], [labels[c] for c in columns], rotation_mode="anchor", **style)
    step = max(1, int(np.ceil(0.2 / cell_height)))
    labelled = sorted({*range(0, len(depths), step), len(depths) - 1})
    if len(labelled) > 1 and labelled[-1] - labelled[-2] < step:
        labelled.pop(-2)
    axes.set_yticks([r + 0.5 for r in labelled], [f"{depths[r]:.3g}%" for r in labelled])
    axes.tick_params(length=0, labelsize=8, colors=_INK, pad=5)
    axes.set_xlabel("context length (tokens)", fontsize=9, color=_INK, labelpad=6)
    axes.set_ylabel("depth of the needle", fontsize=9, color=_INK, labelpad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_cells(axes: Any, grid: np.ndarray, counts: np.ndarray, size: float) -> None:
    for (row, column), value in np.ndenumerate(grid):
        count = counts[row, column]
        text = f"{value:.2f}".removesuffix(".00") if value in (0, 1) else f"{value:.2f}"
        if count < _FEW:
            text = f"{text}\nn={count}" if count else "-"
        colour = "white" if count and not 0.22 <= value <= 0.85 else _INK
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour)


def _mark_training_length(axes: Any, lengths: list[int], sweep: Sweep) -> None:
    """A line behind the last length that was trained; in words where the sweep ends before it."""
    trained = sweep.train_length
    if trained is None:
        return
    place = sum(length <= trained for length in lengths)
    shown = trained <= max(sweep.lengths) or place < len(lengths)
    if shown:
        axes.axvline(place, color=_INK, linewidth=1.8, linestyle=(0, (4, 2)), clip_on=False)
    left_half = place <= len(lengths) / 2
    axes.annotate(
        f"trained on {trained:,} tokens" + ("" if shown else ", beyond this map"),
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


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _whole_notes(caption: str) -> str:
    """The same, with line breaks allowed between its notes only."""
    return caption.replace(" ", _HARD_SPACE).replace(f"·{_HARD_SPACE}", "· ")


def _wrapped(text: str, width: float, measure: Measure, most: int) -> str:
    """In at most `most` lines of about `width` inches; what has no room is left out of the middle, where paths and
    names say least."""
    text = text.replace("\n", " ")
    lines = textwrap.wrap(text, max(4, int(0.92 * width * len(text) / measure(text)))) if text.strip() else []
    if len(lines) > most:
        keep = most - most // 2
        lines = [*lines[: keep - 1], f"{lines[keep - 1][:-4]} ...", *lines[len(lines) - most // 2 :]]
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("heatmap", __doc__)
    add = parser.add_argument
    add("results", nargs="+", type=path, help="results of eval.needle, rows of a published sweep, or folders of such")
    add("--output", type=path, help="picture to write (.png, .pdf, .svg); without, the last name given is the picture")
    add("--score", default="exact", help=f"for results of eval.needle: {', '.join(SCORE_NAMES)}")
    add("--score-range", help="lowest and highest possible score of the rows, e.g. 1,10")
    add("--train-length", help="draw the training length here: 2k, or one a panel like 512,2k")
    add("--titles", nargs="+", help="one a panel (default: the checkpoints' names)")
    return parser.parse_intermixed_args(argv)  # a picture named last, also after options


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    picture, results = args.output, args.results
    if picture is None:
        if len(results) < 2 or results[-1].suffix.lower() not in _PICTURES:
            raise ValueError("no picture to write is named; add --output needle.png")
        *results, picture = results
    check_picture(picture)
    if len(results) > _MOST_PANELS:
        raise ValueError(
            f"{len(results)} files would be {len(results)} panels, and {_MOST_PANELS} have room; a folder is one panel:"
            " its files are parts of one sweep"
        )
    scale = _numbers("--score-range", args.score_range, float)
    if len(scale) not in (0, 2):
        raise ValueError(f"--score-range {args.score_range}: expected two numbers like 1,10")
    sweeps = [read_sweep([file], args.score, (scale[0], scale[1]) if scale else None) for file in results]
    trained = _numbers("--train-length", args.train_length, parse_length)
    trained *= len(sweeps) if len(trained) == 1 else 1
    for name, values in (("--titles", args.titles), ("--train-length", trained)):
        if values and len(values) != len(sweeps):
            raise ValueError(f"{name}: {len(values)} for {len(sweeps)} panels; give one a panel")
    if trained:
        sweeps = [replace(sweep, train_length=length) for sweep, length in zip(sweeps, trained, strict=True)]
    numbers = picture.with_name(f"{picture.stem}.cells.json")
    _require_ours(numbers)
    titles = args.titles
    if titles is None and len({sweep.checkpoint for sweep in sweeps}) < len(sweeps):
        titles = [str(file) for file in results]
    draw(sweeps, picture, titles)
    panels = [sweep.as_json() for sweep in sweeps]
    files.write_json(numbers, panels[0] if len(panels) == 1 else {"kind": "needle-heatmaps", "panels": panels})
    for sweep in sweeps:
        print(describe(sweep) if len(sweeps) == 1 else f"{sweep.checkpoint}: {describe(sweep)}")
    print(f"{picture}\n{numbers}")


def _require_ours(numbers: Path) -> None:
    """Refuse to replace a file that is no picture's numbers, such as results under a like name. Raises ValueError."""
    if numbers.is_file():
        try:
            content = files.read_json(numbers)
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.get("kind") not in _KINDS:
            raise ValueError(f"{numbers} is where the picture's numbers go, and another file; choose another --output")


def _numbers(option: str, text: str | None, parse: Callable[[str], Any]) -> list[Any]:
    try:
        return [parse(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from None


if __name__ == "__main__":
    ending.run(main)
