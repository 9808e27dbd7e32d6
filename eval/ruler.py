"""RULER's synthetic tasks (arXiv 2404.06654) without a network, and how long a context a checkpoint makes use of.

    python -m eval.ruler --ckpt runs/1.3b/extend-32k/hf --lengths 4k,8k,16k,32k --haystack essays.jsonl.gz
    python -m eval.ruler --ckpt ... --tasks niah_single_2,vt --n 100 --qa squad-dev.json

The tasks are those of `eval.ruler_tasks`, in our own sentences, so that scores compare with each other and not to the
digit with published ones. A length counts the tokens of the answer too. Answers are greedy, end with the tokens that
they may have, and score as RULER's do: the share of the expected texts in them, case aside. Generation stops where all
are there, since more text cannot change the score.

`ruler.json` holds every answer, the score of each task and length in percent with a 95 % interval, and the effective
length: the longest up to which the mean over tasks stays at RULER's threshold. Another one is relative to the score at
the shortest length; a model that scores below 10 there is near chance and has none. Like `needle.json` the file is
written while it runs, the same command goes on from it, and `--processes` and `--part` split it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from eval import samples
from eval.ahead import made_ahead
from eval.grid import default_lengths, format_length, listed, name_of, parse_lengths
from eval.heldout import find_heldout
from eval.needle import check_haystack, check_lengths, read_haystack
from eval.ruler_tasks import TASKS, Maker, Question, Reading, match
from eval.samples import Batch, Evaluation, Sample
from eval.sweep import wilson
from s2 import ending
from s2.arguments import new_parser, path
from s2.inference.folder import bos_of, memory_for
from s2.inference.pool import DecodePool
from s2.inference.prefill import add_prefill_chunk
from s2.model.hf import load_config

SAMPLES = 20
THRESHOLD, SOURCE = 85.6, "Llama2-7B at 4k, arXiv 2404.06654"
RELATIVE = 0.9  # of a model's own score at its shortest length
LEAST = 10.0  # of that score: a share of less is noise
_VERSION = 1  # of the questions
_SCORING = "greedy generation, ended where the score can no longer change; string match, case aside"


def plan(tasks: Sequence[str], lengths: Sequence[int], n: int, seed: int) -> Iterator[Sample]:
    """Samples, shortest lengths first."""
    for length in sorted(set(lengths)):
        for task in tasks:
            for index in range(n):
                name = f"{task}/{length}/{index}"
                yield {"id": name, "task": task, "length": length, "index": index, "seed": f"{seed}/{name}"}


def _questions(maker: Maker, batch: Batch) -> list[Question]:
    return [maker.make(sample["task"], sample["length"], sample["seed"]) for sample in batch]


def summarise(rows: Sequence[Sample]) -> dict[str, Any]:
    """Scores in percent by task and length, by length, and the effective lengths."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["length"], row["task"]), []).append(row["scores"]["match"])
    tasks = [
        {"task": task, "length": length, "metric": TASKS[task].metric}
        | _percent(fmean(scores), len(scores), len(scores))
        for (length, task), scores in sorted(
            found.items(), key=lambda item: (item[0][0], list(TASKS).index(item[0][1]))
        )
    ]
    lengths: list[dict[str, Any]] = []
    for length in sorted({length for length, _ in found}):
        groups = [scores for (of, _), scores in found.items() if of == length]
        # as many equally weighted samples as have the variance of a mean over tasks
        equal = len(groups) ** 2 / sum(1 / len(scores) for scores in groups)
        row = _percent(fmean(map(fmean, groups)), sum(map(len, groups)), equal)
        first = lengths[0]["score"] if lengths else row["score"]
        lengths.append({"length": length, **row, "relative": round(row["score"] / first, 4) if first else None})
    return {
        "tasks": tasks,
        "lengths": lengths,
        "effective": {
            "threshold": THRESHOLD,
            "source": SOURCE,
            "length": _longest(lengths, lambda row: row["score"] >= THRESHOLD),
            "relative_threshold": RELATIVE,
            "relative_length": _longest(lengths, lambda row: row["relative"] >= RELATIVE)
            if lengths[0]["score"] >= LEAST
            else None,
        },
        "interval_kind": "Wilson, 95 %",
    }


def _percent(mean: float, n: int, equal: float) -> dict[str, Any]:
    return {"score": round(100 * mean, 2), "n": n, "interval": [round(100 * end, 2) for end in wilson(mean, equal)]}


def _longest(lengths: Sequence[dict[str, Any]], holds: Any) -> int | None:
    """The last length of those before the first for which it does not hold."""
    return max((row["length"] for row in itertools.takewhile(holds, lengths)), default=None)


def describe(summary: dict[str, Any]) -> str:
    """A Markdown table of tasks by length, and a line of effective lengths."""
    lengths = [row["length"] for row in summary["lengths"]]
    scores = {(row["task"], row["length"]): row["score"] for row in summary["tasks"]}
    rows = [["task", *map(format_length, lengths)], ["---", *["---:"] * len(lengths)]]
    for task in dict.fromkeys(row["task"] for row in summary["tasks"]):
        rows.append([task, *(f"{scores[task, n]:.1f}" if (task, n) in scores else "" for n in lengths)])
    rows.append(["mean", *(f"{row['score']:.1f} ({row['interval'][0]:.0f} to {row['interval'][1]:.0f})"
                           for row in summary["lengths"])])  # fmt: skip
    effective = summary["effective"]
    own, relative = (
        format_length(effective[key]) if effective[key] else "none" for key in ("length", "relative_length")
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\neffective length: {own} at {effective['threshold']} ({effective['source']});"
        f" {relative} at {effective['relative_threshold']:.0%} of the score at {format_length(lengths[0])}"
        f"{f', which is below {LEAST:g} and so near chance' if summary['lengths'][0]['score'] < LEAST else ''}"
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("eval.ruler", __doc__)
    samples.add_arguments(parser)
    add_prefill_chunk(parser)
    add = parser.add_argument
    # fmt: off
    add("--lengths", help="tokens, answers included: 4k,8k (default: the model's, 1/2, 1/4, 1/8 of it)")
    add("--tasks", help=f"of {', '.join(TASKS)} (default: all; qa where --qa is given)")
    add("--n", default=SAMPLES, type=int, help=f"samples of each task and length ({SAMPLES})")
    add("--haystack", type=path,
        help="essays: text, jsonl(.gz) or parquet file(s), or shards; default: the run's held-out ones")
    add("--text-column", default="text", help="column of the haystack's rows")
    add("--qa", type=path, help="questions about paragraphs: a JSON file in SQuAD's form")
    add("--beyond", action="store_true", help="take lengths beyond max_position_embeddings too")
    add("--seed", default=0, type=int)
    # fmt: on
    args = parser.parse_args(argv)
    if args.n < 1:
        raise ValueError(f"--n {args.n}: expected at least 1")
    every = [task for task in TASKS if task != "qa" or args.qa]
    args.tasks = every if args.tasks is None else [name.strip() for name in args.tasks.split(",")]
    if unknown := [name for name in args.tasks if name not in TASKS]:
        raise ValueError(f"--tasks {unknown[0]}: expected some of {', '.join(TASKS)}")
    if "qa" in args.tasks and not args.qa:
        raise ValueError("--tasks qa: name its questions with --qa FILE")
    args.tasks = [task for task in TASKS if task in args.tasks]
    args.is_whole = args.tasks == every
    return args


def command(argv: Sequence[str]) -> Path:
    """What the command line does; the file of the results."""
    return ready(argv)()


def ready(argv: Sequence[str]) -> Callable[[], Path]:
    """`command` when all that can be wrong with the arguments and texts has been looked up: what computes."""
    args = _arguments(argv)
    samples.check_arguments(args)
    trained = load_config(args.ckpt).max_position_embeddings
    lengths = default_lengths(trained) if args.lengths is None else parse_lengths(args.lengths)
    readable = max(trained, *lengths) if args.beyond else trained
    check_lengths(lengths, readable)
    checkpoint = samples.open_checkpoint(args, readable, args.prefill_chunk)
    source = args.haystack or find_heldout(args.ckpt, "--haystack FILE")
    haystack = read_haystack(source, args.text_column, checkpoint.tokenizer)
    check_haystack(haystack, lengths)
    reading = Reading.load(args.qa) if args.qa else None
    maker = Maker(haystack, checkpoint.tokenizer, bos_of(checkpoint.tokenizer), reading)
    for sample in plan(args.tasks, lengths[:1], 1, args.seed):  # whatever has no room says so now
        maker.make(sample["task"], sample["length"], sample["seed"])

    pool = cache(lambda: DecodePool(checkpoint.model))  # the weights are read when samples are missing

    def compute(batches: Sequence[Batch]) -> Iterator[Sample]:
        with closing(made_ahead(partial(_questions, maker), batches, samples.makers(args, checkpoint))) as made:
            for batch, asked in zip(batches, made, strict=True):
                yield from answer(batch, asked)

    def answer(batch: Batch, asked: Sequence[Question]) -> Iterator[Sample]:
        task, length = batch[0]["task"], batch[0]["length"]

        def said(tokens: list[int]) -> str:
            return checkpoint.tokenizer.decode(tokens, skip_special_tokens=False)

        def is_done(i: int, tokens: list[int]) -> bool:
            return match(task, said(tokens), asked[i].expected) == 1

        with memory_for(f"{len(batch)} x {length} tokens", checkpoint.device, "lower --batch-tokens"):
            rows = [question.tokens for question in asked]
            answers = checkpoint.generate(rows, TASKS[task].new_tokens, is_done, pool())
        for sample, question, tokens in zip(batch, asked, answers, strict=True):
            text = said(tokens)
            yield sample | {
                "prompt": samples.digest(question.tokens),
                "prompt_tokens": len(question.tokens),
                "expected": question.expected,
                "generated": text,
                "scores": {"match": match(task, text, question.expected)},
            }

    settings = {
        "haystack": haystack.source,
        "haystack_digest": haystack.digest,
        "qa": reading and samples.digest([reading.paragraphs, reading.questions]),
        "seed": args.seed,
        "bos_id": maker.bos_id,
        "version": _VERSION,
    }
    parts = ["ruler"]
    parts += [listed("", [format_length(n) for n in lengths])] if lengths != default_lengths(trained) else []
    parts += [] if args.is_whole else [listed("task", args.tasks)]
    usual = {"n": SAMPLES, "seed": 0}
    parts += [f"{name}{getattr(args, name)}" for name, value in usual.items() if getattr(args, name) != value]
    parts += [name_of(given) for given in (args.haystack, args.qa) if given]
    wanted = list(plan(args.tasks, lengths, args.n, args.seed))

    def key(sample: Sample) -> tuple[str, int]:
        return sample["task"], sample["length"]

    evaluation = Evaluation("ruler", _SCORING, settings, wanted, key, compute, summarise, describe)
    return partial(evaluation.run, argv, args, checkpoint, "-".join(parts))


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
