"""Result files of needle sweeps for the tests of what reads and draws them."""

import json
from pathlib import Path
from typing import Any


def write_results(file: Path, cells: dict[tuple[int, float], float], n: int = 2, **extra: Any) -> Path:
    """A result file of eval.needle with `n` samples of the same score in each cell."""
    samples = [
        {
            "id": f"{length}/{depth}/{i}",
            "length": length,
            "depth": depth,
            "scores": {"exact": score, "partial": 0.5},
        }
        for (length, depth), score in cells.items()
        for i in range(n)
    ]
    settings = {"haystack": "prose", "needles": 1, "distractors": 0}
    about = {"kind": "needle", "checkpoint": "demo/extend-2k", "train_length": 2048, "settings": settings}
    file.write_text(json.dumps({**about, **extra, "samples": samples}))
    return file


def published_rows(cells: dict[tuple[int, float], float], **extra: Any) -> list[dict[str, Any]]:
    """Rows in the form of published sweeps."""
    return [
        {"context_length": length, "depth_percent": depth, "score": score, **extra}
        for (length, depth), score in cells.items()
    ]
