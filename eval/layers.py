"""Which layers of a dense checkpoint stay dense where the others become sparse.

    python -m eval.layers --ckpt models/smollm2-135m --layout L8V12+sink1 --dense 5 \
        --haystack essays.jsonl.gz --documents books.jsonl.gz

Nothing is trained: with every layer sparse, the layer whose return to dense attention lowers the loss most stays dense,
then the one that does so beside it, and so on, `--dense` times. The loss is that of documents plus that of the numbers
that needle prompts ask for, both in nats per token: the heads that fetch from afar sit in few layers, others in each
checkpoint, and the mean loss of text hardly sees them. Of L layers, k of them dense, L + (L - 1) + ... (k terms) passes
over 2 n texts are computed.

`layers.json` has the losses of every layout that was tried, of the checkpoint as it is and of the sparse layout;
`layers.md` what was chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from eval import samples
from eval.checkpoint import Checkpoint, results_folder
from eval.grid import Grid, format_length, parse_length
from eval.heldout import find_heldout
from eval.needle import Prompts, check_haystack, check_lengths, read_haystack
from eval.positions import read_documents
from s2 import ending, files
from s2.arguments import new_parser, path
from s2.attention.layout import LayerLayout
from s2.inference.folder import bos_of, check_folder, memory_for
from s2.model.config import ModelConfig
from s2.model.layouts import ranges

SAMPLES = 16


@dataclass(frozen=True)
class Losses:
    """In nats per token. text: of documents. answers: of the numbers asked for; exact: the share of prompts whose
    every token of the number is the most likely one."""

    text: float
    answers: float
    exact: float

    @property
    def sum(self) -> float:
        return self.text + self.answers

    def to_dict(self) -> dict[str, float]:
        return {"text": round(self.text, 5), "answers": round(self.answers, 5), "exact": round(self.exact, 4)}


@dataclass(frozen=True)
class Texts:
    """What is read under each layout. documents: token ids of one length. prompts: token ids of one length, each with
    the number of tokens at its end that are the answer."""

    documents: list[list[int]]
    prompts: list[tuple[list[int], int]]
    rows: int

    @torch.inference_mode()
    def losses(self, checkpoint: Checkpoint, config: ModelConfig) -> Losses:
        """Under the layout of `config`.

        Raises:
            MemoryError: a batch that the device has no room for.
            ValueError: losses that are not finite.
        """
        checkpoint.model.attend_as(config)
        text, answers, exact = [], [], []
        for values, _ in self._scores(checkpoint, [(row, len(row) - 1) for row in self.documents]):
            text.append(-values.mean().item())
        for values, hits in self._scores(checkpoint, self.prompts):
            answers.append(-values.mean().item())
            exact.append(float(hits.all()))
        return Losses(fmean(text), fmean(answers), fmean(exact))

    def _scores(
        self, checkpoint: Checkpoint, texts: Sequence[tuple[list[int], int]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`Checkpoint.log_likelihoods` of so many tokens at the end of each."""
        for at in range(0, len(texts), self.rows):
            batch = texts[at : at + self.rows]
            with memory_for(f"{len(batch)} x {len(batch[0][0])} tokens", checkpoint.device, "lower --batch-tokens"):
                ids = torch.tensor([tokens for tokens, _ in batch], device=checkpoint.device)
                hidden = checkpoint.model.model(ids[:, :-1], None, None)  # [B, S - 1, E]
                for own, row, (_, count) in zip(hidden, ids, batch, strict=True):
                    yield checkpoint.log_likelihoods(own[-count:], row[-count:])


def choose(checkpoint: Checkpoint, texts: Texts, layout: str, count: int) -> Iterator[dict[str, Any]]:
    """The layers of `layout` that stay dense, one after another: {layer, layout, losses, tried: {layer: losses}}.

    The checkpoint attends by whatever layout was measured last.
    """
    config, chosen = checkpoint.config, list[int]()

    def with_dense(layers: Sequence[int]) -> ModelConfig:
        return config.replace(attention_layout=f"{layout}+dense{ranges(sorted(layers))}")

    for _ in range(count):
        left = [layer for layer in range(config.num_hidden_layers) if layer not in chosen]
        tried = {layer: texts.losses(checkpoint, with_dense([*chosen, layer])) for layer in left}
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
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("eval.layers", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--ckpt", type=path, required=True, help="Hugging Face folder")
    add("--layout", required=True, help="the pattern of the sparse layers: L8V12+sink1")
    add("--dense", type=int, required=True, help="layers that stay dense")
    add("--length", help="tokens of documents and prompts: 8k (default: the model's)")
    add("--n", type=int, default=SAMPLES, help="documents, and prompts with depths from 0 to 100 %% (%(default)s)")
    add("--haystack", type=path, help="essays for the prompts; default: the run's held-out documents")
    add("--documents", type=path, help="text, jsonl(.gz) or parquet file(s), or shards; default: as --haystack")
    add("--text-column", default="text", help="of both (%(default)s)")
    add("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    add("--batch-tokens", type=int, help="tokens of a batch (default: what some 32 GiB hold on a GPU, 16384 on a CPU)")
    add("--device", help="default: the GPU if there is one")
    add("--dtype", choices=samples.DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--output", type=path, help="folder for layers.json (default: the run's results folder)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.n < 2:
        raise ValueError(f"--n {args.n}: expected at least 2")
    return args


def read(args: argparse.Namespace, checkpoint: Checkpoint, length: int) -> Texts:
    """The documents and prompts that the arguments name.

    Raises as `eval.needle.read_haystack` and `eval.positions.read_documents`, and ValueError for a haystack that is too
    short.
    """
    tokenizer, bos = checkpoint.tokenizer, bos_of(checkpoint.tokenizer)
    haystack = read_haystack(args.haystack or find_heldout(args.ckpt), args.text_column, tokenizer)
    depths = tuple(100 * i / (args.n - 1) for i in range(args.n))
    prompts = Prompts(haystack, tokenizer, bos, Grid((length,), depths, 1, seed=args.seed))
    check_haystack(haystack, (length,))
    asked = []
    for prompt in map(prompts.build, prompts.grid.samples()):
        answer = prompt.needles[0].answer
        asked.append((prompt.tokens, answer.stop - answer.start))
    source = args.documents or args.haystack or find_heldout(args.ckpt)
    documents = read_documents(checkpoint, source, args.text_column, (length,), args.n)[length]
    rows = max(1, samples.batch_tokens(args, checkpoint) // length)
    return Texts([tokens[:length] for _, tokens in documents], asked, rows)


def command(argv: Sequence[str]) -> Path:
    """What the command line does; the file of the results."""
    args = _arguments(argv)
    output = args.output or results_folder(check_folder(args.ckpt))
    files.require_writable(output)
    checkpoint = samples.open_checkpoint(args)
    check_layout(args.layout, checkpoint.config, args.dense)
    length = checkpoint.max_length if args.length is None else parse_length(args.length)
    check_lengths((length,), checkpoint.max_length)
    texts = read(args, checkpoint, length)
    config = checkpoint.config
    found: dict[str, Any] = {
        "kind": "layers", **checkpoint.describe(), "layout": args.layout, "length": length,
        "documents": len(texts.documents), "prompts": len(texts.prompts), "seed": args.seed,
        "as_it_is": texts.losses(checkpoint, config).to_dict(),
        "sparse": texts.losses(checkpoint, config.replace(attention_layout=args.layout)).to_dict(),
        "steps": [],
    }  # fmt: skip
    for step in choose(checkpoint, texts, args.layout, args.dense):
        found["steps"].append(step)
        said = ", ".join(f"{name} {value:.4f}" for name, value in step["losses"].items())
        print(f"{step['layout']}: {said}", flush=True)
        files.write_json(output / "layers.json", found)
    table = describe(found)
    files.write_text(output / "layers.md", f"{table}\n")
    print(f"\n{table}\n\nattention_layout: {found['steps'][-1]['layout']}\n{output / 'layers.json'}")
    return output / "layers.json"


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
