"""lm-eval tables of a checkpoint.

    python -m eval.lm --ckpt runs/demo/extend-2k/hf                              # our own tasks: no network
    python -m eval.lm --ckpt runs/demo/extend-2k/hf --tasks hellaswag,piqa       # lm-eval's, from the hub
    python -m eval.lm --ckpt ... --tasks mmlu --num-fewshot 5 --data-dir DATA    # lm-eval's, on local files

Prints lm-eval's own table under a header that says what the numbers depend on (layout, max_length, BOS,
shots, limit, cut inputs) and writes both as Markdown, and the results as JSON, into the run's results
folder. Importing this module registers the model as `s2` with lm-eval.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry
from lm_eval.utils import make_table

from eval.adapter import S2LM
from eval.checkpoint import check_checkpoint, results_folder
from eval.local_tasks import write_local_tasks
from eval.output import write_json, write_text

TASKS_FOLDER = Path(__file__).parent / "tasks"
OWN_TASKS = ("s2_heldout", "s2_passkey")

__all__ = ["OWN_TASKS", "S2LM", "evaluate", "main"]


def evaluate(
    lm: S2LM,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: Path | None = None,
    metadata: dict[str, Any] | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Run tasks by their lm-eval names and return lm-eval's results, with our header under `s2`.

    Stock tasks read the hub, or local files under `data_dir` (see `eval.local_tasks`). `metadata` reaches
    the tasks that build their data themselves, e.g. {"max_seq_lengths": [4096]} for lm-eval's RULER.

    Raises ValueError for an unknown task or lengths in `metadata` beyond the model's; FileNotFoundError for
    missing local data.
    """
    lengths = (metadata or {}).get("max_seq_lengths", [])
    if too_long := [length for length in lengths if length > lm.max_length]:
        raise ValueError(
            f"max_seq_lengths {too_long}: longer than max_length={lm.max_length}; the prompts would be cut"
            " and the scores meaningless"
        )
    metadata = {"pretrained": str(lm.checkpoint.folder), "max_length": lm.max_length, **(metadata or {})}
    stock = [name for name in tasks if name not in OWN_TASKS]
    if unknown := [name for name in stock if name not in stock_index()]:
        raise ValueError(
            f"--tasks {unknown[0]}: no task, group or tag of this name; ours are {', '.join(OWN_TASKS)},"
            " lm-eval's are listed by `lm-eval ls tasks`"
        )
    remarks: list[str] = []
    with tempfile.TemporaryDirectory(prefix="s2-eval-") as temporary:
        local = [str(TASKS_FOLDER)]
        if stock and data_dir is not None:
            remarks = write_local_tasks(stock_index(), stock, data_dir, Path(temporary))
            local.append(temporary)
        on_hub = bool(stock) and data_dir is None
        manager = TaskManager(include_path=local, include_defaults=on_hub, metadata=metadata)
        lm.overflow.clear()
        results = lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=log_samples,
            metadata=metadata,
        )
    assert results is not None
    shots = "task default" if num_fewshot is None else str(num_fewshot)
    results["s2"] = {
        **lm.checkpoint.describe(),
        "tasks": list(tasks),
        "max_length": lm.max_length,
        "bos": lm.bos_setting(),
        "num_fewshot": shots,
        "limit": limit,
        "cut_inputs": lm.overflow_note(),
        "remarks": remarks if num_fewshot else [],
    }
    return results


@cache
def stock_index() -> Mapping[str, Entry]:
    """Tasks, groups and tags that lm-eval brings along; reading its thousands of files takes seconds."""
    return TaskManager().task_index


def table(results: dict[str, Any]) -> str:
    """Header lines and lm-eval's Markdown tables."""
    about = results["s2"]
    lines = [
        f"checkpoint: {about['checkpoint']} ({about['fingerprint']}, {about['dtype']})",
        f"attention: {about['attention_layout']}, block size {about['block_size']}",
        f"max_length: {about['max_length']} (model: {about['max_position_embeddings']});"
        f" cut inputs: {about['cut_inputs']}",
        f"BOS: {about['bos']}",
        f"n-shot: {about['num_fewshot']}; limit: {about['limit'] or 'none'}",
        *about["remarks"],
    ]
    text = "\n".join(f"- {line}" for line in lines) + "\n\n" + make_table(results)
    return text + ("\n" + make_table(results, "groups") if results.get("groups") else "")


def result_stem(tasks: Sequence[str], num_fewshot: int | None, limit: int | None) -> str:
    """File name without suffix, so that different tables of a checkpoint do not overwrite each other."""
    stem = "+".join(tasks)
    if len(tasks) > 4:
        stem = f"{tasks[0]}+{len(tasks) - 1}-more-{hashlib.sha256(stem.encode()).hexdigest()[:6]}"
    shots = "" if num_fewshot is None else f"-{num_fewshot}shot"
    return f"lm-{stem}{shots}" + ("" if limit is None else f"-limit{limit}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.lm", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, help="Hugging Face folder, e.g. runs/demo/extend-2k/hf")
    add(
        "--tasks",
        default=",".join(OWN_TASKS),
        help=f"comma-separated lm-eval names (default: {','.join(OWN_TASKS)})",
    )
    add(
        "--output",
        type=Path,
        help="folder for table and JSON (default: the run's results folder)",
    )
    add("--limit", type=int, help="only the first documents of each task: for a quick look, not for a result")
    add("--num-fewshot", type=int, help="default: as each task says")
    add("--data-dir", type=Path, help="local files for stock tasks: FOLDER/<task>/<split>.jsonl(.gz)")
    add(
        "--heldout",
        type=Path,
        help="documents for s2_heldout (jsonl, text, shard folder); default: the run's own",
    )
    add(
        "--metadata",
        type=json.loads,
        default={},
        help="""JSON for tasks that build their data: '{"max_seq_lengths": [4096]}'""",
    )
    add("--max-length", type=int, help="shorter than the model's own, to compare checkpoints alike")
    add(
        "--overflow",
        choices=("warn", "error"),
        default="warn",
        help="inputs beyond max_length: cut and count, or stop",
    )
    add(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="BOS before every text; auto: as the tokenizer does",
    )
    add("--batch-tokens", type=int, default=16384)
    add("--device", help="default: the GPU if there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    add("--log-samples", action="store_true", help="write every document's answer into the JSON too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    check_checkpoint(args.ckpt)
    tasks = [name for name in args.tasks.split(",") if name]
    if args.heldout and not args.heldout.exists():
        raise FileNotFoundError(f"--heldout {args.heldout}: no such file or folder")
    lm = S2LM(
        args.ckpt,
        device=args.device,
        dtype=args.dtype,
        max_length=args.max_length,
        batch_tokens=args.batch_tokens,
        add_bos_token={"auto": None, "yes": True, "no": False}[args.bos],
        on_overflow=args.overflow,
    )
    metadata = dict(args.metadata) | ({"heldout": str(args.heldout)} if args.heldout else {})
    results = evaluate(
        lm,
        tasks,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        data_dir=args.data_dir,
        metadata=metadata,
        log_samples=args.log_samples,
    )
    stem = (args.output or results_folder(args.ckpt)) / result_stem(tasks, args.num_fewshot, args.limit)
    text = table(results)
    write_json(stem.with_name(f"{stem.name}.json"), results)
    write_text(stem.with_name(f"{stem.name}.md"), text)
    print(f"\n{text}\n{stem}.json\n{stem}.md")


if __name__ == "__main__":
    main()
