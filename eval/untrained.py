"""What a checkpoint's weights are worth as they are under another layout or rotation: nothing is trained.

The losses are those of documents and of the numbers that needle prompts ask for, both in nats per token: the heads that
fetch from afar sit in few layers, others in each checkpoint, and the mean loss of text hardly sees them. Of one length,
the texts are the same whatever is tried.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from eval import samples
from eval.checkpoint import Checkpoint
from eval.grid import Grid, format_length
from eval.heldout import find_heldout
from eval.needle import Prompts, check_haystack, read_haystack
from eval.needle_prompts import Prompt
from eval.positions import read_documents
from eval.report import figures
from s2 import files
from s2.arguments import path
from s2.inference.folder import bos_of, memory_for
from s2.model.config import ModelConfig
from s2.model.transformer import Transformer
from s2.progress import progress

SAMPLES = 16
HAYSTACK = "--haystack FILE (make: HAYSTACK=FILE)"


@dataclass(frozen=True)
class Losses:
    """In nats per token. text: of documents. answers: of the numbers asked for; exact: the share of numbers whose
    every token is the most likely one."""

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
    """What is read each time. documents: token ids of one length. prompts: of one length. rows: of a batch."""

    documents: list[list[int]]
    prompts: list[Prompt]
    rows: int

    @property
    def digest(self) -> str:
        return samples.digest([self.documents, [prompt.tokens for prompt in self.prompts]])

    def losses(self, checkpoint: Checkpoint, config: ModelConfig) -> Losses:
        """Under the layout and rotations of `config`. Raises as `losses_from`."""
        return self.losses_from(checkpoint, config, {0: config})[0]

    @torch.inference_mode()
    def losses_from(
        self, checkpoint: Checkpoint, base: ModelConfig, others: Mapping[int, ModelConfig]
    ) -> dict[int, Losses]:
        """Under each of these layouts, which are that of `base` below the layer that they are named by: what stands
        there is computed once. The checkpoint attends by one of them afterwards.

        Raises:
            MemoryError: a batch that the device has no room for.
            ValueError: losses that are not finite.
        """
        documents: dict[int, list[float]] = {layer: [] for layer in others}
        needles: dict[int, list[tuple[float, bool]]] = {layer: [] for layer in others}
        whole = [(row, (slice(1, len(row)),)) for row in self.documents]
        asked = [(prompt.tokens, tuple(needle.answer for needle in prompt.needles)) for prompt in self.prompts]
        with progress("losses", len(others) * (len(whole) + len(asked)), "text") as bar:
            for layer, [(values, _)] in self._scores(checkpoint, base, others, whole):
                documents[layer].append(-values.mean().item())
                bar.update()
            for layer, scores in self._scores(checkpoint, base, others, asked):
                needles[layer] += [(-values.mean().item(), bool(hits.all())) for values, hits in scores]
                bar.update()

        def mean_of(layer: int) -> Losses:
            answers, exact = zip(*needles[layer], strict=True)
            return Losses(fmean(documents[layer]), fmean(answers), fmean(exact))

        return {layer: mean_of(layer) for layer in others}

    def _scores(
        self,
        checkpoint: Checkpoint,
        base: ModelConfig,
        others: Mapping[int, ModelConfig],
        texts: Sequence[tuple[list[int], tuple[slice, ...]]],
    ) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """The layer that names the layout, and `Checkpoint.log_likelihoods` of each slice of a text."""
        for at in range(0, len(texts), self.rows):
            batch = texts[at : at + self.rows]
            with memory_for(f"{len(batch)} x {len(batch[0][0])} tokens", checkpoint.device, "lower --batch-tokens"):
                ids = torch.tensor([tokens for tokens, _ in batch], device=checkpoint.device)
                for layer, hidden in _states(checkpoint.model, ids[:, :-1], base, others):
                    for own, row, (_, parts) in zip(hidden, ids, batch, strict=True):
                        behind = [own[part.start - 1 : part.stop - 1] for part in parts]
                        yield layer, list(map(checkpoint.log_likelihoods, behind, [row[part] for part in parts]))


def _states(
    model: Transformer, ids: Tensor, base: ModelConfig, others: Mapping[int, ModelConfig]
) -> Iterator[tuple[int, Tensor]]:
    """Hidden states `[B, S, E]` of tokens `[B, S]` under each of the layouts of `Texts.losses_from`."""
    decoder, positions = model.model, torch.arange(ids.shape[1], device=ids.device)[None]
    below, done = decoder.embed_tokens(ids), 0
    for layer, config in sorted(others.items(), key=lambda pair: pair[0]):
        model.attend_as(base)
        below, done = decoder.through(below, positions, begin=done, end=layer), layer
        model.attend_as(config)
        yield layer, decoder.norm(decoder.through(below, positions, begin=layer))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands that read `Texts` have in common."""
    add = parser.add_argument
    # fmt: off
    add("--ckpt", type=path, required=True, help="Hugging Face folder")
    add("--n", type=int, default=SAMPLES, help="documents, and prompts with depths from 0 to 100 %% (%(default)s)")
    add("--haystack", type=path, help="essays for the prompts; default: the run's held-out documents")
    add("--documents", type=path, help="text, jsonl(.gz) or parquet file(s), or shards; default: as --haystack")
    add("--text-column", default="text", help="of both (%(default)s)")
    add("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    add("--batch-tokens", type=int, help="tokens of a batch (default: what some 32 GiB hold on a GPU, 16384 on a CPU)")
    add("--device", help="default: the GPU if there is one")
    add("--dtype", choices=samples.DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    # fmt: on


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers that are too small."""
    for name, least in (("n", 2), ("batch_tokens", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


def read(
    args: argparse.Namespace, checkpoint: Checkpoint, lengths: Sequence[int], option: str, needles: int = 1
) -> dict[int, Texts]:
    """By length, the documents and prompts that the arguments name. option: that names the lengths. needles: that a
    prompt asks for, one after another.

    Raises as `eval.needle.read_haystack` and `eval.positions.read_documents`, and ValueError for a haystack that is too
    short, or a length that the needles do not fit.
    """
    tokenizer, bos = checkpoint.tokenizer, bos_of(checkpoint.tokenizer)
    haystack = read_haystack(args.haystack or find_heldout(args.ckpt, HAYSTACK), args.text_column, tokenizer)
    check_haystack(haystack, lengths, option)
    depths = tuple(100 * i / (args.n - 1) for i in range(args.n))
    source = args.documents or args.haystack or find_heldout(args.ckpt, HAYSTACK)
    documents = read_documents(checkpoint, source, args.text_column, lengths, args.n, option=option)
    found = {}
    for length in lengths:
        kind = "single" if needles == 1 else "multi-query"
        prompts = Prompts(haystack, tokenizer, bos, Grid((length,), depths, 1, needles, seed=args.seed, kind=kind))
        try:
            asked = list(map(prompts.build, prompts.grid.samples()))
        except ValueError as error:
            raise ValueError(f"{option} {format_length(length)}, {needles} to a prompt: {error}") from None
        if len(documents[length]) < args.n:
            said = f"documents of {length} tokens or more: {len(documents[length])}, of --n {args.n}"
            print(f"{source}: {said}", flush=True)
        rows = max(1, samples.batch_tokens(args, checkpoint) // length)
        found[length] = Texts([tokens[:length] for _, tokens in documents[length]], asked, rows)
    return found


def known(file: Path, about: dict[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """What an earlier run of the same checkpoint and texts has found, and left unfinished perhaps; results of others
    move aside, with their table and picture, and so does what else has the name of one of these.

    keys: of each of its `steps`. Raises ValueError where the file lacks one.
    """
    old = files.read_json(file) if file.is_file() else None
    if isinstance(old, dict) and about.items() <= old.items():
        steps = old.get("steps")
        if not isinstance(steps, list) or not all(isinstance(x, dict) and x.keys() >= set(keys) for x in steps):
            raise ValueError(f"{file}: not as it was written (steps, each with {', '.join(keys)}); move it away")
        print(f"{file}: {len(steps)} steps are there already", flush=True)
        return old
    why = "is of another checkpoint, layout or text" if file.is_file() else f"is there without {file.name}"
    for outdated in filter(Path.is_file, map(file.with_suffix, (".json", ".md", ".png"))):
        print(f"{outdated} {why}; kept as {files.move_aside(outdated).name}")
    return None


def write(file: Path, found: dict[str, Any], table: str, figure: Figure) -> None:
    """The results, and beside them their table (.md) and picture (.png)."""
    files.write_json(file, found)
    files.write_text(file.with_suffix(".md"), f"{table}\n")
    figures.save(figure, file.with_suffix(".png"))
