"""Needle sweeps as numbers: read from files, placed in cells of context length by depth, with their uncertainty.

What can be read, also gzip-compressed:

- results of `eval.needle`, and the `.cells.json` that `eval.heatmap` writes beside a picture;
- rows of `context_length`, `depth_percent`, `score`, the form in which sweeps of other models are published: JSON
  lines, a JSON list, or one object a file (one file a cell);
- a folder of such files, which is one sweep.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from s2.files import parse_json

SCORE_NAMES = {
    "exact": "teacher-forced exact match",
    "partial": "teacher-forced token accuracy",
    "generated": "greedy generation, exact match",
}
_COLUMNS = ("context_length", "depth_percent", "score")  # of published rows
_OWN = ("length", "depth", "score")
_KINDS = {list: "a list", dict: "an object", float: "a number"}
Z95 = 1.959964  # two-sided 95 %


def student(freedom: int) -> float:
    """Two-sided 95 % point of Student's t: tabulated up to 4 degrees of freedom, above by an expansion in 1/freedom
    (Abramowitz and Stegun, 26.7.5), which is within 0.2 %."""
    if freedom < 5:
        return (12.7062, 4.3027, 3.1824, 2.7764)[freedom - 1]
    z, n = statistics.NormalDist().inv_cdf(0.975), float(freedom)
    return (
        z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )  # fmt: skip


def wilson(mean: float, n: float) -> tuple[float, float]:
    """95 % interval of the expectation behind `mean`, of `n` independent scores in 0..1 (Wilson, JASA 1927).

    Exact in its assumptions for scores of 0 and 1; wider than need be for scores between.
    """
    shrink = 1 + Z95**2 / n
    centre = (mean + Z95**2 / (2 * n)) / shrink
    half = Z95 * math.sqrt(max(0.0, mean * (1 - mean)) / n + (Z95 / (2 * n)) ** 2) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Sweep:
    """Scores in 0..1 by (context length in tokens, depth in percent), with what a caption needs to say."""

    cells: dict[tuple[int, float], list[float]]
    checkpoint: str
    scorer: str
    train_length: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        return sorted({length for length, _ in self.cells})

    @property
    def depths(self) -> list[float]:
        return sorted({depth for _, depth in self.cells})

    def grid(self, lengths: Sequence[int] | None = None, depths: Sequence[float] | None = None) -> np.ndarray:
        """Mean score [depths, lengths], by default of this sweep's own; NaN where a cell was not run."""
        lengths, depths = lengths or self.lengths, depths or self.depths
        return np.array([[np.mean(self.cells.get((size, depth), [np.nan])) for size in lengths] for depth in depths])

    def counts(self) -> tuple[int, int]:
        """Fewest and most samples of a cell that was run."""
        sizes = [len(scores) for scores in self.cells.values()]
        return min(sizes), max(sizes)

    def mean(self) -> float:
        """Mean over cells, so that a cell with more samples does not count more."""
        return float(np.mean([np.mean(scores) for scores in self.cells.values()]))

    def interval(self) -> tuple[float, float]:
        """95 % interval of `mean`, with the number of equally weighted samples that have its variance."""
        inverse = sum(1 / len(scores) for scores in self.cells.values())
        return wilson(self.mean(), len(self.cells) ** 2 / inverse)

    def at(self, lengths: Sequence[int]) -> Sweep:
        """Only the cells of these lengths."""
        return replace(self, cells={cell: scores for cell, scores in self.cells.items() if cell[0] in lengths})

    def by_length(self) -> list[dict[str, Any]]:
        """Mean over the depths of each length, with its interval and number of samples."""
        rows = []
        for length in self.lengths:
            own = self.at([length])
            n, interval = sum(map(len, own.cells.values())), [round(end, 4) for end in own.interval()]
            rows.append({"length": length, "score": own.mean(), "n": n, "interval": interval})
        return rows

    def as_json(self) -> dict[str, Any]:
        """Mean and interval of every cell and of the whole."""
        cells = []
        for (length, depth), scores in sorted(self.cells.items()):
            mean = float(np.mean(scores))
            interval = [round(end, 4) for end in wilson(mean, len(scores))]
            cells.append({"length": length, "depth": depth, "score": mean, "n": len(scores), "interval": interval})
        return {
            "kind": "needle-heatmap",
            "checkpoint": self.checkpoint,
            "scorer": self.scorer,
            "train_length": self.train_length,
            "notes": list(self.notes),
            "mean": self.mean(),
            "interval": [round(end, 4) for end in self.interval()],
            "interval_kind": "Wilson, 95 %",
            "cells": cells,
        }


def describe(sweep: Sweep) -> str:
    """One line: mean score and its 95 % interval, samples per cell and what they can tell, notes."""
    low, high = sweep.counts()
    n = f"n = {low}" if low == high else f"n = {low} to {high}"
    begin, end = sweep.interval()
    certain = f"{low} of {low} right: 95% {wilson(1, low)[0]:.2f} to 1"
    return " · ".join(
        [f"mean {sweep.mean():.3f} (95% {begin:.2f} to {end:.2f})", f"{n} per cell ({certain})", *sweep.notes]
    )


def kind_of(results: Mapping[str, Any]) -> str:
    """Which needles a result file of `eval.needle` is of (`eval.needle_prompts.KINDS`); earlier files do not say it."""
    return str((results.get("settings") or {}).get("kind", "single"))


def read_sweep(files: Sequence[Path], score: str = "exact", score_range: tuple[float, float] | None = None) -> Sweep:
    """Read files that are parts of one sweep; a folder stands for its .json and .jsonl files.

    A sample that two of the files hold counts once. A needle that lies nearer to another of the sweep's depths than to
    the one it was meant for is shown where it lies, and a note says of how many that is so.

    Args:
        score: which of the scores of `eval.needle`.
        score_range: lowest and highest possible score of published rows, brought to 0..1; our own are 0..1 always.
    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown form, a broken row, a missing score, a score outside the range, files of several
            checkpoints; names file and row.
    """
    scale = score_range or (0.0, 1.0)
    if not scale[0] < scale[1]:
        low, high = scale
        raise ValueError(f"--score-range {low:g},{high:g}: expected the lowest and the highest score, like 1,10")
    parts = [_read(file, score) for file in _expanded(files)]
    names = list(dict.fromkeys(part.checkpoint for part in parts if part.rows))
    if not names:
        raise ValueError(f"{', '.join(map(str, files))}: no samples")
    if len(names) > 1 or len({part.fingerprint for part in parts if part.fingerprint}) > 1:
        raise ValueError(
            f"{', '.join(map(str, files))}: of several checkpoints ({', '.join(names[:4])}); files of one sweep"
            " are of one checkpoint, others are drawn side by side"
        )
    cells: defaultdict[tuple[int, float], list[float]] = defaultdict(list)
    seen = set()
    for part in parts:
        low, high = scale if part.is_published else (0.0, 1.0)
        for row in part.rows:
            if not low <= row.score <= high:
                hint = "" if score_range or not part.is_published else "; name the scale with --score-range, like 1,10"
                raise ValueError(f"{row.place}: score {row.score:g} is outside {low:g}..{high:g}{hint}")
            if row.identity is None or row.identity not in seen:
                cells[row.length, row.depth] += [(row.score - low) / (high - low)] * row.n
                seen.add(row.identity)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    lengths = [part.train_length for part in parts if part.train_length]
    return Sweep(dict(cells), names[0], parts[0].scorer, max(lengths, default=None), notes)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    place: str
    length: int
    depth: float
    score: float
    n: int = 1
    identity: Any = None


@dataclass(frozen=True)
class _Part:
    rows: list[_Row]
    checkpoint: str
    scorer: str
    train_length: int | None = None
    notes: tuple[str, ...] = ()
    fingerprint: str | None = None
    is_published: bool = False


def _expanded(paths: Sequence[Path]) -> Iterator[Path]:
    for path in dict.fromkeys(map(Path, paths)):
        if not path.is_dir():
            yield path
            continue
        found = [file for file in sorted(path.iterdir()) if file.name.endswith((".json", ".jsonl", ".jsonl.gz"))]
        found = [file for file in found if not file.name.endswith(".cells.json")]  # the numbers of a picture of these
        if not found:
            raise FileNotFoundError(f"{path}: no .json or .jsonl file in this folder")
        yield from found


def _read(file: Path, score: str) -> _Part:
    content = _parse(file)
    if isinstance(content, dict) and content.get("kind") == "needle":
        return _samples(file, content, score)
    if isinstance(content, dict) and content.get("kind") == "needle-heatmap":
        cells = [(f"{file}, cell {i}", cell) for i, cell in enumerate(_get(file, content, "cells", list), start=1)]
        rows = [replace(_row(place, c, _OWN), n=max(1, int(_get(place, c, "n", float)))) for place, c in cells]
        notes = tuple(map(_text, _get(file, content, "notes", list, [])))
        scorer = _text(content.get("scorer", ""))
        return _Part(rows, _name(file, content), scorer, _train_length(file, content), notes)
    if isinstance(content, dict) and not set(_COLUMNS) & set(content):
        raise ValueError(f"{file}: expected a result file of eval.needle or rows of {', '.join(_COLUMNS)}")
    found = [(str(file), content)] if isinstance(content, dict) else content
    rows = [_row(place, row, _COLUMNS) for place, row in found]
    names = list(dict.fromkeys(_name(file, {"checkpoint": row.get("model")}) for _, row in found))
    if len(names) > 1:
        raise ValueError(f"{file}: rows of several models ({', '.join(names[:4])}); one file for each, please")
    return _Part(rows, "".join(names), "as published", is_published=True)


def _parse(file: Path) -> Any:
    """The object of a JSON file, or [(place, value)] of a list or of JSON lines."""
    data = file.read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file}: not UTF-8 text, or damaged gzip data ({error})") from None
    try:
        content = parse_json(file, text)
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [(f"{file}, line {n}", parse_json(file, line, n)) for n, line in lines]
    return (
        [(f"{file}, row {i}", row) for i, row in enumerate(content, start=1)] if isinstance(content, list) else content
    )


def _samples(file: Path, results: dict[str, Any], score: str) -> _Part:
    samples = _get(file, results, "samples", list)
    rows, moved = [], 0
    depths = sorted({row.depth for row in (_row(f"{file}, sample {i}", s, _OWN[:2]) for i, s in enumerate(samples, 1))})
    conditions = json.dumps([results.get(key) for key in ("fingerprint", "dtype", "settings")], sort_keys=True)
    for number, sample in enumerate(samples, start=1):
        place = f"{file}, sample {sample.get('id', number)}"
        scores = _get(place, sample, "scores", dict)
        if score not in scores:
            raise ValueError(f"{place}: no score {score!r}; it has {', '.join(scores) or 'none'}")
        identity = (conditions, sample["id"]) if "id" in sample and results.get("fingerprint") else None
        row = replace(_row(place, sample | scores, (*_OWN[:2], score)), identity=identity)
        for needle in _get(place, sample, "needles", list, [])[:1]:
            measured = _get(place, needle, "depth", float, row.depth)
            near = min(depths, key=lambda depth: (abs(depth - measured), depth != row.depth))
            moved += near != row.depth
            row = replace(row, depth=near)
        rows.append(row)
    settings = _get(file, results, "settings", dict, {})
    notes = [f"attention {results['attention_layout']}"] if results.get("attention_layout") else []
    notes += [f"haystack {settings['haystack']}"] if settings.get("haystack") else []
    notes += [_text(settings["kind"])] if settings.get("kind", "single") != "single" else []
    for key, usual in (("needles", 1), ("distractors", 0)):
        if (count := _get(file, settings, key, float, usual)) > usual:
            notes.append(f"{count:g} {key}")
    if moved:
        notes.append(f"{moved} of {len(rows)} needles lay nearer to another row than meant and are shown there")
    scorer, fingerprint = SCORE_NAMES.get(score, score), results.get("fingerprint")
    return _Part(rows, _name(file, results), scorer, _train_length(file, results), tuple(notes), fingerprint)


def _row(place: str, content: Any, columns: Sequence[str]) -> _Row:
    """Checked; `columns` are the names of length, depth and, where there is one, score."""
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected an object with {', '.join(columns)}, not {json.dumps(content)[:40]}")
    length, depth, score = (*(_get(place, content, key, float) for key in columns), 0.0)[:3]
    if length < 1 or length != int(length):
        raise ValueError(f"{place}: a context of {length:g} tokens; expected a whole number from 1 on")
    if not 0 <= depth <= 100:
        raise ValueError(f"{place}: depth {depth:g}; a depth is a percentage, 0 to 100")
    return _Row(place, int(length), depth, score)


def _get(place: object, content: Any, key: str, kind: type, default: Any = None) -> Any:
    """The value of a key, which must be of this kind; without a default it must be there."""
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected an object, not {json.dumps(content)[:40]}")
    if key not in content and default is None:
        raise ValueError(f"{place}: no {key!r}")
    value = content.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number if kind is float else isinstance(value, kind)):
        raise ValueError(f"{place}: {key} is {json.dumps(value)[:40]}, not {_KINDS[kind]}")
    return value


def _train_length(file: Path, content: dict[str, Any]) -> int | None:
    return None if content.get("train_length") is None else int(_get(file, content, "train_length", float))


def _name(file: Path, content: dict[str, Any]) -> str:
    return _text(content.get("checkpoint") or file.name.split(".")[0] or file.name)


def _text(value: Any) -> str:
    return " ".join(str(value).split())
