"""The page of an experiment: results.json and curves.json, README.md with tables side by side, and pictures."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from results_cells import Row, cell, title
from results_collect import SETTLED
from results_heatmaps import front, heatmaps
from results_plan import Plan, shown

from data.shards.reader import TokenShards
from eval.grid import format_length
from eval.report.settings import NO_SYNTHETIC, UNKNOWN, synthetic_share
from s2 import files
from s2.tables import markdown
from s2.training.gate import gate_warning
from s2.training.metrics import heldout_sets

SIGNATURE = "<!-- written by scripts/results.py, which replaces it -->"
PARTS = {
    "training": "Losses of the training log",
    "needle": "Needle in a haystack",
    "ruler": "RULER (percent)",
    "tasks": "Downstream tasks",
    "positions": "Held-out loss by position",
    "speed": "Speed and memory",
}
ARCHIVE = "runs.tar.gz"  # beside the page: what it is made from
_KEPT = ("step", "tokens", "seconds", "train/loss")  # of the training log, besides held-out losses
_MOST_COLUMNS = 8  # of a table
_LEAST_POINTS = 4  # of a curve of held-out losses
_MOST_PANELS = 4  # of losses by position
_COLOURS = (*(f"C{n}" for n in range(10)), "black", "gold", "navy", "limegreen")  # of arms


def page_folder(usual: Path, results: Row) -> Path:
    """Where the page goes: `usual`, or with a number behind it where that has the page of other runs. Runs are told
    apart by when their stages began; a page goes on as long as one of them is the same."""
    for folder in (usual, *(usual.with_name(f"{usual.name}-{number}") for number in range(2, 1000))):
        page, file = folder / "README.md", folder / "results.json"
        if not file.is_file() and not page.is_file():
            return folder
        if file.is_file() and _beginnings(files.read_json(file)) & _beginnings(results):
            return folder
    raise ValueError(f"{usual}: there are a thousand pages already; name a folder with --output")


def _beginnings(results: Row) -> set[tuple[str, str, str]]:
    """(arm, stage, when it first began) of each stage of a page."""
    return {
        (arm, stage, first["began"])
        for arm, each in results["arms"].items()
        for stage, record in each["stages"].items()
        for first in record["attempts"][:1]
    }


def write(plan: Plan, results: Row, output: Path, titles: Mapping[str, str]) -> Path:
    """Write all files of the page into `output` and return README.md.

    Raises NotOursError where that is somebody else's: README.md has no signature, or is not there and other files are.
    """
    page = output / "README.md"
    if page.is_file() and SIGNATURE not in page.read_text(encoding="utf-8", errors="replace"):
        raise files.NotOursError(f"{page} was not written by this program; choose another --output, or move it")
    if not page.is_file():
        if others := sorted(path.name for path in output.glob("[!.]*") if path.is_file()):
            shown = ", ".join(others[:3])
            raise files.NotOursError(f"{output} holds files of others ({shown}); choose another --output, or move them")
        files.write_text(page, f"{SIGNATURE}\n")  # whatever of the rest a kill leaves is known to be ours
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
    files.write_text(page, text(plan, results, pictures, heatmaps(plan, output), front(plan, results, output)))
    return page


def text(plan: Plan, results: Row, pictures: Mapping[str, str], maps: Mapping[str, str], opening: str) -> str:
    """README.md. maps: pictures of needles, and what they show. opening: what stands before the tables."""
    share = retrieval_share(results, [asdict(spec) for spec in plan.specs.values()])
    parts = [f"# {plan.name}", plan.about.strip(), opening, *_state(plan, results)]
    parts += ["## Arms", _arms(plan, results)]
    parts += [f"{share} Every table below is of models trained so."] if share else []
    parts.append(gates_before(results))
    parts += [f"![{words}]({picture}.png)\n\n{words}." for picture, words in pictures.items()]
    parts += [f"![{words}]({name})" for name, words in maps.items()]
    for part, heading in PARTS.items():
        stages = dict.fromkeys(row["stage"] for row in results["figures"] if row["part"] == part)
        for stage in stages:
            rows = _shown([row for row in results["figures"] if (row["part"], row["stage"]) == (part, stage)])
            parts += [f"## {heading}{f', after {stage}' if stage else ''}", *_tables(rows, results, share)]
    parts += ["## Data", data_table(results), "## Commands", _commands(results)]
    return "\n\n".join([*filter(None, parts), SIGNATURE]) + "\n"


def _shown(rows: Sequence[Row]) -> list[Row]:
    """What of a part stands in its tables: of losses by position, ranges of the longest length alone."""
    longest = max((row["length"] or 0 for row in rows), default=0)
    return [row for row in rows if not _span(row) or row["length"] == longest]


def _span(row: Row) -> tuple[str, int] | None:
    """Of a loss of a range of positions: which loss, and where the range ends."""
    found = re.fullmatch(r"(.*) \d+-(\d+)", row["task"]) if row["part"] == "positions" else None
    return (found[1], int(found[2])) if found else None


def _state(plan: Plan, results: Row) -> list[str]:
    """What is missing, and where the arms were run."""
    lines = [f"- {arm}: missing {', '.join(stages)}" for arm, stages in results["missing"].items()]
    head = f"Not all of it is there yet, {len(lines)} of {len(plan.arms)} arms are incomplete:\n\n"
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


def retrieval_share(results: Row, prepared: Sequence[Row] = ()) -> str:
    """What of the training tokens was synthetic retrieval documents, as a sentence; "" where none was.

    prepared: sections of the plan's data, for runs that have not recorded it (`eval.report.settings.synthetic_share`).
    """
    found: dict[str, set[str]] = {}
    for each in results["arms"].values():
        for stage, summary in each["summaries"].items():
            data = (each["stages"][stage]["recipe"] or {}).get("data", {}).get("init_args", {})
            words = synthetic_share(summary, data, prepared) or UNKNOWN
            found.setdefault(stage, set()).add(words.replace(" of the tokens", ""))
    if {word for words in found.values() for word in words} <= {NO_SYNTHETIC}:
        return ""
    shares = "; ".join(f"{stage} {' or '.join(sorted(values))}" for stage, values in found.items())
    return f"Synthetic retrieval documents (data/corpus/retrieval.py) in the training tokens: {shares}."


def gates_before(results: Row) -> str:
    """A line for each stage that began from a checkpoint whose gate was not passed."""
    lines = []
    for arm, each in results["arms"].items():
        for stage, summary in each["summaries"].items():
            if said := gate_warning(summary.get("gate_before")):
                lines.append(f"- {arm} {stage}: {said}")
    return "\n".join(lines)


def _tables(rows: Sequence[Row], results: Row, share: str) -> list[str]:
    """Tables of one part and stage: figures, and in brackets the differences from the baseline. Arms are in rows, or in
    columns where there are more figures than a table has columns, and fewer arms."""
    figures = list(dict.fromkeys((r["task"], r["length"], r["metric"]) for r in rows))
    known = {(r["arm"], r["task"], r["length"], r["metric"]): r for r in rows}
    arms = [arm for arm in results["arms"] if any(r["arm"] == arm for r in rows)]
    if len(arms) < _MOST_COLUMNS < len(figures):
        tasks = list(dict.fromkeys((task, metric) for task, _, metric in figures))
        figures.sort(key=lambda figure: tasks.index((figure[0], figure[2])))  # lengths of one below each other
        body = [[title(*figure), *(cell(known.get((arm, *figure))) for arm in arms)] for figure in figures]
        tables = [markdown(["", *arms], body)]
    else:
        tables = []
        for i in range(0, len(figures), _MOST_COLUMNS):
            some = figures[i : i + _MOST_COLUMNS]
            body = [[arm, *(cell(known.get((arm, *figure))) for figure in some)] for arm in arms]
            tables.append(markdown(["arm", *(title(*figure) for figure in some)], body))
    if rows[0]["part"] == "speed":
        return tables
    notes = []
    if any("from_baseline" in row for row in rows):
        notes.append(
            f"In brackets: difference from {results['baseline']} with its 95 % interval, * where the same questions "
            "were compared one by one."
        )
        if any(row["from_baseline"]["interval"] is None for row in rows if "from_baseline" in row):
            notes.append("A difference without an interval is one of means of which nothing more is on record.")
    if any("from_also" in row for row in rows):
        notes.append(f"In braces: difference from {results['also']}, in whichever stage that was measured.")
    if any(row["metric"] == "perplexity" for row in rows):
        notes.append("Differences of perplexities are relative.")
    if rows[0]["part"] in ("training", "positions"):
        notes.append("0.01 nats per token are 1 % of perplexity.")
    if rows[0]["part"] == "positions":
        notes.append("Ranges of the shorter lengths are in the picture and in results.json.")
    counts = sorted({row["n"] for row in rows if row["n"]})
    if counts and rows[0]["part"] != "training":
        notes.append(f"n = {counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "") + " a figure.")
    return [*tables, " ".join(filter(None, [*notes, share]))]


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
        for stage in each["summaries"]:  # those that trained
            data = each["stages"][stage]["data"]
            said = "; ".join(f"{n} {d['tokens']:,} tokens, digest {d['digest']}" for n, d in data.items())
            if said and arm not in digests.setdefault(said, []):
                digests[said].append(arm)
    warning = "" if len(digests) < 2 else "**The arms were not trained on the same data.**\n\n"
    return warning + table + "\n\n" + "\n".join(f"- {', '.join(arms)}: {said}" for said, arms in digests.items())


def _commands(results: Row) -> str:
    lines = []
    for arm, each in results["arms"].items():
        for stage, record in each["stages"].items():
            seed = (record["recipe"] or {}).get("seed_everything")
            lines.append(f"- {arm} {stage} ({record['seconds'] / 60:.1f} min{f', seed {seed}' if seed else ''}): "
                         f"`{shown(['python', *record['command'][1:]])}`")  # fmt: skip
    records = [record for each in results["arms"].values() for record in each["stages"].values()]
    launched = {record["launched"] for record in records if record.get("launched")}
    lines += ["", "The recipe of each is in results.json (`arms.<arm>.stages.<stage>.recipe`). They were begun by:", ""]
    lines += [f"- `{command}`" for command in sorted(launched)]
    last = max(records, key=lambda record: record.get("began", ""), default={}).get("launched", "")
    keys = [word for word in shlex.split(last) if "=" in word and not word.startswith("-")]
    again = shown(["python", "scripts/results.py", results["plan"], "--import", f"<this folder>/{ARCHIVE}", *keys])
    lines += ["", f"All figures are in [{ARCHIVE}]({ARCHIVE}). From the root of the repository a page of them, "
              f"under today's date, is made by `{again}`"]  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures


def _figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure, and its panels row by row."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(6.5 * columns, 5 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _style(results: Row, arm: str) -> dict[str, str]:
    """Colour and marker of an arm, the same in all pictures and two of one colour told apart."""
    number = list(results["arms"]).index(arm)
    colour = _COLOURS[number % len(_COLOURS)]
    return {"color": colour, "marker": "osD^v<>P"[number % 8], "linestyle": "-" if number < 10 else "--"}


def _plain_ticks(axis: Any, label: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5 times powers of ten, as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axis.set_minor_formatter(NullFormatter())


def _curves(results: Row, logs: Row) -> Any:
    """Training loss, and loss on the first held-out set where it was taken often enough for a curve, over tokens and
    over minutes: a row of panels each for every stage."""
    rows = []
    for stage in dict.fromkeys(stage for each in logs.values() for stage in each):
        here = {arm: each[stage] for arm, each in logs.items() if stage in each}
        rows.append((f"{stage}: training loss", "train/loss", here))
        for name in heldout_sets(chain.from_iterable(here.values()))[:1]:
            key = f"val/{name}/loss"
            if max(sum(key in row for row in each) for each in here.values()) >= _LEAST_POINTS:
                rows.append((f"{stage}: held-out {name}", key, here))
    if not rows:
        return None
    figure, axes = _figure(2, len(rows))
    for i, (heading, key, here) in enumerate(rows):
        over_tokens, over_minutes = axes[2 * i : 2 * i + 2]
        tail: list[float] = []  # from where the loss has left its beginning
        for arm, each in here.items():
            if not (measured := [row for row in each if key in row]):
                continue
            losses = [row[key] for row in measured]
            is_training = key == "train/loss"
            tail += losses[SETTLED if is_training else 1 :]
            width = max(1, len(losses) // 50) if is_training else 0
            smooth = [statistics.fmean(losses[max(0, at - width) : at + 1]) for at in range(len(losses))]
            style = _style(results, arm) | ({"marker": ""} if is_training else {"markersize": 4})
            over_tokens.plot([row["tokens"] / 1e6 for row in measured], smooth, label=arm, **style)
            over_minutes.plot([row["seconds"] / 60 for row in measured], smooth, label=arm, **style)
        for panel, label in ((over_tokens, "million tokens"), (over_minutes, "minutes")):
            panel.set(xlabel=label, ylabel="loss (nats per token)", title=heading)
            if len(tail) > 1:
                low, high = min(tail), statistics.quantiles(tail, n=10)[-1]
                panel.set_ylim(low - max(0.05 * (high - low), 1e-3), high)
            panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def _positions(results: Row, logs: Row) -> Any:
    """Held-out loss by position at the longest length measured, a panel for each stage and loss."""
    rows = [(span, row) for row in results["figures"] if (span := _span(row))]
    longest: dict[tuple[str, str], int] = {}
    for (name, _), row in rows:
        longest[row["stage"], name] = max(row["length"], longest.get((row["stage"], name), 0))
    panels = [(stage, name, length) for (stage, name), length in longest.items()][-_MOST_PANELS:]
    if not panels:
        return None
    figure, axes = _figure(2 if len(panels) > 1 else 1, (len(panels) + 1) // 2)
    for panel in axes[len(panels) :]:
        panel.remove()
    for panel, (stage, name, length) in zip(axes, panels, strict=False):
        shown_ends: set[int] = set()
        for arm in results["arms"]:
            where = arm, stage, name, length
            here = [(end, r) for (n, end), r in rows if (r["arm"], r["stage"], n, r["length"]) == where]
            if not here:
                continue
            ends = [end for end, _ in here]
            panel.plot(ends, [r["value"] for _, r in here], markersize=3, label=arm, **_style(results, arm))
            shown_ends |= set(ends)
        panel.set(
            xlabel="position up to",
            ylabel=f"held-out {name} (nats per token)",
            title=f"{stage}, {format_length(length)}",
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
    timed = [row for row in results["figures"] if row["task"] in ("attention forward", "attention backward")]
    for row in timed:
        times[row["arm"]] = times.get(row["arm"], 0.0) + row["value"]
    at = ", ".join(sorted({format_length(row["length"]) for row in timed if row["length"]}))
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
        panel.set(xscale="log", xlabel=f"attention of all layers{at and f' at {at}'}, forward and backward (ms)",
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


def shards(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What is recorded of prepared folders: tokens, and a digest of the shards' checksums."""
    found = {}
    for name, folder in folders.items():
        manifest = TokenShards(folder).manifest
        content = json.dumps([manifest["shards"], manifest["tokenizer"]["sha256"]], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        found[name] = {"tokens": manifest["tokens"], "documents": manifest["documents"], "digest": digest}
    return found
