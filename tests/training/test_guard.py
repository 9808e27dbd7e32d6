"""A step that cannot be right is skipped, counted and named; too many end the run, and nothing dead is exported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from s2 import ending
from s2.training.config import RunConfig
from s2.training.guard import SETTLING, StepGuard
from s2.training.module import PretrainModule
from s2.training.run_folder import complete_checkpoints, read_meta
from tests.training.tiny import curve, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guard")


def skipped_steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "skipped.jsonl").read_text().splitlines()]


def poison(monkeypatch: pytest.MonkeyPatch, *positions: int) -> None:
    """Make the loss of the micro-batches at these data positions NaN."""
    original = PretrainModule._loss

    def poisoned(self: Any, batch: Any) -> Any:
        loss, count = original(self, batch)
        return (loss * math.nan if int(batch["position"]) in positions and self.training else loss), count

    monkeypatch.setattr(PretrainModule, "_loss", poisoned)


@pytest.mark.parametrize("strategy", ["auto", "zero_1", "zero_2", "zero_3"])
def test_one_bad_batch_costs_its_step_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, strategy: str
) -> None:
    poison(monkeypatch, 6)
    stage = f"bad-{strategy}"
    code, run = train(folder, f"trainer.strategy={strategy}", "run.checkpoint_every=4", stage=stage)
    assert code == 0
    said = capsys.readouterr().out
    assert "step 4 skipped (data position 6): the loss is nan" in said
    (record,) = skipped_steps(run)
    assert (record["step"], record["position"]) == (4, 6)
    assert curve(run, "skipped_steps") == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 1
    # step 4 was to write a checkpoint; the next step that was taken does
    names = [path.name for path in complete_checkpoints(run / "checkpoints")]
    assert names == ["step-00000005", "step-00000006"]
    assert all(torch.isfinite(value).all() for value in load_file(run / "hf" / "model.safetensors").values())
    assert all(math.isfinite(loss) for loss in curve(run).values())


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a constant rate, five steps and a skipped one end where five steps end."""
    constant = ("model.schedule={name: constant, warmup_steps: 0}", "run.checkpoint_every=1", "run.validate_every=100")
    _, five = train(folder, *constant, "trainer.max_steps=5", stage="five")
    poison(monkeypatch, 10)  # the first batch of step 6
    _, six = train(folder, *constant, stage="six")
    expected = load_file(five / "hf" / "model.safetensors")
    for name, value in load_file(six / "hf" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_one_bad_micro_batch_of_a_step_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 5)
    accumulated = ("data.micro_batch_size=1", "run.tokens_per_step=128")
    code, run = train(folder, *accumulated, stage="accumulated")
    assert code == 0
    assert [(r["step"], r["position"]) for r in skipped_steps(run)] == [(3, 4)]
    assert "position 5" in skipped_steps(run)[0]["why"]


def test_a_resumed_run_goes_past_the_bad_batch_and_counts_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 2, 8)
    train(folder, "trainer.max_steps=4", stage="resumed")
    code, run = train(folder, stage="resumed")
    assert code == 0
    assert curve(run, "skipped_steps")[6] == 2
    assert read_meta(complete_checkpoints(run / "checkpoints")[-1])["step"] == 6


def test_a_skipped_step_has_no_loss_in_the_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    poison(monkeypatch, 2)
    code, run = train(folder, "trainer.max_steps=3", stage="no-loss")
    assert code == 0 and sorted(curve(run)) == [1, 3]
    assert "step 2/3 | loss nan" in capsys.readouterr().out


def test_a_learning_rate_that_kills_ends_with_a_diagnosis_and_no_export(folder: Path, capsys: Any) -> None:
    wild = ("model.optimizer.lr=1e6", "trainer.max_steps=12", "run.max_skipped_steps=4", "run.checkpoint_every=3")
    code, run = train(folder, *wild, "trainer.gradient_clip_val=null", stage="wild")
    error = capsys.readouterr().err
    assert code == ending.DIVERGED, error
    assert "max_skipped_steps=4" in error or "held-out losses" in error
    assert "Traceback" not in error and not (run / "hf").exists()


def test_bad_batches_from_the_first_step_on_point_at_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    poison(monkeypatch, *range(0, 12))
    code, run = train(folder, "run.max_skipped_steps=3", stage="dead")
    error = capsys.readouterr().err
    assert code == ending.DIVERGED
    assert "3 steps in a row" in error and "data position 4" in error and "model.init_from" in error
    assert complete_checkpoints(run / "checkpoints") == []


def test_a_jump_of_the_loss_is_refused_only_where_it_is_asked_for() -> None:
    for factor, refused in ((None, False), (2.0, True), (4.0, False)):
        guard = StepGuard(RunConfig("r", "s", loss_spike_factor=factor))
        for _ in range(SETTLING):
            guard.add(200.0, 100.0, 0)
            assert not guard.refuses()
            guard._take(2.0)
            guard._begin_step()
        guard.add(500.0, 100.0, 7)
        assert guard.refuses() is refused


@pytest.mark.parametrize("override", ["run.max_skipped_steps=0", "run.loss_spike_factor=0.5"])
def test_limits_that_mean_nothing_are_refused(folder: Path, override: str, capsys: Any) -> None:
    assert train(folder, override, stage="refused")[0] == ending.BAD_INPUT
    assert override.split("=")[0] in capsys.readouterr().err
