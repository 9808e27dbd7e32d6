"""A stage begins only from a checkpoint that has passed its gate, where its recipe asks for that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from s2 import ending, files
from s2.model.config import ModelConfig
from s2.model.hf import fingerprint, save_pretrained
from s2.model.transformer import Transformer
from s2.training.cli import main
from s2.training.gate import BEFORE, check_gate, gate_warning, recorded, thresholds_digest
from s2.training.saving import RunCheckpoint
from tests.training.tiny import tiny_recipe, write_recipe

SHORT = ("trainer.max_steps=2", "model.schedule.warmup_steps=0")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The export of an earlier stage."""
    config = ModelConfig.from_dict(tiny_recipe(tmp_path)["model"]["config"])
    return save_pretrained(Transformer(config), config, tmp_path / "runs/tiny/pretrain/hf", dtype=torch.float32)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """The recipe of the stage after it, beside the thresholds of the stage before."""
    gates = tmp_path / "recipes/tiny/gates"
    gates.mkdir(parents=True)
    (gates / "pretrain.yaml").write_text("needle: [{length: 64, min: 0.9}]  # a comment\n")
    return gates.parent / "extend-128.yaml"


def write_gate(checkpoint: Path, *passed: bool | None, **more: Any) -> Path:
    """gate.json with a check for each of `passed` (None: not measured), and the thresholds that it was measured with.
    more: what it says beside or otherwise."""
    file = checkpoint.parent / "results" / "gate.json"
    file.parent.mkdir(exist_ok=True)
    checks: list[dict[str, Any]] = [
        {"check": "task", "task": "piqa", "min": 0.6, "value": None, "passed": None, "unmeasured": "no such folder"}
        if each is None
        else {"check": "needle", "length": 64, "value": 0.5 + each, "min": 0.9, "passed": each, "max": None}
        for each in passed
    ]
    thresholds = checkpoint.parents[3] / "recipes/tiny/gates/pretrain.yaml"
    kinds = {"needle": {"length": 64, "min": 0.9}, "task": {"task": "piqa", "min": 0.6}}
    asked = {"needle" if kind == "needle" else "tasks": [each for check in checks if check["check"] == kind]
             for kind, each in kinds.items() if any(check["check"] == kind for check in checks)}  # fmt: skip
    thresholds.write_text(yaml.safe_dump(asked))
    digest = {"config_digest": thresholds_digest(thresholds)}
    gate = {"fingerprint": fingerprint(checkpoint), "passed": all(p in (True, None) for p in passed), "checks": checks}
    file.write_text(json.dumps(gate | digest | more))
    return file


def test_a_checkpoint_that_has_passed_is_taken(checkpoint: Path, recipe_file: Path) -> None:
    file = write_gate(checkpoint, True, True)
    found = check_gate(str(checkpoint), "required", recipe_file)
    assert found["state"] == "passed" and found["said"] == f"{checkpoint} has passed its gate ({file})"
    assert found["fingerprint"] == fingerprint(checkpoint) and len(found["checks"]) == 2 and gate_warning(found) == ""


def test_one_that_was_not_measured_is_refused_with_the_command_that_measures(
    checkpoint: Path, recipe_file: Path
) -> None:
    with pytest.raises(ValueError, match="has not been measured") as error:
        check_gate(str(checkpoint), "required", recipe_file)
    assert f"`make gate RECIPE=tiny CKPT={checkpoint}` measures it" in str(error.value)
    assert str(error.value).startswith("run.gate=required: ") and "ARGS=run.gate=ignore" in str(error.value)
    found = check_gate(str(checkpoint), "ignore", recipe_file)
    assert found["state"] == "absent" and "has not been measured" in gate_warning(found)


@pytest.mark.parametrize("init_from", [None, "models/of-others"])
def test_where_there_is_no_gate_nothing_is_said(init_from: str | None, recipe_file: Path) -> None:
    found = check_gate(init_from, "ignore", recipe_file)
    assert found == {"state": "none", "asked": "ignore", "said": ""} and gate_warning(found) == ""


def test_a_missed_check_is_named_with_its_figure_and_threshold_and_with_both_ways_on(
    checkpoint: Path, recipe_file: Path
) -> None:
    write_gate(checkpoint, True, False)
    with pytest.raises(ValueError, match=r"check needle, length 64, value 0\.5, min 0\.9; train it further") as error:
        check_gate(str(checkpoint), "required", recipe_file)
    assert f"`make gate RECIPE=tiny CKPT={checkpoint}`" in str(error.value)
    assert "ARGS=run.gate=ignore" in str(error.value)
    found = check_gate(str(checkpoint), "ignore", recipe_file)
    assert found["state"] == "missed" and [check["passed"] for check in found["checks"]] == [True, False]
    assert gate_warning(found).startswith("begun with run.gate=ignore although ") and "value 0.5" in found["said"]


def test_what_was_never_measured_is_not_measured_again(checkpoint: Path, recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=rf"`make gate RECIPE=tiny CKPT={checkpoint}` measures it, and ARGS"):
        check_gate(str(checkpoint), "required", recipe_file)


def test_other_thresholds_than_the_recipes_do_not_count(checkpoint: Path, recipe_file: Path) -> None:
    """A gate that was measured against a lax file, and one whose thresholds were changed since."""
    write_gate(checkpoint, True, config="lax.yaml", config_digest="0" * 16)
    with pytest.raises(ValueError, match=r"with the thresholds of lax\.yaml, not with .*pretrain\.yaml") as error:
        check_gate(str(checkpoint), "required", recipe_file)
    assert f"`make gate RECIPE=tiny CKPT={checkpoint}` measures it again" in str(error.value)
    assert check_gate(str(checkpoint), "ignore", recipe_file)["state"] == "invalid"
    write_gate(checkpoint, True)
    thresholds = recipe_file.parent / "gates/pretrain.yaml"
    thresholds.write_text("needle:\n- {min: 0.9, length: 64}\n")  # the same, said otherwise
    assert check_gate(str(checkpoint), "required", recipe_file)["state"] == "passed"
    thresholds.write_text("needle: [{length: 64, min: 0.95}]\n")
    with pytest.raises(ValueError, match="was measured with the thresholds of"):
        check_gate(str(checkpoint), "required", recipe_file)


def test_a_task_that_could_not_be_measured_is_said(checkpoint: Path, recipe_file: Path) -> None:
    write_gate(checkpoint, True, None)
    found = check_gate(str(checkpoint), "required", recipe_file)
    assert found["state"] == "passed" and found["said"].endswith("not measured: check task, task piqa, min 0.6")
    assert gate_warning(found) == "the gate before this stage was passed without check task, task piqa, min 0.6"
    write_gate(checkpoint, None)
    with pytest.raises(ValueError, match="no check is passed"):
        check_gate(str(checkpoint), "required", recipe_file)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"passed": False}, "contradicts itself: passed is false"),
        ({"passed": "true"}, 'contradicts itself: passed is "true"'),
        ({"value": 0.5}, "contradicts itself: check needle, .*value 0.5, min 0.9 is recorded as passed true"),
        ({"check passed": "no"}, 'contradicts itself: .*recorded as passed "no"'),
        ({"check passed": 1}, "contradicts itself: .*recorded as passed 1"),
        ({"check passed": None, "unmeasured": "x", "value": None}, "contradicts itself: check needle, "),
        ({"min": 0.1}, "has other checks than .*pretrain.yaml: .*min 0.1, and there it is .*min 0.9"),
        ({"value": "1.5"}, 'is no record of a gate .value is "1.5", expected a number'),
        ({"value": True}, "is no record of a gate .value is true, expected a number"),
        ({"max": 9}, "is no record of a gate .a check with max and min"),
    ],
)
def test_an_edited_record_opens_no_stage(checkpoint: Path, recipe_file: Path, edit: dict[str, Any], said: str) -> None:
    gate = json.loads((file := write_gate(checkpoint, True)).read_text())
    for key, value in edit.items():
        (gate if key == "passed" else gate["checks"][0])[key.removeprefix("check ")] = value
    file.write_text(json.dumps(gate))
    with pytest.raises(ValueError, match=said):
        check_gate(str(checkpoint), "required", recipe_file)
    assert check_gate(str(checkpoint), "ignore", recipe_file)["state"] == "invalid"


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_figure_that_is_no_number_has_not_passed(checkpoint: Path, recipe_file: Path, value: float | None) -> None:
    gate = json.loads((file := write_gate(checkpoint, False)).read_text())
    gate["checks"][0]["value"] = value
    file.write_text(json.dumps(gate))
    assert check_gate(str(checkpoint), "ignore", recipe_file)["state"] == "missed"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"checks": null}', '{"checks": [5], "passed": true, "fingerprint": ""}']
)
def test_a_damaged_record_counts_as_none(checkpoint: Path, recipe_file: Path, text: str) -> None:
    write_gate(checkpoint, True).write_text(text)
    with pytest.raises(ValueError, match="is no record of a gate"):
        check_gate(str(checkpoint), "required", recipe_file)
    assert check_gate(str(checkpoint), "ignore", recipe_file)["state"] == "invalid"


def test_a_gate_without_a_check_is_not_passed(checkpoint: Path, recipe_file: Path) -> None:
    write_gate(checkpoint, **{"passed": True})
    with pytest.raises(ValueError, match="no check is passed"):
        check_gate(str(checkpoint), "required", recipe_file)


def test_a_gate_of_other_weights_does_not_count(checkpoint: Path, recipe_file: Path) -> None:
    write_gate(checkpoint, True)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(ValueError, match="is of other weights"):
        check_gate(str(checkpoint), "required", recipe_file)


def write_stage(checkpoint: Path, tmp_path: Path, recipe_file: Path) -> str:
    recipe = tiny_recipe(tmp_path, "extend-128")
    recipe["model"] |= {"init_from": str(checkpoint)}
    recipe["run"] |= {"gate": "required"}
    return str(write_recipe(recipe_file.parent, recipe))


def test_a_stage_reads_the_gate_before_it_trains(
    checkpoint: Path, tmp_path: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_stage(checkpoint, tmp_path, recipe_file)
    write_gate(checkpoint, False)
    assert main([path]) == ending.BAD_INPUT
    assert "error: run.gate=required: " in capsys.readouterr().err
    write_gate(checkpoint, True)
    assert main([path, *SHORT]) == ending.DONE
    said = capsys.readouterr().out
    assert "has passed its gate" in said and "begun with" not in said
    summary = files.read_json(tmp_path / "runs/tiny/extend-128/summary.json")
    assert summary["gate_before"]["state"] == "passed" and summary["gate_before"]["asked"] == "required"


def test_a_missed_gate_stays_in_the_run_whatever_it_is_resumed_with(
    checkpoint: Path,
    tmp_path: Path,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, run = write_stage(checkpoint, tmp_path, recipe_file), tmp_path / "runs/tiny/extend-128"
    write_gate(checkpoint, False)
    plain = RunCheckpoint.on_step
    monkeypatch.setattr(
        RunCheckpoint, "on_step", lambda self, *about: self._signals.seen.add(15) or plain(self, *about)
    )
    assert main([path, "run.gate=ignore", "trainer.max_steps=3"]) == ending.STOPPED
    kept = files.read_json(run / BEFORE)
    assert kept["state"] == "missed" and kept["asked"] == "ignore" and kept["checks"][0]["value"] == 0.5
    assert kept["fingerprint"] == fingerprint(checkpoint) and "begun with run.gate=ignore" in capsys.readouterr().out
    monkeypatch.setattr(RunCheckpoint, "on_step", plain)
    write_gate(checkpoint, True)  # what it says now is not what it said then
    for _ in range(2):  # to the end, and of what is finished
        assert main([path, "trainer.max_steps=3"]) == ending.DONE
        said = capsys.readouterr().out
        assert "begun with run.gate=ignore although" in said and "value 0.5" in said and "run.gate:" not in said
    assert files.read_json(run / BEFORE) == kept == files.read_json(run / "summary.json")["gate_before"]
    assert "gate: ignore" in (run / "config.yaml").read_text()
    meta = files.read_json(run / "checkpoints/last/meta.json")
    assert meta["recipe"]["run"]["gate"] == "ignore"


def test_a_record_that_is_gone_is_no_gate_that_was_passed(tmp_path: Path) -> None:
    assert recorded(tmp_path)["state"] == "unknown" and "is missing" in recorded(tmp_path)["said"]
    for text in ("[]", '{"state": "passed"', '{"state": "passed"}'):
        (tmp_path / BEFORE).write_text(text)
        assert recorded(tmp_path)["state"] == "unknown"
