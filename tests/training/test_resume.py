"""A run that is killed goes on as if nothing had happened, and only from checkpoints that are whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from s2 import ending
from s2.training import run_folder
from s2.training.callbacks import TrainingLog
from s2.training.metrics import read_metrics
from s2.training.module import PretrainModule
from s2.training.run_folder import complete_checkpoints, read_meta
from tests.training.tiny import curve, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    code, run = train(folder, stage="whole")
    assert code == 0
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


def assert_same_run(run: Path, reference: Path) -> None:
    for column in ("train/loss", "lr", "grad_norm", "val/heldout/loss"):
        assert curve(run, column) == curve(reference, column), column
    expected = weights(reference)
    for name, value in weights(run).items():
        assert torch.equal(value, expected[name]), name


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> list[int]:
    """Do `action` once, during the batch after optimizer step `step`; returns the data positions seen."""
    positions: list[int] = []
    original = PretrainModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        positions.append(int(batch["position"]))
        if self.trainer.global_step == step:
            action()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", training_step)
    return positions


def test_the_same_seed_gives_the_same_losses_and_weights(folder: Path, uninterrupted: Path) -> None:
    _, again = train(folder, stage="again")
    assert_same_run(again, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_at_the_step_boundary_and_the_next_run_equals_an_uninterrupted_one(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    stage = f"stopped-{number.name}"
    with monkeypatch.context() as patch:
        before = at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        code, run = train(folder, stage=stage)
    assert code == ending.STOPPED
    assert (run / "checkpoints" / "last").resolve().name == "step-00000004"
    assert not (run / "hf").exists()
    with monkeypatch.context() as patch:
        after = at_step(patch, -1, lambda: None)
        code, run = train(folder, stage=stage)
    assert code == 0
    assert before + after == [0, 2, 4, 6, 8, 10]
    assert_same_run(run, uninterrupted)


def test_a_stop_signal_in_the_last_step_lets_the_run_end(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, run = train(folder, stage="stopped-at-the-end")
    assert code == ending.DONE
    assert_same_run(run, uninterrupted)
    assert train(folder, stage="stopped-at-the-end")[0] == ending.DONE


def test_an_interrupt_from_the_keyboard_ends_as_one(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a shell starts what it runs in the background with the signal ignored
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert train(folder, stage="interrupted")[0] == ending.INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    monkeypatch.undo()
    code, run = train(folder, stage="interrupted")
    assert code == ending.DONE
    assert_same_run(run, uninterrupted)


def test_a_crash_goes_back_to_the_last_checkpoint_and_replaces_the_rows_after_it(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCut(BaseException):
        pass

    def cut() -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        at_step(patch, 5, cut)
        with pytest.raises(PowerCut):
            train(folder, stage="crashed")
    run = uninterrupted.with_name("crashed")
    assert max(curve(run)) == 5  # one step beyond the checkpoint of step 4
    # What a kill in the middle of writing leaves behind: newer folders that are not whole.
    newest = run / "checkpoints" / "step-00000004"
    shutil.copytree(newest, run / "checkpoints" / "step-00000005.partial")
    shutil.copytree(newest, run / "checkpoints" / "step-00000006")
    (run / "checkpoints" / "step-00000006" / "meta.json").unlink()
    with (run / "logs" / "metrics.csv").open("a") as file:
        file.write("6,76")
    code, run = train(folder, stage="crashed")
    assert code == 0
    assert_same_run(run, uninterrupted)


def test_gradient_accumulation_resumes_at_whole_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulated = ("data.micro_batch_size=1", "run.tokens_per_step=128")
    _, whole = train(folder, *accumulated, stage="accumulated")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        code, _ = train(folder, *accumulated, stage="accumulated-stopped")
    assert code == ending.STOPPED
    _, run = train(folder, *accumulated, stage="accumulated-stopped")
    assert_same_run(run, whole)


def test_accumulated_micro_batches_have_the_gradient_of_one_batch(folder: Path, uninterrupted: Path) -> None:
    _, run = train(folder, "data.micro_batch_size=1", "run.tokens_per_step=128", stage="split")
    for column in ("train/loss", "grad_norm"):
        split, whole = curve(run, column), curve(uninterrupted, column)
        assert split == pytest.approx(whole, rel=1e-3), column  # rounding grows through Adam


def test_a_finished_stage_is_left_alone(
    folder: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: Any) -> None:
        raise AssertionError("a finished stage trained")

    monkeypatch.setattr(TrainingLog, "on_train_start", touched)
    before = (uninterrupted / "hf" / "model.safetensors").stat().st_mtime_ns
    code, _ = train(folder, stage="whole")
    said = capsys.readouterr().out
    assert code == 0 and "nothing to do" in said and "unigram" in said
    assert (uninterrupted / "hf" / "model.safetensors").stat().st_mtime_ns == before


def test_more_steps_continue_a_finished_stage(folder: Path) -> None:
    train(folder, "trainer.max_steps=4", stage="longer")
    code, run = train(folder, stage="longer")
    assert code == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 6
    assert list(curve(run)) == [1, 2, 3, 4, 5, 6]


def test_resume_never_moves_the_old_run_aside(folder: Path) -> None:
    train(folder, "trainer.max_steps=3", stage="twice")
    code, run = train(folder, "trainer.max_steps=3", "run.resume=never", stage="twice")
    assert code == 0
    for kept in (run, run.with_name("twice.1")):
        assert [path.name for path in complete_checkpoints(kept / "checkpoints")] == ["step-00000002", "step-00000003"]
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["resume"] == "auto"  # to train it again goes on


def test_only_the_newest_checkpoints_are_kept(uninterrupted: Path) -> None:
    kept = complete_checkpoints(uninterrupted / "checkpoints")
    assert [path.name for path in kept] == ["step-00000004", "step-00000006"]
    assert (uninterrupted / "checkpoints" / "last").resolve() == kept[-1].resolve()


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_another_micro_batch_after_a_resume_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int
) -> None:
    """Three steps of three micro-batches are no whole number of windows of six or two."""
    step = ("run.tokens_per_step=384", "run.validate_every=2")
    if not (folder / "runs" / "tiny" / "thirds").exists():
        train(folder, *step, stage="thirds")
    stage = f"thirds-then-{micro_batch_size}"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(folder, *step, stage=stage)[0] == ending.STOPPED
    with monkeypatch.context() as patch:
        positions = at_step(patch, -1, lambda: None)
        code, run = train(folder, *step, f"data.micro_batch_size={micro_batch_size}", stage=stage)
    assert code == 0
    assert positions == list(range(18, 36, micro_batch_size))
    for column in ("train/loss", "grad_norm", "val/heldout/loss"):
        expected = curve(run.with_name("thirds"), column)
        assert curve(run, column) == pytest.approx(expected, rel=1e-4), column
    assert list(curve(run, "val/heldout/loss")) == [0, 2, 4, 6]


def test_a_step_that_lightning_and_deepspeed_count_differently_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def lose_one(self: Any, trainer: Any, *_: Any) -> None:
        trainer.strategy.deepspeed_engine.micro_steps += 1

    monkeypatch.setattr(TrainingLog, "on_train_start", lose_one)
    code, _ = train(folder, "run.tokens_per_step=384", stage="miscounted")
    assert code == ending.CRASH
    assert "number 0 of 3 in its step for the trainer, but number 1 for DeepSpeed" in capsys.readouterr().err


def test_tokens_are_counted_as_they_were_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps of 128 tokens and three of 256 are 1,152, whatever the batch is at the end."""
    constant = "model.schedule={name: constant, warmup_steps: 2}"
    train(folder, constant, "trainer.max_steps=3", stage="counted")
    capsys.readouterr()
    _, run = train(folder, constant, "data.micro_batch_size=4", stage="counted")
    assert f"data: {folder}/data/train: 1,152 tokens of " in capsys.readouterr().out  # and so many passes
    rows = [row for row in read_metrics(run / "logs" / "metrics.csv") if "train/loss" in row]
    assert [row["tokens"] for row in rows] == [128, 256, 384, 640, 896, 1152]
    assert json.loads((run / "summary.json").read_text())["tokens"] == 1152
    assert read_meta(complete_checkpoints(run / "checkpoints")[-1])["tokens"] == 1152


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota")])
def test_a_full_disk_ends_in_a_sentence_and_room_is_all_it_takes(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: OSError
) -> None:
    stage = f"full-{error.errno}"
    with monkeypatch.context() as patch:
        original = Trainer.save_checkpoint

        def save(self: Any, *arguments: Any, **keywords: Any) -> None:
            if self.global_step == 4:
                raise error
            original(self, *arguments, **keywords)

        patch.setattr(Trainer, "save_checkpoint", save)
        code, run = train(folder, stage=stage)
    said = capsys.readouterr().err
    assert code == ending.BAD_INPUT and "disk was full" in said and "step 4" in said and "Traceback" not in said
    assert train(folder, stage=stage)[0] == 0
    assert_same_run(run, uninterrupted)


def test_torchs_own_words_for_a_full_disk_count_only_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert not run_folder.disk_is_full(error, tmp_path)
    monkeypatch.setattr(run_folder, "_ALMOST_FULL", 1 << 62)
    assert run_folder.disk_is_full(error, tmp_path)


def test_a_run_that_saves_nothing_needs_no_room_and_keeps_its_figures(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    usage = shutil.disk_usage(folder)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert train(folder, stage="roomy")[0] == ending.BAD_INPUT
    assert "run.keep_checkpoints=2" in capsys.readouterr().err
    code, run = train(folder, "run.checkpoint_every=null", stage="unsaved")
    assert code == 0 and curve(run) == curve(uninterrupted)
    assert not (run / "hf").exists() and not any((run / "checkpoints").iterdir())
    assert json.loads((run / "summary.json").read_text())["step"] == 6
    said = capsys.readouterr().out
    assert "metrics:" in said and "checkpoints:" not in said and "weights:" not in said
