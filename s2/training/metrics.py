"""What is measured of a run: the metrics file, the loss plot, and what throughput is compared with.

`logs/metrics.csv` has one row per logged step and one per validation. It survives a resume: rows after the resumed
step are dropped, because those steps are trained again, and the file goes on from there.

MFU is achieved over peak dense bf16 FLOP/s of the device. Two numerators, both counting forward and backward once
(recomputation is not work) and attention with its causal half only:

    dense-equivalent  what a dense model of this shape would have needed: comparable with other repositories
    executed          what the sparse pattern really needs: how busy the device is

Both count a training sequence as one document. Where documents are shorter and attention stops at their borders, the
work is less, and both figures are upper bounds.
"""

from __future__ import annotations

import csv
import io
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
    """Append-only CSV.

    Args:
        path: the CSV; its folder is made.
        step: where training (re)starts; older rows are kept, later ones dropped.
        names: of the held-out sets, whose columns stand behind `COLUMNS`.
    """

    def __init__(self, path: Path, step: int, names: Iterable[str]) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if step > 0 and row["step"] <= step]
        self.seconds = max((row.get("seconds", 0.0) for row in kept), default=0.0)
        heldout = [f"val/{name}/{what}" for name in names for what in ("loss", "perplexity", "source_loss")]
        self.columns = list(dict.fromkeys([*COLUMNS, *heldout, *(key for row in kept for key in row)]))
        file = io.StringIO(newline="")
        csv.DictWriter(file, self.columns).writeheader()
        csv.DictWriter(file, self.columns).writerows(map(_text, kept))
        files.write_text(path, file.getvalue())

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; it is on disk when this returns."""
        with files.naming(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(_text(row))


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


def heldout_sets(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Names of the sets that rows of a metrics file have losses of, in their order there."""
    names = (key for row in rows for key in row if key.startswith("val/") and key.endswith("/loss"))
    return list(dict.fromkeys(key.removeprefix("val/").removesuffix("/loss") for key in names))


def plot_losses(rows: list[dict[str, float]], png: Path, baselines: Mapping[str, float], title: str) -> None:
    """Train and held-out loss over tokens, with each set's unigram loss as a dashed line.

    Args:
        rows: of the metrics file.
        baselines: held-out set name to unigram loss in nats per token.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    train = [(row["tokens"], row["train/loss"]) for row in rows if "train/loss" in row]
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, label="train")
    for index, name in enumerate(heldout_sets(rows)):
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


# Dense (no 2:4 sparsity) bf16 peak in FLOP/s from the vendors' data sheets, matched as a part of the device name.
# Lightning's `get_available_flops` knows no H200 by the name that CUDA gives it, and no Blackwell.
PEAK_BF16_FLOPS = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "GB200": 2.5e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device by name; None for an unknown one, and then MFU is left out of the log. The longest
    name in the table that occurs in `device_name` wins, so that H100 PCIe is not read as H100."""
    matches = [name for name in PEAK_BF16_FLOPS if name.lower() in device_name.lower()]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None


def peak_memory_gib(device: Any) -> float:
    """Highest memory so far in GiB: allocated on a CUDA device, resident of this process on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clock(seconds: float) -> str:
    """1:02:03"""
    whole = max(round(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
