"""Queries, keys and values of a layer of a checkpoint on a text, for `bench_inference_peers.py --tensors`.

    python scripts/attention_tensors.py runs/demo/extend-2k/hf book.txt layer.safetensors [--layer 15] [--length 8192]

After rotary embedding, in bfloat16: q `[S, Hq, D]`, k and v `[S, H, D]`. The model attends by its own layout before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from s2 import ending, files
from s2.attention import Pattern, s2_attention
from s2.inference.folder import ModelFolder


class _RecordedError(Exception):
    pass


class Recorder:
    """A cache that keeps one layer's queries, keys and values and ends the pass there."""

    lengths: tuple[int, ...] = (0,)

    def __init__(self, layer: int, positions: Tensor) -> None:
        self.layer, self.positions = layer, positions[None]
        self.found: dict[str, Tensor] = {}

    def begin(self, batch_size: int, num_tokens: int, counts: Sequence[int] | None = None) -> None:
        pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, rotation: int) -> Tensor:
        if layer == self.layer:
            self.found = {name: x[0].to(torch.bfloat16).cpu() for name, x in zip("qkv", (q, k, v), strict=True)}
            raise _RecordedError
        return s2_attention(q, k, v, pattern, rotation=rotation)

    def advance(self) -> None:
        pass


def tensors_of(checkpoint: ModelFolder, tokens: Sequence[int], layer: int) -> dict[str, Tensor]:
    """`q`, `k` and `v` of a layer on `tokens`.

    Raises:
        ValueError: there is no such layer.
    """
    layers = checkpoint.config.num_hidden_layers
    if not 0 <= layer < layers:
        raise ValueError(f"--layer {layer}: {checkpoint.folder} has layers 0 to {layers - 1}")
    recorder = Recorder(layer, torch.arange(len(tokens), device=checkpoint.device))
    with torch.inference_mode(), suppress(_RecordedError):
        checkpoint.model(torch.tensor([list(tokens)], device=checkpoint.device), cache=recorder)
    return recorder.found


def _is_ours(file: Path) -> bool:
    """Whether a file has what `main` writes about it."""
    try:
        with safe_open(file, "pt") as tensors:
            return (tensors.metadata() or {}).get("source", "").startswith("layer ")
    except (OSError, SafetensorError):
        return False


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path, help="a Hugging Face folder")
    parser.add_argument("text", type=Path, help="a text file at least as long as --length")
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    parser.add_argument("--layer", type=int, help="counted from 0 (default: the middle one)")
    parser.add_argument("--length", type=int, help="tokens (default: what the model takes)")
    args = parser.parse_args(argv)
    if args.output.exists() and not _is_ours(args.output):
        raise files.NotOursError(f"{args.output} was not written by this program; name another file, or move it")
    checkpoint = ModelFolder.load(args.ckpt)
    length = args.length or checkpoint.max_length
    layer = checkpoint.config.num_hidden_layers // 2 if args.layer is None else args.layer
    tokens = checkpoint.tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False).ids[:length]
    if len(tokens) < length:
        raise ValueError(f"{args.text}: {len(tokens):,} tokens are fewer than --length {length:,}")
    found = tensors_of(checkpoint, tokens, layer)
    source = f"layer {layer} of {checkpoint.folder.name}, {length:,} tokens of {args.text.name}"
    with files.whole(args.output) as stream:
        stream.write(save({name: x.contiguous() for name, x in found.items()}, {"source": source}))
    print(f"wrote {args.output}: {source}, " + ", ".join(f"{name} {list(x.shape)}" for name, x in found.items()))


if __name__ == "__main__":
    ending.run(main)
