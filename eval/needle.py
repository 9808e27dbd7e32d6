"""Needle in a haystack: how well a checkpoint finds a number hidden at every depth of every context length.

    python -m eval.needle --ckpt runs/demo/extend-2k/hf --lengths 512,1k,2k --depths 11 --n 5 --output results

With `--shared-haystack` all depths of a sample lie in one window of the haystack, and what stands before the needle is
computed once: about two thirds of the work for eleven depths. Its prompts are others than without, so that the two
are never mixed, and the samples of a length are fewer different texts: their interval says less than it seems. Scores
of one prompt differ from those of a pass of its own by rounding alone.

`--kind` says what is hidden and asked for (`eval.needle_prompts`). Each sample gets three scores in 0..1, each the mean
over its needles:
    exact      every token of the number is the most likely one, given the true ones before it (one forward)
    partial    the share of the number's tokens for which that holds
    generated  the number is what greedy generation from the question says (where `exact` is right, that is known)
`needle.json` holds every sample, and mean and 95 % interval of every cell. It is written while the sweep runs, and the
same command started again goes on from it; `--processes` and `--part` split it. `needle.png` is the heatmap of the
score that `--score` names. Arguments other than the defaults are part of the names (`needle-n1-seed3.json`), so that no
sweep takes another's place, unless `--output` names the file itself.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenizers import Tokenizer

from eval import samples
from eval.checkpoint import Checkpoint
from eval.grid import (
    DEPTHS,
    SAMPLES,
    Grid,
    default_lengths,
    format_length,
    parse_depths,
    parse_length,
    parse_lengths,
    result_stem,
)
from eval.haystack import Haystack
from eval.heatmap import draw
from eval.heldout import find_heldout, read_texts
from eval.needle_prompts import KINDS, MAX_SHIFT, Needle, Prompt, build_prompt, filler
from eval.samples import Batch, Part, Sample
from eval.sweep import SCORE_NAMES, describe, read_sweep
from s2 import ending, files
from s2.arguments import new_parser, path
from s2.inference.folder import bos_of
from s2.inference.prefill import add_prefill_chunk
from s2.inference.prefix import PrefixCache
from s2.model.hf import load_config
from s2.out_of_memory import is_out_of_memory

HAYSTACK_TOKENS = 1 << 20
_RECORDED = ("key", "number", "position", "depth")  # of each needle
_SCORING, _GENERATING = "one forward over question and answer", "; greedy generation where that is not right"


_haystacks: dict[Any, Haystack] = {}  # the last one that was read


def read_haystack(source: Path, column: str, tokenizer: Tokenizer, tokens: int = HAYSTACK_TOKENS) -> Haystack:
    """The first `tokens` of a text. That of a file or shard folder is kept for the next part of a suite, which reads
    the same, until the file is written anew.

    Raises as `eval.heldout.read_texts` and `Haystack.from_texts`.
    """
    file = source / "manifest.json" if source.is_dir() else source
    written = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
    key = (source, column, tokens, written, tokenizer.to_str())
    if written is None or key not in _haystacks:
        _haystacks.clear()
        name = source.name or str(source)
        _haystacks[key] = Haystack.from_texts(read_texts(source, column), tokenizer, name, tokens)
    return _haystacks[key]


@dataclass(frozen=True)
class Prompts:
    """What a sweep asks: the samples of a grid, hidden in a haystack. `bos_id` opens each; None: nothing does."""

    haystack: Haystack
    tokenizer: Tokenizer
    bos_id: int | None
    grid: Grid

    def settings(self) -> dict[str, Any]:
        """What tells sweeps of one checkpoint apart."""
        return {
            "kind": self.grid.kind,
            "haystack": self.haystack.source,
            "haystack_digest": self.haystack.digest,
            "haystack_tokens": len(self.haystack.tokens),
            "shared_haystack": self.grid.shared,
            "needles": self.grid.needles,
            "distractors": self.grid.distractors,
            "seed": self.grid.seed,
            "bos_id": self.bos_id,
            "max_shift": MAX_SHIFT,
        }

    def build(self, sample: Sample) -> Prompt:
        grid, begin = self.grid, None
        if grid.shared:
            window = random.Random(f"{grid.seed}/{sample['length']}/{sample['index']}")
            begin = self.haystack.window(sample["length"], window).start
        where = {key: sample[key] for key in ("length", "depth", "seed")}
        ask = partial(build_prompt, self.haystack, self.tokenizer, self.bos_id, kind=grid.kind, begin=begin, **where)
        return ask(needles=grid.needles or 1, distractors=grid.distractors or 0)

    def check(self, max_length: int, vocab_size: int) -> None:
        """Raises ValueError when the longest length does not fit the model or the haystack, when prompts of the
        shortest have no room, when their needles lie nearer to another row of the map than to their own, or when the
        model has no embedding for a token."""
        check_lengths(self.grid.lengths, max_length)
        check_haystack(self.haystack, self.grid.lengths)
        most = int(self.haystack.tokens.max())
        depths = self.grid.depths
        for sample in (sample for sample in self.grid.samples() if sample["length"] == self.grid.lengths[0]):
            prompt = self.build(sample)
            most = max(most, *prompt.tokens)
            depth, measured = sample["depth"], prompt.needles[0].depth
            if min(depths, key=lambda row: abs(row - measured)) != depth:
                raise ValueError(
                    f"--depths: {len(depths)} depths cannot be told apart at {sample['length']} tokens, where a needle"
                    f" meant for {depth:g}% lies at {measured:.1f}%; take fewer, or longer contexts (one depth is"
                    " --depths 50%)"
                )
        if most >= vocab_size:
            raise ValueError(
                f"the tokenizer has token {most}, and the model embeds {vocab_size} (vocab_size in its config.json);"
                " tokenizer.json is another model's"
            )


def check_lengths(lengths: Sequence[int], max_length: int) -> None:
    """Raises ValueError when the longest length does not fit the model."""
    if max(lengths) > max_length:
        raise ValueError(
            f"--lengths {max(lengths)}: the checkpoint reads at most {max_length} tokens (max_position_embeddings"
            " in its config.json); drop the longer lengths, extend the model first, or see with --beyond how it does"
            " there as it is"
        )


def check_haystack(haystack: Haystack, lengths: Sequence[int], option: str = "--lengths") -> None:
    """Raises ValueError, naming the option, when the haystack is shorter than the longest length."""
    if max(lengths) > len(haystack.tokens):
        raise ValueError(
            f"{option} {max(lengths)}: the haystack {haystack.source} has only {len(haystack.tokens):,} tokens;"
            " give a longer one with --haystack FILE"
        )


def run_sweep(
    reader: Checkpoint,
    prompts: Prompts,
    file: Path,
    about: dict[str, Any],
    generate: bool = True,
    batch_tokens: int = 1,
    part: Part | None = None,
) -> dict[str, Any]:
    """Score all samples that are not known yet; return the content of `file` (see `eval.samples.collect`).

    Args:
        reader: or whatever has its `max_length`, `predict_last` and `generate`.
        file: as `eval.samples.place_in` gives it.
        about: what is recorded of the checkpoint and the conditions.
        batch_tokens: of prompts of one length that are read at once.
    Raises:
        ValueError: a length beyond the model's, before anything is computed; a file of another sweep.
        MemoryError: a length that the device has no room for.
    """
    grid = prompts.grid
    check_lengths(grid.lengths, reader.max_length)
    header = {"kind": "needle", "conditions": {}, **about, "settings": prompts.settings()}

    def rows(sample: Sample) -> int:
        return max(1, batch_tokens // sample["length"])

    def key(sample: Sample) -> Any:  # what shares a window is computed together
        return (sample["length"], sample["index"] // rows(sample)) if grid.shared else sample["length"]

    def order(asked: tuple[Batch, list[Prompt]]) -> tuple[int, int]:
        return -len(asked[0]), min(prompt.first for prompt in asked[1])

    def compute(batches: Sequence[Batch]) -> Iterator[Sample]:
        return (record for batch in batches for record in compute_batch(batch))

    def compute_batch(batch: Batch) -> Iterator[Sample]:
        length, cache = batch[0]["length"], None
        steps = samples.batches_of(batch, lambda sample: grid.shared and sample["depth"], rows)
        try:
            # of those that begin alike the one that differs first comes first, so that each goes on from what is known
            asked = sorted(((step, [prompts.build(sample) for sample in step]) for step in steps), key=order)
            for (step, built), (_, following) in zip(asked, [*asked[1:], ([], [])], strict=True):
                if grid.shared and (cache is None or cache.batch_size != len(step)):
                    cache = None  # its memory first
                    cache = reader.prefix_cache(len(step), length)
                following = following if len(following) == len(built) else []
                scored = score(reader, prompts.tokenizer, built, generate, cache, following)
                for sample, prompt, record in zip(step, built, scored, strict=True):
                    yield sample | {"prompt": samples.digest(prompt.tokens)} | record
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"--lengths {length}: no room for so many tokens in the device's memory; lower --batch-tokens or"
                f" --prefill-chunk; what is done is in {file}"
            ) from None

    plan = samples.batches_of(grid.samples(), key, lambda sample: 1 << 30 if grid.shared else rows(sample))
    # Samples scored without generation count as known only while generation is not asked for.
    wanted = [name for name in SCORE_NAMES if generate or name != "generated"]
    results = samples.collect(file, header, list(plan), compute, part=part, wanted=wanted)
    if part is None:
        shared = set.intersection(*(set(sample["scores"]) for sample in results["samples"]))
        results["summary"] = {name: _summary(file, name) for name in SCORE_NAMES if name in shared}
        files.write_json(file, results)
    return results


def _summary(file: Path, score: str) -> dict[str, Any]:
    sweep = read_sweep([file], score)
    numbers = sweep.as_json()
    shown = {key: numbers[key] for key in ("scorer", "mean", "interval", "interval_kind", "cells")}
    return shown | {"lengths": sweep.by_length()}


def score(
    reader: Checkpoint,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    generate: bool = True,
    cache: PrefixCache | None = None,
    following: Sequence[Prompt] = (),
) -> list[dict[str, Any]]:
    """What the records of prompts of one length say beyond their place in the grid: needles, expected, predicted (the
    most likely tokens, each after the true ones before it), generated, scores. `cache` and the prompts that follow: see
    `Checkpoint.predict_last`."""
    firsts = [min(needle.answer.start for needle in prompt.needles) for prompt in prompts]
    count = max(len(prompt.tokens) - first for prompt, first in zip(prompts, firsts, strict=True))
    more: dict[str, Any] = (
        {} if cache is None else {"prefix": cache, "following": [prompt.tokens[:-1] for prompt in following]}
    )
    predicted = reader.predict_last([prompt.tokens[:-1] for prompt in prompts], count, **more)
    return [
        _record(reader, tokenizer, prompt, [*prompt.tokens[:-count], *said], generate)
        for prompt, said in zip(prompts, predicted, strict=True)
    ]


def _record(
    reader: Checkpoint, tokenizer: Tokenizer, prompt: Prompt, predicted: list[int], generate: bool
) -> dict[str, Any]:
    """`predicted`: the most likely token at each place of the prompt, from the first answer on."""
    tokens = prompt.tokens
    hits = [
        [predicted[i] == tokens[i] for i in range(needle.answer.start, needle.answer.stop)] for needle in prompt.needles
    ]
    likely = [
        tokenizer.decode(predicted[n.answer.start : n.answer.stop], skip_special_tokens=False) for n in prompt.needles
    ]
    record: dict[str, Any] = {
        "needles": [{key: getattr(needle, key) for key in _RECORDED} for needle in prompt.needles],
        "on_boundary": prompt.on_boundary,
        "expected": ", ".join(needle.number for needle in prompt.needles),
        "predicted": likely[0] if len(likely) == 1 else likely,
        "scores": {"exact": fmean([all(h) for h in hits]), "partial": fmean([fmean(h) for h in hits])},
    }
    if generate:
        said = [_say(reader, tokenizer, tokens, n, all(h)) for n, h in zip(prompt.needles, hits, strict=True)]
        record["generated"] = said[0] if len(said) == 1 else said
        found = [re.search(r"\d+", text) for text in said]
        right = [f is not None and f[0] == n.number for f, n in zip(found, prompt.needles, strict=True)]
        record["scores"]["generated"] = fmean(right)
    return record


def _say(reader: Checkpoint, tokenizer: Tokenizer, tokens: list[int], needle: Needle, is_exact: bool) -> str:
    """The greedy continuation of a question. Where each token of the answer is the most likely one after those before
    it, the answer is what greedy decoding gives."""
    asked, answer = tokens[: needle.answer.start], tokens[needle.answer]
    return tokenizer.decode(answer if is_exact else reader.generate([asked], len(answer))[0], skip_special_tokens=False)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("eval.needle", __doc__)
    samples.add_arguments(parser)
    add_prefill_chunk(parser)
    add = parser.add_argument
    # fmt: off
    add("--kind", default="single", help=f"{', '.join(KINDS)} (default: %(default)s)")
    add("--lengths", help="tokens: 512,1k,2k (default: the model's, 1/2, 1/4, 1/8 of it)")
    add("--depths", default=str(DEPTHS), help=f"number of depths ({DEPTHS}), or percents: 0,50,100 or 50%%")
    add("--n", default=SAMPLES, type=int, help=f"samples per cell ({SAMPLES})")
    add("--score", default="exact", choices=list(SCORE_NAMES), help="which score the heatmap shows")
    add("--no-generate", action="store_true", help="skip generation: the `generated` score, half of the time")
    add("--shared-haystack", action="store_true",
        help="one window of the haystack for all depths of a sample, whose beginning is then computed once")
    add(
        "--haystack", type=path, help="text, jsonl(.gz) or parquet file(s), or shards; default: the run's held-out ones"
    )
    add("--text-column", default="text", help="column of the haystack's rows")
    add("--haystack-tokens", default=format_length(HAYSTACK_TOKENS), help="how much of the haystack to read")
    add("--needles", type=int, help="numbers hidden and asked for in each prompt (default: as the kind has)")
    add("--distractors", type=int, help="further numbers hidden and not asked for (default: as the kind has)")
    add("--beyond", action="store_true",
        help="take lengths beyond max_position_embeddings too: how the model does where it was not trained")
    add("--seed", default=0, type=int)
    add("--train-length", help="where the heatmap's line is (default: max_position_embeddings)")
    # fmt: on
    args = parser.parse_args(argv)
    for name in ("haystack_tokens", "train_length"):
        if getattr(args, name) is not None:
            try:
                setattr(args, name, parse_length(getattr(args, name)))
            except ValueError as error:
                raise ValueError(f"--{name.replace('_', '-')}: {error}") from None
    return args


def command(argv: Sequence[str]) -> Path:
    """What the command line does; the file of the results."""
    return ready(argv)()


def ready(argv: Sequence[str]) -> Callable[[], Path]:
    """`command` when all that can be wrong with the arguments and texts has been looked up: what computes."""
    args = _arguments(argv)
    output = samples.check_arguments(args)
    if args.score == "generated" and args.no_generate:
        raise ValueError("--score generated needs generation; drop --no-generate")
    if args.kind == "passkey" and args.haystack:
        raise ValueError(f"--haystack {args.haystack}: --kind passkey has a haystack of its own")
    trained = load_config(args.ckpt).max_position_embeddings
    lengths = default_lengths(trained) if args.lengths is None else parse_lengths(args.lengths)
    depths = parse_depths(args.depths)
    grid = Grid(lengths, depths, args.n, args.needles, args.distractors, args.seed, args.kind, args.shared_haystack)
    readable = max(trained, *grid.lengths) if args.beyond else trained
    check_lengths(grid.lengths, readable)
    checkpoint = samples.open_checkpoint(args, readable, args.prefill_chunk)
    tokenizer = checkpoint.tokenizer
    if args.kind == "passkey":
        haystack = filler(tokenizer, max(grid.lengths))
    else:
        source = args.haystack or find_heldout(args.ckpt, "--haystack FILE (make: HELDOUT=FILE)")
        haystack = read_haystack(source, args.text_column, tokenizer, args.haystack_tokens)
    prompts = Prompts(haystack, tokenizer, bos_of(tokenizer), grid)
    prompts.check(readable, checkpoint.config.vocab_size)
    files.require_writable(output.parent if output.suffix == ".json" else output)
    about = checkpoint.describe() | {"train_length": args.train_length or trained}
    scoring = _SCORING + ("" if args.no_generate else _GENERATING)
    about["conditions"] = samples.conditions(checkpoint, prompts.bos_id, scoring)
    tokens = None if args.haystack_tokens == HAYSTACK_TOKENS else args.haystack_tokens
    stem = result_stem(grid, trained, args.haystack, tokens, not args.no_generate)

    def work() -> Path:
        file = samples.place_in(output, stem, {"kind": "needle", **about, "settings": prompts.settings()})
        if args.processes > 1:
            samples.split("needle", argv, args)
        tokens_of_batch = samples.batch_tokens(args, checkpoint)
        run_sweep(checkpoint, prompts, file, about, not args.no_generate, tokens_of_batch, args.part)
        if args.part is None:
            sweep = read_sweep([file], score=args.score)
            picture = file.with_suffix(".png" if args.score == "exact" else f".{args.score}.png")
            draw([sweep], picture)
            print(f"{describe(sweep)}\n{file}\n{picture}")
        return file

    return work


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
