"""What a layout costs at a context length: attention time of all layers, and what of keys and values has to be kept.

    python scripts/results_speed.py --config runs/experiments/patterns/dense/train/hf --length 128k --output speed.json

Times (batch 1, bfloat16, forward and backward, median) are taken on a GPU only. `kv_bytes_per_token` counts the keys
and values that some query still sees or may see later; the model's cache keeps all of them (`cache_bytes_per_token`).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from eval.grid import parse_length
from s2 import ending, files
from s2.attention import s2_attention
from s2.model.config import ModelConfig
from s2.model.hf import load_config
from s2.model.layouts import kv_bytes_per_token

_BYTES = 2  # of a number in bfloat16


def attention_ms(config: ModelConfig, length: int) -> dict[str, float]:
    """Milliseconds of all layers' attention, on the current GPU."""
    from triton.testing import do_bench

    def made(heads: int) -> torch.Tensor:
        return torch.randn(1, length, heads, config.head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, k, v = made(config.num_attention_heads), made(config.num_key_value_heads), made(config.num_key_value_heads)
    grad = torch.randn_like(q)
    rotations = config.layout.distinct_rotations(config.num_key_value_heads)
    total = {"forward_ms": 0.0, "backward_ms": 0.0, "decode_ms": 0.0}
    for (pattern, rotation), count in Counter(zip(config.layout.patterns, rotations, strict=True)).items():

        def attend(tokens: int = length, pattern: Any = pattern, rotation: int = rotation) -> torch.Tensor:
            return s2_attention(q[:, -tokens:], k, v, pattern, rotation=rotation)

        out = attend()
        times = {"backward_ms": lambda out=out: out.backward(grad, retain_graph=True)}
        total["backward_ms"] += count * _median(do_bench, times["backward_ms"], grad_to_none=[q, k, v])
        with torch.no_grad():
            total["forward_ms"] += count * _median(do_bench, attend)
            total["decode_ms"] += count * _median(do_bench, lambda attend=attend: attend(1))
    return total


def _median(bench: Any, function: Any, **options: Any) -> float:
    return float(bench(function, warmup=50, rep=200, return_mode="median", **options))


def measure(config: ModelConfig, length: int) -> dict[str, Any]:
    """The figures of one layout."""
    heads = config.num_key_value_heads
    row: dict[str, Any] = {
        "kind": "speed",
        "attention_layout": config.attention_layout,
        "block_size": config.block_size,
        "length": length,
        "density": config.layout.density(length, heads),
        "kv_bytes_per_token": kv_bytes_per_token(config, length),
        "cache_bytes_per_token": 2 * _BYTES * config.num_hidden_layers * heads * config.head_dim,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return row | (attention_ms(config, length) if torch.cuda.is_available() else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a Hugging Face folder; its config.json is read")
    parser.add_argument("--length", type=parse_length, default="128k", help="tokens (default: 128k)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    row = measure(load_config(args.config), args.length)
    files.write_json(args.output, row)
    print(row)


if __name__ == "__main__":
    ending.run(main)
