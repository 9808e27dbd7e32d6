"""Cases and tables of `bench_inference_peers.py`. A row has `name`, `seq_len`, `heads`, `batch` (0: prefill), `source`
(of tensors from a file), `status`, `note`, and its figures, None where there is none: `time` and `alone` (milliseconds
of prefill, microseconds of decode), `error`, `difference`, `share` (of the query-key pairs, or of the keys).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench_record import Record
from bench_report import Row, blank_row

from s2.tables import markdown

FIGURES = ("time", "alone", "error", "difference", "share")


@dataclass(frozen=True)
class Shape:
    """A case; `batch` 0 is prefill of one sequence."""

    heads: int
    kv_heads: int
    length: int
    batch: int = 0
    source: str = ""  # of tensors from a file

    def row(self, name: str) -> Row:
        row = blank_row(name, self.length, FIGURES)
        return row | {"heads": f"{self.heads}/{self.kv_heads}", "batch": self.batch, "source": self.source}


def parts(record: Record) -> list[str]:
    """Tables of prefill and decode, of drawn inputs and of each file."""
    found = []
    for source in dict.fromkeys(row["source"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["source"] == source]
        beside = f", {source}" if source else ""
        for title, unit, is_part in _PARTS:
            if mine := [row for row in rows if is_part(row)]:
                found += [f"## {title}{beside}", table(mine, unit)]
    return found


_PARTS: tuple[tuple[str, str, Callable[[Row], bool]], ...] = (
    ("Prefill", "ms", lambda row: not row["batch"]),
    ("Decode", "us", lambda row: bool(row["batch"])),
)


def table(rows: list[Row], unit: str) -> str:
    """`unit` "us" is decode, which has batches and is set beside FlashInfer's dense rows, prefill beside cuDNN's."""
    decode = unit == "us"
    base = {
        _case(row): row["time"] for row in rows if row["name"] == ("FlashInfer, all keys" if decode else "dense, cuDNN")
    }
    header = ["heads", *(["batch"] if decode else []), "length", "method", f"{'keys' if decode else 'pairs'}, %", unit]
    header += ["of it attention", "over all keys" if decode else "over cuDNN", "error", "difference", "note"]
    digits, body = ",.1f" if decode else ",.3f", []
    for row in rows:
        dense, time = base.get(_case(row)), row["time"]
        over = None if dense is None or time is None else dense / time
        share = None if row["share"] is None else 100 * row["share"]
        at = [row["heads"], *([str(row["batch"])] if decode else []), f"{row['seq_len']:,}", row["name"]]
        timed = row["status"] if time is None else _cell(time, digits)
        figures = [_cell(share, ".1f"), timed, _cell(row["alone"], digits), _cell(over, ".2f")]
        body.append([*at, *figures, _cell(row["error"], ".2g"), _cell(row["difference"], ".1g"), row["note"]])
    return markdown(
        header, body, numbers=[n for n, name in enumerate(header) if name not in ("heads", "method", "note")]
    )


def _case(row: Row) -> tuple[str, int, int]:
    return row["heads"], row["seq_len"], row["batch"]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
