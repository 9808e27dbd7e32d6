"""Tables of what was measured of the models, with differences to the first run and how sure those are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.differences import Difference, losses_by_document, of_means, of_questions, paired_means, questions
from eval.grid import format_length
from eval.report.run import Run, Scores
from eval.results import threshold
from eval.sweep import SCORE_NAMES, wilson
from s2.tables import markdown

DASH = "-"


class Comparison:
    """A table with a column a run, which remembers how its differences were made."""

    def __init__(self, runs: Sequence[Run], *header: str) -> None:
        self.runs, self.header = runs, header
        self.rows: list[list[str]] = []
        self._how: dict[bool, dict[str, None]] = {}
        self._bare = False

    def add(
        self,
        labels: Sequence[str],
        cells: Sequence[str | None],
        found: Sequence[Difference | float | None],
        unit: str = "",
    ) -> None:
        """One row. found: the difference of each run to the first; a bare number has no interval. unit: of these."""
        texts = []
        for i, (cell, difference) in enumerate(zip(cells, found, strict=True)):
            text = cell or DASH
            if i and cell and isinstance(difference, Difference):
                self._how.setdefault(difference.paired, {})[self.runs[i].name] = None
                text += f"<br>**{difference}{unit}**" if difference.is_sure else f"<br>{difference}{unit}"
            elif i and cell and difference is not None:
                self._bare = True
                text += f"<br>{difference:+.3f}{unit}"
            texts.append(text)
        self.rows.append([*labels, *texts])

    def parts(self, unit: str = "", item: str = "question") -> list[str]:
        """The table and what its second lines are. item: what differences are paired by."""
        columns = [i for i in range(len(self.header)) if any(row[i] for row in self.rows)]
        names = [run.name for run in self.runs]
        rows = [[*(row[i] for i in columns), *row[len(self.header) :]] for row in self.rows]
        parts = [markdown([*(self.header[i] for i in columns), *names], rows)]
        says = f"Second lines: difference to {names[0]}{unit}"
        ways = {True: f"paired by {item}", False: "unpaired"}
        how = "; ".join(f"{', '.join(of)} {ways[each]}" for each, of in sorted(self._how.items(), reverse=True))
        if how:
            bare = "; without one where only means are on record" if self._bare else ""
            parts.append(f"{says} with its 95 % interval, bold where that leaves 0 out ({how}){bare}.")
        elif self._bare:
            parts.append(f"{says}, without an interval: only means are on record.")
        return parts


def with_interval(mean: float, low: float, high: float, digits: int = 3) -> str:
    return f"{mean:.{digits}f} ({low:.{digits - 1}f} to {high:.{digits - 1}f})"


# --- losses -----------------------------------------------------------------------------------------------------------


def heldout(runs: Sequence[Run]) -> list[str]:
    """Held-out losses at the end of training, and after how many tokens that was."""
    table = Comparison(runs, "held-out set", "note")
    counts = [run.last("tokens") for run in runs]
    table.add(("tokens", ""), [None if count is None else f"{count:,.0f}" for count in counts], [None] * len(runs))
    for name in heldout_sets(runs):
        losses = [run.last(f"val/{name}/loss") for run in runs]
        same = [_heldout_text(run, name) == _heldout_text(runs[0], name) for run in runs]
        found = [
            None if loss is None or losses[0] is None or not alike else loss - losses[0]
            for loss, alike in zip(losses, same, strict=True)
        ]
        other = [
            run.name for run, alike, loss in zip(runs, same, losses, strict=True) if not alike and loss is not None
        ]
        note = f"other text in {', '.join(other)}" if other and losses[0] is not None else ""
        table.add((name, note), [None if loss is None else f"{loss:.3f}" for loss in losses], found)
    return table.parts(" in nats a token")


def heldout_sets(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.heldout_sets))


def _heldout_text(run: Run, name: str) -> Any:
    """What says which text a held-out set is; None where the recipe does not."""
    sets = (each for each in run.data.get("validation") or () if isinstance(each, dict) and each.get("name") == name)
    found = next(sets, None)
    return found and found | {"seq_len": found.get("seq_len") or run.data.get("seq_len")}


def positions(runs: Sequence[Run], stem: str) -> list[str]:
    """Loss by position, a row a bucket, and perplexity; paired over documents where those are the same."""
    table = Comparison(runs, "length", "position")
    found = [run.positions.get(stem) for run in runs]
    tables = [buckets(scores) for scores in found]
    for length in sorted({length for by_length in tables for length in by_length}):
        spans = dict.fromkeys((b["from"], b["to"]) for t in tables for b in t.get(length, ()))
        for low, high in ((None, None), *spans):
            values = [_loss(scores, length, low, high) for scores in found]
            each = [losses_by_document(s.content, length, low or 0, high) if s else {} for s in found]
            differences = [_document_difference(each[0], other) for other in each]
            label = "all" if low is None else f"{low:,} to {high:,}"
            table.add((format_length(length), label), values, differences)
            if low is None:
                relative = [each and each.relative() for each in differences]
                values = [_perplexity(scores, length) for scores in found]
                table.add((format_length(length), "all, perplexity"), values, relative, " %")
    return [*table.parts(" in nats a token, of perplexities in percent,", "document"), said(runs, found, cuts=False)]


def said(runs: Sequence[Run], found: Sequence[Scores | None], cuts: bool = True) -> str:
    """The conditions that result files say they hold under, a line a run. cuts: with the prompts not read whole."""
    lines, keys = [], ("n", "bos", "sampling", *(("cut",) if cuts else ()), "scoring")
    for run, scores in zip(runs, found, strict=True):
        about = scores.content.get("conditions", {}) if scores else {}
        known = [f"{key} {about[key]}" for key in keys if key in about]
        lines += [f"- {run.name}: {', '.join(known)}"] if known else []
    return "\n".join(lines)


def buckets(scores: Scores | None) -> dict[int, list[dict[str, Any]]]:
    """Buckets of positions by length."""
    lengths = scores.content["summary"].get("lengths", []) if scores else []
    return {each["length"]: each.get("buckets", []) for each in lengths}


def _loss(scores: Scores | None, length: int, low: int | None, high: int | None) -> str | None:
    for each in scores.content["summary"].get("lengths", []) if scores else []:
        if each["length"] == length:
            rows = [each] if low is None else [b for b in each["buckets"] if (b["from"], b["to"]) == (low, high)]
            for row in rows:
                return with_interval(row["loss"], *row["interval"]) if row.get("interval") else f"{row['loss']:.3f}"
    return None


def _perplexity(scores: Scores | None, length: int) -> str | None:
    rows = scores.content["summary"].get("lengths", []) if scores else []
    row = next((row for row in rows if row["length"] == length), None)
    if row is None or row.get("perplexity") is None:
        return None
    if not row.get("interval"):
        return f"{row['perplexity']:.3f}"
    low, high = map(math.exp, row["interval"])
    return with_interval(row["perplexity"], low, high)


def _document_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference | None:
    if first and first.keys() == second.keys():
        return paired_means(first, second)
    (a, error_a), (b, error_b) = _mean(list(first.values())), _mean(list(second.values()))
    return None if math.isnan(error_a + error_b) else of_means(a, error_a, b, error_b)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, NaN of fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


# --- retrieval --------------------------------------------------------------------------------------------------------


def needle(runs: Sequence[Run], stem: str, score: str = "exact") -> list[str]:
    """Needles found by length, and the worst depth."""
    table = Comparison(runs, "context length", "n")
    found = [run.needle.get(stem) for run in runs]
    sweeps = [run.sweeps.get(stem) for run in runs]
    for length in sorted({length for sweep in sweeps if sweep for length in sweep.lengths}):
        answers = [questions(scores.content, score, length=length) if scores else {} for scores in found]
        _add_answers(table, (format_length(length),), answers)
    for name in (score, *(other for other in SCORE_NAMES if other != score)):
        answers = [questions(scores.content, name) if scores else {} for scores in found]
        if any(answers):
            _add_answers(table, (f"all: {SCORE_NAMES[name]}",), answers)
    worst = []
    for sweep in sweeps:
        by_depth = {} if sweep is None else {d: sweep.grid(None, [d])[0].mean() for d in sweep.depths}
        depth = min(by_depth, key=lambda d: by_depth[d], default=None)
        worst.append(None if depth is None else f"{by_depth[depth]:.3f} at {depth:g} %")
    table.add(("worst depth", ""), worst, [None] * len(runs))
    return table.parts()


def _add_answers(table: Comparison, labels: Sequence[str], answers: Sequence[Mapping[str, float]]) -> None:
    cells = []
    for each in answers:
        mean = sum(each.values()) / len(each) if each else 0.0
        cells.append(with_interval(mean, *wilson(mean, len(each))) if each else None)
    sizes = dict.fromkeys(str(len(each)) for each in answers if each)
    table.add((*labels, " / ".join(sizes)), cells, [of_questions(answers[0], each) for each in answers])


def ruler(runs: Sequence[Run], stem: str) -> list[str]:
    """RULER's scores (in shares of 1) by length, effective length, and by task and length."""
    found = [run.ruler.get(stem) for run in runs]
    lengths = sorted({s["length"] for scores in found if scores for s in scores.content.get("samples", ())})
    tasks = list(dict.fromkeys(s["task"] for scores in found if scores for s in scores.content.get("samples", ())))
    table = Comparison(runs, "task", "context length", "n")
    for length in lengths:
        answers = [questions(scores.content, "match", length=length) if scores else {} for scores in found]
        _add_answers(table, ("all", format_length(length)), answers)
    table.add(("effective length", "", ""), [_effective(scores) for scores in found], [None] * len(runs))
    for task in tasks:
        for length in lengths:
            answers = [questions(s.content, "match", task=task, length=length) if s else {} for s in found]
            _add_answers(table, (task, format_length(length)), answers)
    parts = table.parts()
    summaries = [scores.content["summary"] for scores in found if scores]
    for about in [summary["effective"] for summary in summaries if summary.get("effective")][:1]:
        parts.append(
            f"Effective length: the longest up to which every length scores at least {about['threshold']:g} % "
            f"({about['source']}); in brackets, at least {about['relative_threshold']:.0%} of the shortest's score."
        )
    return [*parts, said(runs, found)]


def _effective(scores: Scores | None) -> str | None:
    about = scores.content["summary"].get("effective") if scores else None
    if not about:
        return None
    absolute, relative = (about.get(key) for key in ("length", "relative_length"))
    return f"{format_length(absolute) if absolute else 'none'} ({format_length(relative) if relative else 'none'})"


def gate(runs: Sequence[Run]) -> str:
    """What a stage had to reach before the next one, and whether it did."""
    rows = []
    for run in runs:
        for check in run.gate.get("checks", ()):
            what = " ".join(str(check[key]) for key in ("check", "kind", "task", "metric") if check.get(key))
            place = format_length(check["length"]) if check.get("length") else ""
            span = f", {check['from']:,} to {check.get('to') or check['length']:,}" if "from" in check else ""
            limit = threshold(check)
            passed = "passed" if check.get("passed") else "**not passed**"
            passed = f"not measured: {check['unmeasured']}" if check.get("unmeasured") else passed
            value = "-" if check.get("value") is None else f"{check['value']:.3f}"
            rows.append([run.name, what, place + span, value, limit, passed])
    return markdown(["run", "check", "length, positions", "value", "limit", ""], rows)
