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
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCORE_NAMES = {
    "exact": "teacher-forced exact match",
    "partial": "teacher-forced token accuracy",
    "generated": "greedy generation, exact match",
}
_PUBLISHED = ("context_length", "depth_percent", "score")
_Z = 1.959964  # two-sided 95 %


def wilson(mean: float, n: float) -> tuple[float, float]:
    """95 % interval of the expectation behind `mean`, of `n` independent scores in 0..1 (Wilson, JASA 1927).

    Exact in its assumptions for scores of 0 and 1; wider than need be for scores between.
    """
    shrink = 1 + _Z**2 / n
    centre = (mean + _Z**2 / (2 * n)) / shrink
    half = _Z * math.sqrt(max(0.0, mean * (1 - mean)) / n + (_Z / (2 * n)) ** 2) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Sweep:
    """Scores in 0..1 by (context length in tokens, depth in percent), with what a caption needs to say."""

    cells: dict[tuple[int, float], list[float]]
    checkpoint: str
    scorer: str
    train_length: int | None = None
    notes: tuple[str, ...] = field(default=())

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
            f"{', '.join(map(str, files))}: of several checkpoints ({', '.join(names)}); files of one sweep"
            " are of one checkpoint, others are drawn side by side"
        )
    cells: defaultdict[tuple[int, float], list[float]] = defaultdict(list)
    seen = set()
    for part in parts:
        low, high = scale if part.published else (0.0, 1.0)
        for row in part.rows:
            if not low <= row.score <= high:
                hint = "" if score_range or not part.published else "; name the scale with --score-range, like 1,10"
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
    published: bool = False


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
    if isinstance(content, dict):
        if content.get("kind") == "needle":
            return _samples(file, content, score)
        if content.get("kind") == "needle-heatmap" and "cells" in content:
            return _cells(file, content)
        if not set(_PUBLISHED) & set(content):
            raise ValueError(
                f"{file}: expected a result file of eval.needle or rows of context_length, depth_percent, score"
            )
        content = [("", content)]
    return _published(file, content)


def _parse(file: Path) -> Any:
    """The object of a JSON file, or [(" row 3" or " line 3", value)] of a list or of JSON lines."""
    try:
        data = file.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: damaged gzip data ({error})") from None
    if not text.strip():
        raise ValueError(f"{file}: the file is empty")
    if file.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return _parse_lines(file, text)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under another name
            return _parse_lines(file, text)
        raise ValueError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if isinstance(content, list):
        return [(f", row {number}", row) for number, row in enumerate(content, start=1)]
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object or a list of rows, not {json.dumps(content)[:40]}")
    return content


def _parse_lines(file: Path, text: str) -> list[tuple[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f", line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{file}, line {number}: not valid JSON ({reason})") from None
    return rows


def _published(file: Path, content: list[tuple[str, Any]]) -> _Part:
    rows, names = [], []
    for where, row in content:
        place = f"{file}{where}"
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object with {', '.join(_PUBLISHED)}, not {json.dumps(row)[:40]}")
        length, depth, score = (_number(place, row, key) for key in _PUBLISHED)
        rows.append(_Row(place, _length(place, length), _depth(place, depth), score))
        names.append(_text(row.get("model", _stem(file))))
    names = list(dict.fromkeys(names))
    if len(names) > 1:
        raise ValueError(f"{file}: rows of several models ({', '.join(names[:4])}); one file for each, please")
    return _Part(rows, names[0] if names else _stem(file), "as published", published=True)


def _cells(file: Path, content: dict[str, Any]) -> _Part:
    rows = []
    for number, cell in enumerate(_objects(file, content, "cells"), start=1):
        place = f"{file}, cell {number}"
        length, depth, score, n = (_number(place, cell, key) for key in ("length", "depth", "score", "n"))
        rows.append(_Row(place, _length(place, length), _depth(place, depth), score, max(1, int(n))))
    return _Part(
        rows,
        _text(content.get("checkpoint") or _stem(file)),
        _text(content.get("scorer", "")),
        _train_length(file, content),
        tuple(map(_text, _list(file, content, "notes"))),
    )


def _samples(file: Path, results: dict[str, Any], score: str) -> _Part:
    samples = _objects(file, results, "samples")
    rows, moved = [], 0
    depths = sorted({sample["depth"] for sample in samples if isinstance(sample.get("depth"), int | float)})
    conditions = json.dumps([results.get(key) for key in ("fingerprint", "dtype", "settings")], sort_keys=True)
    for number, sample in enumerate(samples, start=1):
        name = sample.get("id", str(number))
        place = f"{file}, sample {name}"
        scores = _object(place, sample, "scores")
        if score not in scores:
            raise ValueError(f"{place}: no score {score!r}; it has {', '.join(scores) or 'none'}")
        meant = _depth(place, _number(place, sample, "depth"))
        needles = [needle for needle in _objects(place, sample, "needles")[:1] if "depth" in needle]
        measured = next((_depth(place, _number(place, needle, "depth")) for needle in needles), meant)
        depth = min(depths, key=lambda row: (abs(row - measured), row != meant))
        moved += depth != meant
        length = _length(place, _number(place, sample, "length"))
        identity = (conditions, name) if "id" in sample and results.get("fingerprint") else None
        rows.append(_Row(place, length, depth, _number(place, scores, score), 1, identity))
    settings = _object(file, results, "settings")
    notes = [f"haystack {settings['haystack']}"] if settings.get("haystack") else []
    if results.get("attention_layout"):
        notes.insert(0, f"attention {results['attention_layout']}")
    for key, usual in (("needles", 1), ("distractors", 0)):
        if key in settings and (count := _number(str(file), settings, key)) > usual:
            notes.append(f"{count:g} {key}")
    if moved:
        notes.append(f"{moved} of {len(rows)} needles lay nearer to another row than meant and are shown there")
    return _Part(
        rows,
        _text(results.get("checkpoint") or _stem(file)),
        SCORE_NAMES.get(score, score),
        _train_length(file, results),
        tuple(notes),
        results.get("fingerprint"),
    )


def _list(place: object, content: dict[str, Any], key: str) -> list[Any]:
    """The list under `key`; none where that is missing. Raises ValueError for anything else."""
    if not isinstance(value := content.get(key, []), list):
        raise ValueError(f"{place}: {key} is {json.dumps(value)[:40]}, expected a list")
    return value


def _objects(place: object, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    for value in (values := _list(place, content, key)):
        if not isinstance(value, dict):
            raise ValueError(f"{place}: {key} holds {json.dumps(value)[:40]}, expected objects")
    return values


def _object(place: object, content: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(value := content.get(key, {}), dict):
        raise ValueError(f"{place}: {key} is {json.dumps(value)[:40]}, expected an object")
    return value


def _train_length(file: Path, content: dict[str, Any]) -> int | None:
    if content.get("train_length") is None:
        return None
    return _length(str(file), _number(str(file), content, "train_length"))


def _number(place: str, row: dict[str, Any], key: str) -> float:
    if key not in row:
        raise ValueError(f"{place}: no {key!r}; expected {', '.join(_PUBLISHED)}")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{place}: {key} is {json.dumps(value)}, not a number")
    return float(value)


def _length(place: str, value: float) -> int:
    if value < 1 or value != int(value):
        raise ValueError(f"{place}: a context of {value:g} tokens; expected a whole number from 1 on")
    return int(value)


def _depth(place: str, value: float) -> float:
    if not 0 <= value <= 100:
        raise ValueError(f"{place}: depth {value:g}; a depth is a percentage, 0 to 100")
    return value


def _stem(file: Path) -> str:
    return file.name.split(".")[0] or file.name


def _text(value: Any) -> str:
    return " ".join(str(value).split())


# --- lengths in writing -----------------------------------------------------------------------------------------------


def parse_length(text: str) -> int:
    """`2048`, `2k` (2 x 1024) or `1m` (1024 x 1024). Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,12})([km]?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} is no length; write a number of tokens like 2048 or 2k")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[2]]


def format_length(length: int) -> str:
    """2048 is 2k, 2560 is 2.5k, 1048576 is 1M; what 512 does not divide counts in thousands: 118059 is 118k."""
    if length >= 1024 and length % 512 == 0:
        return f"{length / 1024:g}k" if length < 1 << 20 or length % (1 << 19) else f"{length / (1 << 20):g}M"
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if length >= size * 0.9995:  # 999,999 is 1M
            digits = max(0, 2 - int(math.log10(length / size * 1.0005)))
            short = f"{length / size:.{digits}f}"
            return f"{short.rstrip('0').rstrip('.') if '.' in short else short}{letter}"
    return str(length)


def format_lengths(lengths: Sequence[int]) -> list[str]:
    """Labels of several lengths, in full where the short ones would not tell them apart (1000 and 1024)."""
    short = [format_length(length) for length in lengths]
    return short if len(set(short)) == len(set(lengths)) else [f"{length:,}" for length in lengths]
