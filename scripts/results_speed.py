"""What a layout costs at a context length: attention time of all layers, and what of keys and values has to be kept.

    python scripts/results_speed.py --config runs/experiments/patterns/dense/train/hf --length 128k --output speed.json

Times (batch 1, bfloat16, median) are taken on a GPU only: of forward and backward, and of a decode step in a CUDA graph
(the keys and values of one new token written, and its attention to what the cache holds). `kv_bytes_per_token` counts
the keys and values that some query still sees or may see later, `cache_bytes_per_token` all that such a cache has room
for.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.grid import parse_length
from s2 import ending, files
from s2.attention import s2_attention
from s2.inference import KVCache
from s2.model.config import ModelConfig
from s2.model.hf import load_config
from s2.model.layouts import kv_bytes_per_token

_DTYPE = torch.bfloat16


def attention_ms(config: ModelConfig, length: int) -> dict[str, float]:
    """Milliseconds of all layers' attention, on the current GPU."""
    from triton.testing import do_bench

    q, k, v = (x.requires_grad_() for x in _random(config, length, "cuda"))
    grad = torch.randn_like(q)
    total = {"forward_ms": 0.0, "backward_ms": 0.0}
    for (pattern, rotation), count in Counter(_layers(config)).items():

        def attend(pattern: Any = pattern, rotation: int = rotation) -> torch.Tensor:
            return s2_attention(q, k, v, pattern, rotation=rotation)

        out = attend()
        times = {"backward_ms": lambda out=out: out.backward(grad, retain_graph=True)}
        total["backward_ms"] += count * _median(do_bench, times["backward_ms"], grad_to_none=[q, k, v])
        with torch.no_grad():
            total["forward_ms"] += count * _median(do_bench, attend)
    return total


def _median(bench: Any, function: Any, **options: Any) -> float:
    return float(bench(function, warmup=50, rep=200, return_mode="median", **options))


class DecodeStep:
    """The attention of all layers to keys that a cache holds of `length` tokens, for the last of them. Its time does
    not depend on what they are: zeros, but for the last."""

    def __init__(self, config: ModelConfig, length: int, device: str):
        self.layers = _layers(config)
        self.cache = KVCache(config.replace(max_position_embeddings=length), 1, length, device=device, dtype=_DTYPE)
        self.new = _random(config, 1, device)
        if length > 1:
            self.cache.begin(1, length - 1)
            self.cache.advance()
        self.cache.reserve(1, 1)

    @torch.inference_mode()
    def __call__(self) -> list[torch.Tensor]:
        self.cache.begin_on_device(1)  # without an end, so that the next call does the same
        return [self.cache.attend(layer, *self.new, *attends) for layer, attends in enumerate(self.layers)]


def decode_ms(config: ModelConfig, length: int) -> float:
    """Milliseconds of a decode step's attention, of all layers, on the current GPU."""
    from triton.testing import do_bench_cudagraph

    step = DecodeStep(config, length, "cuda")
    step()  # what is compiled and allocated once
    torch.cuda.synchronize()  # the next steps go on another stream, and share its workspace
    return float(do_bench_cudagraph(step, rep=50, return_mode="median"))


def _layers(config: ModelConfig) -> list[Any]:
    """Pattern and rotation of each."""
    rotations = config.layout.distinct_rotations(config.num_key_value_heads)
    return list(zip(config.layout.patterns, rotations, strict=True))


def _random(config: ModelConfig, tokens: int, device: str) -> list[torch.Tensor]:
    """Queries, keys and values."""
    heads = config.num_attention_heads, *[config.num_key_value_heads] * 2
    return [torch.randn(1, tokens, each, config.head_dim, device=device, dtype=_DTYPE) for each in heads]


def measure(config: ModelConfig, length: int) -> dict[str, Any]:
    """The figures of one layout."""
    row: dict[str, Any] = {
        "kind": "speed",
        "attention_layout": config.attention_layout,
        "block_size": config.block_size,
        "length": length,
        "density": config.layout.density(length, config.num_key_value_heads),
        "kv_bytes_per_token": kv_bytes_per_token(config, length),
        "cache_bytes_per_token": KVCache.bytes_for(config.replace(max_position_embeddings=length), 1, length, _DTYPE)
        / length,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if not torch.cuda.is_available():
        return row
    return row | attention_ms(config, length) | {"decode_ms": decode_ms(config, length)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a Hugging Face folder; its config.json is read")
    parser.add_argument("--length", type=parse_length, default="128k", help="tokens (default: 128k)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.output.is_file() and not {"attention_layout", "kv_bytes_per_token"} <= set(
        files.read_record(args.output) or ()
    ):
        raise files.NotOursError(f"--output {args.output}: another file than this program's figures; name another one")
    row = measure(load_config(args.config), args.length)
    files.write_json(args.output, row)
    print(row)


if __name__ == "__main__":
    ending.run(main)
