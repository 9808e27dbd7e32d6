"""Running out of memory ends in a sentence that says what to turn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2 import ending
from s2.model.config import ModelConfig
from s2.training import memory
from s2.training.module import PretrainModule
from tests.training.tiny import train

SMALL = ModelConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def test_a_run_out_of_memory_names_step_estimate_and_what_to_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    original = PretrainModule.training_step

    def fails(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", fails)
    code, _ = train(tmp_path)
    error = capsys.readouterr().err
    assert code == ending.OUT_OF_MEMORY
    assert error.count("\n") == 1 and "Traceback" not in error
    for part in ("step 3", "GiB per device", "data.micro_batch_size below 2", "activation_checkpointing=selective"):
        assert part in error


@pytest.mark.parametrize(
    ("checkpointing", "stage", "ranks", "first", "absent"),
    [
        ("full", 2, 4, "trainer.strategy=zero_3", "activation_checkpointing"),
        ("selective", 3, 4, "activation_checkpointing=full", "zero_4"),
        ("full", 3, 2, "more GPUs", "zero_4"),
        ("full", 1, 1, "more GPUs", "zero_2;"),
    ],
)
def test_advice_names_only_what_can_still_be_turned(
    checkpointing: str, stage: int, ranks: int, first: str, absent: str
) -> None:
    module = SimpleNamespace(config=SMALL, phase="step {step}", activation_checkpointing=checkpointing)
    strategy = SimpleNamespace(stage=stage)
    trainer = SimpleNamespace(strategy=strategy, world_size=ranks, global_step=0, precision="bf16-mixed")
    text = memory.advice(module, SimpleNamespace(micro_batch_size=1, seq_len=64), trainer)
    turns = text.split("In this order: ")[1].split("; ")
    assert first in turns[0] and absent not in text


def test_what_the_gpu_held_is_said_in_gibibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.usage() == "" or torch.cuda.is_available()
    gib = 2**30
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "mem_get_info": (4 * gib, 140 * gib),
        "max_memory_allocated": 110 * gib,
        "max_memory_reserved": 126 * gib,
        "memory_reserved": 120 * gib,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    text = memory.usage()
    assert "of 140.0 GiB" in text and "110.0 in tensors" in text and "126.0 with its cache" in text
    assert text.endswith("other processes 16.0")
