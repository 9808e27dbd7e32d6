"""The report of `bench_attention.py`: tables and plots. Works on the rows alone, without a GPU.

Its records have `sections` (each `name`, `title`, `rows`), `host` (rows of host costs), and optionally `limits` and
`targets`. A row has `name`, `seq_len`, `status` ("ok", "skipped", "out of memory" or "failed"), `note`, and its
figures, None where there is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_record import Record, save, stem

from s2 import files
from s2.tables import markdown

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

    def kernel(row: Row) -> tuple[str, str] | None:
        return (row["spec"], row["name"].split()[2].rstrip(",")) if row.get("spec") else None

    body = []
    for section in sections:
        case = section.get("case", {})
        theirs = [row for other in sections if case.get("over") == other["name"] for row in other["rows"]]
        for row in filter(kernel, section["rows"]):
            alike = [other for other in theirs if kernel(other) == kernel(row)]
            if case.get("packed"):
                alike = alike[case["lengths"].index(row["seq_len"]) :]
            else:
                alike = [other for other in alike if other["seq_len"] == row["seq_len"]]
            if alike:
                pairs = [(row[key], alike[0][key]) for key in ("forward_tflops", "backward_tflops")]
                rates = ["-" if None in pair else f"{pair[0] / pair[1]:.2f}" for pair in pairs]
                body.append([section["name"], case["over"], *kernel(row), f"{row['seq_len']:,}", *rates])
    header = ("case", "over", "pattern", "backend", "length", "forward", "backward")
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

    figure = Figure(figsize=(17, 8), layout="constrained")
    grid = figure.subplots(2, 3)
    names = list(dict.fromkeys(row["name"] for row in rows if row["forward_ms"] is not None))
    lengths = sorted({row["seq_len"] for row in rows})
    colours = [*colormaps["tab10"].colors, *colormaps["tab20"].colors[1::2]]
    for axes, ways in zip(grid, (("forward",), ("forward", "backward")), strict=True):
        values = {
            f"{ways[-1]}, ms": [row[f"{ways[-1]}_ms"] for row in rows],
            f"{ways[-1]}, useful TFLOP/s": [row[f"{ways[-1]}_tflops"] for row in rows],
            f"{' + '.join(ways)}, speed-up over FlashAttention-2": [speedup(rows, row, *ways) for row in rows],
        }
        for axis, (label, panel) in zip(axes, values.items(), strict=True):
            if not any(panel):  # no backward, or no baseline
                axis.set_axis_off()
                continue
            for name, colour in zip(names, itertools.cycle(colours)):
                points = [(r["seq_len"], y) for r, y in zip(rows, panel, strict=True) if r["name"] == name and y]
                style = "--" if name.startswith("dense") else "-" if name.startswith("S2") else ":"
                axis.plot([x for x, _ in points], [y for _, y in points], style, marker="o", color=colour, ms=4)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
            axis.set_xticks([], minor=True)
            if "TFLOP" in label:
                axis.set_ylim(bottom=0)
            else:
                axis.set_yscale("log", base=10 if label.endswith("ms") else 2)
            if "speed-up" in label:
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            axis.set(xlabel="sequence length", title=label)
            axis.grid(alpha=0.3)
    figure.legend(grid[0][0].lines, names, loc="outside right upper", fontsize=9)
    figure.suptitle(title)
    with files.whole(path) as stream:
        figure.savefig(stream, format="png", dpi=130)


# ---------------------------------------------------------------- the page


def parts(record: Record, plots: dict[str, str]) -> Iterator[str]:
    """Of the page; `plots` maps a section's name to its picture."""
    sections, limits = record["sections"], record.get("limits")
    for section in sections:
        yield from (f"## {section['title']}", table(section["rows"]), notes(section["rows"]))
        if section["name"] in plots:
            yield f"![time, rates and speed-up, {section['name']}]({plots[section['name']]})"
    if record["host"]:
        yield from ("## Host time of one call, microseconds", host_table(record["host"]), notes(record["host"]))
    if compared := comparisons(sections):
        yield from ("## Our rates over another case's", compared)
    if limits and (measured := shares(sections, limits)):
        reached = f"{limits['copy_tb_s']:.2f} TB/s of a copy, {limits['product_tflop_s']:.0f} TFLOP/s of a product"
        yield from ("## Share of the machine's limits", f"Limits in this process: {reached}.", measured)
    if record.get("targets"):
        yield from ("## Targets: rate over cuDNN's", targets(sections))


def write(record: Record, folder: Path, *, with_plots: bool) -> Path:
    """Write record and page, and a `.png` for each section of several lengths; the path without a suffix."""
    plots = {}
    for section in record["sections"] if with_plots else []:
        if len({row["seq_len"] for row in section["rows"] if row["forward_ms"] is not None}) > 1:
            plots[section["name"]] = f"{stem(record)}-{section['name']}.png"
            plot(section["rows"], f"{record['machine']}, {section['title']}", folder / plots[section["name"]])
    path = folder / stem(record)
    save(record, path, "S2-Attention", parts(record, plots))
    return path
