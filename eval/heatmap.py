"""The needle heatmap: context length by depth, score 0 to 1 on a fixed red-yellow-green scale.

    python -m eval.heatmap results/needle.json --output needle.png --score exact
    python -m eval.heatmap before.json after.json --output before-after.png --titles before after
    python -m eval.heatmap dense.json hybrid.json --output pair.png --difference
    python -m eval.heatmap published_sweep.jsonl --output sweep.png --score-range 1,10

Each file, or folder of files that are parts of one sweep, is a panel of its own; --difference adds one for the second
minus the first. What can be read, `eval.sweep` says. The numbers of the picture, with their intervals, go beside it as
`<name>.cells.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.differences import Difference, of_sweeps
from eval.grid import format_lengths, parse_length
from eval.panels import PICTURES, Panel, check_picture, draw_panels
from eval.sweep import SCORE_NAMES, Sweep, describe, read_sweep
from s2 import ending, files
from s2.arguments import new_parser, path

_MOST_PANELS = 6
_AXES = ("context length (tokens)", "depth of the needle")
_KINDS = ("needle-heatmap", "needle-heatmaps")  # of files of a picture's numbers


def draw(
    sweeps: Sequence[Sweep],
    picture: Path,
    titles: Sequence[str] | None = None,
    difference: Difference | None = None,
    table: Sequence[Sequence[str]] = (),
) -> None:
    """Write sweeps as panels of one figure, with one colour scale of 0 to 1.

    Sweeps of the same depths get the same columns, so that a cell is found again at its place: the lengths of all of
    them, grey where a sweep has no samples. Others keep their own. Each panel has a line at its own `train_length`.

    Args:
        picture: .png, .pdf or .svg; an old one is replaced in one step.
        titles: one a panel; default: the checkpoints' names.
        difference: of the second of two sweeps minus the first; adds a panel for it.
        table: lines of a label and a text under each panel.
    """
    single = "Needle in a haystack: " if len(sweeps) == 1 else ""
    titles = list(titles or [single + sweep.checkpoint for sweep in sweeps])
    if len(titles) != len(sweeps):
        raise ValueError(f"{len(titles)} titles for {len(sweeps)} panels")
    lengths = sorted({length for sweep in sweeps for length in sweep.lengths})
    alike = all(sweep.depths == sweeps[0].depths for sweep in sweeps)
    panels = []
    for sweep, title in zip(sweeps, titles, strict=True):
        columns, depths = lengths if alike else sweep.lengths, sweep.depths
        counts = np.array([[len(sweep.cells.get((size, depth), ())) for size in columns] for depth in depths])
        panels.append(_panel(title, describe(sweep), sweep.grid(columns, depths), counts, columns, depths, sweep))
    if difference is not None:
        panels.append(_difference_panel(sweeps, titles, difference))
    scorers = " / ".join(dict.fromkeys(sweep.scorer for sweep in sweeps))
    draw_panels(panels, picture, f"score: {scorers}", *_AXES, share_rows=alike, table=table)


def draw_differences(
    first: Sweep, others: Sequence[Sweep], differences: Sequence[Difference], picture: Path, titles: Sequence[str]
) -> None:
    """Write what each of `others` is minus the first, over the cells that both have, as a picture of its own.

    titles: of the first and the others.
    """
    of = zip(others, titles[1:], differences, strict=True)
    panels = [_difference_panel([first, sweep], [titles[0], title], found) for sweep, title, found in of]
    draw_panels(panels, picture, "", *_AXES, share_rows=all(panel.rows == panels[0].rows for panel in panels))


def _panel(
    title: str, caption: str, grid: np.ndarray, counts: np.ndarray, lengths: list[int], depths: list[float], of: Sweep
) -> Panel:
    line, note = _training_length(lengths, of)
    rows = [f"{depth:.3g}%" for depth in depths]
    return Panel(title, caption, grid, counts, format_lengths(lengths), rows, line, note)


def _training_length(lengths: list[int], sweep: Sweep) -> tuple[int | None, str]:
    """Behind which column the line of the training length stands, None where the sweep ends before it; in words."""
    trained = sweep.train_length
    if trained is None:
        return None, ""
    place = sum(length <= trained for length in lengths)
    shown = trained <= max(sweep.lengths) or place < len(lengths)
    return place if shown else None, f"trained on {trained:,} tokens" + ("" if shown else ", beyond this map")


def _difference_panel(sweeps: Sequence[Sweep], titles: Sequence[str], difference: Difference) -> Panel:
    first, second = sweeps
    shared = first.cells.keys() & second.cells.keys()
    lengths, depths = sorted({cell[0] for cell in shared}), sorted({cell[1] for cell in shared})
    grids = [sweep.grid(lengths, depths) for sweep in sweeps]
    counts = [[min(len(s.cells.get((size, d), ())) for s in sweeps) for size in lengths] for d in depths]
    caption = f"mean {difference.value:+.3f} (95% {difference.low:+.2f} to {difference.high:+.2f}) · {difference.how}"
    grid = grids[1] - grids[0]
    of = second if first.train_length == second.train_length else replace(second, train_length=None)
    panel = _panel(f"{titles[1]} minus {titles[0]}", caption, grid, np.array(counts), lengths, depths, of)
    return replace(panel, is_difference=True)


# --- the command ------------------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("eval.heatmap", __doc__)
    add = parser.add_argument
    add("results", nargs="+", type=path, help="results of eval.needle, rows of a published sweep, or folders of such")
    add("--output", type=path, help="picture to write (.png, .pdf, .svg); without, the last name given is the picture")
    add("--score", default="exact", help=f"for results of eval.needle: {', '.join(SCORE_NAMES)}")
    add("--score-range", help="lowest and highest possible score of the rows, e.g. 1,10")
    add("--train-length", help="draw the training length here: 2k, or one a panel like 512,2k")
    add("--titles", nargs="+", help="one a panel (default: the checkpoints' names)")
    add("--difference", action="store_true", help="of two results: a third panel, the second minus the first")
    return parser.parse_intermixed_args(argv)  # a picture named last, also after options


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    picture, results = args.output, args.results
    if picture is None:
        if len(results) < 2 or results[-1].suffix.lower() not in PICTURES:
            raise ValueError("no picture to write is named; add --output needle.png")
        *results, picture = results
    check_picture(picture)
    if len(results) > _MOST_PANELS:
        raise ValueError(
            f"{len(results)} files would be {len(results)} panels, and {_MOST_PANELS} have room; a folder is one panel:"
            " its files are parts of one sweep"
        )
    if args.difference and len(results) != 2:
        raise ValueError(f"--difference is that of two results, and {len(results)} are named")
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
    difference = _difference(sweeps, results, args.score) if args.difference else None
    titles = args.titles
    if titles is None and len({sweep.checkpoint for sweep in sweeps}) < len(sweeps):
        titles = [str(file) for file in results]
    draw(sweeps, picture, titles, difference)
    panels = [sweep.as_json() for sweep in sweeps]
    more = {} if difference is None else {"difference": difference.as_json()}
    files.write_json(numbers, panels[0] if len(panels) == 1 else {"kind": "needle-heatmaps", "panels": panels, **more})
    for sweep in sweeps:
        print(describe(sweep) if len(sweeps) == 1 else f"{sweep.checkpoint}: {describe(sweep)}")
    if difference is not None:
        print(f"difference: {difference}, {difference.how}")
    print(f"{picture}\n{numbers}")


def _difference(sweeps: Sequence[Sweep], results: Sequence[Path], score: str) -> Difference:
    if not sweeps[0].cells.keys() & sweeps[1].cells.keys():
        raise ValueError(f"--difference: {results[0]} and {results[1]} have no length and depth in common")
    contents = [files.read_json(file) if file.suffix == ".json" and file.is_file() else {} for file in results]
    return of_sweeps(sweeps, [content if isinstance(content, dict) else {} for content in contents], score)


def _require_ours(numbers: Path) -> None:
    """Refuse to replace a file that is no picture's numbers, such as results under a like name. Raises ValueError."""
    if numbers.is_file() and (files.read_record(numbers) or {}).get("kind") not in _KINDS:
        raise ValueError(f"{numbers} is where the picture's numbers go, and another file; choose another --output")


def _numbers(option: str, text: str | None, parse: Callable[[str], Any]) -> list[Any]:
    try:
        return [parse(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from None


if __name__ == "__main__":
    ending.run(main)
