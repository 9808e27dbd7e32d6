"""Needle heatmaps of an experiment's arms side by side, what they are minus the baseline's, and the picture of a few
arms with a table of what else was measured (`front` in a plan)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from results_cells import Row, cell
from results_plan import Plan

from eval.differences import of_sweeps
from eval.grid import format_length
from eval.heatmap import draw, draw_differences
from eval.report.settings import UNKNOWN, synthetic_share
from eval.sweep import Sweep, kind_of, read_sweep
from s2 import files
from s2.tables import markdown

_ABREAST = 6  # heatmaps in a picture
FRONT = "front.png"

Found = dict[tuple[str, str], dict[str, Path]]


def _sweeps(plan: Plan) -> Found:
    """Files of finished sweeps for a single needle by (stage, stem) and arm, the baseline first."""
    found: Found = {}
    for name in sorted((arm.name for arm in plan.arms), key=lambda name: name != plan.baseline):
        for file in sorted(Path(plan.root, name).glob("*/results/needle*.json")):
            content = files.read_json(file)
            if isinstance(content, dict) and kind_of(content) == "single" and "summary" in content:
                found.setdefault((file.parts[-3], file.stem), {})[name] = file
    return found


def heatmaps(plan: Plan, output: Path) -> dict[str, str]:
    """Draw the arms side by side, the baseline first, and what others are minus the baseline; the pictures' names, and
    what they show."""
    made = {}
    for (stage, stem), by_arm in _sweeps(plan).items():
        for name, some in _abreast(f"{stage}-{stem}", list(by_arm)):
            draw([read_sweep([by_arm[arm]]) for arm in some], output / name, some)
            made[name] = f"needles found by length and depth, after {stage}: {', '.join(some)}"
        if plan.baseline not in by_arm:
            continue
        sweeps = {arm: read_sweep([file]) for arm, file in by_arm.items()}
        first = sweeps[plan.baseline]
        others = [arm for arm in sweeps if arm != plan.baseline and sweeps[arm].cells.keys() & first.cells.keys()]
        for name, some in _abreast(f"{stage}-{stem}-minus-{plan.baseline}", others):
            contents = {arm: files.read_json(by_arm[arm]) for arm in (plan.baseline, *some)}
            each = [of_sweeps([first, sweeps[arm]], [contents[plan.baseline], contents[arm]], "exact") for arm in some]
            draw_differences(first, [sweeps[arm] for arm in some], each, output / name, [plan.baseline, *some])
            made[name] = f"needles found, after {stage}, minus {plan.baseline}: {', '.join(some)}"
    return made


def _abreast(stem: str, arms: list[str]) -> Iterator[tuple[str, list[str]]]:
    for begin in range(0, len(arms), _ABREAST):
        number = f"-{begin // _ABREAST + 1}" if len(arms) > _ABREAST else ""
        yield f"{stem}{number}.png", arms[begin : begin + _ABREAST]


# ---------------------------------------------------------------- the front


def front(plan: Plan, results: Row, output: Path) -> str:
    """Draw the heatmaps of the plan's `front` arms, of the sweep that reaches farthest (the last stage's of several),
    above a table of the models that were swept; what the page says of it, "" where the plan wants none."""
    if not plan.front:
        return ""
    stages = [stage.name for stage in plan.stages]
    found = {}
    for (stage, stem), by_arm in _sweeps(plan).items():
        if all(arm in by_arm for arm in plan.front):
            sweeps = [read_sweep([by_arm[arm]]) for arm in plan.front]
            reach = min(max(sweep.lengths) for sweep in sweeps)
            found[reach, stages.index(stage) if stage in stages else -1, stem] = stage, sweeps
    if not found:
        return f"{FRONT} is not there: no needle sweep has been made of all of {', '.join(plan.front)}."
    stage, sweeps = found[max(found)]
    table = _table(plan, results, stage, sweeps)
    draw(sweeps, output / FRONT, list(plan.front), table=table)
    alt = f"needles found by length and depth, after {stage}: {', '.join(plan.front)}"
    return f"![{alt}]({FRONT})\n\n{markdown(['', *plan.front], table)}"


def _table(plan: Plan, results: Row, stage: str, sweeps: Sequence[Sweep]) -> list[list[str]]:
    """Lines of a label and a text for each arm."""
    arms = [results["arms"][arm] for arm in plan.front]
    prepared = [asdict(spec) for spec in plan.specs.values()]
    rows = [
        ["attention", *(_layout(arm["model"]) for arm in arms)],
        ["tokens trained on", *(_by_stage(arm, lambda _, summary: f"{summary['tokens']:,}") for arm in arms)],
        ["of them synthetic retrieval documents", *(_by_stage(arm, _synthetic_of(arm, prepared)) for arm in arms)],
    ]
    known = {(r["arm"], r["stage"], r["part"], r["task"], r["length"], r["metric"]): r for r in results["figures"]}
    lengths = _trained_lengths(arms, max(length for sweep in sweeps for length in sweep.lengths))

    def add(label: str, *key: Any) -> None:
        found = [known.get((arm, stage, *key)) for arm in plan.front]
        if any(found):
            rows.append([label, *map(cell, found)])

    for length in lengths:
        add(f"needles found at {format_length(length)}", "needle", "single", length, "exact")
    measured = [r for r in results["figures"] if r["part"] == "positions" and r["metric"] == "perplexity"]
    tasks = list(dict.fromkeys(r["task"] for r in measured if r["arm"] in plan.front and r["stage"] == stage))
    for task in sorted(tasks):  # all documents before those of one source
        for length in lengths:
            of = task.removeprefix("loss").strip() or "of all held-out documents"
            counts = {r["n"] for r in measured if (r["task"], r["length"], r["stage"]) == (task, length, stage)}
            documents = f", {max(counts)} documents" if counts else ""
            add(f"perplexity {of} at {format_length(length)}{documents}", "positions", task, length, "perplexity")
    means = [r["task"] for r in results["figures"] if r["part"] == "tasks" and r["metric"] == "acc_norm or acc"]
    for task in dict.fromkeys(means):
        add(f"accuracy, {task} tasks", "tasks", task, None, "acc_norm or acc")

    def rate(arm: str) -> Any:
        return lambda stage, _: _value(known.get((arm, stage, "speed", "tokens/s per GPU", None, "median")))

    rates = [_by_stage(results["arms"][arm], rate(arm)) for arm in plan.front]
    rows += [["tokens/s per GPU", *rates]] if any(text != "-" for text in rates) else []
    marks = {"[": f"[ ] minus {plan.baseline}", "{": f"{{ }} minus {plan.also}"}
    texts = "".join(text for row in rows for text in row[1:])
    if shown := [words for mark, words in marks.items() if mark in texts]:
        said = f"{', '.join(shown)}, with 95 % intervals; * compared question by question"
        rows.append(["differences", said, *[""] * (len(plan.front) - 1)])
    return rows


def _layout(model: Mapping[str, Any] | None) -> str:
    return f"{model['attention_layout']}, blocks of {model['block_size']}" if model else UNKNOWN


def _by_stage(arm: Row, said: Any) -> str:
    texts = [(stage, text) for stage, summary in arm["summaries"].items() if (text := said(stage, summary))]
    return ", ".join(f"{stage} {text}" for stage, text in texts) or "-"


def _synthetic_of(arm: Row, prepared: Sequence[Row]) -> Any:
    def said(stage: str, summary: Row) -> str:
        data = (arm["stages"][stage]["recipe"] or {}).get("data", {}).get("init_args", {})
        return (synthetic_share(summary, data, prepared) or UNKNOWN).replace(" of the tokens", "")

    return said


def _trained_lengths(arms: Sequence[Row], longest: int) -> list[int]:
    """Tokens of a training sequence of each stage, up to the longest swept; that one where none is."""
    recipes = [record["recipe"] or {} for arm in arms for record in arm["stages"].values()]
    sizes = {recipe.get("data", {}).get("init_args", {}).get("seq_len") for recipe in recipes}
    return sorted(size for size in sizes if size and size <= longest) or [longest]


def _value(row: Row | None) -> str:
    return "" if row is None else f"{row['value']:,.0f}"
