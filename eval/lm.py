"""lm-eval tables of a checkpoint.

    python -m eval.lm --ckpt runs/demo/extend-2k/hf                              # our own tasks: no network
    python -m eval.lm --ckpt runs/demo/extend-2k/hf --tasks hellaswag,piqa       # lm-eval's, from the hub
    python -m eval.lm --ckpt ... --tasks mmlu --num-fewshot 5 --data-dir DATA    # lm-eval's, on local files
    python -m eval.lm --ckpt models/llama --heldout book.txt                     # any Llama folder

Prints lm-eval's own table under a header that says what the numbers depend on (layout, max_length, BOS,
shots, limit, data, cut inputs) and writes both as Markdown, and the results as JSON, into the run's results
folder. The same command started again after an interruption goes on where it stopped. Importing this module registers
the model as `s2` with lm-eval.
"""

import argparse
import difflib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api import registry
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from eval import documents
from eval.adapter import S2LM
from eval.checkpoint import results_folder
from eval.heldout import GIVEN, find_heldout
from eval.local_tasks import LocalTasks, write_local_tasks
from eval.results import Answers, Conditions, write_results
from eval.task_manager import CorrectedTasks, quiet_about, templates_compiled_once
from s2 import ending
from s2.arguments import DTYPES, new_parser, path
from s2.files import require_writable, temporary_folder
from s2.inference.folder import check_folder
from s2.inference.prefill import add_prefill_chunk
from s2.progress import no_bars_in_logs

TASKS_FOLDER = Path(__file__).parent / "tasks"
OWN_TASKS = ("s2_heldout", "s2_passkey")
_OWN_METADATA = ("heldout", "samples", "seed", "num_lengths")
_BOOTSTRAPS = 10_000  # they give a standard error to 0.7 %; lm-eval's 100,000 take a minute of two cores
_BOS = {"auto": None, "yes": True, "no": False}
_LIMITS = "expected a number of documents, at least 1, or a fraction of them below 1"

__all__ = ["OWN_TASKS", "S2LM", "evaluate", "main"]


def evaluate(
    lm: S2LM,
    tasks: Sequence[str],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    data_dir: Path | None = None,
    metadata: dict[str, Any] | None = None,
    log_samples: bool = False,
    unfinished: Path | None = None,
) -> dict[str, Any]:
    """Run tasks by their lm-eval names and return lm-eval's results, with our header under `s2` and each document's
    scores under `documents` (`eval.documents`).

    Stock tasks read the hub, or local files under `data_dir` (see `eval.local_tasks`). `metadata` reaches
    the tasks that build their data themselves, e.g. {"max_seq_lengths": [4096]} for lm-eval's RULER. Where
    `unfinished` names a folder, answers are kept there (`eval.results`), and the same call after an interruption goes
    on from them; `lm.answers.discard()` ends that.

    Raises ValueError for an unknown task, settings out of range or lengths in `metadata` beyond the model's;
    FileNotFoundError for missing local data.
    """
    given = dict(metadata or {})
    lengths = given.get("max_seq_lengths", [])
    if not isinstance(lengths, list) or not all(type(length) is int for length in lengths):
        raise ValueError(f"max_seq_lengths {json.dumps(lengths)}: expected a list of lengths in tokens such as [4096]")
    if too_long := [length for length in lengths if length > lm.max_length]:
        raise ValueError(
            f"max_seq_lengths {too_long}: longer than max_length={lm.max_length}; the prompts would be cut"
            " and the scores meaningless"
        )
    stock = check_tasks(tasks, data_dir)
    if not stock and (unknown := sorted(set(given) - set(_OWN_METADATA))):
        raise ValueError(f"--metadata {unknown[0]}: {', '.join(tasks)} take only {', '.join(_OWN_METADATA)}")
    check_amounts(limit, num_fewshot, stock)
    local = LocalTasks()
    heldout = given.pop("heldout", None)
    if not heldout and "s2_heldout" in tasks:
        heldout = find_heldout(lm.checkpoint.folder, GIVEN)
    with temporary_folder() as temporary:
        include = [str(TASKS_FOLDER)]
        if stock and data_dir is not None:
            local = write_local_tasks(stock_tasks(), stock, data_dir, temporary)
            include.append(str(temporary))
        for_tasks = {"pretrained": str(lm.checkpoint.folder), "max_length": lm.max_length, **given}
        for_tasks |= {"heldout": str(heldout)} if heldout else {}
        manager = CorrectedTasks(
            include_path=include,
            include_defaults=bool(stock) and data_dir is None,
            metadata=for_tasks,
            num_fewshot=num_fewshot,
            data_dir=data_dir,
        )
        conditions = Conditions(
            checkpoint=str(lm.checkpoint.folder.resolve()),
            tasks=tuple(tasks),
            max_length=lm.max_length,
            bos=lm.encoder.bos_setting(),
            dtype=lm.checkpoint.describe()["dtype"],
            on_overflow=lm.on_overflow,
            num_fewshot=num_fewshot,
            limit=limit,
            data=str(data_dir.resolve()) if stock and data_dir is not None else None,
            heldout=str(Path(heldout).resolve()) if heldout and "s2_heldout" in tasks else None,
            metadata=given,
        )
        lm.overflow.clear()
        identity = {"fingerprint": lm.checkpoint.fingerprint}
        lm.answers = None if unfinished is None else Answers(unfinished, conditions.name, identity)
        answers = nullcontext() if lm.answers is None else closing(lm.answers)
        with no_bars_in_logs(), templates_compiled_once(), quiet_about(OWN_TASKS), answers:
            results = lm_eval.simple_evaluate(
                lm,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=True,
                metadata=for_tasks,
                bootstrap_iters=_BOOTSTRAPS,
            )
    assert results is not None
    results["documents"] = documents.kept(results)
    if not log_samples:
        del results["samples"]
    results["s2"] = {
        **lm.checkpoint.describe(),
        **conditions.describe(),
        "cut_inputs": lm.overflow_note(),
        "remarks": local.remarks if num_fewshot else [],
    }
    results["s2_files"] = {"name": conditions.name, "content": conditions.content(local.files)}
    return results


def named_tasks(text: str) -> list[str]:
    """The tasks of `a, b`, each once."""
    return list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))


def check_tasks(tasks: Sequence[str], data_dir: Path | None) -> list[str]:
    """The stock tasks among `tasks`. Raises ValueError for an unknown name, or local data that no task reads."""
    if not tasks:
        raise ValueError("--tasks: no task is named")
    stock = [name for name in tasks if name not in OWN_TASKS]
    if stock and (unknown := [name for name in stock if name not in stock_tasks().task_index]):
        close = difflib.get_close_matches(unknown[0], [*OWN_TASKS, *stock_tasks().all_tasks], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "lm-eval's are listed by `lm-eval ls tasks`"
        raise ValueError(
            f"--tasks {unknown[0]}: no task, group or tag of this name; ours are {', '.join(OWN_TASKS)}, {hint}"
        )
    if data_dir is not None and not stock:
        raise ValueError(f"--data-dir {data_dir}: {', '.join(tasks)} do not read it; name stock tasks with --tasks")
    return stock


def unavailable(tasks: Sequence[str], data_dir: Path | None) -> dict[str, str]:
    """Those of `tasks` whose rows cannot be had, neither below `data_dir` nor, without one, from the hub or what was
    kept of it; with the reason. Raises as `check_tasks`."""
    reasons: dict[str, str] = {}
    if not tasks or not (stock := check_tasks(tasks, None)):
        return reasons
    with temporary_folder() as temporary:
        for name in dict.fromkeys(stock):
            try:
                if data_dir is not None:
                    write_local_tasks(stock_tasks(), [name], data_dir, temporary / name)
                else:
                    CorrectedTasks().load([name])
            except (ConnectionError, FileNotFoundError) as error:
                reasons[name] = str(error)
    return reasons


def is_higher_better(task: str, metric: str) -> bool | None:
    """Whether more of a task's metric is better, as the task's YAML has it, else lm-eval of a metric of that name; None
    for a metric that the YAML does not list."""
    tasks = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False) if task in OWN_TASKS else stock_tasks()
    listed = (tasks.task_index[task].cfg or {}).get("metric_list") or ()
    found = next((each for each in listed if each["metric"] == metric), None)
    if found is None or "higher_is_better" in found:
        return found and found["higher_is_better"]
    return registry.is_higher_better(metric)


def check_amounts(limit: float | None, num_fewshot: int | None, stock: Sequence[str]) -> None:
    """Raises ValueError for a number of documents or of examples that lm-eval would take for none or all, and for
    examples where no task takes any."""
    if limit is not None and not (0 < limit < 1 or (1 <= limit < math.inf and int(limit) == limit)):
        raise ValueError(f"--limit {limit:g}: {_LIMITS}")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num-fewshot {num_fewshot}: expected 0 or more examples")
    if num_fewshot and not stock:
        raise ValueError(f"--num-fewshot {num_fewshot}: {', '.join(OWN_TASKS)} take no examples")


@cache
def stock_tasks() -> TaskManager:
    """Tasks, groups and tags that lm-eval brings along; reading its thousands of files takes seconds."""
    return TaskManager()


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
        *([f"data: {about['data']}"] if about["data"] else []),
        *([f"held-out documents: {about['heldout']}"] if about["heldout"] else []),
        *about["remarks"],
    ]
    text = "\n".join(f"- {line}" for line in lines) + "\n\n" + make_table(results)
    return text + ("\n" + make_table(results, "groups") if results.get("groups") else "")


def _limit(text: str) -> float:
    try:
        limit = float(text)
        check_amounts(limit, None, ())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: {_LIMITS}") from None
    return limit if limit < 1 else int(limit)


def _metadata(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r}: expected a JSON object such as {{"max_seq_lengths": [4096]}}')
    return value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("eval.lm", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--ckpt", type=path, required=True, help="Hugging Face folder, e.g. runs/demo/extend-2k/hf")
    add("--tasks", default=",".join(OWN_TASKS), help="comma-separated lm-eval names (default: %(default)s)")
    add("--output", type=path,
        help="folder for table and JSON (default: the run's results folder; runs/eval/<name>/results for others")
    add("--limit", type=_limit,
        help="only the first documents of each task, or a fraction below 1: for a quick look, not for a result")
    add("--num-fewshot", type=int, help="default: as each task says")
    add("--data-dir", type=path, help="local files for stock tasks: FOLDER/<task>/<split>.jsonl(.gz)")
    add("--heldout", type=path,
        help="documents for s2_heldout (jsonl, text, shard folder); default: the run's own")
    add("--metadata", type=_metadata, default={},
        help="""JSON for tasks that build their data: '{"max_seq_lengths": [4096]}'""")
    add("--max-length", type=int, help="shorter than the model's own, to compare checkpoints alike")
    add("--overflow", choices=("warn", "error"), default="warn",
        help="inputs beyond max_length: cut and count, or stop")
    add("--bos", choices=tuple(_BOS), default="auto", help="BOS before every text; auto: as the tokenizer does")
    add("--batch-tokens", type=int, default=16384, help="tokens of a batch; lower it where memory is full")
    add("--device", help="default: the GPU if there is one")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add_prefill_chunk(parser)
    add("--log-samples", action="store_true", help="keep documents and answers in the JSON, not scores alone")
    # fmt: on
    return parser.parse_args(argv)


def command(argv: Sequence[str] | None = None) -> Path:
    """What the command line does; the JSON file of the results."""
    return ready(argv)()


def ready(argv: Sequence[str] | None = None) -> Callable[[], Path]:
    """`command` when all that can be wrong with the arguments has been looked up: what computes."""
    args = _arguments(argv)
    check_folder(args.ckpt)
    tasks = named_tasks(args.tasks)
    check_amounts(args.limit, args.num_fewshot, check_tasks(tasks, args.data_dir))
    if args.heldout and "s2_heldout" not in tasks:
        raise ValueError(f"--heldout {args.heldout}: only s2_heldout reads it, and --tasks does not name that")
    if args.heldout and not args.heldout.exists():
        raise FileNotFoundError(f"--heldout {args.heldout}: no such file or folder")
    if "s2_heldout" in tasks and not args.heldout:
        find_heldout(args.ckpt, GIVEN)  # now, and not after the model is loaded
    output = args.output or results_folder(args.ckpt)
    require_writable(output)

    def work() -> Path:
        lm = S2LM(
            args.ckpt,
            device=args.device,
            dtype=args.dtype,
            max_length=args.max_length,
            batch_tokens=args.batch_tokens,
            add_bos_token=_BOS[args.bos],
            on_overflow=args.overflow,
            prefill_chunk=args.prefill_chunk,
        )
        results = evaluate(
            lm,
            tasks,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            data_dir=args.data_dir,
            metadata=args.metadata | ({"heldout": str(args.heldout)} if args.heldout else {}),
            log_samples=args.log_samples,
            unfinished=output,
        )
        text = table(results)
        print(f"\n{text}", flush=True)  # first: whatever happens to the files, the numbers are there
        written = write_results(output, results, text)
        print("\n".join(map(str, written)))
        if lm.answers is not None:
            lm.answers.discard()
        return written[0]

    return work


def main(argv: Sequence[str] | None = None) -> None:
    command(argv)


if __name__ == "__main__":
    ending.run(main)
