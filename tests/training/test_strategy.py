"""ZeRO 1, 2 and 3 on the CPU train as plain AdamW does, and what they leave behind can be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from s2.model.config import ModelConfig
from s2.model.hf import load_pretrained, save_pretrained
from s2.model.layers import Block
from s2.model.transformer import Transformer
from s2.training.memory import estimate_memory
from s2.training.metrics import peak_flops, read_metrics
from s2.training.module import PretrainModule
from s2.training.summary import closing_words
from tests.training.tiny import curve, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategy")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """The same recipe without DeepSpeed."""
    code, run = train(folder, "trainer.strategy=auto", stage="plain")
    assert code == 0
    return run


@pytest.mark.parametrize("strategy", ["zero_1", "zero_2", "zero_3", "zero_2_offload", "zero_3_offload"])
def test_zero_on_the_cpu_equals_plain_adamw(folder: Path, plain: Path, strategy: str) -> None:
    code, run = train(folder, f"trainer.strategy={strategy}", stage=strategy)
    assert code == 0
    assert curve(run) == pytest.approx(curve(plain), rel=1e-5)
    exported, expected = load_pretrained(run / "hf").state_dict(), load_pretrained(plain / "hf").state_dict()
    for name, value in expected.items():
        assert (exported[name].float() - value.float()).abs().max() < 1e-4, name


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_zero_3_trains_the_same_with_every_weight_sharded_and_any_checkpointing(
    folder: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The weights of so small a model lie below DeepSpeed's threshold for sharding, and would never be released."""
    whole: list[bool] = []
    original = Block.forward

    def forward(self: Any, *args: Any) -> Any:
        whole.append(all(parameter.numel() == parameter.ds_numel for parameter in self.parameters()))
        others = [block for block in self.others if block is not self]
        whole.append(all(parameter.numel() == 0 for block in others for parameter in block.parameters()))
        return original(self, *args)

    def on_fit_start(self: Any) -> None:
        monkeypatch.setattr(Block, "others", self.model.model.blocks, raising=False)

    monkeypatch.setattr(Block, "forward", forward)
    monkeypatch.setattr(PretrainModule, "on_fit_start", on_fit_start)
    settings = {"stage": 3, "persistence_threshold": 0, "prefetch_elements": 0, "reuse_distance": 0}
    strategy = json.dumps({"class_path": "s2.training.strategy.ZeROStrategy", "init_args": settings})
    checkpointing = f"model.activation_checkpointing={mode}"
    code, run = train(folder, f"trainer.strategy={strategy}", checkpointing, stage=f"sharded-{mode}")
    assert code == 0 and len(whole) > 24 and all(whole[-12:])  # of the last steps; the first are observed whole
    assert curve(run) == pytest.approx(curve(plain), rel=1e-5)
    exported, expected = load_pretrained(run / "hf").state_dict(), load_pretrained(plain / "hf").state_dict()
    for name, value in expected.items():
        assert (exported[name].float() - value.float()).abs().max() < 1e-4, name


def test_a_run_folder_holds_everything_a_run_promises(plain: Path) -> None:
    for name in ("config.yaml", "logs/metrics.csv", "checkpoints/last/meta.json", "summary.json"):
        assert (plain / name).is_file(), name
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (plain / "hf" / name).is_file(), name
    assert (plain / "loss.png").read_bytes().startswith(b"\x89PNG") and (plain / "loss.png").stat().st_size > 5000
    assert list((plain / "logs" / "tensorboard").glob("events.*"))
    config = yaml.safe_load((plain / "config.yaml").read_text())
    assert config["trainer"]["strategy"] == "auto" and config["model"]["optimizer"]["weight_decay"] == 0.1


def test_the_exported_config_delimits_documents_as_the_data_did(plain: Path) -> None:
    config = json.loads((plain / "hf" / "config.json").read_text())
    manifest = json.loads((plain.parents[2] / "data" / "train" / "manifest.json").read_text())
    assert config["eos_token_id"] == manifest["tokenizer"]["eos_id"]
    assert config["attention_layout"] == "L1V2-inter"


def test_the_summary_holds_the_held_out_loss_before_and_after_and_the_unigram_loss(plain: Path) -> None:
    heldout = json.loads((plain / "summary.json").read_text())["validation"]["heldout"]
    losses = curve(plain, "val/heldout/loss")
    assert list(losses) == [0, 3, 6]
    assert heldout["initial_loss"] == losses[0] and heldout["loss"] == losses[6] < losses[0]
    assert 2.0 < heldout["unigram_loss"] < 5.7


def test_the_summary_says_how_often_the_data_was_gone_through(plain: Path) -> None:
    summary = json.loads((plain / "summary.json").read_text())
    [data] = summary["data"]
    manifest = json.loads((plain.parents[2] / "data" / "train" / "manifest.json").read_text())
    assert data["asked"] == summary["tokens"] and data["available"] == manifest["tokens"]
    assert data["passes"] == pytest.approx(data["asked"] / data["available"], rel=0.1)
    assert data["synthetic"] == 0.0


def test_extension_reports_the_checkpoint_as_it_is_at_its_own_length(folder: Path, plain: Path) -> None:
    start = f"model.init_from={plain}/hf"
    longer = ("model.config={max_position_embeddings: 128, rope_theta: 8e6}", "data.seq_len=128")
    code, run = train(folder, start, *longer, "data.micro_batch_size=1", stage="extended")
    assert code == 0
    exported = json.loads((run / "hf" / "config.json").read_text())
    assert exported["max_position_embeddings"] == 128 and exported["rope_theta"] == 8e6
    # Before step 1 there are two losses over the same held-out rows: of the checkpoint with its own rope_theta, in
    # documents of its own length, ...
    same = train(folder, start, *longer, "model.config.rope_theta=10000.0", "data.micro_batch_size=1", stage="same")[1]
    before = curve(run, "val/heldout/source_loss")[0]
    assert before == curve(same, "val/heldout/source_loss")[0]
    # ... and with those that training uses.
    assert len({before, curve(run, "val/heldout/loss")[0], curve(same, "val/heldout/loss")[0]}) == 3
    assert curve(run)[1] != curve(same)[1]
    short = train(folder, start, stage="short")[1]
    assert curve(short, "val/heldout/source_loss")[0] == curve(short, "val/heldout/loss")[0]
    summary = json.loads((run / "summary.json").read_text())["validation"]["heldout"]
    assert (summary["initial_loss"], summary["source_loss"]) == (curve(run, "val/heldout/loss")[0], before)
    said = closing_words(run)
    assert f"before training {summary['initial_loss']:.4f} ({plain}/hf as it is {before:.4f})" in said
    assert "as it is" not in closing_words(short)


def test_a_dense_checkpoint_goes_on_under_a_layout_with_all_it_came_with(folder: Path, plain: Path, capsys) -> None:
    """A Qwen2 with a chat template, twice trained on; heads that lose the first block are warned of, once."""
    torch.manual_seed(0)
    sizes = json.loads((plain / "hf" / "config.json").read_text())
    sizes |= {"model_type": "qwen2", "attention_layout": "dense", "qkv_bias": True}
    dense = Transformer(ModelConfig.from_hf_dict(sizes))
    start = save_pretrained(dense, dense.config, folder / "dense", plain / "hf" / "tokenizer.json", torch.float32)
    (start / "chat_template.jinja").write_text("{{ messages }}")
    (start / "generation_config.json").write_text('{"temperature": 0.6}')
    layout, short = (
        "model.config={attention_layout: W1-inter, block_size: 16}",
        ("trainer.max_steps=3", "trainer.strategy=zero_3"),
    )
    code, run = train(folder, f"model.init_from={start}", layout, *short, stage="converted")
    assert code == 0
    values = json.loads((run / "summary.json").read_text())["validation"]["heldout"]
    assert values["source_loss"] != values["initial_loss"]
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: heads trained")]
    assert f"heldout {values['source_loss']:.4f} -> {values['initial_loss']:.4f}" in warning
    assert "attention_layout=W1-inter" in warning and "model.config.attention_layout='W1+sink1-inter'" in warning
    code, more = train(
        folder, f"model.init_from={run}/hf", "model.config={rope_theta: 2e4}", "trainer.max_steps=3", stage="more"
    )
    assert code == 0 and "warning: heads trained" not in capsys.readouterr().out
    for hf in (run / "hf", more / "hf"):
        assert json.loads((hf / "config.json").read_text())["qkv_bias"] is True
        assert (hf / "chat_template.jinja").read_text() == "{{ messages }}"
        assert json.loads((hf / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_training_on_keeps_what_a_foreign_checkpoint_came_with(folder: Path, plain: Path, capsys) -> None:
    foreign = folder / "foreign"
    shutil.copytree(plain / "hf", foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"bos_token_id": 7, "eos_token_id": [5, 6]}))
    (foreign / "chat_template.jinja").write_text("{{ messages }}")
    code, run = train(folder, f"model.init_from={foreign}", "trainer.max_steps=3", stage="on")
    assert code == 0
    exported = json.loads((run / "hf" / "config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (7, [5, 6])
    assert (run / "hf" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert f"documents end with token 1 in the data; the model's eos_token_id stays [5, 6], as in {foreign}" in (
        capsys.readouterr().out
    )


def test_throughput_rows_count_tokens_of_optimizer_steps(plain: Path) -> None:
    rows = [row for row in read_metrics(plain / "logs" / "metrics.csv") if "train/loss" in row]
    assert [row["tokens"] for row in rows] == [128 * step for step in range(1, 7)]
    assert all(row["tokens_per_second_per_device"] > 0 and row["memory_gib"] > 0 for row in rows)
    assert not any("mfu_executed" in row for row in rows)  # a CPU has no known peak


def test_peak_flops_knows_variants_of_a_name_and_nothing_it_was_not_told() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GB200") == 2.5e15
    assert peak_flops("Some Future Device") is None


@pytest.mark.parametrize(("stage", "bytes_per_parameter"), [(0, 18), (1, 7.5), (2, 4), (3, 2.25)])
def test_memory_estimate_shards_what_each_zero_stage_shards(stage: int, bytes_per_parameter: float) -> None:
    config = ModelConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    memory = estimate_memory(config, 0, stage=stage, world_size=8, precision="bf16-mixed", checkpointing="none")
    assert memory.total == config.num_parameters() * bytes_per_parameter


def test_long_sequences_under_full_checkpointing_hold_no_more_where_the_mlp_is_wider() -> None:
    """A 7B at 128k, in GiB: 32 of blocks' inputs, 3 at the head, 13 of attention and its gradients."""

    def activations(width: int, mode: str) -> float:
        config = ModelConfig(
            vocab_size=1000, hidden_size=4096, intermediate_size=width, num_hidden_layers=32, num_attention_heads=32
        )
        settings = {"stage": 3, "world_size": 2, "precision": "bf16-mixed", "checkpointing": mode}
        return estimate_memory(config, 2**17, **settings).activations / 2**30

    assert activations(11_008, "full") == activations(44_032, "full") == 48
    assert activations(11_008, "selective") < activations(44_032, "selective")


def test_full_checkpointing_keeps_less_than_selective_and_that_less_than_none() -> None:
    config = ModelConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4
    )
    settings = {"stage": 0, "world_size": 1, "precision": "32-true"}
    kept = [
        estimate_memory(config, 4096, checkpointing=mode, **settings).activations
        for mode in ("full", "selective", "none")
    ]
    assert kept[0] < kept[1] < kept[2]
    assert torch.isfinite(torch.tensor(kept)).all()
