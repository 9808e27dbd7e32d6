"""The page of an experiment: results.json and curves.json, README.md with tables side by side, and pictures."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from results_collect import SETTLED
from results_plan import Plan, shown

from data.shards.reader import TokenShards
from eval.grid import format_length
from s2 import files
from s2.tables import markdown
from s2.training.gate import gate_warning

SIGNATURE = "<!-- written by scripts/results.py, which replaces it -->"
PARTS = {
    "training": "Losses of the training log",
    "needle": "Needle in a haystack",
    "ruler": "RULER (percent)",
    "tasks": "Downstream tasks",
    "positions": "Held-out loss by position",
    "speed": "Speed and memory",
}
_KEPT = ("step", "tokens", "seconds", "train/loss")  # of the training log, besides held-out losses
_MOST_COLUMNS = 8  # of a table

Row = dict[str, Any]


def write(plan: Plan, results: Row, output: Path, titles: Mapping[str, str]) -> Path:
    """Write all files of the page into `output` and return README.md.

    Raises ValueError where that is somebody else's.
    """
    page = output / "README.md"
    if page.is_file() and SIGNATURE not in page.read_text(encoding="utf-8"):
        raise ValueError(f"{page} was not written by this program; choose another --output, or move it")
    logs = results.pop("logs")
    thin = {
        arm: {stage: [{k: row[k] for k in row if k in _KEPT or k.startswith("val/")} for row in rows]
              for stage, rows in stages.items()}
        for arm, stages in logs.items()
    }  # fmt: skip
    files.write_json(output / "curves.json", thin)
    files.write_json(output / "results.json", results)
    pictures = {}
    for name, draw in (("curves", _curves), ("positions", _positions), ("speed", _quality_and_speed)):
        if figure := draw(results, thin):
            with files.whole(output / f"{name}.png") as stream:
                figure.savefig(stream, dpi=110, format="png")
            pictures[name] = titles[name]
    files.write_text(page, text(plan, results, pictures, _heatmaps(plan, output)))
    return page


def text(plan: Plan, results: Row, pictures: Mapping[str, str], heatmaps: Sequence[str]) -> str:
    """README.md."""
    share = retrieval_share(results)
    parts = [f"# {plan.name}", plan.about.strip(), *_state(plan, results), "## Arms", _arms(plan, results)]
    parts += [f"{share} Every table below is of models trained so."] if share else []
    parts.append(gates_before(results))
    for picture, title in pictures.items():
        parts.append(f"![{title}]({picture}.png)\n\n{title}.")
    parts += [f"![needle heatmaps]({name})" for name in heatmaps]
    for part, title in PARTS.items():
        stages = dict.fromkeys(row["stage"] for row in results["figures"] if row["part"] == part)
        for stage in stages:
            rows = _shown([row for row in results["figures"] if (row["part"], row["stage"]) == (part, stage)])
            parts += [f"## {title}{f', after {stage}' if stage else ''}", *_tables(rows, results, share)]
    parts += ["## Data", data_table(results), "## Commands", _commands(results)]
    return "\n\n".join([*filter(None, parts), SIGNATURE]) + "\n"


def _shown(rows: Sequence[Row]) -> list[Row]:
    """What of a part stands in its tables: of losses by position, ranges of the longest length alone."""
    longest = max((row["length"] or 0 for row in rows), default=0)
    return [r for r in rows if r["part"] != "positions" or r["task"] == "loss" or r["length"] == longest]


def _state(plan: Plan, results: Row) -> list[str]:
    """What is missing, and where the arms were run."""
    lines = [f"- {arm}: missing {', '.join(stages)}" for arm, stages in results["missing"].items()]
    head = f"Not all of it is there yet ({len(lines)} of {len(plan.arms)} arms):\n\n"
    found = [head + "\n".join(lines)] if lines else []
    where: dict[str, list[str]] = {}
    for arm, each in results["arms"].items():
        for record in each["stages"].values():
            versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
            where.setdefault(f"commit {record['commit']}, {record['device']}, {versions}", []).append(arm)
    return [*found, "\n".join(f"- {place}: {', '.join(dict.fromkeys(names))}" for place, names in where.items())]


def _arms(plan: Plan, results: Row) -> str:
    rows = []
    about = {arm.name: arm.about for arm in plan.arms}
    for arm, each in results["arms"].items():
        model = each["model"] or {}
        density = model.get("density", {})
        tokens = [f"{stage} {s['tokens'] / 1e6:,.1f}M" for stage, s in each["summaries"].items()]
        rows.append([
            arm, about[arm], model.get("attention_layout", "-"), str(model.get("block_size", "-")),
            f"{model['parameters'] / 1e6:,.0f}M" if model else "-",
            " / ".join(f"{density[n]:.1%}" for n in density) or "-", ", ".join(tokens) or "-",
        ])  # fmt: skip
    header = ["arm", "what", "layout", "block", "parameters", "density at 8k / 32k / 128k", "tokens trained"]
    return markdown(header, rows, numbers=(3, 4))


def retrieval_share(results: Row) -> str:
    """What of the training tokens was synthetic retrieval documents, as a sentence; "" where none was."""
    found: dict[str, set[str]] = {}
    for each in results["arms"].values():
        for stage, summary in each["summaries"].items():
            total = sum(part["asked"] for part in summary["data"])
            made = sum(part["asked"] for part in summary["data"] if "retrieval" in part["component"])
            if made:
                found.setdefault(stage, set()).add(f"{made / total:.0%}")
    shares = "; ".join(f"{stage} {' or '.join(sorted(values))}" for stage, values in found.items())
    return (
        f"Synthetic retrieval documents (data/corpus/retrieval.py) in the training tokens: {shares}." if shares else ""
    )


def gates_before(results: Row) -> str:
    """A line for each stage that began from a checkpoint whose gate was not passed."""
    lines = []
    for arm, each in results["arms"].items():
        for stage, summary in each["summaries"].items():
            if said := gate_warning(summary.get("gate_before")):
                lines.append(f"- {arm} {stage}: {said}")
    return "\n".join(lines)


def _tables(rows: Sequence[Row], results: Row, share: str) -> list[str]:
    """Tables of one part and stage, arms in rows: figures, and in brackets the differences from the baseline."""
    columns = list(dict.fromkeys((r["task"], r["length"], r["metric"]) for r in rows))
    known = {(r["arm"], r["task"], r["length"], r["metric"]): r for r in rows}
    arms = [arm for arm in results["arms"] if any(r["arm"] == arm for r in rows)]
    tables = []
    for i in range(0, len(columns), _MOST_COLUMNS):
        some = columns[i : i + _MOST_COLUMNS]
        header = ["arm", *(_title(*column) for column in some)]
        body = [[arm, *(_cell(known.get((arm, *column))) for column in some)] for arm in arms]
        tables.append(markdown(header, body))
    if rows[0]["part"] == "speed":
        return tables
    notes = []
    if any("from_baseline" in row for row in rows):
        notes.append(
            f"In brackets: difference from {results['baseline']} with its 95 % interval, * where the same questions "
            "were compared one by one."
        )
    if rows[0]["part"] in ("training", "positions"):
        notes.append("0.01 nats per token are 1 % of perplexity.")
    if rows[0]["part"] == "positions":
        notes.append("Ranges of the shorter lengths are in the picture and in results.json.")
    counts = sorted({row["n"] for row in rows if row["n"]})
    if counts and rows[0]["part"] != "training":
        notes.append(f"n = {counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "") + " a figure.")
    return [*tables, " ".join(filter(None, [*notes, share]))]


def _title(task: str, length: int | None, metric: str) -> str:
    return f"{task}{f' @{format_length(length)}' if length else ''}, {metric}"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    value = _number(row["value"])
    if row["stderr"] is not None:
        value += f" ± {_number(row['stderr'])}"
    elif row["interval"]:
        value += f" ({_number(row['interval'][0])} to {_number(row['interval'][1])})"
    if (base := row.get("from_baseline")) is None or row["part"] == "speed":
        return value
    within = " ({:+.2g} to {:+.2g})".format(*base["interval"]) if base["interval"] else ""
    return f"{value} [{base['difference']:+.3g}{within}{'*' if base['paired'] else ''}]"


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def data_table(results: Row) -> str:
    """How often each arm went through its data."""
    rows = []
    for arm, each in results["arms"].items():
        for stage, summary in each["summaries"].items():
            for part in summary["data"]:
                asked, there = f"{part['asked']:,.0f}", f"{part['available']:,}"
                rows.append([arm, stage, part["component"], asked, there, f"{part['passes']:.2f}"])
    table = markdown(["arm", "stage", "component", "tokens trained on", "tokens there", "passes"], rows, (3, 4, 5))
    digests: dict[str, list[str]] = {}
    for arm, each in results["arms"].items():
        for record in each["stages"].values():
            said = "; ".join(f"{n} {d['tokens']:,} tokens, digest {d['digest']}" for n, d in record["data"].items())
            digests.setdefault(said, []).append(arm)
    warning = "" if len(digests) < 2 else "**The arms were not trained on the same data.**\n\n"
    return warning + table + "\n\n" + "\n".join(f"- {said}" for said in digests if said)


def _commands(results: Row) -> str:
    lines = []
    for arm, each in results["arms"].items():
        for stage, record in each["stages"].items():
            seed = (record["recipe"] or {}).get("seed_everything")
            lines.append(f"- {arm} {stage} ({record['seconds'] / 60:.1f} min{f', seed {seed}' if seed else ''}): "
                         f"`{shown(['python', *record['command'][1:]])}`")  # fmt: skip
    launched = {record.get("launched", "") for each in results["arms"].values() for record in each["stages"].values()}
    lines += ["", "The recipe of each is in results.json (`arms.<arm>.stages.<stage>.recipe`). They were begun by:", ""]
    return "\n".join([*lines, *(f"- `{command}`" for command in sorted(filter(None, launched)))])


# ---------------------------------------------------------------- pictures


def _figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure, and its panels row by row."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(6.5 * columns, 5 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _style(results: Row, arm: str) -> dict[str, str]:
    """Colour and marker of an arm, the same in all pictures and two of one colour told apart."""
    number = list(results["arms"]).index(arm)
    return {"color": f"C{number % 10}", "marker": "osD^v<>P"[number % 8], "linestyle": "-" if number < 10 else "--"}


def _plain_ticks(axis: Any, label: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5 times powers of ten, as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axis.set_minor_formatter(NullFormatter())


def _curves(results: Row, logs: Row) -> Any:
    """Training loss over tokens and over minutes, a row of panels for every stage."""
    stages = list(dict.fromkeys(stage for each in logs.values() for stage in each))
    if not stages:
        return None
    figure, axes = _figure(2, len(stages))
    for i, stage in enumerate(stages):
        for arm, each in logs.items():
            style = {**_style(results, arm), "marker": ""}
            rows = [row for row in each.get(stage, []) if "train/loss" in row]
            width = max(1, len(rows) // 50)
            losses = [row["train/loss"] for row in rows]
            smooth = [statistics.fmean(losses[max(0, at - width) : at + 1]) for at in range(len(losses))]
            for panel, (column, scale) in zip(axes[2 * i : 2 * i + 2], (("tokens", 1e6), ("seconds", 60)), strict=True):
                xs = [row[column] / scale for row in rows]
                panel.plot(xs, smooth, label=arm, **style)
        settled = [row for each in logs.values() for row in each.get(stage, [])[SETTLED:]]
        tail = [row["train/loss"] for row in settled if "train/loss" in row]
        for panel, label in zip(axes[2 * i : 2 * i + 2], ("million tokens", "minutes"), strict=True):
            panel.set(xlabel=label, ylabel="training loss (nats per token)", title=stage)
            if tail:
                panel.set_ylim(min(tail) - 0.05, statistics.quantiles(tail, n=10)[-1] if len(tail) > 1 else None)
            panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def _positions(results: Row, logs: Row) -> Any:
    """Held-out loss by position, a panel for each stage and length."""
    rows = [r for r in results["figures"] if r["part"] == "positions" and r["task"] != "loss"]
    panels = list(dict.fromkeys((row["stage"], row["length"]) for row in rows))[:4]
    if not panels:
        return None
    figure, axes = _figure(2 if len(panels) > 1 else 1, (len(panels) + 1) // 2)
    for panel in axes[len(panels) :]:
        panel.remove()
    for panel, (stage, length) in zip(axes, panels, strict=False):
        shown_ends: set[int] = set()
        for arm in results["arms"]:
            here = [r for r in rows if (r["arm"], r["stage"], r["length"]) == (arm, stage, length)]
            ends = [int(r["task"].split("-")[-1]) for r in here]
            panel.plot(ends, [r["value"] for r in here], markersize=3, label=arm, **_style(results, arm))
            shown_ends |= set(ends)
        panel.set(
            xlabel="position up to", ylabel="held-out loss (nats per token)", title=f"{stage}, {format_length(length)}"
        )
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(shown_ends), [format_length(end) for end in sorted(shown_ends)])
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def _quality_and_speed(results: Row, logs: Row) -> Any:
    """Held-out loss as a difference from the baseline, and needles found, at the longest length trained on, against the
    time of all layers' attention forward and backward; with their intervals."""
    times: dict[str, float] = {}
    for row in results["figures"]:
        if row["task"] in ("attention forward", "attention backward"):
            times[row["arm"]] = times.get(row["arm"], 0.0) + row["value"]
    kinds = {("positions", "loss", "nats/token"): "held-out loss", ("needle", "single", "exact"): "needle, single"}
    chosen = [(rows, name) for kind, name in kinds.items() if (rows := _longest_trained(results, kind, times))]
    if not chosen:
        return None
    figure, axes = _figure(len(chosen))
    for panel, (rows, name) in zip(axes, chosen, strict=True):
        label = f"{name} at {format_length(rows[0]['length'])} ({rows[0]['metric']})"
        is_loss = rows[0]["part"] == "positions" and any(row.get("from_baseline") for row in rows)
        for arm in times:
            for row in (row for row in rows if row["arm"] == arm):
                y, interval = row["value"], row.get("interval")
                if is_loss:
                    difference = row.get("from_baseline") or {"difference": 0.0}
                    y, interval = difference["difference"], difference.get("interval")
                bars = [[max(0.0, y - interval[0])], [max(0.0, interval[1] - y)]] if interval else None
                style = {**_style(results, arm), "linestyle": ""}
                panel.errorbar(times[arm], y, bars, capsize=3, label=arm, **style)
        panel.set(xscale="log", xlabel="attention of all layers, forward and backward (ms)",
                  ylabel=f"{label}, difference from {results['baseline']}" if is_loss else label)  # fmt: skip
        _plain_ticks(panel.xaxis, "{:,.0f}".format)
        if rows[0]["part"] == "needle":
            panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _longest_trained(results: Row, kind: tuple[str, str, str], arms: Iterable[str]) -> list[Row]:
    """Figures of a kind, of all arms, at the longest length that some arm has been trained on; where all are beyond it,
    at the shortest."""
    found = [
        row for row in results["figures"] if (row["part"], row["task"], row["metric"]) == kind and row["arm"] in arms
    ]

    def rank(row: Row) -> tuple[bool, int]:
        recipe = results["arms"][row["arm"]]["stages"].get(row["stage"], {}).get("recipe") or {}
        trained = recipe.get("model", {}).get("config", {}).get("max_position_embeddings", row["length"])
        return row["length"] <= trained, row["length"] if row["length"] <= trained else -row["length"]

    best = max(found, key=rank, default=None)
    return [row for row in found if best and (row["stage"], row["length"]) == (best["stage"], best["length"])]


def _heatmaps(plan: Plan, output: Path) -> list[str]:
    """Heatmaps of the arms side by side, the baseline first, six at most a picture; their file names."""
    from eval.heatmap import draw
    from eval.sweep import read_sweep

    names = sorted((arm.name for arm in plan.arms), key=lambda name: name != plan.baseline)
    by_sweep: dict[str, list[tuple[str, Path]]] = {}
    for name in names:
        for file in sorted(Path(plan.root, name).glob("*/results/needle*.json")):
            content = files.read_json(file)
            if content.get("settings", {}).get("kind", "single") == "single" and "summary" in content:
                by_sweep.setdefault(f"{file.parts[-3]}-{file.stem}", []).append((name, file))
    made = []
    for stem, found in by_sweep.items():
        for i in range(0, len(found), 6):
            some = found[i : i + 6]
            picture = output / f"{stem}{f'-{i // 6 + 1}' if len(found) > 6 else ''}.png"
            draw([read_sweep([file]) for _, file in some], picture, [name for name, _ in some])
            made.append(picture.name)
    return made


def shards(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What is recorded of prepared folders: tokens, and a digest of the shards' checksums."""
    found = {}
    for name, folder in folders.items():
        manifest = TokenShards(folder).manifest
        content = json.dumps([manifest["shards"], manifest["tokenizer"]["sha256"]], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        found[name] = {"tokens": manifest["tokens"], "documents": manifest["documents"], "digest": digest}
    return found
