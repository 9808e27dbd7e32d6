"""A stage begins only from a checkpoint that has passed its gate, where its recipe asks for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from s2 import ending
from s2.model.config import ModelConfig
from s2.model.hf import fingerprint, save_pretrained
from s2.model.transformer import Transformer
from s2.training.cli import main
from s2.training.gate import check_gate
from tests.training.tiny import tiny_recipe, write_recipe


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The export of an earlier stage."""
    config = ModelConfig.from_dict(tiny_recipe(tmp_path)["model"]["config"])
    return save_pretrained(Transformer(config), config, tmp_path / "runs/tiny/pretrain/hf", dtype=torch.float32)


def write_gate(checkpoint: Path, *passed: bool, **more: Any) -> Path:
    file = checkpoint.parent / "results" / "gate.json"
    file.parent.mkdir(exist_ok=True)
    checks = [{"check": "needle", "length": 64, "value": 0.5 + p, "min": 0.9, "passed": p, "max": None} for p in passed]
    gate = {"fingerprint": fingerprint(checkpoint), "passed": all(passed), "checks": checks, **more}
    file.write_text(json.dumps(gate))
    return file


def test_a_checkpoint_that_has_passed_is_taken(checkpoint: Path) -> None:
    file = write_gate(checkpoint, True, True)
    assert check_gate(str(checkpoint), "required") == f"{checkpoint} has passed its gate ({file})"


def test_one_that_was_not_measured_is_refused_with_the_command_that_measures(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="has not been measured") as error:
        check_gate(str(checkpoint), "required")
    assert f"run `make gate RECIPE=tiny CKPT={checkpoint}`" in str(error.value)
    assert str(error.value).startswith("run.gate=required: ") and "run.gate=ignore" in str(error.value)
    assert check_gate(str(checkpoint), "ignore") == ""


def test_a_missed_check_is_named_with_its_figure_and_threshold(checkpoint: Path) -> None:
    write_gate(checkpoint, True, False)
    with pytest.raises(ValueError, match=r"check needle, length 64, value 0\.5, min 0\.9; run\.gate=ignore"):
        check_gate(str(checkpoint), "required")
    said = check_gate(str(checkpoint), "ignore")
    assert said.startswith("run.gate=ignore: ") and "value 0.5" in said


@pytest.mark.parametrize("more", [{"passed": True}, {"passed": False}])
def test_both_the_sum_and_the_checks_have_to_say_so(checkpoint: Path, more: dict[str, bool]) -> None:
    write_gate(checkpoint, not more["passed"], **more)
    with pytest.raises(ValueError, match="has not passed its gate"):
        check_gate(str(checkpoint), "required")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"checks": null}', '{"checks": [5], "passed": true, "fingerprint": ""}']
)
def test_a_damaged_record_counts_as_none(checkpoint: Path, text: str) -> None:
    write_gate(checkpoint, True).write_text(text)
    with pytest.raises(ValueError, match="is no record of a gate"):
        check_gate(str(checkpoint), "required")
    assert check_gate(str(checkpoint), "ignore").startswith("run.gate=ignore: ")


def test_a_gate_without_a_check_is_not_passed(checkpoint: Path) -> None:
    write_gate(checkpoint, **{"passed": True})
    with pytest.raises(ValueError, match="it has no check"):
        check_gate(str(checkpoint), "required")


def test_a_gate_of_other_weights_does_not_count(checkpoint: Path) -> None:
    write_gate(checkpoint, True)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(ValueError, match="is of other weights"):
        check_gate(str(checkpoint), "required")


def test_a_stage_reads_the_gate_before_it_trains(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, "extend-128")
    recipe["model"] |= {"init_from": str(checkpoint)}
    recipe["run"] |= {"gate": "required"}
    path = write_recipe(tmp_path, recipe)
    write_gate(checkpoint, False)
    assert main([str(path)]) == ending.BAD_INPUT
    assert "error: run.gate=required: " in capsys.readouterr().err
    assert main([str(path), "run.gate=ignore", "trainer.max_steps=2", "model.schedule.warmup_steps=0"]) == ending.DONE
    assert "run.gate=ignore: " in capsys.readouterr().out
    assert "gate: ignore" in (tmp_path / "runs/tiny/extend-128/config.yaml").read_text()
    write_gate(checkpoint, True)
    again = [str(path), "run.stage=extend-256", "trainer.max_steps=2", "model.schedule.warmup_steps=0"]
    assert main(again) == ending.DONE
    assert "has passed its gate" in capsys.readouterr().out
