"""How far two runs are apart, and how sure that is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.sweep import Z95, Sweep, student, wilson


@dataclass(frozen=True)
class Difference:
    """`value` = second less first, with its 95 % interval. paired: of the same questions, one by one."""

    value: float
    low: float
    high: float
    paired: bool

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def scaled(self, factor: float) -> Difference:
        """In another unit, so many of which are one of this."""
        return Difference(factor * self.value, factor * self.low, factor * self.high, self.paired)

    def relative(self) -> Difference:
        """Of losses as that of their perplexities, in percent of the first."""
        value, low, high = (100 * math.expm1(end) for end in (self.value, self.low, self.high))
        return Difference(value, low, high, self.paired)

    def as_json(self) -> dict[str, Any]:
        interval = [round(self.low, 4), round(self.high, 4)]
        return {"difference": self.value, "interval": interval, "interval_kind": "95 %", "paired": self.paired}

    @property
    def how(self) -> str:
        return "paired: the same questions" if self.paired else "unpaired"

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.2f} to {self.high:+.2f})"


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Of scores in 0..1 by question, over the questions that both have.

    Agresti and Min's interval (Statistics in Medicine 2005): half a pair is added to each cell of the table of right
    and wrong, so that runs that agree everywhere do not look certain. Exact in its assumptions for scores of 0 and 1.

    Raises:
        ValueError: no question in common.
    """
    each = np.array([second[name] - first[name] for name in first if name in second])
    if not each.size:
        raise ValueError("no question in common")
    n, total = each.size + 2, each.sum()
    half = Z95 * math.sqrt(max(0.0, (each**2).sum() + 1 - total**2 / n)) / n
    return Difference(float(each.mean()), max(-1.0, total / n - half), min(1.0, total / n + half), True)


def unpaired(first: float, first_n: float, second: float, second_n: float) -> Difference:
    """Of two mean scores in 0..1 of so many independent questions each: Newcombe's hybrid of Wilson intervals
    (Statistics in Medicine 1998, method 10)."""
    (low_1, high_1), (low_2, high_2) = wilson(first, first_n), wilson(second, second_n)
    value = second - first
    low = value - math.hypot(second - low_2, high_1 - first)
    return Difference(value, low, value + math.hypot(high_2 - second, first - low_1), False)


def of_means(first: float, first_error: float, second: float, second_error: float) -> Difference:
    """Of two independent means with their standard errors."""
    value, half = second - first, Z95 * math.hypot(first_error, second_error)
    return Difference(value, value - half, value + half, False)


def paired_means(first: Mapping[str, float], second: Mapping[str, float]) -> Difference | None:
    """Of any numbers by item, over the items that both have; None with fewer than two."""
    each = np.array([second[name] - first[name] for name in first if name in second])
    if each.size < 2:
        return None
    half = student(each.size - 1) * float(each.std(ddof=1)) / math.sqrt(each.size)
    return Difference(float(each.mean()), float(each.mean()) - half, float(each.mean()) + half, True)


def of_documents(first: Mapping[str, float], second: Mapping[str, float]) -> Difference | None:
    """Of numbers by document (`eval.documents`), where both have the same ones: Agresti and Min's interval of right and
    wrong answers, Student's of others. None where the documents differ or are fewer than two."""
    if not first or first.keys() != second.keys():
        return None
    is_binary = {*first.values(), *second.values()} <= {0.0, 1.0}
    return paired(first, second) if is_binary else paired_means(first, second)


def mean_of(each: Sequence[Difference]) -> Difference:
    """Of the mean over parts that are independent of each other, such as tasks: the distances from the differences to
    the ends of their intervals are added in squares (Zou and Donner, Statistics in Medicine 2008), which keeps them
    uneven where they are. Paired where all parts are."""
    count = len(each)
    value = math.fsum(part.value for part in each) / count
    low = value - math.hypot(*(part.value - part.low for part in each)) / count
    high = value + math.hypot(*(part.high - part.value for part in each)) / count
    return Difference(value, low, high, all(part.paired for part in each))


# --- questions --------------------------------------------------------------------------------------------------------


def questions(content: Mapping[str, Any], score: str, **where: Any) -> dict[str, float]:
    """Scores of a result file of `eval.needle` or `eval.ruler` by question, of the samples with these values (`length`,
    `task`). A question's name changes with its prompt, so that only answers to the same prompts are compared."""
    found = {}
    settings = json.dumps(content.get("settings"), sort_keys=True)
    for sample in content.get("samples", ()):
        if score in sample.get("scores", ()) and all(sample.get(key) == value for key, value in where.items()):
            # earlier files have no digest of the prompt: settings and what was hidden tell prompts apart
            prompt = sample.get("prompt") or f"{settings} {sample.get('needles')}"
            found[f"{sample.get('id')} {prompt}"] = float(sample["scores"][score])
    return found


def losses_by_document(
    content: Mapping[str, Any], length: int, low: int = 0, high: int | None = None
) -> dict[str, float]:
    """Mean loss of each document of that length in a result file of `eval.positions`, over the buckets from `low` to
    `high` (None: to the end). A document's name changes with its tokens."""
    found = {}
    for sample in content.get("samples", ()):
        if sample.get("length") == length:
            rows = [row for row in sample["losses"] if low <= row[0] and (high is None or row[1] <= high)]
            if count := sum(row[2] for row in rows):
                found[f"{sample['id']} {sample.get('prompt')}"] = sum(row[2] * row[3] for row in rows) / count
    return found


def loss_name(content: Mapping[str, Any]) -> str:
    """What a result file of `eval.positions` holds: `loss`, or `loss of books` where it read one source alone."""
    source = (content.get("settings") or {}).get("source")
    return f"loss of {source}" if source else "loss"


def of_questions(first: Mapping[str, float], second: Mapping[str, float]) -> Difference | None:
    """Paired where both answered the same questions, else unpaired; None where one answered none."""
    if not first or not second:
        return None
    if first.keys() == second.keys():
        return paired(first, second)
    means = [float(np.mean(list(scores.values()))) for scores in (first, second)]
    return unpaired(means[0], len(first), means[1], len(second))


def of_sweeps(sweeps: Sequence[Sweep], contents: Sequence[Mapping[str, Any]], score: str) -> Difference:
    """Of two needle sweeps as a whole, over the cells that both have.

    contents: their result files, {} where there is none.
    """
    first, second = (questions(content, score) for content in contents)
    if first and first.keys() == second.keys():
        return paired(first, second)
    shared = sorted(sweeps[0].cells.keys() & sweeps[1].cells.keys())
    cells = [[sweep.cells[cell] for cell in shared] for sweep in sweeps]
    means = [float(np.mean([np.mean(scores) for scores in each])) for each in cells]
    sizes = [len(shared) ** 2 / sum(1 / len(scores) for scores in each) for each in cells]
    return unpaired(means[0], sizes[0], means[1], sizes[1])
