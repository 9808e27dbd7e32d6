"""A whole experiment, small: data, training, extension, needles and the page, with a stop in between."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402

SMALL = """
name: small
root: runs/small
baseline: dense
inputs: {data: runs/small-data, tokenizer: START/tokenizer.json}
data:
  corpus:
    output: "{data}/corpus"
    sources: [{path: python-env, max_bytes: 600_000}]
    tokenizer: {path: "{tokenizer}"}
    heldout_fraction: 0.3
  retrieval:
    output: "{data}/retrieval"
    sources:
      - path: retrieval
        retrieval: {documents: 60, facts: [2, 4], filler: "{data}/corpus/train", chars: [600, 900]}
    tokenizer: {path: "{tokenizer}"}
    heldout_fraction: 0.0
stages:
  - name: train
    recipe: &recipe
      seed_everything: 1
      run: {tokens_per_step: 1024, validate_every: 4, checkpoint_every: 4, keep_checkpoints: 1}
      model:
        config: {vocab_size: 2048, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, block_size: 16,
                 num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512,
                 tie_word_embeddings: true}
      data:
        class_path: data.datamodule.PackedDataModule
        init_args: &data
          seq_len: 512
          micro_batch_size: 2
          num_workers: 0
          mixture:
            - {path: "{data}/corpus/train", weight: 0.75}
            - {path: "{data}/retrieval/train", weight: 0.25}
          validation: [{name: all, path: "{data}/corpus/heldout", max_windows: 4}]
      trainer: {accelerator: cpu, devices: 1, strategy: zero_1, max_steps: 8, log_every_n_steps: 1}
  - name: extend
    recipe:
      <<: *recipe
      model: {init_from: "{arm}/train/hf", config: {max_position_embeddings: 1024, rope_theta: 4.0e+4}}
      data: {class_path: data.datamodule.PackedDataModule, init_args: {<<: *data, seq_len: 1024, micro_batch_size: 1}}
      trainer: {accelerator: cpu, devices: 1, strategy: zero_1, max_steps: 4, log_every_n_steps: 1}
  - name: needle
    command: [python, -m, eval.needle, --ckpt, "{arm}/extend/hf", --output, "{arm}/extend/results", --haystack,
              "{data}/corpus/heldout", --lengths, "512,1k", --depths, "3", --n, "2", --no-generate]
    leaves: ["{arm}/extend/results/needle*.json"]
  - name: speed
    command: [python, ROOT/scripts/results_speed.py, --config, "{arm}/extend/hf", --length, 8k, --output,
              "{arm}/speed.json"]
    leaves: ["{arm}/speed.json"]
arms:
  - {name: dense}
  - {name: sparse, overrides: [model.config.attention_layout=L2V2+sink1]}
"""


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_an_experiment_runs_from_data_to_page_and_goes_on_after_a_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(
        SMALL.replace("START", str(ROOT / "recipes/demo/start")).replace("ROOT", str(ROOT))
    )  # fmt: skip
    assert results.main(["plan.yaml", "--data-only"]) == 0

    def stop():  # once the dense arm has taken a step
        log = Path("runs/small/dense/train/logs/metrics.csv")
        until = time.monotonic() + 300
        while time.monotonic() < until and not (log.is_file() and log.read_text().count("\n") > 2):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(results.Unfinished, match="dense, sparse unfinished"):
        results.main(["plan.yaml", "--output", "page"])
    thread.join()
    assert json.loads(Path("runs/small/dense/train.run.json").read_text())["exit_code"] == 75
    assert results.main(["plan.yaml", "--output", "page"]) == 0
    assert "continuing from" in Path("runs/small/dense/train.log").read_text()
    found = json.loads(Path("page/results.json").read_text())
    assert not found["missing"]
    figures = {(row["arm"], row["stage"], row["task"], row["length"]): row for row in found["figures"]}
    for arm in ("dense", "sparse"):
        assert found["arms"][arm]["summaries"]["train"]["step"] == 8
        assert figures[arm, "extend", "single", 1024]["n"] == 6
        assert figures[arm, "", "KV needed per token", 8192]["value"] > 0
    assert figures["sparse", "extend", "single", 1024]["from_baseline"]["paired"]
    text = Path("page/README.md").read_text()
    assert re.search(r"in the training tokens: train [23]\d\.\d%; extend 2[45]\.\d%\.", text)
    assert {path.name for path in Path("page").glob("*.png")} >= {
        "curves.png",
        "extend-needle-512+1k-d3-n2-heldout-no-generate.png",
    }
