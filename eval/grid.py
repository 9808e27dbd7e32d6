"""Which samples a needle sweep has, how lengths and depths are written, and how its results are named."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.needle_prompts import KINDS, check_counts

DEPTHS, SAMPLES = 11, 5  # by default


@dataclass(frozen=True)
class Grid:
    """Which samples a sweep has: `n` for every pair of length (tokens) and depth (percent).

    needles, distractors: None is as many as the kind has (`eval.needle_prompts.KINDS`). shared: the samples of one
    index lie in one window of the haystack, whatever their depth.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    n: int
    needles: int | None = None
    distractors: int | None = None
    seed: int = 0
    kind: str = "single"
    shared: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"--kind {self.kind}: expected {', '.join(KINDS)}")
        for name in ("needles", "distractors"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(KINDS[self.kind], name))
        for name, least in (("n", 1), ("needles", 1), ("distractors", 0)):
            if (getattr(self, name) or 0) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        if not self.lengths or not self.depths:
            raise ValueError("a sweep needs at least one length and one depth")
        if bad := [depth for depth in self.depths if not 0 <= depth <= 100]:
            raise ValueError(f"--depths {bad[0]:g}: a depth is a percentage, 0 to 100")
        check_counts(self.kind, self.needles or 1, self.distractors or 0)
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        object.__setattr__(self, "depths", tuple(sorted(set(self.depths))))

    def samples(self) -> Iterator[dict[str, Any]]:
        """id, length, depth, index and seed of each, shortest lengths first."""
        for length in self.lengths:
            for depth in self.depths:
                for index in range(self.n):
                    name = f"{length}/{depth:g}/{index}"
                    seed = f"{self.seed}/{name}"
                    yield {"id": name, "length": length, "depth": depth, "index": index, "seed": seed}


def default_lengths(max_length: int) -> tuple[int, ...]:
    """The model's length and its half, quarter and eighth, as far as those have 256 tokens."""
    return tuple(max_length // part for part in (8, 4, 2, 1) if max_length // part >= 256 or part == 1)


def parse_lengths(text: str) -> tuple[int, ...]:
    """`512,1k,2k`. Raises ValueError that names the option."""
    try:
        return tuple(sorted({parse_length(part) for part in text.split(",")}))
    except ValueError as error:
        raise ValueError(f"--lengths {text}: {error}") from None


def parse_depths(text: str) -> tuple[float, ...]:
    """`11` means 11 depths evenly from 0 to 100 percent; `0,50,100` and `50%` those depths. Raises ValueError."""
    try:
        numbers = [float(part.strip().removesuffix("%")) for part in text.split(",")]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError
    except ValueError:
        raise ValueError(f"--depths {text}: expected a number of depths, or percents like 0,50,100 or 50%") from None
    if len(numbers) > 1 or "%" in text:
        return tuple(sorted({round(number, 3) for number in numbers}))
    if not (2 <= numbers[0] <= 1001 and numbers[0].is_integer()):
        raise ValueError(f"--depths {text}: at least 2 (the start and the end), or percents like 0,50,100 or 50%")
    count = int(numbers[0])
    return tuple(round(100 * i / (count - 1), 3) for i in range(count))


def result_stem(grid: Grid, max_length: int, haystack: Path | None, haystack_tokens: int | None, generate: bool) -> str:
    """File name of a sweep's results without suffix: `needle`, and what differs from the defaults.

    Args:
        max_length: the model's, which the default lengths follow.
        haystack, haystack_tokens: None where they are the defaults.
    """
    parts = ["needle"] if grid.kind == "single" else ["needle", grid.kind]
    if grid.lengths != default_lengths(max_length):
        parts.append(listed("", [format_length(length) for length in grid.lengths]))
    if grid.depths != parse_depths(str(DEPTHS)):
        even = len(grid.depths) > 1 and grid.depths == parse_depths(str(len(grid.depths)))
        parts.append(f"d{len(grid.depths)}" if even else listed("depth", [f"{depth:g}" for depth in grid.depths]))
    kind = KINDS[grid.kind]
    usual = {"n": SAMPLES, "needles": kind.needles, "distractors": kind.distractors, "seed": 0}
    parts += [f"{name}{getattr(grid, name)}" for name, value in usual.items() if getattr(grid, name) != value]
    parts += ["shared"] if grid.shared else []
    if haystack is not None:
        parts.append(name_of(haystack))
    if haystack_tokens is not None:
        parts.append(f"of-{format_length(haystack_tokens)}")
    if not generate:
        parts.append("no-generate")
    return "-".join(parts)


def name_of(source: Path) -> str:
    """Of a file or folder of texts, as part of a file name."""
    return re.sub(r"[^\w-]+", "_", source.name.split(".")[0])[:40]


def listed(what: str, items: Sequence[str]) -> str:
    """Several values as part of a file name."""
    text = "+".join(items)
    if len(items) <= 6:
        return what + text
    return f"{len(items)}-{what or 'length'}s-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


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
