"""A stage is finished at its last step and nowhere else: what would end it before is refused, or leaves no export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from s2 import ending
from s2.recipe import load_recipe
from s2.training.cli import main
from s2.training.config import read_stage
from tests.training.tiny import curve, tiny_recipe, train, write_recipe


class EndAtThree(Callback):
    """As EarlyStopping does."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.max_epochs=1"], "trainer.max_epochs: expected null or -1, trainer.max_steps says it, got 1"),
        (["trainer.limit_train_batches=2"], "trainer.limit_train_batches: expected null, trainer.max_steps says it"),
        (["trainer.limit_train_batches=1"], "trainer.limit_train_batches: "),
        (["trainer.limit_train_batches=0.5"], "trainer.limit_train_batches: "),
        (["trainer.max_time=00:00:00:02"], "trainer.max_time: 00:00:00:02 ends a stage before trainer.max_steps=6"),
        (["trainer.max_time={minutes: 1}"], "trainer.max_time: "),
        (["trainer.overfit_batches=1"], "trainer.overfit_batches: expected 0; for few texts"),
        (["trainer.fast_dev_run=true"], "trainer.fast_dev_run: expected false; for a few steps set trainer.max_steps"),
        (["trainer.barebones=true"], "trainer.barebones: expected false; "),
        (["trainer.check_val_every_n_epoch=2"], "trainer.check_val_every_n_epoch: expected null or 1"),
        (
            ["run.tokens_per_step=256", "trainer.accumulate_grad_batches=4"],
            "trainer.accumulate_grad_batches: 4 would be ignored, it follows from run.tokens_per_step=256",
        ),
    ],
)
def test_what_would_end_a_stage_early_or_be_ignored_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    assert main([str(path), *overrides]) == ending.BAD_INPUT
    error = capsys.readouterr().err
    assert f"error: {path}: {said}" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_callback_that_ends_training_leaves_a_checkpoint_and_no_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = "trainer.callbacks=[{class_path: tests.training.test_ends.EndAtThree}]"
    code, run = train(tmp_path, callback)
    said = capsys.readouterr().err
    assert code == ending.STOPPED and said.startswith("stopped: training was ended at step 3 of 6 by something other")
    assert f"nothing is exported, the checkpoint to go on from is {run}/checkpoints/step-00000003" in said
    assert not (run / "hf").exists() and not (run / "summary.json").exists()
    assert train(tmp_path)[0] == ending.DONE
    assert json.loads((run / "summary.json").read_text())["step"] == 6
    whole = curve(train(tmp_path, stage="whole")[1])
    assert curve(run) == whole
    assert train(tmp_path, callback, "run.checkpoint_every=null", stage="unsaved")[0] == ending.STOPPED
    assert "nothing is saved" in capsys.readouterr().err


def test_a_run_that_saves_nothing_may_end_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = train(
        tmp_path, "run.checkpoint_every=null", "trainer.max_time=00:00:00:01", "trainer.max_steps=100000",
        "trainer.log_every_n_steps=50", "run.validate_every=100000",
    )  # fmt: skip
    assert code == ending.DONE
    step = json.loads((run / "summary.json").read_text())["step"]
    assert 0 < step < 100000
    assert f"trainer.max_time has ended the stage at step {step} of 100000" in capsys.readouterr().out


def test_what_a_run_has_written_down_is_a_recipe(tmp_path: Path) -> None:
    """Every default of Lightning's Trainer stands in it, and none is refused."""
    _, run = train(tmp_path, "run.tokens_per_step=256", "trainer.max_steps=1", "model.schedule.warmup_steps=0")
    assert read_stage(load_recipe(run / "config.yaml"), run / "config.yaml").run.tokens_per_step == 256
