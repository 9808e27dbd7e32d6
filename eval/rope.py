"""Which rotary frequencies a checkpoint begins its context extension with.

    python -m eval.rope --ckpt models/smollm2-135m --lengths 4k,8k,16k,32k \
        --haystack essays.jsonl.gz --documents books.jsonl.gz

Nothing is trained: each rotation is measured at each length, also beyond the one that the checkpoint was trained at, by
the loss of documents and of the numbers that needle prompts ask for, in nats per token. Prompts have several needles,
and their losses stand by distance too: a model may miss some distances and find what lies nearer and farther. In as
many prompts as one has needles, each number stands at each distance once: give `--n` a multiple of that. `usual` lists
what is tried; `--rope` names others, by the recipe's keys of `model.config`, and `--layout` the attention layout that a
dense checkpoint is to have:

    --rope '{rope_theta: 2.0e+5, rope_scaling: {rope_type: yarn, factor: 4, original_max_position_embeddings: 8192}}'

`rope.json` has the losses, `rope.md` a table, `rope.png` both over length and the answers over distance. They are
written after each rotation; the same command goes on from there, and other `--rope` are added.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from matplotlib.figure import Figure

from eval import samples, untrained
from eval.checkpoint import results_folder
from eval.grid import format_length, parse_lengths
from eval.report import figures
from s2 import ending, files
from s2.arguments import new_parser, path
from s2.inference.folder import check_folder
from s2.model.config import ModelConfig
from s2.model.rope import scales_by_kind

NEEDLES = 16  # of a prompt
RANGES = 16  # of distances
_KEYS = ("rope_theta", "rope_scaling")

Rotation = dict[str, Any]


def raised(theta: float, factor: float, head_dim: int) -> float:
    """The base that slows the slowest pair of dimensions by `factor` and leaves the fastest ("NTK-aware", as YaRN's
    paper, arXiv 2309.00071, calls it)."""
    return float(f"{theta * factor ** (head_dim / (head_dim - 2)):.3g}")


def usual(config: ModelConfig, longest: int) -> list[Rotation]:
    """What is tried for `longest` tokens: the checkpoint's own rotation; a higher base; and where it has no scaling,
    linear, Llama 3's and YaRN's, the last also from half the trained length, and beside a higher base."""
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
    found = [own, own | {"rope_theta": higher}]
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
    ]


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
        length = each.get("original_max_position_embeddings")
        said.append(
            f"{kind} {each['rope_type']} {each['factor']:g}".strip()
            + (f" from {format_length(length)}" if length else "")
            + (f" times {each['attention_factor']:g}" if each.get("attention_factor") else "")
        )
    return ", ".join(said)


def parse(text: str, config: ModelConfig) -> Rotation:
    """A rotation in YAML; what it does not name is the checkpoint's.

    Raises ValueError for other keys, and values that `ModelConfig` refuses.
    """
    try:
        keys = yaml.safe_load(text)
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


def by_distance(needles: Sequence[tuple[int, float]], length: int) -> list[float | None]:
    """Mean losses of the answers in `RANGES` equal ranges of distances up to `length`; None where there are none."""
    losses: list[list[float]] = [[] for _ in range(RANGES)]
    for distance, loss in needles:
        losses[min(RANGES * distance // length, RANGES - 1)].append(loss)
    return [round(fmean(each), 4) if each else None for each in losses]


def worst(ranges: Sequence[float | None]) -> float:
    return max(loss for loss in ranges if loss is not None)


def describe(found: dict[str, Any]) -> str:
    """A Markdown table, a row for each rotation."""
    lengths = [format_length(length) for length in found["lengths"]]
    texts, answers = ([f"{what}, {n}" for n in lengths] for what in ("text", "answers"))
    rows = [["rotation", *texts, *answers, f"worst distances, {lengths[-1]}"]]
    rows.append(["---", *["---:"] * (2 * len(lengths) + 1)])
    for step in found["steps"]:
        losses = [step["losses"][str(length)] for length in found["lengths"]]
        texts = [f"{each['text']:.3f}" for each in losses]
        answers = [f"{each['answers']:.3f} ({each['exact']:.2f})" for each in losses]
        rows.append([name(step["rotation"]), *texts, *answers, f"{worst(losses[-1]['distances']):.3f}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    counts = ", ".join(
        f"{found['documents'][str(n)]} and {found['prompts']} at {format_length(n)}" for n in found["lengths"]
    )
    return (
        f"{table}\n\nNats per token of documents, and of the numbers that needle prompts ask for,"
        f" {found['needles']} each (share of numbers that are most likely whole); of {RANGES} ranges of distances"
        f" between a number and its question the worst. Documents and prompts: {counts}"
    )


def best(found: dict[str, Any]) -> Rotation:
    """That with the least loss of text and answers together at the longest length."""
    longest = str(max(found["lengths"]))
    step = min(found["steps"], key=lambda step: sum(step["losses"][longest][key] for key in ("text", "answers")))
    return step["rotation"]


def figure_of(found: dict[str, Any]) -> Figure:
    """Losses over length, of text, then of answers, then those of answers at the longest length over distance; a line
    for each rotation."""
    figure = figures.new_figure(14.0, 4.2)
    lengths, longest = found["lengths"], max(found["lengths"])
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
    figures.style(axes, "tokens from the number to its question", "", f"the numbers at {format_length(longest)}")
    for step, look in steps:
        ranges = list(enumerate(step["losses"][str(longest)]["distances"]))
        points = [((i + 0.5) * longest / RANGES, loss) for i, loss in ranges if loss is not None]
        [line] = axes.plot(*zip(*points, strict=True), marker=".", markersize=4, linewidth=1)
        line.set(**look)
        ends.append((points[-1][1], name(step["rotation"]), look["color"]))
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
    files.require_writable(output)
    about = {
        "kind": "rope", **checkpoint.describe(), "attention_layout": config.attention_layout,
        "lengths": list(lengths), "seed": args.seed,
        "documents": {str(length): len(each.documents) for length, each in texts.items()}, "prompts": args.n,
        "needles": args.needles, "texts": samples.digest([each.digest for each in texts.values()]),
    }  # fmt: skip
    file = output / "rope.json"
    found = untrained.known(file, about, "steps") or about | {"steps": []}
    for rotation in rotations:
        if any(step["rotation"] == rotation for step in found["steps"]):
            continue
        tried = config.replace(max_position_embeddings=max(trained, longest), **rotation)
        losses = {}
        for length, each in texts.items():
            measured = each.losses(checkpoint, tried)
            losses[str(length)] = measured.to_dict() | {"distances": by_distance(measured.needles, length)}
        found["steps"].append({"rotation": rotation, "losses": losses})
        at_end = losses[str(longest)]
        said = ", ".join(f"{key} {at_end[key]:.3f}" for key in ("text", "answers", "exact"))
        print(f"{name(rotation)}: at {format_length(longest)} {said}", flush=True)
        untrained.write(file, found, describe(found), figure_of(found))
    chosen = best(found)
    keys = yaml.safe_dump(chosen, default_flow_style=True, sort_keys=False, width=1000).strip()
    print(f"\n{describe(found)}\n\nleast at {format_length(longest)}, text and answers together: {name(chosen)}")
    print(f"model.config: {keys}\n{file}")
    return file


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
