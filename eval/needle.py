"""Needle in a haystack: how well a checkpoint finds a number hidden at every depth of every context length.

    python -m eval.needle --ckpt runs/demo/extend-2k/hf --lengths 512,1k,2k --depths 11 --n 5 --output results

Each sample gets three scores in 0..1, each the mean over its needles:
    exact      every token of the number is the most likely one, given the true ones before it (one forward)
    partial    the share of the number's tokens for which that holds
    generated  the number is what greedy generation from the question says
`needle.json` holds every sample, and mean and 95 % interval of every cell. It is written while the sweep runs, and the
same command started again goes on from it. `needle.png` is the heatmap of the score that `--score` names. Arguments
other than the defaults are part of the names (`needle-n1-seed3.json`), so that no sweep takes another's place, unless
`--output` names the file itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from eval.arguments import new_parser, path
from eval.checkpoint import Checkpoint, bos_of, check_checkpoint, load_tokenizer, results_folder
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
from eval.haystack import MAX_SHIFT, Haystack, Prompt, build_prompt
from eval.heatmap import draw
from eval.heldout import find_heldout, read_texts
from eval.sweep import SCORE_NAMES, describe, read_sweep
from s2 import ending, files
from s2.model.hf import load_config

_WRITE_EVERY_SECONDS = 5.0
_HAYSTACK_TOKENS = 1 << 20
_RECORDED = ("key", "number", "position", "depth")  # of each needle


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
            "haystack": self.haystack.source,
            "haystack_digest": self.haystack.digest,
            "haystack_tokens": len(self.haystack.tokens),
            "needles": self.grid.needles,
            "distractors": self.grid.distractors,
            "seed": self.grid.seed,
            "bos_id": self.bos_id,
            "max_shift": MAX_SHIFT,
        }

    def seed(self, name: str) -> str:
        return f"{self.grid.seed}/{name}"

    def build(self, name: str, length: int, depth: float) -> Prompt:
        grid, seed = self.grid, self.seed(name)
        ask = partial(build_prompt, self.haystack, self.tokenizer, self.bos_id, length=length, depth=depth, seed=seed)
        return ask(needles=grid.needles, distractors=grid.distractors)

    def check(self, max_length: int, vocab_size: int) -> None:
        """Raises ValueError when the longest length does not fit the model or the haystack, when prompts of the
        shortest have no room, when their needles lie nearer to another row of the map than to their own, or when the
        model has no embedding for a token."""
        check_lengths(self.grid.lengths, max_length)
        tokens, longest = self.haystack.tokens, max(self.grid.lengths)
        if longest > len(tokens):
            raise ValueError(
                f"--lengths {longest}: the haystack {self.haystack.source} has only {len(tokens):,} tokens;"
                " give a longer one with --haystack FILE"
            )
        most = int(tokens.max())
        depths = self.grid.depths
        for name, length, depth, _ in (sample for sample in self.grid.samples() if sample[1] == self.grid.lengths[0]):
            prompt = self.build(name, length, depth)
            most = max(most, *prompt.tokens)
            measured = prompt.needles[0].depth
            if min(depths, key=lambda row: abs(row - measured)) != depth:
                raise ValueError(
                    f"--depths: {len(depths)} depths cannot be told apart at {length} tokens, where a needle meant for"
                    f" {depth:g}% lies at {measured:.1f}%; take fewer, or longer contexts (one depth is --depths 50%)"
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


def run_sweep(
    reader: Checkpoint, prompts: Prompts, file: Path, about: dict[str, Any], generate: bool = True
) -> dict[str, Any]:
    """Score all samples that are not known yet; return the content of `file`.

    Known are the samples of `file` and of other sweeps in its folder that are of the same checkpoint, haystack and kind
    of prompt. `file` is written every few seconds and at the end, whatever ends the sweep.

    Args:
        reader: or whatever has its `max_length`, `predict_last` and `generate`.
        file: as `place_results` gives it. Samples that it holds already stay in it.
        about: what is recorded of the checkpoint; its `checkpoint`, `fingerprint` and `dtype` tell sweeps apart.
    Raises:
        ValueError: a length beyond the model's, before anything is computed; a file of another sweep.
        MemoryError: a length that the device has no room for.
    """
    check_lengths(prompts.grid.lengths, reader.max_length)
    place_results(file, file.stem, about, prompts)
    results: dict[str, Any] = {"kind": "needle", **about, "settings": prompts.settings()}
    # Samples scored without generation count as known only while generation is not asked for.
    wanted = set(SCORE_NAMES) if generate else set(SCORE_NAMES) - {"generated"}
    own = _samples(file, results) if file.exists() else {}
    known: dict[str, dict[str, Any]] = {}
    for found in (*(_samples(other, results) for other in sorted(file.parent.glob("needle*.json"))), own):
        known |= {name: sample for name, sample in found.items() if wanted <= set(sample["scores"])}
    samples = list(prompts.grid.samples())
    todo = [sample for sample in samples if sample[0] not in known]
    kept = own | {name: known[name] for name, *_ in samples if name in known}
    if len(todo) < len(samples):
        print(f"{file}: {len(samples) - len(todo)} samples are there already, {len(todo)} to go")
    written = time.monotonic()
    try:
        for name, length, depth, index in tqdm(todo, desc="needle", unit="sample"):
            sample = {"id": name, "length": length, "depth": depth, "index": index, "seed": prompts.seed(name)}
            try:
                prompt = prompts.build(name, length, depth)
                kept[name] = sample | score(reader, prompts.tokenizer, prompt, generate)
            except torch.OutOfMemoryError:
                raise MemoryError(
                    f"--lengths {length}: no room for so many tokens in the device's memory; what is done is in {file}"
                ) from None
            if time.monotonic() - written > _WRITE_EVERY_SECONDS:
                files.write_json(file, results | {"samples": list(kept.values())})
                written = time.monotonic()
    finally:
        results["samples"] = list(kept.values())
        files.write_json(file, results)
    shared = set.intersection(*(set(sample["scores"]) for sample in results["samples"]))
    results["summary"] = {name: _summary(file, name) for name in SCORE_NAMES if name in shared}
    files.write_json(file, results)
    return results


def place_results(output: Path, stem: str, about: dict[str, Any], prompts: Prompts) -> Path:
    """Where the results of this sweep go: `<output>/<stem>.json`, where nothing of another sweep stands.

    Results of the checkpoint's earlier weights move to `<stem>.json.1`, with their picture; where another checkpoint's
    are, or this one's on another haystack or in another precision, the new file gets a suffix of its own.

    Args:
        output: a folder, or the .json file itself, which then must be new or of the same checkpoint and haystack.
    Raises:
        ValueError: the file is there and is no needle results, or of another sweep where `output` names the file.
    """
    file = output if output.suffix == ".json" else output / f"{stem}.json"
    if not file.exists():
        return file
    new = {**about, "settings": prompts.settings()}
    old = files.read_json(file)
    if not isinstance(old, dict) or old.get("kind") != "needle":
        raise ValueError(f"{file} is no needle result file; choose another --output")
    if _identity(old) == _identity(new):
        return file
    if file == output:
        raise ValueError(f"{file} is of another checkpoint, haystack or kind of prompt; choose another --output")
    earlier = old.get("fingerprint") != about.get("fingerprint") or "max_shift" not in old.get("settings", {})
    if old.get("checkpoint") == about.get("checkpoint") and earlier:
        for outdated in (file, *file.parent.glob(f"{stem}.png"), *file.parent.glob(f"{stem}.*.png")):
            print(f"{outdated} is of an earlier checkpoint; kept as {files.move_aside(outdated).name}")
        return file
    suffix = hashlib.sha256(_identity(new).encode()).hexdigest()[:6]
    print(f"{file} is of another checkpoint, haystack or precision; this sweep goes to {stem}-{suffix}.json")
    return file.with_name(f"{stem}-{suffix}.json")


def _identity(results: dict[str, Any]) -> str:
    """What two sweeps must have in common to share samples."""
    return json.dumps([results.get(key) for key in ("checkpoint", "fingerprint", "dtype", "settings")], sort_keys=True)


def _samples(file: Path, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Samples by id of a file that is of the same checkpoint, haystack and kind of prompt as `results`; else none."""
    try:
        found = files.read_json(file)
        if _identity(found) == _identity(results):
            return {sample["id"]: sample for sample in found["samples"]}
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        pass  # another program's, or a broken one: no samples
    return {}


def _summary(file: Path, score: str) -> dict[str, Any]:
    numbers = read_sweep([file], score).as_json()
    return {key: numbers[key] for key in ("scorer", "mean", "interval", "interval_kind", "cells")}


def score(reader: Checkpoint, tokenizer: Tokenizer, prompt: Prompt, generate: bool = True) -> dict[str, Any]:
    """What one sample's record says beyond its place in the grid: needles, expected, generated, scores."""
    tokens = prompt.tokens
    first = prompt.needles[0].answer.start
    predicted = reader.predict_last(tokens[:-1], len(tokens) - first)
    hits = [
        [predicted[i - first] == tokens[i] for i in range(needle.answer.start, needle.answer.stop)]
        for needle in prompt.needles
    ]
    record: dict[str, Any] = {
        "needles": [{key: getattr(needle, key) for key in _RECORDED} for needle in prompt.needles],
        "on_boundary": prompt.on_boundary,
        "expected": ", ".join(needle.number for needle in prompt.needles),
        "scores": {"exact": fmean([all(h) for h in hits]), "partial": fmean([fmean(h) for h in hits])},
    }
    if generate:
        said = []
        for needle in prompt.needles:
            new = reader.generate(tokens[: needle.answer.start], needle.answer.stop - needle.answer.start)
            said.append(tokenizer.decode(new, skip_special_tokens=False))
        record["generated"] = said[0] if len(said) == 1 else said
        found = [re.search(r"\d+", text) for text in said]
        right = [f is not None and f[0] == n.number for f, n in zip(found, prompt.needles, strict=True)]
        record["scores"]["generated"] = fmean(right)
    return record


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("needle", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--ckpt", type=path, required=True, help="Hugging Face folder, e.g. runs/demo/extend-2k/hf")
    add("--lengths", help="tokens: 512,1k,2k (default: the model's, 1/2, 1/4, 1/8 of it)")
    add("--depths", default=str(DEPTHS), help=f"number of depths ({DEPTHS}), or percents: 0,50,100 or 50%%")
    add("--n", default=SAMPLES, type=int, help=f"samples per cell ({SAMPLES})")
    add("--score", default="exact", choices=list(SCORE_NAMES), help="which score the heatmap shows")
    add("--no-generate", action="store_true", help="skip generation: the `generated` score, half of the time")
    add(
        "--haystack", type=path, help="text, jsonl(.gz) or parquet file(s), or shards; default: the run's held-out ones"
    )
    add("--text-column", default="text", help="column of the haystack's rows")
    add("--haystack-tokens", default=format_length(_HAYSTACK_TOKENS), help="how much of the haystack to read")
    add("--needles", default=1, type=int, help="numbers hidden and asked for in each prompt")
    add("--distractors", default=0, type=int, help="further numbers hidden and not asked for")
    add("--beyond", action="store_true",
        help="take lengths beyond max_position_embeddings too: how the model does where it was not trained")
    add("--seed", default=0, type=int)
    add("--train-length", help="where the heatmap's line is (default: max_position_embeddings)")
    add("--output", type=path, help="folder, or .json file, for the results (default: the run's results folder)")
    add("--device", help="default: the GPU if there is one")
    # fmt: on
    args = parser.parse_args(argv)
    for name in ("haystack_tokens", "train_length"):
        if getattr(args, name) is not None:
            try:
                setattr(args, name, parse_length(getattr(args, name)))
            except ValueError as error:
                raise ValueError(f"--{name.replace('_', '-')}: {error}") from None
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    check_checkpoint(args.ckpt)
    if args.score == "generated" and args.no_generate:
        raise ValueError("--score generated needs generation; drop --no-generate")
    config = load_config(args.ckpt)
    trained = config.max_position_embeddings
    lengths = default_lengths(trained) if args.lengths is None else parse_lengths(args.lengths)
    grid = Grid(lengths, parse_depths(args.depths), args.n, args.needles, args.distractors, args.seed)
    readable = max(trained, *grid.lengths) if args.beyond else trained
    check_lengths(grid.lengths, readable)
    source = args.haystack or find_heldout(args.ckpt)
    tokenizer = load_tokenizer(args.ckpt)
    texts = read_texts(source, args.text_column)
    haystack = Haystack.from_texts(texts, tokenizer, source.name or str(source), args.haystack_tokens)
    prompts = Prompts(haystack, tokenizer, bos_of(tokenizer), grid)
    prompts.check(readable, config.vocab_size)
    output = args.output or results_folder(args.ckpt)
    files.require_writable(output.parent if output.suffix == ".json" else output)
    checkpoint = Checkpoint.load(args.ckpt, args.device, max_length=readable)
    about = checkpoint.describe() | {"train_length": args.train_length or trained}
    tokens = None if args.haystack_tokens == _HAYSTACK_TOKENS else args.haystack_tokens
    stem = result_stem(grid, trained, args.haystack, tokens, not args.no_generate)
    file = place_results(output, stem, about, prompts)
    run_sweep(checkpoint, prompts, file, about, generate=not args.no_generate)
    sweep = read_sweep([file], score=args.score)
    picture = file.with_suffix(".png" if args.score == "exact" else f".{args.score}.png")
    draw([sweep], picture)
    print(f"{describe(sweep)}\n{file}\n{picture}")


if __name__ == "__main__":
    ending.run(main)
