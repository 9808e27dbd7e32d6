"""The model that a check beside another library runs: its sizes as options, its config, and the machine it runs on."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

from s2.model import ModelConfig


def add_model_options(
    parser: argparse.ArgumentParser, layout: str, *, layers: int, hidden: int, ffn: int, vocab: int
) -> None:
    """`--layout` and a model's sizes, of which the arguments are the defaults."""
    parser.add_argument("--layout", default=layout, help="default: %(default)s")
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "ffn": ffn,
        "heads": 16,
        "kv-heads": 4,
        "vocab": vocab,
        "block-size": 64,
    }
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=default, help="default: %(default)s")


def config_of(args: argparse.Namespace, longest: int, **more: Any) -> ModelConfig:
    """Of those options, for texts of up to `longest` tokens."""
    return ModelConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=longest,
        attention_layout=args.layout,
        block_size=args.block_size,
        **more,
    )


def sizes_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a record says of the model."""
    sizes = {key: getattr(args, key) for key in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "layout")}
    return sizes | {"block": args.block_size}


def machine_of(device: str) -> str:
    """What a record calls the machine."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
