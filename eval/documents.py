"""What the figures of lm-eval's tables are made of, document by document, so that two models are compared on each.

A result file keeps under `documents`, for each task, a digest of the documents as they were asked and what each metric
says of each of them: the numbers, not the texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from eval.samples import digest
from eval.sweep import Z95, wilson

_DIGITS = 6  # of the numbers that are kept
_ALIKE = 1e-4  # how far a figure made of them may be from the table's


def kept(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`documents` of lm-eval's results with samples: by task a `digest`, and `scores` by metric and filter.

    A score is a number, or the two that a ratio is taken of ([log-likelihood, words]); None where the metric says
    nothing of that document.
    """
    found = {}
    for task, samples in results["samples"].items():
        scores: dict[str, list[Any]] = {}
        asked = {}
        for filtered, group in groupby(samples, lambda sample: sample.get("filter", "none")):
            rows = list(group)
            asked[filtered] = [
                [row.get(key) for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash")] for row in rows
            ]
            for metric in dict.fromkeys(name for row in rows for name in row["metrics"]):
                column = [_number(row.get(metric)) for row in rows]
                if any(value is not None for value in column):
                    scores[f"{metric},{filtered}"] = column
        version = results.get("versions", {}).get(task)
        found[task] = {"digest": digest([task, version, asked]), "scores": scores}
    return found


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2 and None not in (pair := [_number(part) for part in value]):
        return pair
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.{_DIGITS}g}")


def of(results: Mapping[str, Any], task: str, metric: str) -> dict[str, float]:
    """A number for each document whose mean is the figure of `metric` (`acc,none`) in the table, by the document's
    name; {} where none are on record.

    Documents of two files have the same names where the same documents were asked in the same way. Of a perplexity, and
    of bits per byte, it is how far each document moves the figure (the delta method). A group has the documents of its
    tasks.
    """
    value = results["results"][task].get(metric)
    rows = _rows(results, task, metric)
    if not isinstance(value, int | float) or not rows:
        return {}
    numbers = _numbers(value, list(rows.values()))
    return {} if numbers is None else dict(zip(rows, numbers, strict=True))


def _rows(results: Mapping[str, Any], task: str, metric: str) -> dict[str, Any]:
    documents = results["documents"] if "documents" in results else kept({"samples": {}, **results})
    if task in documents:
        scores = documents[task]["scores"].get(metric, [])
        name = f"{task} {documents[task]['digest']}"
        return {f"{name} {i}": score for i, score in enumerate(scores) if score is not None}
    parts = [_rows(results, part, metric) for part in results.get("group_subtasks", {}).get(task, ())]
    return {name: row for part in parts for name, row in part.items()} if all(parts) else {}


def _numbers(value: float, rows: Sequence[Any]) -> list[float] | None:
    """Of what is kept of each document, numbers with the mean `value`; None where the figure is no known one."""

    def is_figure(made: float) -> bool:
        return math.isclose(made, value, rel_tol=_ALIKE, abs_tol=_ALIKE / 100)

    if not any(isinstance(row, list) for row in rows):
        mean = math.fsum(rows) / len(rows)
        if is_figure(mean):
            return [float(row) for row in rows]
        if is_figure(_perplexity(mean)):
            return [value * (1 - (row - mean)) for row in rows]
        return None
    if not all(isinstance(row, list) for row in rows) or not (size := math.fsum(row[1] for row in rows)):
        return None
    ratio = math.fsum(row[0] for row in rows) / size
    moves = [(row[0] - ratio * row[1]) * len(rows) / size for row in rows]
    if is_figure(_perplexity(ratio)):
        return [value * (1 - move) for move in moves]
    if is_figure(-ratio / math.log(2)):
        return [value - move / math.log(2) for move in moves]
    return None


def _perplexity(mean: float) -> float:
    return math.exp(-mean) if mean > -700 else math.inf


def interval(results: Mapping[str, Any], task: str, metric: str) -> tuple[float, float] | None:
    """95 % of a figure: Wilson's interval of right and wrong answers, which is not sure of all right ones either; of
    others what lm-eval's standard error gives, None without one."""
    numbers, value = of(results, task, metric), results["results"][task][metric]
    if numbers and {*numbers.values()} <= {0.0, 1.0}:
        return wilson(value, len(numbers))
    name, _, filtered = metric.partition(",")
    error = results["results"][task].get(f"{name}_stderr,{filtered}")
    return (value - Z95 * error, value + Z95 * error) if isinstance(error, int | float) else None


def count_of(results: Mapping[str, Any], task: str, metric: str) -> int | None:
    """Of how many documents a figure is. lm-eval's own count is one number a task, however many of its documents a
    metric says something of."""
    return len(_rows(results, task, metric)) or results.get("n-samples", {}).get(task, {}).get("effective")


def whole_tasks(results: Mapping[str, Any]) -> list[str]:
    """The tasks that a mean over tasks counts: a group as one, its parts not."""
    parts = {part for parts in results.get("group_subtasks", {}).values() for part in parts}
    return [task for task in results["results"] if task not in parts]
