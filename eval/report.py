"""One page of a run's results, or of several runs side by side.

    python -m eval.report runs/demo/extend-2k                                          # its results/README.md
    python -m eval.report runs/demo/pretrain runs/demo/extend-2k --output report.html

Reads what the other programs left in a run folder (lm-eval results, needle sweeps, held-out losses of the training log)
and writes Markdown with links to the pictures, or HTML (.html) with the pictures in it, so that the page can be sent.
Results of weights that the run no longer has are left out, and named.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from lm_eval.utils import make_table

from eval.arguments import new_parser, path
from eval.checkpoint import fingerprint, results_folder
from eval.grid import format_lengths
from eval.sweep import Sweep, describe, read_sweep
from s2 import ending
from s2.files import read_json, write_text
from s2.tables import markdown
from s2.training.metrics import read_metrics

_SIGNATURE = "<!-- written by python -m eval.report, which replaces it -->"
_EARLIER = ("# Results of ", "# Side by side: ")  # how pages begin that have no signature yet
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccd2d8;padding:.25em .6em;text-align:left}"
    "p:has(img){display:inline-block;width:49%;min-width:24em}img{max-width:100%}"
)
_TABLE = ("results", "versions", "n-shot", "higher_is_better")  # what lm-eval makes a table of
# What lm-eval results record beside the conditions under which they hold.
_ABOUT = {
    *("checkpoint", "fingerprint", "attention_layout", "block_size", "max_position_embeddings"),
    *("tasks", "num_fewshot", "cut_inputs", "remarks"),
}


@dataclass(frozen=True)
class RunResults:
    """What one run folder holds.

    lm: lm-eval results. needle: sweep by file. losses: rows of {step, tokens, <held-out set>: loss in nats}.
    left_out: names of result files that are of other weights than the run has now.
    """

    folder: Path
    lm: tuple[dict[str, Any], ...]
    needle: dict[Path, Sweep]
    losses: tuple[dict[str, float], ...]
    left_out: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> RunResults:
        """Raises FileNotFoundError for a folder without any result, ValueError for a broken file."""
        if not folder.is_dir():
            raise FileNotFoundError(f"run {folder}: no such folder; expected something like runs/demo/extend-2k")
        results = results_folder(folder)
        folder = results.parent
        weights = folder / "hf" if (folder / "hf").is_dir() else folder
        now = fingerprint(weights) if (weights / "config.json").is_file() else None
        lm, needle, left_out = [], {}, []
        for file in sorted(results.glob("*.json")):
            content = read_json(file)
            if not isinstance(content, dict) or ".old" in file.name:  # as earlier versions set sweeps aside
                continue
            about = content.get("s2") if "results" in content else content if content.get("kind") == "needle" else None
            if not isinstance(about, dict):
                continue
            if now and about.get("fingerprint") not in (None, now):
                left_out.append(file.name)
            elif about is not content:
                lm.append(_table_of(file, content))
            elif content.get("samples"):
                needle[file] = read_sweep([file])
        losses = _held_out_losses(folder / "logs" / "metrics.csv")
        if not (lm or needle or losses or left_out):
            raise FileNotFoundError(
                f"run {folder} has no results yet: neither results/*.json (`make eval`, `make needle`) nor"
                " held-out losses in logs/metrics.csv"
            )
        return cls(folder, tuple(lm), needle, tuple(losses), tuple(left_out))


def _table_of(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    parts = {"s2": content["s2"].get("tasks"), **{key: content.get(key) for key in _TABLE}}
    if missing := [key for key, value in parts.items() if not isinstance(value, list if key == "s2" else dict)]:
        raise ValueError(f"{file}: not as eval.lm writes it ({missing[0]!r} is missing or incomplete); move it away")
    return content


def labels(folders: Sequence[Path]) -> list[str]:
    """The last two parts of each path, or as many more as tell it from the others: A/demo/ext and B/demo/ext."""
    paths = [folder.resolve().parts for folder in folders]

    def last(parts: tuple[str, ...], count: int) -> str:
        return "/".join(parts[-count:]).replace("//", "/").removeprefix("/" if count < len(parts) else "")

    def label(parts: tuple[str, ...]) -> str:
        shortest = (n for n in range(2, len(parts)) if [last(p, n) for p in paths].count(last(parts, n)) == 1)
        return last(parts, next(shortest, len(parts)))

    return [label(parts) for parts in paths]


def _held_out_losses(file: Path) -> list[dict[str, float]]:
    """Rows of the training log that hold `val/<name>/loss` columns, as {step, tokens, <name>: loss}."""
    rows = []
    for row in read_metrics(file, strict=True):
        keys = [key for key in row if key.startswith("val/") and key.endswith("/loss")]
        losses = {key.removeprefix("val/").removesuffix("/loss"): row[key] for key in keys}
        rows += [{"step": row["step"], "tokens": row["tokens"], **losses}] if losses else []
    return rows


def run_page(run: RunResults, page: Path) -> str:
    """Markdown of one run, with pictures linked relative to `page`."""
    (name,) = labels([run.folder])
    parts = [f"# Results of {name}"]
    if run.losses:
        parts += ["## Held-out loss", _losses_table(run.losses), *_picture("loss", run.folder / "loss.png", page)]
    parts += _needle_parts([run], [name], page)
    parts += ["## Downstream tasks"] if run.lm else []
    for results in run.lm:
        parts += [_lm_conditions(results), make_table(results).strip()]
    return _page([*parts, *_left_out([run], [name])])


def comparison_page(runs: Sequence[RunResults], page: Path) -> str:
    """Markdown of several runs side by side, one column each; a dash where a run lacks the number."""
    names = labels([run.folder for run in runs])
    parts = ["# Side by side: " + ", ".join(names)]
    last = [run.losses[-1] if run.losses else {} for run in runs]
    if any(last):
        rows = [["tokens", *(f"{row['tokens']:,.0f}" if row else "-" for row in last)]]
        rows += [[name, *(_number(row.get(name)) for row in last)] for name in _sets(last)]
        parts += ["## Held-out loss at the end", markdown(["set", *names], rows)]
    parts += _needle_parts(runs, names, page)
    if rows := _metric_rows(runs):
        header = ["task", "n-shot", "metric", "conditions", *names]
        if not any(row[3] for row in rows):
            header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
        parts += ["## Downstream tasks", markdown(header, rows)]
        for name, run in zip(names, runs, strict=True):
            parts += [f"{name}\n\n{_lm_conditions(results)}" for results in run.lm]
    return _page([*parts, *_left_out(runs, names)])


def _needle_parts(runs: Sequence[RunResults], names: Sequence[str], page: Path) -> list[str]:
    """A section for each name of results, with a row for each run that has them."""
    found: dict[str, list[tuple[str, Path, Sweep]]] = {}
    for name, run in zip(names, runs, strict=True):
        for file, sweep in run.needle.items():
            found.setdefault(file.stem, []).append((name, file, sweep))
    parts = []
    for stem, sweeps in found.items():
        which = stem.removeprefix("needle").strip("-")
        parts.append("## Needle in a haystack" + (f": {which}" if which else ""))
        parts.append(_needle_table([(name, sweep) for name, _, sweep in sweeps]))
        parts.append("\n".join(f"- {name}: {describe(sweep)}" for name, _, sweep in sweeps))
        for name, file, _ in sweeps:
            parts += _picture(f"needle heatmap of {name}", file.with_suffix(".png"), page)
    return parts


def to_html(text: str, page: Path) -> str:
    """A Markdown page as HTML that needs no other file: the pictures are in it."""
    from markdown import markdown as convert

    def embed(match: re.Match[str]) -> str:
        picture = page.parent / unquote(match[1])
        return f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"'

    body = re.sub(r'src="([^"]+\.png)"', embed, convert(text, extensions=["tables"]))
    title = html.escape(text.splitlines()[0].lstrip("# "))
    return f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n{body}\n'


def _page(parts: Sequence[str]) -> str:
    return "\n\n".join([*parts, _SIGNATURE]) + "\n"


def _left_out(runs: Sequence[RunResults], names: Sequence[str]) -> list[str]:
    return [
        f"Left out of {name}, since they are of other weights than it has now: {', '.join(run.left_out)}"
        for name, run in zip(names, runs, strict=True)
        if run.left_out
    ]


def _sets(rows: Iterable[dict[str, float]]) -> list[str]:
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("step", "tokens")]


def _losses_table(losses: Sequence[dict[str, float]]) -> str:
    names = _sets(losses)
    picked = losses if len(losses) <= 8 else [losses[round(i)] for i in np.linspace(0, len(losses) - 1, 8)]
    rows = [
        [f"{row['step']:,.0f}", f"{row['tokens']:,.0f}", *(_number(row.get(name)) for name in names)] for row in picked
    ]
    return markdown(["step", "tokens", *names], rows)


def _needle_table(sweeps: Sequence[tuple[str, Sweep]]) -> str:
    """One row per checkpoint: mean with its interval, mean over depths by length, worst depth."""
    lengths = sorted({length for _, sweep in sweeps for length in sweep.lengths})
    rows = []
    for name, sweep in sweeps:
        means = dict(zip(sweep.lengths, np.nanmean(sweep.grid(), axis=0), strict=True))
        by_depth = np.nanmean(sweep.grid(), axis=1)
        low = int(by_depth.argmin())
        begin, end = sweep.interval()
        rows.append(
            [
                name,
                f"{sweep.mean():.3f} ({begin:.2f} to {end:.2f})",
                *(_number(means.get(length)) for length in lengths),
                f"{by_depth[low]:.3f} at {sweep.depths[low]:g}%",
            ]
        )
    return markdown(["checkpoint", "mean (95%)", *format_lengths(lengths), "worst depth"], rows)


def _metric_rows(runs: Sequence[RunResults]) -> list[list[str]]:
    """Rows of task, shots, metric, conditions and a value ± standard error a run.

    A run's results of one metric under several conditions stand in rows of their own, which say what differs; results
    of the first documents alone always do.
    """
    found: dict[tuple[str, str, str], list[tuple[int, dict[str, str], str]]] = {}
    for column, run in enumerate(runs):
        for results in run.lm:
            conditions = {key: str(value) for key, value in results["s2"].items() if key not in _ABOUT}
            for key, text in _metrics(results):
                found.setdefault(key, []).append((column, conditions, text))
    rows = []
    for key, values in found.items():
        differing = {"limit"} if any(c.get("limit", "None") != "None" for _, c, _ in values) else set()
        for column, conditions, _ in values:
            others = [other for c, other, _ in values if c == column]
            differing |= {name for name in conditions if len({other.get(name) for other in others}) > 1}
        cells: dict[str, list[str]] = {}
        for column, conditions, text in values:
            said = ", ".join(f"{name} {conditions.get(name, '?')}" for name in sorted(differing))
            cells.setdefault(said.replace("limit None", "no limit"), ["-"] * len(runs))[column] = text
        rows += [[*key, said, *row] for said, row in cells.items()]
    return rows


def _metrics(results: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], str]]:
    """((task, shots, metric), value ± standard error)"""
    for task, values in results["results"].items():
        shots = str(results.get("n-shot", {}).get(task, ""))
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{filtered}")
                margin = f" ± {error:.4f}" if isinstance(error, float) else ""
                label = name if filtered in ("", "none") else f"{name} ({filtered})"
                yield (task, shots, label), f"{value:.4f}{margin}"


def _lm_conditions(results: dict[str, Any]) -> str:
    about = results["s2"]
    said = {"max_length": "max_length", "bos": "BOS", "limit": "limit", "dtype": "dtype"}
    known = [f"{name} {about[key] or 'none'}" for key, name in said.items() if key in about]
    return f"{', '.join(about['tasks'])}: {', '.join(known)}, cut inputs: {about.get('cut_inputs', 'unknown')}"


def _picture(text: str, file: Path, page: Path) -> list[str]:
    """A link to a picture, where there is one."""
    link = Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix()
    return [f"![{text}]({quote(link, safe='/+,')})"] if file.is_file() else []


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def _require_ours(page: Path) -> None:
    """Refuse to replace a page that somebody else has written. Raises ValueError."""
    if page.is_file():
        text = page.read_text(encoding="utf-8", errors="replace")
        if text.strip() and _SIGNATURE not in text and not text.startswith(_EARLIER):
            raise ValueError(f"{page} was not written by this program; choose another --output, or move it")


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=path, help="run folders: runs/demo/pretrain runs/demo/extend-2k")
    parser.add_argument("--output", type=path, help=".md or .html to write (for one run: its results/README.md)")
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and args.output is None:
        raise ValueError("several runs need --output FILE, e.g. --output runs/demo/README.md")
    page = args.output or results_folder(args.runs[0]) / "README.md"
    _require_ours(page)
    read = [RunResults.read(folder) for folder in args.runs]
    runs = list({run.folder.resolve(): run for run in read}.values())  # a run that is named twice is one column
    text = run_page(runs[0], page) if len(runs) == 1 else comparison_page(runs, page)
    write_text(page, to_html(text, page) if page.suffix in (".html", ".htm") else text)
    print(page)


if __name__ == "__main__":
    ending.run(main)
