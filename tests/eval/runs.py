"""Run folders for the tests of reports."""

import json
import math
from pathlib import Path

from tests.eval.sweeps import write_results

MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "attention_layout": "L2V4-inter",
    "block_size": 16,
}
RECIPE = {
    "seed_everything": 7,
    "run": {"recipe": "demo", "stage": "a", "tokens_per_step": 1024},
    "model": {"config": MODEL, "init_from": None, "optimizer": {"lr": 0.001}, "schedule": {"name": "cosine"}},
    "data": {
        "class_path": "data.datamodule.PackedDataModule",
        "init_args": {
            "seq_len": 512,
            "mixture": [{"path": "d/web/train", "weight": 3.0}, {"path": "d/facts/train", "weight": 1.0}],
            "validation": [{"name": "web", "path": "d/web/heldout"}],
            "prepare": [
                {"output": "d/web", "sources": [{"path": "web.jsonl"}]},
                {"output": "d/facts", "sources": [{"path": "retrieval"}]},
            ],
        },
    },
    "trainer": {"gradient_clip_val": 1.0},
}


def lm_results(acc=0.25, **about):
    return {
        "results": {"piqa": {"alias": "piqa", "acc,none": acc, "acc_stderr,none": 0.0123}},
        "versions": {"piqa": 1.0},
        "n-shot": {"piqa": 5},
        "higher_is_better": {"piqa": {"acc": True}},
        "s2": {
            "tasks": ["piqa"],
            "max_length": 1024,
            "bos": "yes (<|bos|>)",
            "limit": None,
            "cut_inputs": "none",
            **about,
        },
    }


def make_run(folder: Path, score=1.0, acc=0.25, loss=3.0, recipe=RECIPE) -> Path:
    """A run with a training log, a recipe (None: without), four needles and an lm-eval table."""
    results = folder / "results"
    results.mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "logs" / "metrics.csv").write_text(
        "step,tokens,seconds,train/loss,tokens_per_second_per_device,mfu_dense_equivalent,mfu_executed,"
        "val/web/loss,val/web/perplexity\n"
        "10,1000,60,5.0,100,0.5,0.4,,\n"
        f"10,1000,61,,,,,{loss + 1},{math.exp(loss + 1)}\n"
        f"20,2000,7260,4.0,300,0.7,0.6,{loss},{math.exp(loss)}\n"
    )
    if recipe is not None:
        (folder / "config.yaml").write_text(json.dumps(recipe))
    cells = {(length, depth): score if depth else 1.0 for length in (512, 1024) for depth in (0, 100)}
    write_results(results / "needle.json", cells, n=1, checkpoint=folder.name, train_length=1024)
    (results / "lm-piqa.json").write_text(json.dumps(lm_results(acc)))
    return folder


def write_ruler(file: Path, right: int, of: int = 20, prompt: str = "p") -> Path:
    """RULER's results of one task at one length, the first `right` answers of `of` right."""
    samples = [
        {
            "id": f"vt/512/{i}",
            "task": "vt",
            "length": 512,
            "prompt": f"{prompt}{i}",
            "scores": {"match": float(i < right)},
        }
        for i in range(of)
    ]
    score = 100 * right / of
    rows = [{"task": "vt", "length": 512, "metric": "all", "score": score, "n": of, "interval": [0.0, 100.0]}]
    lengths = [{"length": 512, "score": score, "n": of, "interval": [0.0, 100.0], "relative": 1.0}]
    effective = {"threshold": 85.6, "source": "theirs", "length": None} | {
        "relative_threshold": 0.9,
        "relative_length": 512,
    }
    summary = {"tasks": rows, "lengths": lengths, "effective": effective}
    about = {"kind": "ruler", "settings": {"seed": 0}, "conditions": {"bos": "exactly one", "cut": 3}}
    file.write_text(json.dumps({**about, "samples": samples, "summary": summary}))
    return file


def write_positions(file: Path, shift: float = 0.0) -> Path:
    """Losses by position of three documents of 128 tokens."""
    samples = [
        {
            "id": f"128/{i}",
            "length": 128,
            "prompt": f"d{i}",
            "losses": [[0, 64, 63, 4.0 + i + shift], [64, 128, 64, 3.0 + i + shift]],
        }
        for i in range(3)
    ]
    buckets = [
        {"from": low, "to": high, "loss": loss + 1 + shift, "interval": [loss, loss + 2], "perplexity": 9.0}
        for low, high, loss in ((0, 64, 4.0), (64, 128, 3.0))
    ]
    row = {"length": 128, "loss": 4.5 + shift, "interval": [4.0, 5.0], "perplexity": 90.0, "buckets": buckets}
    file.write_text(json.dumps({"kind": "positions", "samples": samples, "summary": {"lengths": [row]}}))
    return file
