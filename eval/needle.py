"""Needle in a haystack: how well a checkpoint finds a number hidden at every depth of every context length.

    python -m eval.needle --ckpt runs/demo/extend-2k/hf --lengths 512,1k,2k --depths 11 --n 5 --output results

Each sample gets three scores in 0..1, each the mean over its needles:
    exact      every token of the number is the most likely one, given the true ones before it (one forward)
    partial    the share of the number's tokens for which that holds
    generated  the number is what greedy generation from the question says
`needle.json` holds every sample and is written while the sweep runs; the same command started again goes
on from it. `needle.png` is the heatmap of the score that `--score` names.
"""

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer
from tqdm import tqdm

from eval.checkpoint import Checkpoint, check_checkpoint, results_folder
from eval.haystack import Haystack, Prompt, build_prompt
from eval.heatmap import draw
from eval.heldout import find_heldout, read_texts
from eval.sweep import SCORE_NAMES, describe, read_sweep
from s2 import ending
from s2.files import read_json, write_json
from s2.model.hf import load_config

SCORES = SCORE_NAMES
_WRITE_EVERY_SECONDS = 5.0


class Reader(Protocol):
    """What a sweep asks of a model; `eval.checkpoint.Checkpoint` is one."""

    @property
    def max_length(self) -> int: ...

    def predict_last(self, tokens: list[int], count: int) -> list[int]: ...

    def generate(self, tokens: list[int], max_new_tokens: int) -> list[int]: ...


@dataclass(frozen=True)
class Grid:
    """Which samples a sweep has: `n` for every pair of length (tokens) and depth (percent)."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    n: int
    needles: int = 1
    distractors: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("needles", 1), ("distractors", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        if not self.lengths or not self.depths:
            raise ValueError("a sweep needs at least one length and one depth")
        if bad := [depth for depth in self.depths if not 0 <= depth <= 100]:
            raise ValueError(f"--depths {bad[0]:g}: a depth is a percentage, 0 to 100")

    def samples(self) -> Iterator[tuple[str, int, float, int]]:
        """(id, length, depth, index), shortest lengths first."""
        for length in sorted(self.lengths):
            for depth in self.depths:
                for index in range(self.n):
                    yield f"{length}/{depth:g}/{index}", length, depth, index


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
    """Score all samples of `grid` that `file` does not hold yet; return the file's content.

    `file` is written every few seconds and at the end, whatever ends the sweep. It belongs to one checkpoint,
    haystack and kind of sample; when those differ, the old file is kept under another name and a new one
    begun.

    Raises ValueError for a length beyond the model's or the haystack's, before anything is computed.
    """
    check_lengths(grid.lengths, reader.max_length, haystack)
    settings = {
        "haystack": haystack.source,
        "haystack_digest": haystack.digest,
        "needles": grid.needles,
        "distractors": grid.distractors,
        "seed": grid.seed,
        "bos_id": bos_id,
    }
    results = _open_results(file, about, settings)
    # Samples scored without generation count as done only while generation is not asked for.
    wanted = set(SCORES) if generate else set(SCORES) - {"generated"}
    done = {sample["id"] for sample in results["samples"] if wanted <= set(sample["scores"])}
    todo = [sample for sample in grid.samples() if sample[0] not in done]
    again = {sample[0] for sample in todo}
    results["samples"] = [sample for sample in results["samples"] if sample["id"] not in again]
    if done:
        print(f"{file}: {len(done)} samples are there already, {len(todo)} to go")
    written = time.monotonic()
    try:
        for name, length, depth, index in tqdm(todo, desc="needle", unit="sample"):
            seed = f"{grid.seed}/{name}"
            prompt = build_prompt(
                haystack,
                tokenizer,
                bos_id,
                length=length,
                depth=depth,
                seed=seed,
                needles=grid.needles,
                distractors=grid.distractors,
            )
            sample = {"id": name, "length": length, "depth": depth, "index": index, "seed": seed}
            results["samples"].append(sample | score(reader, tokenizer, prompt, generate))
            if time.monotonic() - written > _WRITE_EVERY_SECONDS:
                write_json(file, results)
                written = time.monotonic()
    finally:
        write_json(file, results)
    return results


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


def check_lengths(lengths: Sequence[int], max_length: int, haystack: Haystack) -> None:
    """Raises ValueError when the longest length does not fit the model or the haystack."""
    longest = max(lengths)
    if longest > max_length:
        raise ValueError(
            f"--lengths {longest}: the checkpoint reads at most {max_length} tokens (max_position_embeddings"
            " in its config.json); drop the longer lengths, or extend the model first"
        )
    if longest > len(haystack.tokens):
        raise ValueError(
            f"--lengths {longest}: the haystack {haystack.source} has only {len(haystack.tokens):,} tokens;"
            " give a longer one with --haystack FILE"
        )


def _open_results(file: Path, about: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    fresh = {"kind": "needle", **about, "settings": settings, "samples": []}
    if not file.exists():
        return fresh
    old = read_json(file)
    if old.get("kind") != "needle":
        raise ValueError(f"{file} is no needle result file; choose another --output folder")
    if old.get("fingerprint") == about.get("fingerprint") and old["settings"] == settings:
        return fresh | {"samples": old["samples"]}
    different = [key for key in settings if old["settings"].get(key) != settings[key]] or ["checkpoint"]
    number = 1
    while (aside := file.with_name(f"{file.stem}.old{number}{file.suffix}")).exists():
        number += 1
    file.rename(aside)
    print(f"{file} is from another sweep ({', '.join(different)} differ); kept as {aside.name}, starting anew")
    return fresh


def _digits(text: str) -> str:
    match = re.search(r"\d+", text)
    return match[0] if match else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parse_length(text: str) -> int:
    """`2048`, `2k` (2 x 1024) or `1m` (1024 x 1024). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} is no length; write a number of tokens like 2048 or 2k")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[2]]


def default_lengths(max_length: int) -> tuple[int, ...]:
    """The model's length and its half, quarter and eighth, as far as those have 256 tokens."""
    return tuple(max_length // part for part in (8, 4, 2, 1) if max_length // part >= 256 or part == 1)


def parse_lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({parse_length(part) for part in text.split(",")}))


def parse_depths(text: str) -> tuple[float, ...]:
    """`11` means 11 depths evenly from 0 to 100 percent; `0,50,100` those depths."""
    if "," not in text:
        count = int(text)
        if count < 2:
            raise ValueError(f"--depths {text}: at least 2 (the start and the end), or a list like 0,50,100")
        return tuple(round(100 * i / (count - 1), 3) for i in range(count))
    return tuple(float(part) for part in text.split(","))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.needle", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, help="Hugging Face folder, e.g. runs/demo/extend-2k/hf")
    add(
        "--lengths",
        type=parse_lengths,
        help="tokens: 512,1k,2k (default: the model's, 1/2, 1/4, 1/8 of it)",
    )
    add(
        "--depths",
        default=parse_depths("11"),
        type=parse_depths,
        help="number of depths, or a list of percents",
    )
    add("--n", default=5, type=int, help="samples per cell")
    add("--score", default="exact", choices=list(SCORES), help="which score the heatmap shows")
    add("--no-generate", action="store_true", help="skip generation: the `generated` score, half of the time")
    add(
        "--haystack",
        help="text, jsonl(.gz) or parquet file(s), or a shard folder; default: the run's held-out shards",
    )
    add("--text-column", default="text", help="column of the haystack's rows")
    add("--haystack-tokens", default=1 << 20, type=parse_length, help="how much of the haystack to read")
    add("--needles", default=1, type=int, help="numbers hidden and asked for in each prompt")
    add("--distractors", default=0, type=int, help="further numbers hidden and not asked for")
    add("--seed", default=0, type=int)
    add(
        "--train-length",
        type=parse_length,
        help="where the heatmap's line is (default: max_position_embeddings)",
    )
    add(
        "--output",
        type=Path,
        help="folder for JSON and picture (default: the run's results folder)",
    )
    add("--device", help="default: the GPU if there is one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    check_checkpoint(args.ckpt)
    if args.score == "generated" and args.no_generate:
        raise ValueError("--score generated needs generation; drop --no-generate")
    output = args.output or results_folder(args.ckpt)
    lengths = args.lengths or default_lengths(load_config(args.ckpt).max_position_embeddings)
    grid = Grid(lengths, args.depths, args.n, args.needles, args.distractors, args.seed)
    source = Path(args.haystack) if args.haystack else find_heldout(args.ckpt)
    checkpoint = Checkpoint.load(args.ckpt, args.device)
    texts = read_texts(source, args.text_column)
    haystack = Haystack.from_texts(texts, checkpoint.tokenizer, source.name, args.haystack_tokens)
    about = checkpoint.describe() | {"train_length": args.train_length or checkpoint.max_length}
    file = output / "needle.json"
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
    draw(sweep, output / "needle.png")
    print(describe(sweep))
    print(f"{file}\n{output / 'needle.png'}")


if __name__ == "__main__":
    ending.run(main)
