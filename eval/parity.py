"""Whether our lm-eval model scores as lm-eval's own does on the exported folder, request by request.

    python -m eval.parity --ckpt models/smollm2 --tasks piqa,arc_easy,lambada_openai --limit 200 --data-dir data/eval

Both see the same requests of the same tasks, in float32 on the CPU; theirs goes through transformers, also where layers
are sparse (`s2.integrations`). `parity.json` has the log-likelihoods of both and the largest difference of each task; a
difference above `--tolerance`, or that is no number, ends the command with code 2.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from eval.adapter import S2LM
from eval.checkpoint import results_folder
from eval.lm import check_tasks, evaluate, named_tasks
from s2 import ending, files
from s2.arguments import new_parser, path
from s2.inference.folder import check_folder

TOLERANCE = 1e-3  # of a request's summed log-likelihood


class _Both(S2LM):
    """Ours, that asks lm-eval's the same and keeps both answers."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        super().__init__(folder, device="cpu", dtype="float32")
        self._theirs = HFLM(
            pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size,
            max_length=self.max_length, add_bos_token=self.encoder.add_bos_token,
        )  # fmt: skip
        self.rows: list[dict[str, Any]] = []

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        ours = super().loglikelihood(requests, disable_tqdm)
        theirs = self._theirs.loglikelihood(list(requests), disable_tqdm=disable_tqdm)
        for request, (own, _), (other, _) in zip(requests, ours, theirs, strict=True):
            row = {"task": request.task_name, "document": request.doc_id, "index": request.idx}
            self.rows.append(row | {"ours": own, "hf": other})
        return ours


def compare(
    folder: Path, tasks: Sequence[str], limit: int | None, data_dir: Path | None, batch_size: int = 8
) -> dict[str, Any]:
    """Log-likelihoods of both for every request, and the largest difference of each task.

    Raises ValueError for tasks that score no likelihood.
    """
    check_tasks(tasks, data_dir)
    both = _Both(folder, batch_size)
    evaluate(both, tasks, limit=limit, data_dir=data_dir)
    if not both.rows:
        raise ValueError(f"--tasks {', '.join(tasks)}: they score no likelihood of an answer")
    worst = {}
    for name in dict.fromkeys(row["task"] for row in both.rows):
        rows = [row for row in both.rows if row["task"] == name]
        differences = [abs(row["ours"] - row["hf"]) for row in rows]
        largest = math.nan if any(map(math.isnan, differences)) else max(differences)
        worst[name] = {"requests": len(rows), "largest_difference": largest}
    return {"kind": "parity", **both.checkpoint.describe(), "tasks": worst, "limit": limit, "requests": both.rows}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("eval.parity", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--ckpt", type=path, required=True, help="Hugging Face folder")
    add("--tasks", required=True, help="comma-separated lm-eval names")
    add("--limit", type=int, default=200, help="documents of each task (%(default)s)")
    add("--data-dir", type=path, help="local files: FOLDER/<task>/<split>.jsonl(.gz)")
    add("--tolerance", type=float, default=TOLERANCE, help="of a summed log-likelihood (%(default)s)")
    add("--batch-size", type=int, default=8, help="of lm-eval's model (%(default)s)")
    add("--output", type=path, help="folder for parity.json (default: the run's results folder)")
    # fmt: on
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 0 <= args.tolerance < math.inf:
        raise ValueError(f"--tolerance {args.tolerance}: expected a number from 0 on")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(sys.argv[1:] if argv is None else argv)
    output = args.output or results_folder(check_folder(args.ckpt))
    files.require_writable(output)
    found = compare(args.ckpt, named_tasks(args.tasks), args.limit, args.data_dir, args.batch_size)
    files.write_json(output / "parity.json", found)
    for name, row in found["tasks"].items():
        print(f"{name}: {row['requests']} requests, largest difference {row['largest_difference']:.2e}", flush=True)
    print(output / "parity.json", flush=True)
    if off := [name for name, row in found["tasks"].items() if not row["largest_difference"] <= args.tolerance]:
        raise ValueError(f"{output / 'parity.json'}: {', '.join(off)} differ by more than {args.tolerance:g}")


if __name__ == "__main__":
    ending.run(main)
