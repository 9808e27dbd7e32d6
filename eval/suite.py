"""Everything that is measured of a checkpoint, by one command: needle, RULER, loss by position, lm-eval tasks.

    python -m eval.suite --ckpt runs/smollm2/extend-32k/hf --lengths 4k,8k,16k,32k --haystack essays.jsonl.gz \
        --data-dir data/eval --tasks hellaswag,piqa,arc_easy,winogrande,lambada_openai --limit 1000

Each part is a command of its own (`eval.needle`, `eval.ruler`, `eval.positions`, `eval.lm`) that writes its own JSON
and goes on where it was interrupted; so does this one. `suite-<digest>.json` and `.md` bring their figures together,
with the seconds of each part. `--processes` splits all but lm-eval over GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval import documents, lm, needle, positions, ruler, samples
from eval.checkpoint import Checkpoint
from eval.differences import loss_name
from eval.grid import default_lengths, format_length, parse_depths, parse_lengths
from eval.heldout import find_heldout
from eval.needle import check_lengths
from eval.needle_prompts import KINDS
from eval.results import is_current
from s2 import ending, files
from s2.arguments import new_parser, options_named, path
from s2.inference.prefill import PREFILL_CHUNK, add_prefill_chunk
from s2.model.hf import load_config

PARTS: dict[str, Callable[[Sequence[str]], Callable[[], Path]]] = {
    "positions": positions.ready,
    "ruler": ruler.ready,
    "needle": needle.ready,
    "lm": lm.ready,
}
OPTIONS = {  # of the parts, where the suite calls them otherwise
    "positions": {"--source": "--document-source"},
    "ruler": {"--tasks": "--ruler-tasks", "--n": "--ruler-n"},
    "needle": {"--kind": "--kinds", "--n": "--needle-n"},
}

Row = dict[str, Any]


def rows_of(part: str, results: dict[str, Any]) -> list[Row]:
    """The figures of a result file, one a row: part, task, length, metric, value, n, interval, higher_is_better."""
    if part == "needle":
        task, score = results["settings"]["kind"], "exact"
        return [
            _row(part, task, row["length"], score, row["score"], row["n"], row["interval"])
            for row in results["summary"][score]["lengths"]
        ]
    summary = results.get("summary", {})
    if part == "ruler":
        means = [{"task": "mean", "metric": "all", **row} for row in summary["lengths"]]
        return [
            _row(part, row["task"], row["length"], row["metric"], row["score"], row["n"], row["interval"])
            for row in [*summary["tasks"], *means]
        ]
    if part == "positions":
        return [
            _row(
                part,
                loss_name(results),
                row["length"],
                "nats/token",
                row["loss"],
                row["documents"],
                row["interval"],
                False,
            )
            for row in summary["lengths"]
        ]
    return [row for task in results["results"] for row in _lm_rows(task, results)]


def _lm_rows(task: str, results: dict[str, Any]) -> list[Row]:
    rows, values = [], results["results"][task]
    better = results.get("higher_is_better", {}).get(task, {})
    for name, value in values.items():
        metric, _, filtered = name.partition(",")
        if not filtered or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered}")
        stderr = stderr if isinstance(stderr, int | float) else None
        interval = [round(end, 5) for end in documents.interval(results, task, name) or ()] or None
        n = documents.count_of(results, task, name)
        row = _row("lm", task, None, metric, value, n, interval, better.get(metric, True))
        rows.append(row | {"stderr": stderr})
    return rows


def _row(
    part: str,
    task: str,
    length: int | None,
    metric: str,
    value: float,
    n: int | None,
    interval: Any,
    better: bool = True,
) -> Row:
    return {
        "part": part, "task": task, "length": length, "metric": metric, "value": value, "n": n, "interval": interval,
        "higher_is_better": better,
    }  # fmt: skip


def table(suite: dict[str, Any]) -> str:
    """Markdown: what depends on the length, lm-eval's tasks, what was run."""
    rows, lengths = suite["rows"], suite["lengths"]
    lines = [
        f"# {suite['checkpoint']}",
        "",
        f"- checkpoint {suite['fingerprint']}, {suite['dtype']}, attention {suite['attention_layout']}, reads"
        f" {suite['max_position_embeddings']:,} tokens",
        f"- BOS: {suite['bos']}; greedy; 95 % intervals in parentheses, n behind them",
    ]
    if effective := suite.get("effective"):
        own, relative = (
            format_length(effective[key]) if effective[key] else "none" for key in ("length", "relative_length")
        )
        lines.append(
            f"- effective length: {own} at {effective['threshold']} ({effective['source']}), {relative} at"
            f" {effective['relative_threshold']:.0%} of the shortest length's score, if that is {ruler.LEAST:g} or more"
        )
    names = {"needle": "needle, {task} (exact)", "ruler": "RULER {task} (%)", "positions": "{task} (nats/token)"}
    by_length = [row for row in rows if row["length"]]
    if by_length:
        lines += ["", f"| | {' | '.join(map(format_length, lengths))} |", f"|---|{'---:|' * len(lengths)}"]
        for part, task in dict.fromkeys((row["part"], row["task"]) for row in by_length):
            own_rows = {row["length"]: row for row in by_length if (row["part"], row["task"]) == (part, task)}
            cells = [_cell(own_rows[length]) if length in own_rows else "" for length in lengths]
            lines.append(f"| {names[part].format(task=task)} | {' | '.join(cells)} |")
    if others := [row for row in rows if row["part"] == "lm"]:
        lines += ["", "| task | metric | value | n |", "|---|---|---:|---:|"]
        lines += [f"| {row['task']} | {row['metric']} | {_cell(row, n=False)} | {row['n']} |" for row in others]
    lines += ["", "| part | seconds | file |", "|---|---:|---|"]
    lines += [f"| {part['name']} | {part['seconds']:.0f} | {part['file']} |" for part in suite["parts"]]
    lines += [f"| all | {suite['seconds']:.0f} | |", "", *(f"    {part['command']}" for part in suite["parts"])]
    return "\n".join(lines) + "\n"


def _cell(row: Row, n: bool = True) -> str:
    digits = 1 if row["part"] == "ruler" else 3
    within = " ({:.{d}f} to {:.{d}f})".format(*row["interval"], d=digits) if row["interval"] else ""
    return f"{row['value']:.{digits}f}{within}{' ' + str(row['n']) if n else ''}"


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the words of the command line ask for; nothing is looked up. Raises ValueError, SystemExit."""
    parser = new_parser("eval.suite", __doc__)
    samples.add_arguments(parser)
    add_prefill_chunk(parser)
    add = parser.add_argument
    # fmt: off
    add("--lengths", help="tokens of needle, RULER and loss: 4k,8k (default: the model's, 1/2, 1/4, 1/8 of it)")
    add("--haystack", type=path, help="essays for needle and RULER; default: the run's held-out documents")
    add("--documents", type=path, help="for the loss by position; default: the run's held-out documents")
    add("--document-source", help="of --documents that are shards: the loss also of the documents of this source alone")
    add("--kinds", default="single", help=f"of needles: {','.join(KINDS)} (default: %(default)s)")
    add("--depths", default=str(needle.DEPTHS), help="as of eval.needle")
    add("--shared-haystack", action="store_true",
        help="as of eval.needle: a third less to compute, other prompts")
    add("--needle-n", type=int, default=8, help="samples of a length and depth (%(default)s)")
    add("--ruler-n", type=int, default=ruler.SAMPLES, help="samples of a task and length (%(default)s)")
    add("--ruler-tasks", help="default: all")
    add("--qa", type=path, help="as of eval.ruler")
    add("--tasks", help="lm-eval's: hellaswag,piqa (default: none)")
    add("--data-dir", type=path, help="local files for them: FOLDER/<task>/<split>.jsonl(.gz)")
    add("--limit", help="only the first documents of each of them")
    add("--parts", default=",".join(PARTS), help="which to run (default: %(default)s)")
    add("--beyond", action="store_true", help="take lengths beyond max_position_embeddings too")
    # fmt: on
    args = parser.parse_args(argv)
    args.parts = [part.strip() for part in args.parts.split(",")]
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise ValueError(f"--parts {unknown[0]}: expected some of {', '.join(PARTS)}")
    if args.parts == ["lm"] and not args.tasks:
        raise ValueError("--parts lm: name the tasks with --tasks")
    args.kinds = ",".join(kind.strip() for kind in args.kinds.split(","))
    if unknown := [kind for kind in args.kinds.split(",") if kind not in KINDS]:
        raise ValueError(f"--kinds {unknown[0]}: expected some of {', '.join(KINDS)}")
    if args.lengths is not None:
        parse_lengths(args.lengths)
    parse_depths(args.depths)
    if args.part:
        raise ValueError("--part: the suite has several parts of its own; split it with --processes")
    return args


def texts(args: argparse.Namespace) -> dict[str, Path | None]:
    """What the parts that are chosen read, by its option; None: the run's held-out documents."""
    found: dict[str, Path | None] = {}
    if "positions" in args.parts:
        found["--documents"] = args.documents
    if "ruler" in args.parts or ("needle" in args.parts and set(args.kinds.split(",")) != {"passkey"}):
        found["--haystack"] = args.haystack
    if "ruler" in args.parts and args.qa:
        found["--qa"] = args.qa
    if "lm" in args.parts and args.tasks and args.data_dir:
        found["--data-dir"] = args.data_dir
    return found


def plan(args: argparse.Namespace, lengths: Sequence[int], output: Path) -> list[tuple[str, str, list[str]]]:
    """(part, name, arguments) of each command."""

    def options(**given: Any) -> list[str]:
        named = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
        named = {name: value for name, value in named.items() if value is not None and value is not False}  # 0 is said
        return [word for name, value in named.items() for word in ([name] if value is True else [name, str(value)])]

    common = options(ckpt=args.ckpt, output=output, device=args.device, dtype=args.dtype)
    written = ",".join(map(str, lengths))
    split = {
        "lengths": written, "batch_tokens": args.batch_tokens, "beyond": args.beyond,
        "processes": None if args.processes == 1 else args.processes,
    }  # fmt: skip
    chunk = options(prefill_chunk=None if args.prefill_chunk == PREFILL_CHUNK else args.prefill_chunk)
    found = []
    if "positions" in args.parts:
        of_all = common + options(**split, documents=args.documents)
        found.append(("positions", "loss by position", of_all))
        if only := args.document_source:
            found.append(("positions", f"loss by position, {only}", of_all + options(source=only)))
    if "ruler" in args.parts:
        more = options(**split, n=args.ruler_n, tasks=args.ruler_tasks, haystack=args.haystack, qa=args.qa)
        found.append(("ruler", "RULER", common + more + chunk))
    for kind in args.kinds.split(",") if "needle" in args.parts else ():
        own = None if kind == "passkey" else args.haystack
        more = options(
            **split, kind=kind, depths=args.depths, n=args.needle_n, haystack=own, no_generate=True,
            shared_haystack=args.shared_haystack,
        )  # fmt: skip
        found.append(("needle", f"needle {kind}", common + more + chunk))
    if "lm" in args.parts and args.tasks:
        more = options(tasks=args.tasks, data_dir=args.data_dir, limit=args.limit)
        found.append(("lm", "lm-eval", common + more + chunk))
    return found


def command(argv: Sequence[str]) -> Path:
    """What the command line does; the file of the results."""
    args = read_arguments(argv)
    output = samples.check_arguments(args)
    if output.suffix == ".json":
        raise ValueError(f"--output {output}: the suite writes several files; name a folder")
    trained = load_config(args.ckpt).max_position_embeddings
    lengths = default_lengths(trained) if args.lengths is None else parse_lengths(args.lengths)
    check_lengths(lengths, max(trained, *lengths) if args.beyond else trained)
    for option, given in texts(args).items():
        if given is None:
            find_heldout(args.ckpt, f"{option} FILE (make: {option.strip('-').upper()}=FILE)")
        elif not given.exists():
            raise FileNotFoundError(f"{option} {given}: no such file or folder")
    if args.tasks and "lm" in args.parts:
        lm.check_tasks(lm.named_tasks(args.tasks), args.data_dir)
    files.require_writable(output)
    commands = plan(args, lengths, output)
    about = Checkpoint.open(args.ckpt, args.device, samples.dtype_of(args.dtype)).describe()
    settings = hashlib.sha256(json.dumps([words for *_, words in commands]).encode()).hexdigest()[:6]
    file = output / f"suite-{settings}.json"
    former = files.read_json(file) if file.exists() else {}
    is_former = former.get("fingerprint") == about["fingerprint"] and former.get("dtype") == about["dtype"]
    known = {part["command"]: part for part in former.get("parts", ())} if is_former else {}
    suite: dict[str, Any] = {"kind": "suite", **about, "lengths": list(lengths), "parts": [], "rows": [], "bos": ""}
    works: list[Callable[[], Path]] = []
    for part, _, words in commands:
        old = known.get(_shown(part, words))
        if part == "lm" and old and is_current(output / old["file"]):  # it alone does not know itself what is done
            works.append(partial(_kept, output / old["file"]))
        else:
            with options_named(OPTIONS.get(part, {})):
                works.append(PARTS[part](words))
    for part, name, words in commands:
        shown = _shown(part, words)
        started = time.monotonic()
        old = known.get(shown)
        print(f"\n{shown}", flush=True)
        with options_named(OPTIONS.get(part, {})):
            result = works.pop(0)()  # nothing else holds its weights
        seconds = (old["seconds"] if old else 0.0) + time.monotonic() - started
        content = files.read_json(result)
        entry = {"part": part, "name": name, "file": result.name, "seconds": round(seconds, 1), "command": shown}
        suite["parts"].append(entry)
        suite["rows"] += rows_of(part, content)
        if part == "ruler":
            suite["effective"] = content["summary"]["effective"]
        suite["bos"] = content["s2"]["bos"] if part == "lm" else content["conditions"]["bos"]
        suite["seconds"] = round(sum(done["seconds"] for done in suite["parts"]), 1)
        files.write_json(file, suite)
    text = table(suite)
    files.write_text(file.with_suffix(".md"), text)
    print(f"\n{text}\n{file}\n{file.with_suffix('.md')}")
    return file


def _kept(table: Path) -> Path:
    print(f"{table}: there already, of this checkpoint", flush=True)
    return table


def _shown(part: str, words: Sequence[str]) -> str:
    return f"python -m eval.{part} {shlex.join(words)}"


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
