"""lm-eval's tasks of the models side by side, compared document by document where those are on record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval import documents
from eval.differences import Difference, mean_of, of_documents, of_means
from eval.report.run import Run
from eval.report.scores import Comparison

# What lm-eval results record beside the conditions under which they hold.
_ABOUT = {
    *("checkpoint", "fingerprint", "attention_layout", "block_size", "max_position_embeddings"),
    *("tasks", "num_fewshot", "cut_inputs", "remarks"),
}


def downstream(runs: Sequence[Run]) -> list[str]:
    """A row a task, metric and set of conditions, with lm-eval's standard errors; the mean of accuracies at the end.

    A run's results of one metric under several conditions stand in rows of their own, which say what differs; results
    of the first documents alone always do.
    """
    found: dict[tuple[str, str, str], list[tuple[int, dict[str, str], _Metric]]] = {}
    for column, run in enumerate(runs):
        for scores in run.lm.values():
            conditions = {key: str(value) for key, value in scores.content["s2"].items() if key not in _ABOUT}
            for key, metric in _metrics(scores.content):
                found.setdefault(key, []).append((column, conditions, metric))
    table = Comparison(runs, "task", "n-shot", "metric", "conditions")
    for key, values in found.items():
        differing = {"limit"} if any(c.get("limit", "None") != "None" for _, c, _ in values) else set()
        for column, conditions, _ in values:
            others = [other for c, other, _ in values if c == column]
            differing |= {name for name in conditions if len({other.get(name) for other in others}) > 1}
        rows: dict[str, list[_Metric | None]] = {}
        for column, conditions, metric in values:
            said = ", ".join(f"{name} {conditions.get(name, '?')}" for name in sorted(differing))
            rows.setdefault(said.replace("limit None", "no limit"), [None] * len(runs))[column] = metric
        for said, row in rows.items():
            table.add(
                (*key, said),
                [None if metric is None else str(metric) for metric in row],
                [_less(row[0], other) for other in row],
            )
    shared = accuracies(runs)
    if len(shared) > 1:
        means = _means(shared)
        label = (f"mean of {len(shared)}", "", "acc_norm, else acc", _limits(shared))
        found_ = [_less_by_task(shared, column) for column in range(len(runs))]
        table.add(label, [str(metric) for metric in means], found_)
    said_of = [f"- {run.name}, {_conditions(scores.content)}" for run in runs for scores in run.lm.values()]
    return [*table.parts(item="document"), "\n".join(said_of)]


class _Metric:
    """A value with its standard error, and a number for each document (`eval.documents`) where those are on record."""

    def __init__(self, value: float, error: float | None, numbers: Mapping[str, float] | None = None) -> None:
        self.value, self.error, self.numbers = value, error, numbers or {}

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" ± {self.error:.4f}" if self.error is not None else "")


def _less(first: _Metric | None, second: _Metric | None) -> Difference | float | None:
    if first is None or second is None or first is second:
        return None
    if found := of_documents(first.numbers, second.numbers):
        return found
    if first.error is None or second.error is None:
        return second.value - first.value
    return of_means(first.value, first.error, second.value, second.error)


# --- the mean over tasks ----------------------------------------------------------------------------------------------

Shared = dict[tuple[str, str, float | None], list[_Metric]]


def accuracies(runs: Sequence[Run]) -> Shared:
    """Accuracy of each run by task, number of examples and limit: length-normalized where there is that, of the tasks
    that every run has alike, each once: the whole task, else as many first documents as can be had."""
    found: list[dict[tuple[str, str, float | None], tuple[str, _Metric]]] = [{} for _ in runs]
    for own, run in zip(found, runs, strict=True):
        for scores in run.lm.values():
            whole, limit = documents.whole_tasks(scores.content), scores.content["s2"].get("limit")
            for (task, shots, name), metric in _metrics(scores.content):
                kind, key = name.rstrip(" ↑↓"), (task, shots, limit)
                is_better = key not in own or (own[key][0], kind) == ("acc", "acc_norm")
                if task in whole and kind in ("acc", "acc_norm") and is_better:
                    own[key] = kind, metric
    shared = [key for key in found[0] if all(key in own for own in found)] if found else []
    alike = {key: [own[key][1] for own in found] for key in shared}
    best: dict[str, tuple[str, str, float | None]] = {}
    for task, shots, limit in alike:
        if task not in best or _size(limit) > _size(best[task][2]):
            best[task] = task, shots, limit
    return {key: alike[key] for key in best.values()}


def _size(limit: float | None) -> float:
    return math.inf if limit is None else limit


def _limits(shared: Shared) -> str:
    limits = dict.fromkeys(limit for _, _, limit in shared)
    return "" if set(limits) == {None} else ", ".join("no limit" if n is None else f"limit {n:g}" for n in limits)


def mean_accuracy(runs: Sequence[Run]) -> tuple[str, list[str]] | None:
    """What it is the mean of, and of each run that mean with its standard error; None where no task is in all runs."""
    if not (shared := accuracies(runs)):
        return None
    limits = _limits(shared)
    what = f"mean of {len(shared)} task{'s' * (len(shared) > 1)}{f' ({limits})' if limits else ''}"
    return what, [str(metric) for metric in _means(shared)]


def _means(shared: Shared) -> list[_Metric]:
    means = []
    for metrics in zip(*shared.values(), strict=True):
        errors = [metric.error for metric in metrics]
        error = None if None in errors else math.hypot(*errors) / len(errors)
        means.append(_Metric(sum(metric.value for metric in metrics) / len(metrics), error))
    return means


def _less_by_task(shared: Shared, column: int) -> Difference | float | None:
    """Of the mean: a run's minus the first's, task by task."""
    each = [_less(metrics[0], metrics[column]) for metrics in shared.values()]
    sure = [less for less in each if isinstance(less, Difference)]
    if len(sure) == len(each):
        return mean_of(sure)
    first, own = (_means(shared)[i] for i in (0, column))
    return None if column == 0 else own.value - first.value


# --- reading ----------------------------------------------------------------------------------------------------------


def _metrics(results: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], _Metric]]:
    """((task, shots, metric), value) of every metric; an arrow says which way is better."""
    for task, values in results["results"].items():
        shots = str(results.get("n-shot", {}).get(task, ""))
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{filtered}")
                label = name if filtered in ("", "none") else f"{name} ({filtered})"
                better = (results.get("higher_is_better", {}).get(task) or {}).get(name)
                label += "" if better is None else " ↑" if better else " ↓"
                numbers = documents.of(results, task, key)
                yield (task, shots, label), _Metric(value, error if isinstance(error, float) else None, numbers)


def _conditions(results: dict[str, Any]) -> str:
    about = results["s2"]
    said = {"max_length": "max_length", "bos": "BOS", "limit": "limit", "dtype": "dtype"}
    known = [f"{name} {about[key] or 'none'}" for key, name in said.items() if key in about]
    return f"{', '.join(about['tasks'])}: {', '.join(known)}, cut inputs: {about.get('cut_inputs', 'unknown')}"
