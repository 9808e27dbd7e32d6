"""Which rotary frequencies a checkpoint begins its context extension with.

    python -m eval.rope --ckpt models/smollm2-135m --lengths 4k,8k,16k,32k \
        --haystack essays.jsonl.gz --documents books.jsonl.gz

Nothing is trained: each rotation is measured at each length, also beyond the one that the checkpoint was trained at, by
the loss of documents and of the numbers that needle prompts ask for, in nats per token; and at each distance, by short
prompts whose positions jump between fact and answer. A distance that fails there may still be missed after training
(docs/results.md, "Extending SmolLM2"). `usual` lists what is tried; `--rope` names others, by the
recipe's keys of `model.config`, and `--layout` the attention layout that a dense checkpoint is to have:

    --rope '{rope_theta: 2.0e+5, rope_scaling: {rope_type: yarn, factor: 4, original_max_position_embeddings: 8192}}'

`rope.json` has the losses, `rope.md` a table, `rope.png` both over length and those after jumps over distance. They
are written after each rotation; the same command goes on from there, and other `--rope` are added.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from eval import samples, untrained
from eval.checkpoint import Checkpoint, results_folder
from eval.grid import Grid, format_length, parse_lengths
from eval.heldout import find_heldout
from eval.needle import Prompts, read_haystack
from eval.needle_prompts import Prompt
from eval.report import figures
from s2 import ending, files
from s2.arguments import new_parser, path
from s2.inference.folder import bos_of, check_folder, memory_for
from s2.model.config import ModelConfig
from s2.model.rope import scales_by_kind
from s2.progress import progress
from s2.recipe import parse_yaml

NEEDLES = 16  # of a prompt
SHORT = 256  # tokens of a text whose positions jump
STEPS = 48  # of distances, up to the longest length
_MARGIN = 1.5
_KEYS = ("rope_theta", "rope_scaling")

Rotation = dict[str, Any]


def raised(theta: float, factor: float, head_dim: int) -> float:
    """The base that slows the slowest pair of dimensions by `factor` and leaves the fastest ("NTK-aware", as YaRN's
    paper, arXiv 2309.00071, calls it)."""
    return float(f"{theta * factor ** (head_dim / (head_dim - 2)):.3g}")


def within(theta: float, factor: float, trained: int) -> float:
    """The base that keeps the angles of every pair of dimensions within the trained ones: a pair that turned once in
    the trained length then turns once in `factor` times that, and half as much again. Those that turned more often have
    seen all angles ("critical dimension", arXiv 2310.05209)."""
    share = min(1.0, math.log(trained / (2 * math.pi)) / math.log(theta))  # of the pairs have turned
    return float(f"{theta * (_MARGIN * factor) ** (1 / share):.3g}")


def usual(config: ModelConfig, longest: int) -> list[Rotation]:
    """What is tried for `longest` tokens: the checkpoint's own rotation; two higher bases; and where it has no scaling,
    linear, Llama 3's and YaRN's, the last also from half the trained length, and beside a higher base; and the highest
    base with half of YaRN's temperature."""
    own, trained = {key: getattr(config, key) for key in _KEYS}, config.max_position_embeddings
    if (factor := longest / trained) <= 1:
        return [own]

    def scaled(theta: float, kind: str, by: float, length: int, **more: float) -> Rotation:
        scaling = {"rope_type": kind, "factor": by}
        if kind != "linear":
            scaling["original_max_position_embeddings"] = length
        return {"rope_theta": theta, "rope_scaling": scaling | more}

    theta = config.rope_theta
    higher = raised(theta, factor, config.head_dim)
    highest = within(theta, factor, trained)
    found = [own, own | {"rope_theta": higher}, own | {"rope_theta": highest}]
    if config.rope_scaling:  # a factor counts from the length before that scaling
        return found
    return [
        *found,
        scaled(theta, "linear", factor, trained),
        scaled(theta, "llama3", factor, trained, low_freq_factor=1.0, high_freq_factor=4.0),
        scaled(theta, "yarn", factor, trained),
        scaled(theta, "yarn", 2 * factor, trained // 2),
        scaled(raised(theta, factor**0.5, config.head_dim), "yarn", factor, trained),
        scaled(higher, "yarn", 2.0, longest // 2),
        scaled(highest, "yarn", 1.0, longest, attention_factor=round(1 + 0.05 * math.log(factor), 3)),
    ]


_IN_WORDS = frozenset({"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"})


def name(rotation: Rotation) -> str:
    """For tables: `theta 2e+05, yarn 4 from 8k`."""
    scaling = rotation["rope_scaling"] or {}
    said = [f"theta {rotation['rope_theta']:g}"]
    kinds = scaling.items() if scales_by_kind(scaling) else [("", scaling)]
    for kind, each in kinds:
        if each and "rope_theta" in each:
            said.append(f"{kind} theta {each['rope_theta']:g}")
        if not each or each.get("rope_type", "default") == "default":
            continue
        words, length = [kind], each.get("original_max_position_embeddings")
        if each["factor"] != 1:
            words.append(
                f"{each['rope_type']} {each['factor']:g}" + (f" from {format_length(length)}" if length else "")
            )
        if each.get("attention_factor"):
            words.append(f"times {each['attention_factor']:g}")
        words += [f"{key} {value}" for key, value in each.items() if key not in _IN_WORDS and value is not None]
        if words[1:]:
            said.append(" ".join(filter(None, words)))
    return ", ".join(said)


def parse(text: str, config: ModelConfig) -> Rotation:
    """A rotation in YAML; what it does not name is the checkpoint's.

    Raises ValueError for other keys, and values that `ModelConfig` refuses.
    """
    try:
        keys = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--rope {text}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(keys, Mapping) or not keys or not set(keys) <= set(_KEYS):
        raise ValueError(f"--rope {text}: expected a mapping of {' and '.join(_KEYS)}, as in model.config")
    try:
        changed = config.replace(**keys)
    except ValueError as error:
        raise ValueError(f"--rope {text}: {error}") from None
    return {key: getattr(changed, key) for key in _KEYS}


def _under(config: ModelConfig, layout: str | None) -> ModelConfig:
    """The config with another attention layout. Raises ValueError where the model cannot have it."""
    if layout is None:
        return config
    try:
        return config.replace(attention_layout=layout)
    except ValueError as error:
        raise ValueError(f"--layout {layout}: {error}") from None


@dataclass(frozen=True)
class Jumps:
    """prompts: short ones of one length, with one needle each. distances: from its first token to that of its answer.
    rows: of a batch."""

    prompts: list[Prompt]
    distances: list[int]
    rows: int

    @property
    def digest(self) -> str:
        return samples.digest([[prompt.tokens for prompt in self.prompts], self.distances])

    @torch.inference_mode()
    def losses(self, checkpoint: Checkpoint, config: ModelConfig) -> list[float]:
        """Of the numbers, nats per token, at each distance: positions jump halfway between a fact and its answer.

        Attention under RoPE depends on distances alone, so this is what the rotation does to a fact so far away, with
        none of the text that would lie between.

        Raises:
            MemoryError: a batch that the device has no room for.
            ValueError: losses that are not finite.
        """
        checkpoint.model.attend_as(config)
        with progress("jumps", len(self.distances), "distance") as bar:
            found = []
            for distance in self.distances:
                found.append(fmean(self._losses(checkpoint, distance)))
                bar.update()
        return found

    def _losses(self, checkpoint: Checkpoint, distance: int) -> Iterator[float]:
        decoder, device = checkpoint.model.model, checkpoint.device
        for at in range(0, len(self.prompts), self.rows):
            batch = self.prompts[at : at + self.rows]
            ids = torch.tensor([prompt.tokens for prompt in batch], device=device)
            steps = torch.arange(ids.shape[1] - 1, device=device)
            answers = [(prompt.needles[0].position, prompt.needles[0].answer) for prompt in batch]
            middles = torch.tensor([[(fact + answer.start) // 2] for fact, answer in answers], device=device)
            jumps = torch.tensor([[distance - (answer.start - fact)] for fact, answer in answers], device=device)
            with memory_for(f"{len(batch)} x {ids.shape[1]} tokens", device, "lower --batch-tokens"):
                hidden = decoder.through(decoder.embed_tokens(ids[:, :-1]), steps + jumps * (steps >= middles))
                for own, row, (_, answer) in zip(decoder.norm(hidden), ids, answers, strict=True):
                    values, _ = checkpoint.log_likelihoods(own[answer.start - 1 : answer.stop - 1], row[answer])
                    yield -values.mean().item()


def read_jumps(args: argparse.Namespace, checkpoint: Checkpoint, longest: int) -> Jumps:
    """`args.n` prompts, each asked at `STEPS` distances up to `longest`, without those within a prompt.

    Raises ValueError where a fact and its question have no room in a prompt.
    """
    tokenizer = checkpoint.tokenizer
    haystack = read_haystack(args.haystack or find_heldout(args.ckpt, untrained.HAYSTACK), args.text_column, tokenizer)
    grid = Grid((min(SHORT, longest),), (25.0,), args.n, seed=args.seed)
    try:
        prompts = list(map(Prompts(haystack, tokenizer, bos_of(tokenizer), grid).build, grid.samples()))
    except ValueError as error:
        raise ValueError(f"prompts of {grid.lengths[0]} tokens, whose positions jump: {error}") from None
    distances = [longest * step // STEPS for step in range(1, STEPS + 1)]
    rows = max(1, samples.batch_tokens(args, checkpoint) // SHORT)
    return Jumps(prompts, [each for each in distances if each >= grid.lengths[0]], rows)


def describe(found: dict[str, Any]) -> str:
    """A Markdown table, a row for each rotation."""
    lengths = [format_length(length) for length in found["lengths"]]
    texts, answers = ([f"{what}, {n}" for n in lengths] for what in ("text", "answers"))
    rows = [["rotation", *texts, *answers, f"jumps up to {lengths[-1]}", "worst jump"]]
    rows.append(["---", *["---:"] * (2 * len(lengths) + 2)])
    for step in found["steps"]:
        losses = [step["losses"][str(length)] for length in found["lengths"]]
        texts = [f"{each['text']:.3f}" for each in losses]
        answers = [f"{each['answers']:.3f} ({each['exact']:.2f})" for each in losses]
        jumps, distances = step["jumps"], found["distances"]
        worst = f"{max(jumps):.3f} at {distances[jumps.index(max(jumps))]:,}"
        rows.append([name(step["rotation"]), *texts, *answers, f"{fmean(jumps):.3f}", worst])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    counts = ", ".join(
        f"{found['documents'][str(n)]} and {found['prompts']} at {format_length(n)}" for n in found["lengths"]
    )
    return (
        f"{table}\n\nNats per token of documents, and of the numbers that needle prompts ask for,"
        f" {found['needles']} each (share of numbers that are most likely whole). Documents and prompts: {counts}."
        f" Jumps: numbers of {found['prompts']} short prompts whose positions jump, so that the answer stands at one of"
        f" {len(found['distances'])} distances from its fact: the mean of these, and the worst. Layout:"
        f" {found['attention_layout']}"
    )


def best(found: dict[str, Any]) -> Rotation:
    """That with the least loss of text and answers together at the longest length."""
    longest = str(max(found["lengths"]))
    step = min(found["steps"], key=lambda step: sum(step["losses"][longest][key] for key in ("text", "answers")))
    return step["rotation"]


def flattest(found: dict[str, Any]) -> Rotation:
    """That with the least loss at its worst distance."""
    return min(found["steps"], key=lambda step: max(step["jumps"]))["rotation"]


def figure_of(found: dict[str, Any]) -> Figure:
    """Losses over length, of text, then of answers, then those after jumps over distance; a line for each rotation."""
    figure = figures.new_figure(14.0, 4.2)
    lengths = found["lengths"]
    steps = list(zip(found["steps"], figures.looks(len(found["steps"])), strict=True))
    ends = []
    for left, key, title in ((0.045, "text", "documents"), (0.3, "answers", "needles' numbers")):
        axes = figure.add_axes((left, 0.13, 0.21, 0.76))
        figures.style(axes, "tokens", "nats per token", f"{found['checkpoint']}: {title}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [format_length(length) for length in lengths])
        axes.axvline(found["max_position_embeddings"], color=figures.PALE, linewidth=1, linestyle=":")
        for step, look in steps:
            losses = [step["losses"][str(length)][key] for length in lengths]
            [line] = axes.plot(lengths, losses, marker=".", markersize=4, linewidth=1)
            line.set(**look)
    axes = figure.add_axes((0.555, 0.13, 0.21, 0.76))
    figures.style(axes, "tokens from fact to answer", "", "numbers after jumps")
    for step, look in steps:
        [line] = axes.plot(found["distances"], step["jumps"], marker=".", markersize=3, linewidth=1)
        line.set(**look)
        ends.append((step["jumps"][-1], name(step["rotation"]), look["color"]))
    figures.label_ends(axes, ends)
    return figure


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("eval.rope", __doc__)
    untrained.add_arguments(parser)
    add = parser.add_argument
    # fmt: off
    add("--lengths", help="tokens of documents and prompts: 4k,8k,32k (default: the trained one, 2 and 4 times it)")
    add("--needles", type=int, default=NEEDLES, help="that a prompt asks for, one after another (%(default)s)")
    add("--rope", action="append", metavar="YAML", help="rope_theta and rope_scaling instead of the usual; repeatable")
    add("--layout", help="attention layout to measure under (default: the checkpoint's)")
    add("--output", type=path, help="folder for rope.json (default: the run's results folder)")
    # fmt: on
    args = parser.parse_args(argv)
    untrained.check_arguments(args)
    if args.needles < 1:
        raise ValueError(f"--needles {args.needles}: expected at least 1")
    return args


def command(argv: Sequence[str]) -> Path:
    """What the command line does; the file of the results."""
    args = _arguments(argv)
    output = args.output or results_folder(check_folder(args.ckpt))
    checkpoint = samples.open_checkpoint(args)
    config, trained = _under(checkpoint.config, args.layout), checkpoint.max_length
    lengths = parse_lengths(args.lengths) if args.lengths else (trained, 2 * trained, 4 * trained)
    own, longest = {key: getattr(config, key) for key in _KEYS}, max(lengths)
    rotations = [own, *(parse(text, config) for text in args.rope)] if args.rope else usual(config, longest)
    if min(lengths) < 2:
        raise ValueError(f"--lengths {args.lengths}: expected at least 2 tokens each")
    texts = untrained.read(args, checkpoint, lengths, "--lengths", args.needles)
    jumps = read_jumps(args, checkpoint, longest)
    files.require_writable(output)
    about = {
        "kind": "rope", **checkpoint.describe(), "attention_layout": config.attention_layout,
        "lengths": list(lengths), "seed": args.seed,
        "documents": {str(length): len(each.documents) for length, each in texts.items()}, "prompts": args.n,
        "needles": args.needles, "distances": jumps.distances,
        "texts": samples.digest([jumps.digest, *(each.digest for each in texts.values())]),
    }  # fmt: skip
    file = output / "rope.json"
    found = untrained.known(file, about, ("rotation", "losses", "jumps")) or about | {"steps": []}
    for rotation in rotations:
        if any(step["rotation"] == rotation for step in found["steps"]):
            continue
        tried = config.replace(max_position_embeddings=max(trained, longest), **rotation)
        losses = {str(length): each.losses(checkpoint, tried).to_dict() for length, each in texts.items()}
        after = [round(loss, 4) for loss in jumps.losses(checkpoint, tried)]
        found["steps"].append({"rotation": rotation, "losses": losses, "jumps": after})
        at_end = losses[str(longest)]
        said = ", ".join(f"{key} {at_end[key]:.3f}" for key in ("text", "answers", "exact"))
        print(f"{name(rotation)}: at {format_length(longest)} {said}; worst jump {max(after):.3f}", flush=True)
        untrained.write(file, found, describe(found), figure_of(found))
    print(f"\n{describe(found)}\n")
    for said, chosen in (
        (f"least at {format_length(longest)}, text and answers together", best(found)),
        ("least at the worst distance", flattest(found)),
    ):
        keys = yaml.safe_dump(chosen, default_flow_style=True, sort_keys=False, width=1000).strip()
        print(f"{said}: {name(chosen)}\n    model.config: {keys}")
    print(file)
    return file


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
