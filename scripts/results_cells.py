"""Figures of an experiment as texts in the cells of its tables."""

from __future__ import annotations

from typing import Any

from eval.grid import format_length

Row = dict[str, Any]


def title(task: str, length: int | None, metric: str) -> str:
    return f"{task}{f' @{format_length(length)}' if length else ''}, {metric}"


def cell(row: Row | None) -> str:
    """The figure with its standard error or interval; in brackets the difference from the baseline, in braces that from
    the second reference."""
    if row is None:
        return "-"
    value = number(row["value"])
    if row["stderr"] is not None:
        value += f" ± {number(row['stderr'])}"
    elif row["interval"]:
        value += f" ({number(row['interval'][0])} to {number(row['interval'][1])})"
    if row["part"] == "speed":
        return value
    if (found := row.get("from_baseline")) is not None:
        value += f" [{_difference(found)}]"
    if (found := row.get("from_also")) is not None:
        value += f" {{{_difference(found)}}}"
    return value


def _difference(found: Row) -> str:
    unit, digits = (f" {found['unit']}", 3) if "unit" in found else ("", 2)
    within = " ({:+.{d}g} to {:+.{d}g})".format(*found["interval"], d=digits) if found["interval"] else ""
    return f"{found['difference']:+.3g}{unit}{within}{'*' if found['paired'] else ''}"


def number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
