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
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from eval.checkpoint import Checkpoint, bos_of, check_checkpoint, load_tokenizer, results_folder
from eval.grid import DEPTHS, SAMPLES, Grid, default_lengths, parse_depths, parse_lengths, result_stem
from eval.haystack import MAX_SHIFT, Haystack, Prompt, build_prompt
from eval.heatmap import draw
from eval.heldout import find_heldout, read_texts
from eval.sweep import SCORE_NAMES, describe, format_length, parse_length, read_sweep
from s2 import ending, files
from s2.model.hf import load_config

_WRITE_EVERY_SECONDS = 5.0
_HAYSTACK_TOKENS = 1 << 20


class Reader(Protocol):
    """What a sweep asks of a model; `eval.checkpoint.Checkpoint` is one."""

    @property
    def max_length(self) -> int: ...

    def predict_last(self, tokens: list[int], count: int) -> list[int]: ...

    def generate(self, tokens: list[int], max_new_tokens: int) -> list[int]: ...


def run_sweep(
    reader: Reader,
    tokenizer: Tokenizer,
    bos_id: int | None,
    haystack: Haystack,
    grid: Grid,
    file: Path,
    about: dict[str, Any],
    generate: bool = True,
) -> dict[str, Any]:
    """Score all samples of `grid` that are not known yet; return the content of `file`.

    Known are the samples of `file` and of other sweeps in its folder that are of the same checkpoint, haystack and kind
    of prompt. `file` is written every few seconds and at the end, whatever ends the sweep.

    Args:
        file: as `place_results` gives it. Samples that it holds already stay in it.
        about: what is recorded of the checkpoint; its `checkpoint`, `fingerprint` and `dtype` tell sweeps apart.
    Raises:
        ValueError: a length beyond the model's or the haystack's, before anything is computed; a file of another sweep.
        MemoryError: a length that the device has no room for.
    """
    check_lengths(grid.lengths, reader.max_length, haystack)
    place_results(file, file.stem, about, grid, haystack, bos_id)
    results: dict[str, Any] = {"kind": "needle", **about, "settings": _settings(grid, haystack, bos_id)}
    # Samples scored without generation count as known only while generation is not asked for.
    wanted = set(SCORE_NAMES) if generate else set(SCORE_NAMES) - {"generated"}
    own = _samples(file, results) if file.exists() else {}
    known: dict[str, dict[str, Any]] = {}
    for found in (*(_samples(other, results) for other in sorted(file.parent.glob("needle*.json"))), own):
        known |= {name: sample for name, sample in found.items() if wanted <= set(sample["scores"])}
    samples = list(grid.samples())
    todo = [sample for sample in samples if sample[0] not in known]
    kept = own | {name: known[name] for name, *_ in samples if name in known}
    if len(todo) < len(samples):
        print(f"{file}: {len(samples) - len(todo)} samples are there already, {len(todo)} to go")
    written = time.monotonic()
    try:
        for name, length, depth, index in tqdm(todo, desc="needle", unit="sample"):
            prompt = _prompt(haystack, tokenizer, bos_id, grid, name, length, depth)
            sample = {"id": name, "length": length, "depth": depth, "index": index, "seed": _seed(grid, name)}
            try:
                kept[name] = sample | score(reader, tokenizer, prompt, generate)
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


def place_results(
    output: Path, stem: str, about: dict[str, Any], grid: Grid, haystack: Haystack, bos_id: int | None
) -> Path:
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
    new = {**about, "settings": _settings(grid, haystack, bos_id)}
    old = files.read_json(file)
    if not isinstance(old, dict) or old.get("kind") != "needle":
        raise ValueError(f"{file} is no needle result file; choose another --output")
    if _identity(old) == _identity(new):
        return file
    if file == output:
        raise ValueError(f"{file} is of another checkpoint, haystack or kind of prompt; choose another --output")
    earlier = old.get("fingerprint") != about.get("fingerprint") or "max_shift" not in old.get("settings", {})
    if old.get("checkpoint") == about.get("checkpoint") and earlier:
        for path in (file, *file.parent.glob(f"{stem}.png"), *file.parent.glob(f"{stem}.*.png")):
            print(f"{path} is of an earlier checkpoint; kept as {files.move_aside(path).name}")
        return file
    suffix = hashlib.sha256(_identity(new).encode()).hexdigest()[:6]
    print(f"{file} is of another checkpoint, haystack or precision; this sweep goes to {stem}-{suffix}.json")
    return file.with_name(f"{stem}-{suffix}.json")


def _settings(grid: Grid, haystack: Haystack, bos_id: int | None) -> dict[str, Any]:
    return {
        "haystack": haystack.source,
        "haystack_digest": haystack.digest,
        "haystack_tokens": len(haystack.tokens),
        "needles": grid.needles,
        "distractors": grid.distractors,
        "seed": grid.seed,
        "bos_id": bos_id,
        "max_shift": MAX_SHIFT,
    }


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


def _seed(grid: Grid, name: str) -> str:
    return f"{grid.seed}/{name}"


def _prompt(
    haystack: Haystack, tokenizer: Tokenizer, bos_id: int | None, grid: Grid, name: str, length: int, depth: float
) -> Prompt:
    return build_prompt(
        haystack,
        tokenizer,
        bos_id,
        length=length,
        depth=depth,
        seed=_seed(grid, name),
        needles=grid.needles,
        distractors=grid.distractors,
    )


def score(reader: Reader, tokenizer: Tokenizer, prompt: Prompt, generate: bool = True) -> dict[str, Any]:
    """What one sample's record says beyond its place in the grid: needles, expected, generated, scores."""
    tokens = prompt.tokens
    first = prompt.needles[0].answer.start
    predicted = reader.predict_last(tokens[:-1], len(tokens) - first)
    hits = [
        [predicted[i - first] == tokens[i] for i in range(needle.answer.start, needle.answer.stop)]
        for needle in prompt.needles
    ]
    record: dict[str, Any] = {
        "needles": [
            {"key": needle.key, "number": needle.number, "position": needle.position, "depth": needle.depth}
            for needle in prompt.needles
        ],
        "on_boundary": prompt.on_boundary,
        "expected": ", ".join(needle.number for needle in prompt.needles),
        "scores": {"exact": _mean([all(h) for h in hits]), "partial": _mean([_mean(h) for h in hits])},
    }
    if generate:
        said = []
        for needle in prompt.needles:
            new = reader.generate(tokens[: needle.answer.start], needle.answer.stop - needle.answer.start)
            said.append(tokenizer.decode(new, skip_special_tokens=False))
        record["generated"] = said[0] if len(said) == 1 else said
        record["scores"]["generated"] = _mean(
            [_digits(text) == needle.number for text, needle in zip(said, prompt.needles, strict=True)]
        )
    return record


def check_lengths(lengths: Sequence[int], max_length: int, haystack: Haystack | None = None) -> None:
    """Raises ValueError when the longest length does not fit the model or the haystack."""
    longest = max(lengths)
    if longest > max_length:
        raise ValueError(
            f"--lengths {longest}: the checkpoint reads at most {max_length} tokens (max_position_embeddings"
            " in its config.json); drop the longer lengths, extend the model first, or see with --beyond how it does"
            " there as it is"
        )
    if haystack is not None and longest > len(haystack.tokens):
        raise ValueError(
            f"--lengths {longest}: the haystack {haystack.source} has only {len(haystack.tokens):,} tokens;"
            " give a longer one with --haystack FILE"
        )


def check_prompts(grid: Grid, haystack: Haystack, tokenizer: Tokenizer, bos_id: int | None, vocab_size: int) -> None:
    """Raises ValueError when prompts of the shortest length have no room, when their needles lie nearer to another row
    of the map than to their own, or when the model has no embedding for a token."""
    most = int(haystack.tokens.max())
    for name, length, depth, _ in (sample for sample in grid.samples() if sample[1] == grid.lengths[0]):
        prompt = _prompt(haystack, tokenizer, bos_id, grid, name, length, depth)
        most = max(most, *prompt.tokens)
        measured = prompt.needles[0].depth
        if min(grid.depths, key=lambda row: abs(row - measured)) != depth:
            raise ValueError(
                f"--depths: at {length} tokens a needle meant for {depth:g}% lies at {measured:.1f}%, nearer to another"
                " depth; take fewer depths, or longer contexts"
            )
    if most >= vocab_size:
        raise ValueError(
            f"the tokenizer has token {most}, and the model embeds {vocab_size} (vocab_size in its config.json);"
            " tokenizer.json is another model's"
        )


def _digits(text: str) -> str:
    match = re.search(r"\d+", text)
    return match[0] if match else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.needle", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, help="Hugging Face folder, e.g. runs/demo/extend-2k/hf")
    add("--lengths", help="tokens: 512,1k,2k (default: the model's, 1/2, 1/4, 1/8 of it)")
    add("--depths", default=str(DEPTHS), help=f"number of depths ({DEPTHS}), or a list of percents")
    add("--n", default=SAMPLES, type=int, help=f"samples per cell ({SAMPLES})")
    add("--score", default="exact", choices=list(SCORE_NAMES), help="which score the heatmap shows")
    add("--no-generate", action="store_true", help="skip generation: the `generated` score, half of the time")
    add(
        "--haystack",
        help="text, jsonl(.gz) or parquet file(s), or a shard folder; default: the run's held-out shards",
    )
    add("--text-column", default="text", help="column of the haystack's rows")
    add("--haystack-tokens", default=format_length(_HAYSTACK_TOKENS), help="how much of the haystack to read")
    add("--needles", default=1, type=int, help="numbers hidden and asked for in each prompt")
    add("--distractors", default=0, type=int, help="further numbers hidden and not asked for")
    add(
        "--beyond",
        action="store_true",
        help="take lengths beyond max_position_embeddings too: how the model does where it was not trained",
    )
    add("--seed", default=0, type=int)
    add("--train-length", help="where the heatmap's line is (default: max_position_embeddings)")
    add("--output", type=Path, help="folder, or .json file, for the results (default: the run's results folder)")
    add("--device", help="default: the GPU if there is one")
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
    longest = config.max_position_embeddings
    lengths = default_lengths(longest) if args.lengths is None else parse_lengths(args.lengths)
    grid = Grid(lengths, parse_depths(args.depths), args.n, args.needles, args.distractors, args.seed)
    readable = max(config.max_position_embeddings, *grid.lengths) if args.beyond else config.max_position_embeddings
    check_lengths(grid.lengths, readable)
    source = Path(args.haystack) if args.haystack else find_heldout(args.ckpt)
    tokenizer = load_tokenizer(args.ckpt)
    haystack = Haystack.from_texts(
        read_texts(source, args.text_column), tokenizer, source.name or str(source), args.haystack_tokens
    )
    check_lengths(grid.lengths, readable, haystack)
    check_prompts(grid, haystack, tokenizer, bos_of(tokenizer), config.vocab_size)
    output = args.output or results_folder(args.ckpt)
    files.require_writable(output.parent if output.suffix == ".json" else output)
    checkpoint = Checkpoint.load(args.ckpt, args.device, max_length=readable)
    trained = config.max_position_embeddings
    about = checkpoint.describe() | {"train_length": args.train_length or trained}
    length = None if args.haystack_tokens == _HAYSTACK_TOKENS else args.haystack_tokens
    named = Path(args.haystack) if args.haystack else None
    stem = result_stem(grid, trained, named, length, not args.no_generate)
    file = place_results(output, stem, about, grid, haystack, checkpoint.bos_id)
    run_sweep(
        checkpoint,
        checkpoint.tokenizer,
        checkpoint.bos_id,
        haystack,
        grid,
        file,
        about,
        generate=not args.no_generate,
    )
    sweep = read_sweep([file], score=args.score)
    picture = file.with_suffix(".png" if args.score == "exact" else f".{args.score}.png")
    draw(sweep, picture)
    print(f"{describe(sweep)}\n{file}\n{picture}")


if __name__ == "__main__":
    ending.run(main)
