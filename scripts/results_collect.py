"""What the runs of an experiment have left, as one table of figures: each with n, interval and standard error as far as
its source has them, and with the difference from the baseline arm.

A difference of two arms that were asked the same questions is taken question by question (`paired`), of others from
what is known of each (`eval.differences`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from results_plan import Job
from results_record import as_written

from eval import documents
from eval.differences import (
    Difference,
    loss_name,
    losses_by_document,
    mean_of,
    of_documents,
    of_means,
    of_questions,
    questions,
)
from eval.sweep import Z95, kind_of, wilson
from s2 import files
from s2.model.config import ModelConfig
from s2.model.flops import flops_per_token, full_square_flops_per_token
from s2.model.hf import load_config
from s2.training.metrics import heldout_sets, read_metrics

_MOST_LOSS = 100.0  # whose perplexity is a figure
SETTLED = 2  # logged rows at the start whose rate says nothing: they compile
Key = tuple[str, str, str, int | None, str]  # stage, part, task, length, metric


@dataclass
class Figure:
    """A number of an arm.

    samples: by question, where the source has them; a question's name says what was asked. whole: what a right answer
    counts, of a mean of scores in 0..1; None of other numbers. parts: the figures that this is the mean of. in_group:
    whether another task's figure is made of this one. is_exponential: of the mean of the samples, as a perplexity is of
    a loss; differences are relative, in percent.
    """

    stage: str
    part: str
    task: str
    length: int | None
    metric: str
    value: float
    n: int | None = None
    interval: Sequence[float] | None = None
    stderr: float | None = None
    better: str = "higher"
    samples: dict[str, float] = field(default_factory=dict, repr=False)
    whole: float | None = None
    parts: Sequence[Figure] = field(default=(), repr=False)
    in_group: bool = False
    is_exponential: bool = False

    @property
    def key(self) -> Key:
        return self.stage, self.part, self.task, self.length, self.metric

    @property
    def mean(self) -> float:
        """Of the samples."""
        return math.log(self.value) if self.is_exponential else self.value

    @property
    def error(self) -> float | None:
        """The standard error of `mean`, from the interval where that is all there is."""
        if self.stderr is not None or not self.interval:
            return self.stderr
        low, high = map(math.log, self.interval) if self.is_exponential else self.interval
        return (high - low) / (2 * Z95)


def difference(figure: Figure, base: Figure) -> dict[str, Any]:
    """`figure` less `base` with its interval, whether the same questions were compared one by one, and how many; `unit`
    is "%" of a relative one."""
    unit = {"unit": "%"} if figure.is_exponential else {}
    if (found := _less(figure, base)) is None:
        value = figure.mean - base.mean
        value = 100 * math.expm1(value) if figure.is_exponential else value
        return {"difference": value, "interval": None, "paired": False, "n": None, **unit}
    found = found.relative() if figure.is_exponential else found
    return {**found.as_json(), "n": len(figure.samples) or None if found.paired else None, **unit}


def _less(figure: Figure, base: Figure) -> Difference | None:
    if figure.whole is not None:
        found = of_questions(base.samples, figure.samples)
        return found and found.scaled(figure.whole)
    if found := of_documents(base.samples, figure.samples):
        return found
    if [part.key[1:] for part in figure.parts] == [part.key[1:] for part in base.parts]:
        each = [_less(*pair) for pair in zip(figure.parts, base.parts, strict=True)]
        if each and None not in each:
            return mean_of([part for part in each if part is not None])
    if figure.error is None or base.error is None:
        return None
    return of_means(base.mean, base.error, figure.mean, figure.error)


# ---------------------------------------------------------------- of one arm


def arm_results(jobs: Sequence[Job]) -> dict[str, Any] | None:
    """What an arm's finished stages have left; None where none is finished."""
    done = [job for job in jobs if job.is_done]
    if not done:
        return None
    figures = list[Figure]()
    for job in (job for job in done if job.recipe is not None):
        with as_written(job.folder / job.stage / "summary.json"):
            figures += training_figures(job)
    for file in sorted(done[0].folder.glob("*/results/*.json")):
        with as_written(file):
            figures += evaluation_figures(file)
    for file in sorted(done[0].folder.glob("*.json")):
        with as_written(file):
            row = files.read_json(file)
            figures += speed_figures(row) if row.get("kind") == "speed" else []
    figures += list(_mean_of_tasks(figures))
    config = model_of(done)
    return {
        "stages": {job.stage: job.record for job in done},
        "unfinished": [job.stage for job in jobs if not job.is_done],
        "summaries": {job.stage: _summary(job) for job in done if job.recipe is not None},
        "model": None if config is None else about_model(config),
        "figures": {figure.key: figure for figure in figures},
    }


def _summary(job: Job) -> dict[str, Any]:
    return files.read_json(job.folder / job.stage / "summary.json")


def model_of(jobs: Sequence[Job]) -> ModelConfig | None:
    """The config of what the first stage trained."""
    return next((config for job in jobs if (config := config_of(job)) is not None), None)


def config_of(job: Job) -> ModelConfig | None:
    """The config of what a stage trained, from the export, or from the recipe where nothing was exported."""
    if job.recipe is None:
        return None
    exported, model = job.folder / job.stage / "hf", job.recipe["model"]
    if (exported / "config.json").is_file():
        return load_config(exported)
    return ModelConfig.from_dict(model["config"], str(job.recipe_file)) if model.get("init_from") is None else None


def about_model(config: ModelConfig) -> dict[str, Any]:
    heads = config.num_key_value_heads
    return {
        "attention_layout": config.attention_layout,
        "block_size": config.block_size,
        "parameters": config.num_parameters(),
        "density": {str(n): config.layout.density(n, heads) for n in (8192, 32768, 131072)},
    }


def training_figures(job: Job) -> Iterator[Figure]:
    """Held-out losses, rate, memory and time of a stage that trained."""
    summary = _summary(job)
    for name, values in summary["validation"].items():
        if values["loss"] is not None:
            yield Figure(job.stage, "training", f"held-out {name}", None, "nats/token", values["loss"], better="lower")
    rows = [row for row in read_metrics(job.folder / job.stage / "logs" / "metrics.csv") if "train/loss" in row]
    for key, label in (
        ("tokens_per_second_per_device", "tokens/s per GPU"),
        ("mfu_dense_equivalent", "MFU, dense-equivalent"),
        ("mfu_executed", "MFU, executed"),
    ):
        if rates := [row[key] for row in rows[SETTLED:] if key in row]:
            yield Figure(job.stage, "speed", label, None, "median", statistics.median(rates), n=len(rates))
            if key == "mfu_executed" and (factor := _square_over_executed(job)):
                median = factor * statistics.median(rates)
                yield Figure(job.stage, "speed", "MFU, full square", None, "median", median, n=len(rates))
    yield Figure(job.stage, "speed", "training", None, "hours", summary["seconds"] / 3600, better="lower")
    yield Figure(job.stage, "speed", "peak memory", None, "GiB", summary["memory_gib"], better="lower")


def _square_over_executed(job: Job) -> float | None:
    config, data = config_of(job), (job.recipe or {}).get("data", {}).get("init_args", {})
    if config is None or not (seq_len := data.get("seq_len")):
        return None
    return full_square_flops_per_token(config, seq_len) / flops_per_token(config, seq_len, executed=True)


def speed_figures(row: Mapping[str, Any]) -> Iterator[Figure]:
    labels = {
        "forward_ms": ("attention forward", "ms"),
        "backward_ms": ("attention backward", "ms"),
        "decode_ms": ("attention, one token", "ms"),
        "kv_bytes_per_token": ("KV needed per token", "bytes"),
        "cache_bytes_per_token": ("KV cached per token", "bytes"),
    }
    for key, (label, unit) in labels.items():
        if row.get(key) is not None:
            yield Figure("", "speed", label, row["length"], unit, row[key], better="lower")


def evaluation_figures(file: Path) -> list[Figure]:
    """The figures of a result file of `eval`; [] for other files."""
    content, stage = files.read_json(file), file.parts[-3]
    if not isinstance(content, dict):
        return []
    read = {"needle": _needle, "ruler": _ruler, "positions": _positions}.get(str(content.get("kind")))
    if read is not None and "summary" in content:
        return list(read(content, stage))
    return list(_tasks(content, stage)) if "results" in content and "s2" in content else []


def _needle(content: Mapping[str, Any], stage: str) -> Iterator[Figure]:
    kind = kind_of(content)
    for metric, summary in content["summary"].items():
        known = {row["length"]: row.get("interval") for row in summary.get("lengths", [])}
        for length in dict.fromkeys(each["length"] for each in content["samples"]):
            scores = questions(content, metric, length=length)
            mean, n = statistics.fmean(scores.values()), len(scores)
            interval = known.get(length) or wilson(mean, n)
            yield Figure(stage, "needle", kind, length, metric, mean, n, interval, samples=scores, whole=1.0)


def _ruler(content: Mapping[str, Any], stage: str) -> Iterator[Figure]:
    for row in [*content["summary"]["tasks"], *content["summary"]["lengths"]]:
        own = {"task": row["task"]} if "task" in row else {}
        found = questions(content, "match", length=row["length"], **own)
        task, length, score, n = row.get("task", "all tasks"), row["length"], row["score"], row["n"]
        yield Figure(
            stage, "ruler", task, length, "score", score, n, row["interval"], samples=found, whole=100.0
        )  # fmt: skip


def _positions(content: Mapping[str, Any], stage: str) -> Iterator[Figure]:
    """Loss and perplexity of the whole length, and loss by position: task `loss` and `loss <from>-<to>`, with `of
    <source>` where one source alone was read."""
    name = loss_name(content)
    for row in content["summary"]["lengths"]:
        for bucket in ({"from": 0, "to": row["length"], **row}, *row["buckets"]):
            low, high = bucket["from"], bucket["to"]
            task = name if bucket.get("buckets") else f"{name} {low}-{high}"
            figure = Figure(
                stage, "positions", task, row["length"], "nats/token", bucket["loss"], bucket["documents"],
                bucket["interval"], better="lower", samples=losses_by_document(content, row["length"], low, high),
            )  # fmt: skip
            yield figure
            if task == name and bucket["loss"] < _MOST_LOSS:
                within = bucket["interval"] and [math.exp(end) for end in bucket["interval"]]
                value = math.exp(bucket["loss"])
                yield replace(figure, metric="perplexity", value=value, interval=within, is_exponential=True)


def _tasks(content: Mapping[str, Any], stage: str) -> Iterator[Figure]:
    whole = documents.whole_tasks(content)
    for task, values in content["results"].items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            error = error if isinstance(error, float) else None
            n = documents.count_of(content, task, name)
            better = "higher" if content.get("higher_is_better", {}).get(task, {}).get(metric, True) else "lower"
            interval = documents.interval(content, task, name)
            yield Figure(
                stage, "tasks", task, None, metric, value, n, interval, error, better,
                samples=documents.of(content, task, name), in_group=task not in whole,
            )  # fmt: skip


def _mean_of_tasks(figures: Sequence[Figure]) -> Iterator[Figure]:
    """Accuracy averaged over the tasks of each stage, of a task that has both kinds the length-normalized one; a group
    counts as one task."""
    stages: dict[str, dict[str, Figure]] = {}
    for metric in ("acc", "acc_norm"):
        for each in (f for f in figures if f.part == "tasks" and f.metric == metric and not f.in_group):
            stages.setdefault(each.stage, {})[each.task] = each
    for stage, tasks in stages.items():
        if (count := len(tasks)) > 1:
            errors = [each.error for each in tasks.values() if each.error is not None]
            error = math.hypot(*errors) / count if len(errors) == count else None
            mean = statistics.fmean(each.value for each in tasks.values())
            parts = [tasks[task] for task in sorted(tasks)]
            yield Figure(stage, "tasks", f"mean of {count}", None, "acc_norm or acc", mean, stderr=error, parts=parts)


# ---------------------------------------------------------------- of all arms


def curves(jobs: Sequence[Job]) -> dict[str, list[dict[str, float]]]:
    """Rows of the training log by stage."""
    found = {job.stage: read_metrics(job.folder / job.stage / "logs" / "metrics.csv") for job in jobs if job.recipe}
    return {stage: rows for stage, rows in found.items() if rows}


def at_equal(logs: Mapping[str, list[dict[str, float]]], stage: str) -> dict[str, list[Figure]]:
    """By arm, up to where every arm of a stage has come: training loss at as many tokens, the mean over the twentieth
    before, and held-out losses at the last step that all have validated and after as many minutes, between two
    validations on the line through them. Training losses after as many minutes would be of different texts."""
    found: dict[str, list[Figure]] = {arm: [] for arm in logs}
    trained = {arm: [row for row in rows if "train/loss" in row] for arm, rows in logs.items()}
    if len(logs) < 2 or not all(trained.values()):
        return found

    def add(arm: str, task: str, value: float, **more: Any) -> None:
        found[arm].append(Figure(stage, "training", task, None, "nats/token", value, better="lower", **more))

    end = min(rows[-1]["tokens"] for rows in trained.values())
    for arm, rows in trained.items():
        losses = {str(row["step"]): row["train/loss"] for row in rows if 0.95 * end < row["tokens"] <= end}
        if losses:  # of the same steps, and so of the same batches
            error = statistics.stdev(losses.values()) / math.sqrt(len(losses)) if len(losses) > 1 else None
            mean = statistics.fmean(losses.values())
            add(arm, f"train loss at {end / 1e6:.1f} M tokens", mean, n=len(losses), stderr=error, samples=losses)
    for name in heldout_sets(chain.from_iterable(logs.values())):
        key = f"val/{name}/loss"
        taken = {arm: [row for row in rows if key in row] for arm, rows in logs.items()}
        values = {arm: {row["step"]: row[key] for row in rows} for arm, rows in taken.items()}
        if common := set.intersection(*map(set, values.values())):
            step = max(common)
            for arm, curve in values.items():
                add(arm, f"held-out {name} at step {step:,}", curve[step])
        if not all(taken.values()):
            continue
        last = min(rows[-1]["seconds"] for rows in taken.values())
        if all(rows[0]["seconds"] <= last for rows in taken.values()):
            for arm, rows in taken.items():
                value = np.interp(last, [row["seconds"] for row in rows], [row[key] for row in rows])
                add(arm, f"held-out {name} at {last / 60:.1f} minutes", float(value))
    return found


def collect(arms: Mapping[str, Sequence[Job]], baseline: str | None, also: str | None = None) -> dict[str, Any]:
    """All of an experiment: `arms` (those with results), `missing`, and `figures` in rows.

    also: a second arm that tasks and losses are compared with, whatever stage it has them of (its last one).
    """
    found = {arm: results for arm, jobs in arms.items() if (results := arm_results(jobs)) is not None}
    logs = {arm: curves([job for job in arms[arm] if job.is_done]) for arm in found}
    for stage in dict.fromkeys(stage for each in logs.values() for stage in each):
        for arm, figures in at_equal({a: each[stage] for a, each in logs.items() if stage in each}, stage).items():
            found[arm]["figures"] |= {figure.key: figure for figure in figures}
    rows = []
    base, second = (found.get(name or "", {}).get("figures", {}) for name in (baseline, also))
    second = {key[1:]: figure for key, figure in second.items() if figure.part in ("tasks", "positions")}
    for arm, results in found.items():
        for key, figure in results["figures"].items():
            row = {"arm": arm} | {name: getattr(figure, name) for name in (
                "stage", "part", "task", "length", "metric", "value", "n", "interval", "stderr", "better"
            )}  # fmt: skip
            if arm != baseline and key in base:
                row["from_baseline"] = difference(figure, base[key])
            if arm != also and key[1:] in second:
                row["from_also"] = difference(figure, second[key[1:]])
            rows.append(row)
    return {
        "arms": {arm: {k: v for k, v in each.items() if k != "figures"} for arm, each in found.items()},
        "missing": {arm: [job.stage for job in jobs if not job.is_done] for arm, jobs in arms.items()
                    if not all(job.is_done for job in jobs)},
        "baseline": baseline,
        "also": also,
        "figures": rows,
        "logs": logs,
    }  # fmt: skip
