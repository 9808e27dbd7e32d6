"""Held-out loss by position: whether a checkpoint predicts better where it has read more.

    python -m eval.positions --ckpt runs/1.3b/extend-32k/hf --lengths 8k,32k --documents books.jsonl.gz
    python -m eval.positions --ckpt runs/1.3b/extend-32k/hf --documents runs/1.3b/data/heldout --source books

The first `length` tokens of each document that has as many are read in one pass, one document a row, never several
packed into one, after one BOS where the tokenizer adds one. The mean loss of the tokens of each document in buckets of
powers of two is one observation; `positions.json` has the mean over documents in nats per token, a 95 % interval over
documents, and the perplexity, of each bucket and of the whole. Like `needle.json` it is written while it runs, the same
command goes on from it, and `--processes` and `--part` split it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from eval import samples
from eval.checkpoint import Checkpoint
from eval.grid import format_length, listed, name_of, parse_lengths
from eval.heldout import CHARS_A_TOKEN, find_heldout, read_texts
from eval.needle import check_lengths
from eval.results import checksum_of
from eval.samples import Batch, Evaluation, Sample
from eval.sweep import student
from s2 import ending
from s2.arguments import new_parser, path
from s2.inference.folder import bos_of, memory_for
from s2.model.hf import load_config

DOCUMENTS = 50
_FIRST = 64  # tokens of the first bucket
_SCORING = "one forward over the first tokens of each document, as many as the length; float32 logits"


def buckets(length: int) -> list[tuple[int, int]]:
    """0 to 64, 64 to 128, 128 to 256, ... up to `length`: positions of predicted tokens."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(_FIRST, 2 * edges[-1])))
    return list(pairwise(edges))


@torch.inference_mode()
def losses(checkpoint: Checkpoint, rows: Sequence[list[int]]) -> list[list[list[float]]]:
    """Of rows of one length: [from, to, tokens, mean loss] of each bucket. The first token is not predicted."""
    ids = torch.tensor(rows, device=checkpoint.device)
    hidden = checkpoint.model.model(ids[:, :-1], None, None)  # [B, S - 1, E]
    values, _ = checkpoint.log_likelihoods(hidden.flatten(0, 1), ids[:, 1:].flatten())
    found = []
    for row in (-values).view(len(rows), -1).cpu():
        parts = [(start, stop, row[max(0, start - 1) : stop - 1]) for start, stop in buckets(ids.shape[1])]
        found.append([[start, stop, len(part), part.mean().item()] for start, stop, part in parts if len(part)])
    return found


def summarise(rows: Sequence[Sample]) -> dict[str, Any]:
    """Mean, interval and perplexity of each length and of its buckets."""
    lengths = []
    for length in sorted({row["length"] for row in rows}):
        own = [row["losses"] for row in rows if row["length"] == length]
        whole = [[sum(part[2] for part in parts), sum(part[2] * part[3] for part in parts)] for parts in own]
        row = _mean([total / tokens for tokens, total in whole], sum(tokens for tokens, _ in whole))
        columns = list(zip(*own, strict=True))
        row["buckets"] = [
            {"from": parts[0][0], "to": parts[0][1]}
            | _mean([part[3] for part in parts], sum(part[2] for part in parts))
            for parts in columns
        ]
        lengths.append({"length": length} | row)
    return {"unit": "nats per token", "interval_kind": "Student's t over documents, 95 %", "lengths": lengths}


def _mean(values: list[float], tokens: int) -> dict[str, Any]:
    mean, interval = statistics.fmean(values), None
    if len(values) > 1:
        half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        interval = [round(mean - half, 5), round(mean + half, 5)]
    perplexity = round(math.exp(mean), 4) if mean < 700 else None
    return {
        "documents": len(values), "tokens": int(tokens), "loss": round(mean, 5), "interval": interval,
        "perplexity": perplexity,
    }  # fmt: skip


def describe(summary: dict[str, Any]) -> str:
    """A Markdown table: a row for each bucket, a column for each length."""
    lengths = summary["lengths"]
    rows = [["position", *(format_length(row["length"]) for row in lengths)], ["---", *["---:"] * len(lengths)]]
    edges = sorted({(bucket["from"], bucket["to"]) for row in lengths for bucket in row["buckets"]})
    for start, stop in edges:
        found = [next((b for b in row["buckets"] if (b["from"], b["to"]) == (start, stop)), None) for row in lengths]
        rows.append([f"{start:,} to {stop:,}", *(_cell(bucket) if bucket else "" for bucket in found)])
    rows.append(["all", *map(_cell, lengths)])
    rows.append(["documents", *(str(row["documents"]) for row in lengths)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(row: dict[str, Any]) -> str:
    within = f" ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})" if row["interval"] else ""
    return f"{row['loss']:.3f}{within}"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("eval.positions", __doc__)
    samples.add_arguments(parser)
    add = parser.add_argument
    # fmt: off
    add("--lengths", help="tokens: 8k,32k (default: the model's)")
    add("--documents", type=path,
        help="text, jsonl(.gz) or parquet file(s), or shards; default: the run's held-out ones")
    add("--text-column", default="text", help="column of the documents' rows")
    add("--source", help="of shards, only documents of this source (their manifest.json names them)")
    add("--n", default=DOCUMENTS, type=int, help=f"documents of each length at most, the first ones ({DOCUMENTS})")
    add("--beyond", action="store_true", help="take lengths beyond max_position_embeddings too")
    # fmt: on
    args = parser.parse_args(argv)
    if args.n < 1:
        raise ValueError(f"--n {args.n}: expected at least 1")
    return args


def read_documents(
    checkpoint: Checkpoint,
    source: Path,
    column: str,
    lengths: Sequence[int],
    n: int,
    only: str | None = None,
    option: str = "--lengths",
) -> dict[int, list]:
    """By length, the number and token ids (to the longest length) of the first `n` documents that have so many.
    only: `source` of `eval.heldout.read_texts`.

    Raises ValueError, naming the option, for a length that no document has.
    """
    tokenizer, longest = checkpoint.tokenizer, max(lengths)
    bos = bos_of(tokenizer)
    head, may = [] if bos is None else [bos], may_have(tokenizer)

    def encode(text: str) -> list[int]:
        begin = text[: CHARS_A_TOKEN * longest]  # of a whole book
        return (head + tokenizer.encode(begin, add_special_tokens=False).ids)[:longest]

    found: dict[int, list] = {length: [] for length in sorted(lengths)}
    most, skipped = 0, ""
    for number, text in enumerate(read_texts(source, column, only)):
        shortest = next(length for length, kept in found.items() if len(kept) < n)
        if not may(text, shortest - len(head)):  # most documents of a corpus
            skipped = max(skipped, text, key=len)
            continue
        tokens = encode(text)
        most = max(most, len(tokens))
        for length, kept in found.items():
            if len(tokens) >= length and len(kept) < n:
                kept.append((number, tokens))
        if len(found[longest]) == n:  # and so of each shorter length
            break
    if missing := [length for length, kept in found.items() if not kept]:
        most = max(most, len(encode(skipped)))
        where = f"source {only} in {source}" if only else str(source)
        raise ValueError(
            f"{option} {missing[0]}: no document of {where} has so many tokens (the longest: {most:,}); name longer"
            " ones with --documents FILE"
        )
    return found


def may_have(tokenizer: Tokenizer) -> Callable[[str, int], bool]:
    """A function that says, without encoding it, whether a text may have so many tokens.

    A token stands for at least a byte of what the normalizer makes of the text; one more may stand before it, and
    before each stretch between added tokens.
    """
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special)
    of_a_byte = 2 if any(len(content.encode()) < 2 for content in added) else 1
    normalizer = tokenizer.normalizer

    def may(text: str, count: int) -> bool:
        if 1 + of_a_byte * len(text.encode()) >= count:
            return True
        return normalizer is not None and 1 + of_a_byte * len(normalizer.normalize_str(text).encode()) >= count

    return may


def command(argv: Sequence[str]) -> Path:
    """What the command line does; the file of the results."""
    return ready(argv)()


def ready(argv: Sequence[str]) -> Callable[[], Path]:
    """`command` when all that can be wrong with the arguments and texts has been looked up: what computes."""
    args = _arguments(argv)
    samples.check_arguments(args)
    trained = load_config(args.ckpt).max_position_embeddings
    lengths = (trained,) if args.lengths is None else parse_lengths(args.lengths)
    if lengths[0] < 2:
        raise ValueError(f"--lengths {lengths[0]}: expected at least 2, since the first token is not predicted")
    readable = max(trained, *lengths) if args.beyond else trained
    check_lengths(lengths, readable)
    checkpoint = samples.open_checkpoint(args, readable)
    source = args.documents or find_heldout(args.ckpt, "--documents FILE")
    documents = read_documents(checkpoint, source, args.text_column, lengths, args.n, args.source)
    tokens = {(length, number): row for length, kept in documents.items() for number, row in kept}

    def compute(batches: Sequence[Batch]) -> Iterator[Sample]:
        return (record for batch in batches for record in compute_batch(batch))

    def compute_batch(batch: Batch) -> Iterator[Sample]:
        length = batch[0]["length"]
        rows = [tokens[length, sample["document"]] for sample in batch]
        with memory_for(f"{len(batch)} x {length} tokens", checkpoint.device, "lower --batch-tokens"):
            found = losses(checkpoint, [row[:length] for row in rows])
        for sample, row, parts in zip(batch, rows, found, strict=True):
            prompt = samples.digest(row[:length])
            yield sample | {"tokens": length - 1, "prompt": prompt, "losses": parts}

    settings = {
        "documents": source.name or str(source),
        "documents_digest": checksum_of(source),
        "bos_id": bos_of(checkpoint.tokenizer),
        **({"text_column": args.text_column} if args.text_column != "text" else {}),
        **({"source": args.source} if args.source else {}),
    }
    plan = [{"id": f"{length}/{number}", "length": length, "document": number} for length, number in tokens]
    parts = ["positions"]
    parts += [listed("", [format_length(n) for n in lengths])] if lengths != (trained,) else []
    parts += [f"n{args.n}"] if args.n != DOCUMENTS else []
    parts += [name_of(args.documents)] if args.documents else []
    parts += [f"of-{name_of(Path(args.source))}"] if args.source else []
    evaluation = Evaluation(
        "positions", _SCORING, settings, plan, lambda sample: sample["length"], compute, summarise, describe, cuts=False
    )
    return partial(evaluation.run, argv, args, checkpoint, "-".join(parts))


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
