"""The figures that one looks for first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from eval.differences import questions
from eval.grid import format_length
from eval.report import rates, scores, settings, tasks
from eval.report.run import Run, Scores
from eval.sweep import wilson


def glance(runs: Sequence[Run]) -> list[list[str]]:
    """Lines of a label and a text for each run."""
    rows: list[settings.Row] = [
        ("attention", settings.layout),
        ("parameters", settings.parameters),
        ("tokens", lambda run: settings.tokens(run) and f"{settings.tokens(run):,}"),
        ("of them synthetic retrieval documents", settings.synthetic),
    ]
    rows += [(f"held-out loss, {name}", partial(_last_loss, name)) for name in scores.heldout_sets(runs)]
    for name, length in _cells(run.positions for run in runs):
        label = f"loss, perplexity of documents of {format_length(length)}"
        rows.append((label + _if_several(name, (run.positions for run in runs)), partial(_position, name, length)))
    for name in stems(run.needle for run in runs):
        # the longest of each run: where they differ, each is of interest
        for length in sorted({max(run.sweeps[name].lengths) for run in runs if name in run.sweeps}):
            label = f"needles found at {format_length(length)}"
            rows.append((label + _if_several(name, (run.needle for run in runs)), partial(_needle, name, length)))
    for name, length in _cells(run.ruler for run in runs):
        label = f"RULER at {format_length(length)}"
        rows.append((label + _if_several(name, (run.ruler for run in runs)), partial(_ruler, name, length)))
    if found := tasks.mean_accuracy(runs):
        what, means = found
        by_name = dict(zip((run.name for run in runs), means, strict=True))
        rows.append((f"accuracy, {what}", lambda run: by_name[run.name]))
    rows += [("tokens/s a device", lambda run: rates.rate(run) and f"{rates.rate(run):,.0f}"), ("time", rates.hours)]
    if longest := max((run.model.max_position_embeddings for run in runs if run.model), default=0):
        rows.append((f"KV cache a token at {format_length(longest)}", partial(rates.kv_cache, longest)))
    return settings.lines(rows, runs)


def stems(found: Iterable[Mapping[str, Scores]]) -> list[str]:
    """Names of result files, each once."""
    return list(dict.fromkeys(name for each in found for name in each))


def which(stem: str, kind: str) -> str:
    """What a file's name says beside its kind: `: n1` of needle-n1."""
    more = stem.removeprefix(kind).strip("-")
    return f": {more}" if more else ""


def _if_several(stem: str, found: Iterable[Mapping[str, Scores]]) -> str:
    return which(stem, stem.split("-")[0]) if len(stems(found)) > 1 else ""


def _cells(found: Iterable[Mapping[str, Scores]]) -> list[tuple[str, int]]:
    """(file, length) of summaries by length."""
    cells = {(name, row["length"]) for each in found for name, of in each.items() for row in _lengths(of)}
    return sorted(cells)


def _lengths(found: Scores) -> list[dict[str, Any]]:
    return found.content["summary"].get("lengths", [])


def _at(found: Mapping[str, Scores], name: str, length: int) -> dict[str, Any] | None:
    return next((row for row in _lengths(found[name]) if row["length"] == length), None) if name in found else None


def _last_loss(name: str, run: Run) -> str | None:
    value = run.last(f"val/{name}/loss")
    return None if value is None else f"{value:.3f}"


def _position(name: str, length: int, run: Run) -> str | None:
    row = _at(run.positions, name, length)
    return None if row is None else f"{row['loss']:.3f}, {row['perplexity']:.2f}"


def _needle(name: str, length: int, run: Run) -> str | None:
    found = questions(run.needle[name].content, "exact", length=length) if name in run.needle else {}
    mean = sum(found.values()) / len(found) if found else 0.0
    return scores.with_interval(mean, *wilson(mean, len(found))) if found else None


def _ruler(name: str, length: int, run: Run) -> str | None:
    row = _at(run.ruler, name, length)
    return None if row is None else scores.with_interval(row["score"] / 100, *(end / 100 for end in row["interval"]))
