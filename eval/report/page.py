"""The page: sections in their order, as Markdown with pictures beside it and as HTML with the pictures in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np

from eval import differences, heatmap
from eval.grid import format_lengths
from eval.panels import Panel, draw_panels
from eval.report import curves, figures, layouts, rates, scores, settings, tasks
from eval.report.glance import glance, stems, which
from eval.report.html import to_html
from eval.report.run import Run
from eval.sweep import describe
from s2 import files
from s2.model.config import ModelConfig
from s2.model.layouts import layout_rows
from s2.tables import markdown

SIGNATURE = "<!-- written by python -m eval.report, which replaces it -->"
_PICTURES = "pictures of a report"
_ABREAST = 3  # heatmaps side by side


class Page:
    """Markdown that grows, with its pictures in `<name>-pictures/` beside it.

    file: the .md that will be written.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.parts = file, list[str]()
        self._folder = files.make_folder(file.with_name(f"{file.stem}-pictures"), _PICTURES)
        files.remove_files(self._folder, "*.svg")

    def add(self, *parts: str) -> None:
        self.parts += [part for part in parts if part]

    def picture(self, name: str, alt: str, draw: Callable[[Path], None]) -> None:
        """Draw a picture to the file that it is given, and show it here."""
        file = self._folder / f"{re.sub(r'[^A-Za-z0-9_+.-]+', '-', name)}.svg"
        draw(file)
        self.add(f"![{alt}]({quote(f'{self._folder.name}/{file.name}', safe='/+,')})")

    def text(self) -> str:
        return "\n\n".join([*self.parts, SIGNATURE]) + "\n"


def write(runs: Sequence[Run], file: Path) -> tuple[Path, Path]:
    """Write the page as .html and .md of this name; returns both.

    Raises:
        ValueError: one of the files was written by somebody else.
    """
    places = file.with_suffix(".html"), file.with_suffix(".md")
    for place in places:
        require_ours(place)
    page = Page(places[1])
    _sections(page, runs)
    text = page.text()
    files.write_text(places[1], text)
    files.write_text(places[0], to_html(text, places[1]))
    return places


def require_ours(file: Path) -> None:
    """Refuse to replace a page that somebody else has written. Raises ValueError."""
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.strip() and SIGNATURE not in text:
            raise ValueError(f"{file} was not written by this program; choose another --output, or move it")


def _sections(page: Page, runs: Sequence[Run]) -> None:
    several = len(runs) > 1
    page.add(("# Side by side: " if several else "# Results of ") + ", ".join(run.name for run in runs))
    page.add(markdown(["", *(run.name for run in runs)], glance(runs)))
    if several:
        page.add(f"Differences below are to {runs[0].name}, the first.")
    _layouts(page, runs)
    if any(run.recipe or run.model for run in runs):
        page.add("## Settings", *settings.settings(runs))
    _losses(page, runs)
    for stem in stems(run.needle for run in runs):
        _needle(page, runs, stem)
    for stem in stems(run.ruler for run in runs):
        _ruler(page, runs, stem)
    if any(run.gate for run in runs):
        page.add("## Gate to the next stage", scores.gate(runs))
    if any(run.lm for run in runs):
        page.add("## Downstream tasks", *tasks.downstream(runs))
    if any(run.log or run.summary for run in runs):
        page.add("## Speed and memory", *rates.speed(runs))
    page.add("## Environment", *rates.environment(runs))
    page.add("## What is missing", *missing(runs))


def _layouts(page: Page, runs: Sequence[Run]) -> None:
    if not any(run.model for run in runs):
        return
    page.add(
        "## Who sees what",
        "Rows are blocks of queries, columns blocks of keys: blue the window, green every V-th block, orange the first"
        " blocks (sinks), grey what is not seen. Heads together: the darker, the more of them see a block.",
    )
    alike: dict[str, tuple[ModelConfig, int, list[str]]] = {}
    for run in runs:
        if (model := run.model) is not None:
            seq_len, heads = run.seq_len or model.max_position_embeddings, model.num_attention_heads
            key = f"{model.layout} {heads} {model.num_key_value_heads} {seq_len}"
            alike.setdefault(key, (model, seq_len, []))[2].append(run.name)
    for i, (model, seq_len, having) in enumerate(alike.values()):
        alt = f"attention layout of {', '.join(having)}: {settings.literal(model.attention_layout)}"
        page.picture(f"layout-{i}", alt, _saving(layouts.draw(model, ", ".join(having))))
        table = [[settings.literal(cell) for cell in row] for row in layout_rows(model, seq_len)]
        page.add(markdown(["layers", "pattern", "density", "its heads see together"], table))


def _losses(page: Page, runs: Sequence[Run]) -> None:
    if any(run.log for run in runs):
        page.add("## Loss")
        figure = curves.loss_curves(runs, scores.heldout_sets(runs))
        page.picture("loss", "losses over tokens and over time", _saving(figure))
        if scores.heldout_sets(runs):
            page.add("At the end:", *scores.heldout(runs))
    for stem in stems(run.positions for run in runs):
        page.add(f"## Loss by position{which(stem, 'positions')}")
        tables = {run.name: scores.buckets(run.positions.get(stem)) for run in runs}
        page.picture(f"{stem}", "loss by position in the document", _saving(curves.loss_by_position(tables)))
        page.add(*scores.positions(runs, stem))


def _needle(page: Page, runs: Sequence[Run], stem: str) -> None:
    page.add(f"## Needle in a haystack{which(stem, 'needle')}", *scores.needle(runs, stem))
    having = [run for run in runs if stem in run.needle]
    found = {run.name: run.needle[stem] for run in having}
    sweeps = [run.sweeps[stem] for run in having]
    page.add("\n".join(f"- {name}: {describe(sweep)}" for name, sweep in zip(found, sweeps, strict=True)))
    names, sweeps = list(found), [replace(sweep, notes=()) for sweep in sweeps]  # the list above says them
    for begin in range(0, len(names), _ABREAST):
        shown = names[begin : begin + _ABREAST]
        draw = partial(heatmap.draw, sweeps[begin : begin + _ABREAST], titles=shown)
        page.picture(_numbered(stem, begin), f"needles found by length and depth: {', '.join(shown)}", draw)
    pairs = [
        (name, sweep) for name, sweep in zip(names, sweeps, strict=True) if sweep.cells.keys() & sweeps[0].cells.keys()
    ]
    for begin in range(1, len(pairs), _ABREAST):
        others, theirs = zip(*pairs[begin : begin + _ABREAST], strict=True)
        contents = [found[name].content for name in (names[0], *others)]
        each = [
            differences.of_sweeps([sweeps[0], sweep], [contents[0], content], "exact")
            for sweep, content in zip(theirs, contents[1:], strict=True)
        ]
        said = "; ".join(f"{name} {difference}" for name, difference in zip(others, each, strict=True))
        draw = partial(heatmap.draw_differences, sweeps[0], theirs, each, titles=(names[0], *others))
        page.picture(_numbered(f"{stem}-difference", begin - 1), f"needles found, minus {names[0]}: {said}", draw)


def _numbered(name: str, begin: int) -> str:
    return f"{name}-{begin}" if begin else name


def _ruler(page: Page, runs: Sequence[Run], stem: str) -> None:
    page.add(f"## RULER{which(stem, 'ruler')}")
    having = [run for run in runs if stem in run.ruler]
    found = [run.ruler[stem].content["summary"]["tasks"] for run in having]
    lengths = sorted({row["length"] for rows in found for row in rows})
    tasks = list(dict.fromkeys(row["task"] for rows in found for row in rows))
    panels = []
    for run, rows in zip(having, found, strict=True):
        by_cell = {(row["task"], row["length"]): row for row in rows}
        cells = [[by_cell.get((task, length), {}) for length in lengths] for task in tasks]
        grid = np.array([[cell.get("score", np.nan) / 100 for cell in line] for line in cells])
        counts = np.array([[cell.get("n", 0) for cell in line] for line in cells])
        sizes = sorted({row["n"] for row in rows})
        caption = f"n = {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "") + " per cell"
        panels.append(Panel(run.name, caption, grid, counts, format_lengths(lengths), tasks))
    for begin in range(0, len(panels), _ABREAST):
        shown = panels[begin : begin + _ABREAST]
        alt = f"RULER scores by task and length: {', '.join(panel.title for panel in shown)}"
        draw = partial(
            draw_panels, shown, bar="share found", xlabel="context length (tokens)", ylabel="", share_rows=True
        )
        page.picture(_numbered(stem, begin), alt, draw)
    page.add(*scores.ruler(runs, stem))


def missing(runs: Sequence[Run]) -> list[str]:
    """What each run lacks, and the command that makes it."""
    lines = []
    for run in runs:
        hf = run.folder / "hf"
        lacks = [
            ("config.yaml, so no settings", run.recipe),
            ("training log (logs/metrics.csv)", run.log),
            ("summary.json: the stage has not ended", run.summary),
            ("record of device, versions and commit (environment.json)", run.environment),
            ("exported weights here (hf/)", run.fingerprint),
            (f"needles (`python -m eval.needle --ckpt {hf}`)", run.needle),
            (f"RULER (`python -m eval.ruler --ckpt {hf}`)", run.ruler),
            (f"losses by position (`python -m eval.positions --ckpt {hf}`)", run.positions),
            (f"downstream tasks (`python -m eval.lm --ckpt {hf} --tasks ...`)", run.lm),
        ]
        gone = [what for what, there in lacks if not there]
        lines += [f"- {run.name} has no {what}" for what in gone]
        lines += [f"- Left out of {run.name}: {what}" for what in run.left_out]
    return ["\n".join(lines) or "Nothing: every part of this page is there for every run."]


# --- small things -----------------------------------------------------------------------------------------------------


def _saving(figure: figures.Figure) -> Callable[[Path], None]:
    return lambda file: figures.save(figure, file)
