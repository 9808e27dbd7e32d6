"""Which layers of a dense checkpoint stay dense where the others become sparse.

    python -m eval.layers --ckpt models/smollm2-135m --layout L8V12+sink1 --dense 5 \
        --haystack essays.jsonl.gz --documents books.jsonl.gz

Nothing is trained: with every layer sparse, the layer whose return to dense attention lowers the loss most stays dense,
then the one that does so beside it, and so on, `--dense` times. The loss is that of documents plus that of the numbers
that needle prompts ask for, both in nats per token: the heads that fetch from afar sit in few layers, others in each
checkpoint, and the mean loss of text hardly sees them. Of L layers, k of them dense, L + (L - 1) + ... (k terms)
layouts are tried on 2 n texts; layers below the one that is tried are computed once for all, which halves the work.

`layers.json` has the losses of every layout that was tried, of the checkpoint as it is and of the sparse layout;
`layers.md` what was chosen, `layers.png` the losses by layer. They are written after each layer, and the same command
goes on from there, also with more of `--dense`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval import samples, untrained
from eval.checkpoint import Checkpoint, results_folder
from eval.grid import format_length, parse_length
from eval.report import figures
from eval.untrained import Texts
from s2 import ending, files
from s2.arguments import new_parser, path
from s2.attention.layout import LayerLayout
from s2.inference.folder import check_folder
from s2.model.config import ModelConfig
from s2.model.layouts import ranges

Step = dict[str, Any]


def choose(
    checkpoint: Checkpoint, texts: Texts, sparse: ModelConfig, count: int, known: Sequence[Step] = ()
) -> Iterator[Step]:
    """The layers that stay dense where those of `sparse` do not, one after another, up to `count` with the `known`
    ones: {layer, layout, losses, tried: {layer: losses}}."""
    chosen = [step["layer"] for step in known]

    def with_dense(layers: Sequence[int]) -> ModelConfig:
        if not layers:
            return sparse
        return sparse.replace(attention_layout=f"{sparse.attention_layout}+dense{ranges(sorted(layers))}")

    while len(chosen) < count:
        left = [layer for layer in range(sparse.num_hidden_layers) if layer not in chosen]
        tried = texts.losses_from(
            checkpoint, with_dense(chosen), {layer: with_dense([*chosen, layer]) for layer in left}
        )
        best = min(left, key=lambda layer: tried[layer].sum)
        chosen.append(best)
        yield {
            "layer": best,
            "layout": with_dense(chosen).attention_layout,
            "losses": tried[best].to_dict(),
            "tried": {str(layer): losses.to_dict() for layer, losses in tried.items()},
        }


def check_layout(layout: str, config: ModelConfig, count: int) -> None:
    """Raises ValueError for a layout that this model cannot have, or that has dense layers, and for a number of layers
    that leaves none to choose or none sparse."""
    parsed = LayerLayout.parse(layout, config.num_hidden_layers, config.block_size)
    parsed.check_heads(config.num_attention_heads, config.num_key_value_heads)
    if any(pattern.is_dense for pattern in parsed):
        raise ValueError(f"--layout {layout}: name the sparse pattern alone; which layers are dense is what is asked")
    if not 0 < count < config.num_hidden_layers:
        raise ValueError(f"--dense {count}: expected 1 to {config.num_hidden_layers - 1} layers")


def describe(found: dict[str, Any]) -> str:
    """A Markdown table: the checkpoint as it is, every layer sparse, then a row for each layer that stays dense."""
    length = format_length(found["length"])
    rows = [["layout", f"text, {length}", f"answers, {length}", "exact"], ["---", "---:", "---:", "---:"]]
    measured = [
        (f"{found['attention_layout']} (the checkpoint as it is)", found["as_it_is"]),
        (found["layout"], found["sparse"]),
        *((step["layout"], step["losses"]) for step in found["steps"]),
    ]
    rows += [[name, f"{x['text']:.4f}", f"{x['answers']:.4f}", f"{x['exact']:.2f}"] for name, x in measured]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nDocuments: {found['documents']}, prompts: {found['prompts']}"


def figure_of(found: dict[str, Any]) -> Figure:
    """The losses of text and answers together, by the layer that was dense beside those chosen before."""
    figure = figures.new_figure(7.5, 4.0)
    axes = figure.add_axes((0.09, 0.13, 0.62, 0.78))  # names of lines stand to the right
    figures.style(axes, "dense layer", "nats per token, text + answers", found["checkpoint"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    ends = []
    for step, look in zip(found["steps"], figures.looks(len(found["steps"])), strict=True):
        losses = {int(layer): losses["text"] + losses["answers"] for layer, losses in step["tried"].items()}
        layers = sorted(losses)
        [line] = axes.plot(layers, [losses[layer] for layer in layers], marker=".", markersize=3, linewidth=1)
        line.set(**look)
        axes.plot([step["layer"]], [losses[step["layer"]]], marker="o", color=look["color"])
        ends.append((losses[layers[-1]], f"+ layer {step['layer']}", look["color"]))
    for name, layout in (("sparse", found["layout"]), ("as_it_is", f"{found['attention_layout']} (as it is)")):
        height = found[name]["text"] + found[name]["answers"]
        axes.axhline(height, color=figures.PALE, linewidth=1, linestyle=":")
        ends.append((height, layout, figures.PALE))
    figures.label_ends(axes, ends)
    return figure


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("eval.layers", __doc__)
    untrained.add_arguments(parser)
    add = parser.add_argument
    # fmt: off
    add("--layout", required=True, help="the pattern of the sparse layers: L8V12+sink1")
    add("--block-size", type=int, help="of the attention (default: config.json's, or 64)")
    add("--dense", type=int, required=True, help="layers that stay dense")
    add("--length", help="tokens of documents and prompts: 8k (default: the model's)")
    add("--output", type=path, help="folder for layers.json (default: the run's results folder)")
    # fmt: on
    args = parser.parse_args(argv)
    untrained.check_arguments(args)
    return args


def command(argv: Sequence[str]) -> Path:
    """What the command line does; the file of the results."""
    args = _arguments(argv)
    output = args.output or results_folder(check_folder(args.ckpt))
    checkpoint = samples.open_checkpoint(args)
    config = checkpoint.config
    if args.block_size is not None:
        config = config.replace(block_size=args.block_size)
    check_layout(args.layout, config, args.dense)
    sparse = config.replace(attention_layout=args.layout)
    length = _length(args.length, checkpoint.max_length)
    texts = untrained.read(args, checkpoint, (length,), "--length")[length]
    files.require_writable(output)
    about = {
        "kind": "layers", **checkpoint.describe(), "block_size": sparse.block_size, "layout": args.layout,
        "length": length, "seed": args.seed, "documents": len(texts.documents), "prompts": len(texts.prompts),
        "texts": texts.digest,
    }  # fmt: skip
    file = output / "layers.json"
    found = untrained.known(file, about, ("layer", "layout", "losses", "tried")) or about | {
        "as_it_is": texts.losses(checkpoint, checkpoint.config).to_dict(),
        "sparse": texts.losses(checkpoint, sparse).to_dict(),
        "steps": [],
    }
    untrained.write(file, found, describe(found), figure_of(found))
    for step in choose(checkpoint, texts, sparse, args.dense, found["steps"]):
        found["steps"].append(step)
        said = ", ".join(f"{name} {value:.4f}" for name, value in step["losses"].items())
        print(f"{step['layout']}: {said}", flush=True)
        untrained.write(file, found, describe(found), figure_of(found))
    print(f"\n{describe(found)}\n\nattention_layout: {found['steps'][args.dense - 1]['layout']}\n{file}")
    return file


def _length(text: str | None, longest: int) -> int:
    try:
        length = longest if text is None else parse_length(text)
    except ValueError as error:
        raise ValueError(f"--length: {error}") from None
    if not 2 <= length <= longest:
        raise ValueError(
            f"--length {length}: the checkpoint reads 2 to {longest} tokens (max_position_embeddings in its"
            " config.json)"
        )
    return length


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
