"""The report of `bench_attention.py`: tables, plots and the files they go to. Works on the rows alone, without a GPU.

A record is a dict with `machine`, `name`, `date`, `commit`, `command`, `versions`, `method` (lines of text),
`sections` (each `name`, `title`, `rows`), `host` (rows of host costs), and optionally `limits` and `targets`. A row has
`name`, `seq_len`, `status` ("ok", "skipped", "out of memory" or "failed"), `note`, and its figures, None where there is
none.
"""

from __future__ import annotations

import datetime
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from s2 import files
from s2.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]

FIGURES = (
    "forward_ms", "graph_ms", "forward_tflops", "backward_ms", "backward_tflops", "peak_gib", "difference",
    "flops", "bytes",
)  # fmt: skip
HOST_FIGURES = ("forward_us", "forward_grad_us", "backward_us", "backward_layer_us")
LAYERS = 8  # of the host time of a backward of several
TARGET_LENGTHS = (8192, 32768, 131072)
TARGET_SPECS = ("L1V15", "L8V16")


def blank_row(name: str, seq_len: int, figures: Sequence[str] = FIGURES) -> Row:
    return {"name": name, "seq_len": seq_len, "status": "ok", "note": "", **dict.fromkeys(figures)}


# ---------------------------------------------------------------- ratios


def ratio(rows: list[Row], row: Row, baseline: str, *keys: str) -> float | None:
    """The baseline's figure over the row's at the same length, summed over `keys`; None where one is missing."""
    base = next((r for r in rows if r["seq_len"] == row["seq_len"] and r["name"] == f"dense {baseline}"), None)
    if base is None or any(r[key] is None for r in (base, row) for key in keys):
        return None
    return sum(base[key] for key in keys) / sum(row[key] for key in keys)


def speedup(rows: list[Row], row: Row, *ways: str) -> float | None:
    """Time of FlashAttention-2 over the row's; `ways` are "forward" and "backward"."""
    return ratio(rows, row, "FlashAttention-2", *(f"{way}_ms" for way in ways))


def rate(rows: list[Row], row: Row, way: str) -> float | None:
    """The row's useful TFLOP/s over cuDNN's."""
    inverse = ratio(rows, row, "cuDNN", f"{way}_tflops")
    return None if inverse is None else 1 / inverse


# ---------------------------------------------------------------- tables


def table(rows: list[Row]) -> str:
    header = (
        "length", "kernel", "forward ms", "fwd graph ms", "TFLOP/s", "backward ms", "TFLOP/s", "peak GiB",
        "time vs FA2, fwd", "fwd+bwd", "rate / cuDNN, fwd", "bwd",
    )  # fmt: skip
    forms = {"forward_ms": ".3f", "graph_ms": ".3f", "forward_tflops": ".0f", "backward_ms": ".3f",
             "backward_tflops": ".0f", "peak_gib": ".2f"}  # fmt: skip
    body = []
    for row in rows:
        figures = [_cell(row[key], form) for key, form in forms.items()]
        if row["status"] != "ok":
            figures[0] = row["status"]
        over = [_cell(speedup(rows, row, *ways), ".2f", "x") for ways in (("forward",), ("forward", "backward"))]
        rates = [_cell(rate(rows, row, way), ".2f") for way in ("forward", "backward")]
        body.append([f"{row['seq_len']:,}", row["name"], *figures, *over, *rates])
    return markdown(header, body, numbers=(0, *range(2, len(header))))


def notes(rows: list[Row]) -> str:
    """One line for each kernel and reason, with the lengths where it holds."""
    lengths: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        said = row["note"] if row["status"] == "ok" else ": ".join(filter(None, (row["status"], row["note"])))
        if said:
            lengths.setdefault((row["name"], said), []).append(f"{row['seq_len']:,}")
    return "\n".join(f"- {name} at {', '.join(where)}: {said}" for (name, said), where in lengths.items())


def line(row: Row) -> str:
    """A row as it is printed while the benchmark runs."""
    start = f"{row['seq_len']:>8} {row['name']:<24}"
    if row["status"] != "ok":
        return f"{start} {row['status']} {row['note']}".rstrip()
    text = f"{start} fwd {row['forward_ms']:9.3f} ms {row['forward_tflops']:5.0f} TF"
    if row["backward_ms"] is not None:
        text += f"   bwd {row['backward_ms']:9.3f} ms {row['backward_tflops']:5.0f} TF"
    if row["peak_gib"] is not None:
        text += f"   {row['peak_gib']:.2f} GiB"
    return f"{text}   {row['note']}".rstrip()


def host_table(rows: list[Row]) -> str:
    header = ("kernel", "forward", "forward, with gradients", "backward alone", f"backward of a layer among {LAYERS}")
    body = [[row["name"], *(_cell(row[key], ".1f") for key in HOST_FIGURES)] for row in rows]
    return markdown(header, body, numbers=range(1, len(header)))


def targets(sections: list[dict[str, Any]]) -> str:
    """Our rate over cuDNN's dense causal one, for the Hopper kernels."""
    header = ("case", "pattern", "way", *(f"{length // 1024}k" for length in TARGET_LENGTHS))
    body = []
    for section in sections:
        found = {(row["name"], row["seq_len"]): row for row in section["rows"]}
        for spec in TARGET_SPECS:
            mine = [found.get((f"S2 {spec} hopper", length)) for length in TARGET_LENGTHS]
            if any(mine):
                for way in ("forward", "backward"):
                    ratios = [rate(section["rows"], row, way) if row else None for row in mine]
                    body.append([section["name"], spec, way, *(_cell(value, ".2f") for value in ratios)])
    return markdown(header, body, numbers=range(3, len(header)))


def comparisons(sections: list[dict[str, Any]]) -> str:
    """Our rates over those of the same pattern and backend in another case; empty where there are none. Of packed
    documents the other case has lengths of its own, in the same order."""
    header = ("case", "over", "pattern", "backend", "length", "forward", "backward")
    body = []
    for section in sections:
        case = section.get("case", {})
        others = [other for other in sections if case.get("over") == other["name"]]
        rows = [row for row in section["rows"] if row.get("spec")]
        for row in rows:
            backend = row["name"].split()[2].rstrip(",")
            theirs = [
                r for other in others for r in other["rows"]
                if r.get("spec") == row["spec"] and r["name"].split()[2] == backend
            ]  # fmt: skip
            if case.get("packed"):
                nth = case["lengths"].index(row["seq_len"])
                base = theirs[nth] if nth < len(theirs) else None
            else:
                base = next((r for r in theirs if r["seq_len"] == row["seq_len"]), None)
            if base is not None:
                pairs = [(row[key], base[key]) for key in ("forward_tflops", "backward_tflops")]
                rates = ["-" if None in pair else f"{pair[0] / pair[1]:.2f}" for pair in pairs]
                body.append([section["name"], case["over"], row["spec"], backend, f"{row['seq_len']:,}", *rates])
    return markdown(header, body, numbers=(4, 5, 6)) if body else ""


def shares(sections: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """Of our rows the least time that the machine's `limits` allow over the time they took, and which limit it is. The
    forward reads q, k, v and writes the output once, the backward moves twice as much; useful products only."""
    header = ("case", "kernel", "length", "forward", "limit", "backward", "limit")
    body = []
    for section in sections:
        for row in section["rows"]:
            if not row.get("spec") or row["forward_ms"] is None:
                continue
            cells = []
            for way, operations, moved in (("forward", 1, 1), ("backward", 2.5, 2)):
                least = {
                    "memory": moved * row["bytes"] / limits["copy_tb_s"] / 1e9,
                    "products": operations * row["flops"] / limits["product_tflop_s"] / 1e9,
                }  # ms
                bound = max(least, key=lambda limit: least[limit])
                ms = row[f"{way}_ms"]
                cells += ["-", "-"] if ms is None else [f"{least[bound] / ms:.2f}", bound]
            body.append([section["name"], row["name"], f"{row['seq_len']:,}", *cells])
    return markdown(header, body, numbers=(2, 3, 5)) if body else ""


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


# ---------------------------------------------------------------- plots


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Time, useful rate and speed-up over the sequence length: the forward above, the backward below."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("forward, ms", "log", lambda row: row["forward_ms"]),
        ("forward, useful TFLOP/s", "linear", lambda row: row["forward_tflops"]),
        ("forward, speed-up over FlashAttention-2", "times", lambda row: speedup(rows, row, "forward")),
        ("backward, ms", "log", lambda row: row["backward_ms"]),
        ("backward, useful TFLOP/s", "linear", lambda row: row["backward_tflops"]),
        ("forward + backward, speed-up over FlashAttention-2", "times",
         lambda row: speedup(rows, row, "forward", "backward")),
    ]  # fmt: skip
    figure = Figure(figsize=(17, 8), layout="constrained")
    grid = figure.subplots(2, 3)
    names = list(dict.fromkeys(row["name"] for row in rows if row["forward_ms"] is not None))
    lengths = sorted({row["seq_len"] for row in rows})
    colours = [*colormaps["tab10"].colors, *colormaps["tab20"].colors[1::2]]
    for axis, (label, scale, value) in zip(grid.flat, panels, strict=True):
        if all(value(row) is None for row in rows):  # no backward, or no baseline
            axis.set_axis_off()
            continue
        for index, name in enumerate(names):
            points = [(row["seq_len"], value(row)) for row in rows if row["name"] == name]
            points = [(x, y) for x, y in points if y is not None]
            line = "--" if name.startswith("dense") else "-" if name.startswith("S2") else ":"
            colour = colours[index % len(colours)]
            axis.plot(*zip(*points, strict=True) if points else ([], []), line, marker="o", color=colour, ms=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axis.set_xticks([], minor=True)
        if scale == "times":
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        else:
            axis.set_yscale(scale)
        if scale == "linear":
            axis.set_ylim(bottom=0)
        axis.set(xlabel="sequence length", title=label)
        axis.grid(alpha=0.3)
    figure.legend(grid.flat[0].lines, names, loc="outside right upper", fontsize=9)
    figure.suptitle(title)
    with files.whole(path) as stream:
        figure.savefig(stream, format="png", dpi=130)


# ---------------------------------------------------------------- files


def origin(script: str, argv: list[str], machine: str, versions: dict[str, str], commit: str | None) -> dict[str, Any]:
    """What a record says of where its figures come from: the command without the place that it wrote to."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    here = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    words: list[str] = []
    skip = False
    for word in argv:
        is_place = word.split("=")[0] in ("--output", "--work")
        words += [] if skip or is_place else [word]
        skip = is_place and "=" not in word
    return {
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "commit": commit or here or "unknown",
        "command": shlex.join(["python", f"scripts/{script}.py", *words]),
        "versions": versions,
    }


def heading(title: str, record: dict[str, Any]) -> str:
    """A page's title, and below it where its figures come from and how."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [f"command: `{record['command']}`", f"commit: {record['commit']}", f"versions: {versions}"]
    return f"# {title} on {record['machine']}\n\n" + "\n".join(f"- {line}" for line in [*lines, *record["method"]])


def report(record: dict[str, Any], plots: dict[str, str]) -> str:
    """The Markdown page; `plots` maps a section's name to its picture."""
    sections, limits = record["sections"], record.get("limits")
    parts = [heading("S2-Attention", record)]
    for section in sections:
        parts += [f"## {section['title']}", table(section["rows"]), notes(section["rows"])]
        if section["name"] in plots:
            parts.append(f"![time, rates and speed-up, {section['name']}]({plots[section['name']]})")
    if record["host"]:
        parts += ["## Host time of one call, microseconds", host_table(record["host"]), notes(record["host"])]
    if compared := comparisons(sections):
        parts += ["## Our rates over another case's", compared]
    if limits and (measured := shares(sections, limits)):
        reached = f"{limits['copy_tb_s']:.2f} TB/s of a copy, {limits['product_tflop_s']:.0f} TFLOP/s of a product"
        parts += ["## Share of the machine's limits", f"Limits in this process: {reached}.", measured]
    if record.get("targets"):
        parts += ["## Targets: rate over cuDNN's", targets(sections)]
    return "\n\n".join(filter(None, parts)) + "\n"


def write(record: dict[str, Any], folder: Path, *, with_plots: bool) -> Path:
    """Write page and record, and a `.png` for each section of several lengths."""
    plots = {}
    for section in record["sections"] if with_plots else []:
        if len({row["seq_len"] for row in section["rows"] if row["forward_ms"] is not None}) > 1:
            plots[section["name"]] = f"{stem(record)}-{section['name']}.png"
            plot(section["rows"], f"{record['machine']}, {section['title']}", folder / plots[section["name"]])
    return save(record, folder, report(record, plots))


def stem(record: dict[str, Any]) -> str:
    return f"{record['date']}-{re.sub('[^a-z0-9]+', '-', record['machine'].lower())}-{record['name']}"


def save(record: dict[str, Any], folder: Path, page: str) -> Path:
    """Write a record and its page, `<date>-<machine>-<name>.json` and `.md`."""
    path = folder / f"{stem(record)}.md"
    files.write_json(path.with_suffix(".json"), record)
    files.write_text(path, page)
    return path
