"""The metrics file of a run and its loss plot.

`logs/metrics.csv` has one row per logged step and one per validation. It survives a resume: rows after the resumed
step are dropped, because those steps are trained again, and the file goes on from there.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from s2 import files

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "train/loss",
    "lr",
    "grad_norm",
    "tokens_per_second_per_device",
    "mfu_dense_equivalent",
    "mfu_executed",
    "memory_gib",
    "skipped_steps",
)


class MetricsFile:
    """Append-only CSV with a header that grows when a new validation set appears.

    Args:
        path: the CSV; its folder is made.
        step: where training (re)starts; older rows are kept, later ones dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.columns = list(COLUMNS)
        kept = [row for row in read_metrics(path) if step > 0 and row["step"] <= step]
        for row in kept:
            self._add_columns(row)
        self.seconds = max((row.get("seconds", 0.0) for row in kept), default=0.0)
        self._rewrite(kept)

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; it is on disk when this returns."""
        if self._add_columns(row):
            self._rewrite(read_metrics(self.path))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(_text(row))

    def _add_columns(self, row: Mapping[str, float]) -> bool:
        new = [key for key in row if key not in self.columns]
        self.columns += new
        return bool(new)

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, self.columns)
        writer.writeheader()
        writer.writerows(_text(row) for row in rows)
        files.write_text(self.path, file.getvalue())


def _text(row: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:d}" if isinstance(value, int) else f"{value:.9g}" for key, value in row.items()}


def read_metrics(path: Path, *, strict: bool = False) -> list[dict[str, float]]:
    """Rows of a metrics file without their empty cells; [] where there is no file. A last row without its line end was
    cut short by a kill and is left out, and so are rows that cannot be read.

    Raises:
        ValueError: `strict`, and a row cannot be read; names file and line.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines(keepends=True)
    rows: list[dict[str, float]] = []
    for line, raw in enumerate(csv.DictReader(line for line in lines if line.endswith("\n")), start=2):
        try:
            row = {key: float(value) for key, value in raw.items() if key and value}
            if "seconds" in raw and "seconds" not in row:
                raise ValueError("it ends early")
            rows.append(row | {"step": int(row["step"]), "tokens": int(row.get("tokens", 0))})
        except (ValueError, TypeError, KeyError) as error:
            if strict:
                raise ValueError(f"{path}, line {line}: not a row of the training log ({error})") from None
    return rows


def validation_curve(rows: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    """(step, loss) of one held-out set."""
    key = f"val/{name}/loss"
    return [(int(row["step"]), row[key]) for row in rows if key in row]


def plot_losses(csv_file: Path, png: Path, baselines: Mapping[str, float], title: str) -> None:
    """Train and held-out loss over tokens, with each set's unigram loss as a dashed line.

    Args:
        baselines: held-out set name to unigram loss in nats per token.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    rows = read_metrics(csv_file)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    train = [(row["tokens"], row["train/loss"]) for row in rows if "train/loss" in row]
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, label="train")
    names = dict.fromkeys(key.split("/")[1] for row in rows for key in row if key.startswith("val/"))
    for index, name in enumerate(names):
        key, colour = f"val/{name}/loss", f"C{index + 1}"
        curve = [(row["tokens"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*curve, strict=True), color=colour, marker="o", markersize=3, label=f"held-out {name}")
        if name in baselines:
            axes.axhline(baselines[name], color=colour, linestyle="--", linewidth=1, label=f"unigram {name}")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with files.whole(png) as stream:
        figure.savefig(stream, dpi=120, format="png")
