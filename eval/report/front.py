"""The picture that a README opens with: the needle heatmaps of runs, usually dense and hybrid, and a table below."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

from eval import heatmap
from eval.panels import check_picture
from eval.report.glance import glance
from eval.report.page import SIGNATURE, require_ours
from eval.report.run import Run
from eval.sweep import kind_of
from s2 import files
from s2.tables import markdown

_MOST = 4  # heatmaps side by side


def draw_front(runs: Sequence[Run], picture: Path) -> tuple[Path, Path]:
    """Write the picture, and its table as Markdown beside it; returns both files.

    Of the sweeps for a single needle that all runs have (files of one name), that of the longest context is drawn.

    Raises:
        ValueError: one run or too many, no such sweep in common, or another's file in the place of the table.
    """
    check_picture(picture)
    text = picture.with_suffix(".md")
    require_ours(text)
    if not 2 <= len(runs) <= _MOST:
        raise ValueError(f"--front {picture}: 2 to {_MOST} runs have room side by side, and {len(runs)} are named")
    shared = [stem for stem in runs[0].needle if all(_is_single(run, stem) for run in runs)]
    if not shared:
        have = "; ".join(f"{run.name}: {', '.join(run.needle) or 'none'}" for run in runs)
        raise ValueError(f"--front {picture}: no sweep of one name for a single needle is in all runs ({have})")
    stem = max(shared, key=lambda name: max(runs[0].sweeps[name].lengths))
    sweeps = [run.sweeps[stem] for run in runs]
    rows = glance(runs)
    names = [run.name for run in runs]
    heatmap.draw(sweeps, picture, names, table=[[label, *(_plain(text) for text in texts)] for label, *texts in rows])
    alt = f"needles found by length and depth: {', '.join(names)}"
    files.write_text(text, "\n\n".join([f"![{alt}]({picture.name})", markdown(["", *names], rows), SIGNATURE]) + "\n")
    return picture, text


def _is_single(run: Run, stem: str) -> bool:
    return stem in run.needle and kind_of(run.needle[stem].content) == "single"


def _plain(cell: str) -> str:
    """The first line of a Markdown cell as text."""
    return unescape(re.sub(r"\\(.)", r"\1", cell.split("<br>")[0]))
