"""Markdown tables, of reports and of benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table; `numbers` are the columns (counted from 0) that are aligned to the right."""
    rule = "|".join("---:" if column in numbers else "---" for column in range(len(header)))
    return "\n".join([_line(header), f"|{rule}|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
