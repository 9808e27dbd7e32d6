"""A recipe small enough to train in seconds, and its corpus."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from s2.training.cli import main
from s2.training.metrics import read_metrics


def write_corpus(folder: Path) -> Path:
    """200 documents of 20 to 400 words from a small vocabulary with some structure, the same every time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(60)]
    file = folder / "corpus.jsonl"
    with file.open("w") as stream:
        for _ in range(200):
            at, text = rng.randrange(60), []
            for _ in range(rng.randint(20, 400)):
                at = (at * 7 + rng.randrange(3)) % 60
                text.append(words[at])
            stream.write(json.dumps({"text": " ".join(text)}) + "\n")
    return file


def tiny_recipe(folder: Path, stage: str = "pretrain") -> dict[str, Any]:
    """Two layers, one of them sparse; 64 tokens, 2 rows a micro-batch, 6 steps."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(folder)
    data = folder / "data"
    return {
        "seed_everything": 7,
        "run": {
            "recipe": "tiny",
            "stage": stage,
            "root": str(folder / "runs"),
            "validate_every": 3,
            "checkpoint_every": 2,
        },
        "model": {
            "config": {
                "vocab_size": 300,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "attention_layout": "L1V2-inter",
                "block_size": 16,
            },
            "optimizer": {"lr": 3e-3},
            "schedule": {"name": "wsd", "warmup_steps": 2, "decay_ratio": 0.5},
        },
        "data": {
            "class_path": "data.datamodule.PackedDataModule",
            "init_args": {
                "seq_len": 64,
                "micro_batch_size": 2,
                "num_workers": 0,
                "prepare": {
                    "output": str(data),
                    "sources": [str(corpus)],
                    "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 100_000}},
                    "heldout_fraction": 0.1,
                },
                "mixture": [{"path": str(data / "train")}],
                "validation": [{"name": "heldout", "path": str(data / "heldout"), "max_windows": 5}],
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "strategy": "zero_1",
            "max_steps": 6,
            "log_every_n_steps": 1,
            "gradient_clip_val": 1.0,
        },
    }


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / f"{recipe['run']['stage']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def train(folder: Path, *overrides: str, stage: str = "pretrain") -> tuple[int, Path]:
    """Run the tiny recipe through the command line; returns the exit code and the run folder."""
    path = write_recipe(folder, tiny_recipe(folder, stage))
    return main([str(path), *overrides]), folder / "runs" / "tiny" / stage


def curve(run: Path, column: str = "train/loss") -> dict[int, float]:
    """Step -> value of a metrics column."""
    return {int(row["step"]): row[column] for row in read_metrics(run / "logs" / "metrics.csv") if column in row}
