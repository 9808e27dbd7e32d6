"""Whatever is broken, and whenever a run is killed, it goes on from a whole checkpoint with the same losses.

What is broken and when is drawn at random from a seed; S2_RANDOM_CASES=100 draws that many.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal

from s2 import ending, files
from s2.training import resize, run_folder
from s2.training.run_folder import complete_checkpoints
from tests.training.processes import start
from tests.training.tiny import curve, tiny_recipe, train, write_recipe

SEEDS = range(int(os.environ.get("S2_RANDOM_CASES", "2")))
CONSTANT = "model.schedule={name: constant, warmup_steps: 2}"  # a run of 5 steps is the beginning of one of 6


class PowerCut(BaseException):
    """Nothing after it runs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    code, run = train(folder, CONSTANT, stage="whole")
    assert code == 0
    return run


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """The first five steps of it, with the checkpoints of steps 4 and 5."""
    code, run = train(folder, CONSTANT, "trainer.max_steps=5", stage="stopped")
    assert code == 0
    return run


def assert_same_losses(run: Path, reference: Path, **tolerance: float) -> None:
    for column in ("train/loss", "lr", "grad_norm"):
        found, expected = curve(run, column), curve(reference, column)
        assert found == (pytest.approx(expected, **tolerance) if tolerance else expected), column
    assert complete_checkpoints(run / "checkpoints")[-1].name == "step-00000006"


def _truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def _empty(file: Path, rng: random.Random) -> None:
    os.truncate(file, 0)


def _remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def _overwrite(file: Path, rng: random.Random) -> None:
    """200 bytes, as a failing disk leaves them; the size stays."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(max(1, len(data) - 200))
    data[at : at + 200] = bytes(byte ^ 0x5A for byte in data[at : at + 200])
    file.write_bytes(data)


def break_newest(run: Path, rng: random.Random) -> Path:
    """Break one file of the newest checkpoint in one way."""
    newest = complete_checkpoints(run / "checkpoints")[-1]
    file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    way = rng.choice([_truncate, _empty, _remove, _overwrite])
    print(f"{way.__name__} {file}")
    way(file, rng)
    return file


@pytest.mark.parametrize("seed", SEEDS)
def test_a_broken_file_of_the_newest_checkpoint_is_named_and_passed_over(
    folder: Path, reference: Path, stopped: Path, seed: int, capfd: Any
) -> None:
    stage = f"broken-{seed}"
    shutil.copytree(stopped, stopped.with_name(stage), symlinks=True)
    file = break_newest(stopped.with_name(stage), random.Random(seed))
    code, run = train(folder, CONSTANT, stage=stage)
    said = capfd.readouterr()
    assert code == 0, said.err
    if file.name != files.MARK:  # a checkpoint is whole without its mark
        assert "is damaged" in said.out and str(file) in said.out and "step-00000004" in said.out
    assert_same_losses(run, reference)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_killed_anywhere_in_saving_goes_on(
    folder: Path, reference: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power goes at the n-th of the calls by which saving reaches the disk."""
    rng = random.Random(1000 + seed)
    left = rng.randrange(1, 60)
    stage = f"killed-{seed}"

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                print(f"the power goes at {function.__name__}{arguments}")
                raise PowerCut
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(files, "inventory", counted(files.inventory))
        with contextlib.suppress(PowerCut):
            train(folder, CONSTANT, stage=stage)
    code, run = train(folder, CONSTANT, stage=stage)
    assert code == 0
    assert_same_losses(run, reference)
    assert not list((run / "checkpoints").glob("*.partial"))


@pytest.mark.nightly
def test_two_ranks_killed_and_damaged_go_on(folder: Path, reference: Path, seed: int) -> None:
    recipe = write_recipe(folder, tiny_recipe(folder, "two"))
    two = (CONSTANT, "trainer.devices=2", "data.micro_batch_size=1")
    rng = random.Random(seed)
    process = start(recipe, *two)
    run = folder / "runs" / "tiny" / "two"
    deadline = time.monotonic() + 200
    while not len(complete_checkpoints(run / "checkpoints")) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(rng.random() / 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    break_newest(run, rng)
    process = start(recipe, *two)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_losses(run, reference, rel=1e-4)


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_leaves_them(
    folder: Path, stopped: Path, capsys: Any
) -> None:
    shutil.copytree(stopped, stopped.with_name("hopeless"), symlinks=True)
    for checkpoint in complete_checkpoints(stopped.with_name("hopeless") / "checkpoints"):
        (checkpoint / "meta.json").write_text("")
    code, run = train(folder, CONSTANT, stage="hopeless")
    error = capsys.readouterr().err
    assert code == ending.DAMAGED
    assert "meta.json" in error and "is empty" in error and "run.resume=never" in error
    assert len(complete_checkpoints(run / "checkpoints")) == 2
    assert train(folder, CONSTANT, "run.resume=never", stage="hopeless")[0] == 0
    assert len(complete_checkpoints(run.with_name("hopeless.1") / "checkpoints")) == 2


def test_a_damaged_summary_of_a_finished_run_is_named_with_the_way_out(
    folder: Path, stopped: Path, capsys: Any
) -> None:
    run = stopped.with_name("summary")
    shutil.copytree(stopped, run, symlinks=True)
    for text in ("", "{}", "[]", '{"recipe": 3'):
        (run / "summary.json").write_text(text)
        assert train(folder, "trainer.max_steps=5", CONSTANT, stage="summary")[0] == ending.DAMAGED
        error = capsys.readouterr().err
        assert f"{run / 'summary.json'} is not as it was written" in error and "remove the newest folder" in error


def test_what_a_killed_process_left_while_saving_another_step_is_removed(folder: Path, stopped: Path) -> None:
    run = stopped.with_name("leftover")
    shutil.copytree(stopped, run, symlinks=True)
    ours = files.make_folder(run / "checkpoints" / "step-00000099.partial", run_folder.KIND)
    (ours / "state").write_text("94 GB")
    theirs = run / "checkpoints" / "step-00000098.partial"
    theirs.mkdir()
    (theirs / "note").write_text("x")
    assert train(folder, CONSTANT, stage="leftover")[0] == 0
    assert not ours.exists() and (theirs / "note").read_text() == "x"


def test_a_note_beside_a_checkpoint_outlives_it(folder: Path, stopped: Path) -> None:
    run = stopped.with_name("noted")
    shutil.copytree(stopped, run, symlinks=True)
    note = run / "checkpoints" / "step-00000004" / "good.txt"
    note.write_text("the one before the spike")
    assert train(folder, CONSTANT, "run.keep_checkpoints=1", stage="noted")[0] == 0
    assert note.read_text() == "the one before the spike"
    assert sorted(path.name for path in note.parent.iterdir()) == [files.MARK, "good.txt"]


def test_runs_of_earlier_versions_are_resumed_and_their_checkpoints_rotated(
    folder: Path, reference: Path, stopped: Path, capsys: Any
) -> None:
    """As the first version that could resume left them: no marks, no checksums, no recipe, no count of tokens."""
    run = stopped.with_name("earlier")
    shutil.copytree(stopped, run, symlinks=True)
    for checkpoint in complete_checkpoints(run / "checkpoints"):
        meta = files.read_json(checkpoint / "meta.json")
        for key in ("files", "recipe", "precision"):
            del meta[key]
        (checkpoint / "meta.json").write_text(json.dumps(meta))
        (checkpoint / files.MARK).unlink()
        model = checkpoint / "state" / "checkpoint" / "mp_rank_00_model_states.pt"
        state = torch.load(model, weights_only=False)
        del state["tokens"]
        state["callbacks"].clear()
        state["PackedDataModule"]["micro_steps"] = state["global_step"]
        torch.save(state, model)
    (run / "hf" / files.MARK).unlink()
    summary = files.read_json(run / "summary.json")
    del summary["data"], summary["skipped_steps"], summary["validation"]["heldout"]["source_loss"]
    files.write_json(run / "summary.json", summary)

    five = ("trainer.max_steps=5", CONSTANT)
    assert train(folder, *five, stage="earlier")[0] == 0
    assert "nothing to do" in capsys.readouterr().out
    code, _ = train(folder, CONSTANT, "run.keep_checkpoints=1", stage="earlier")
    assert code == 0
    assert_same_losses(run, reference)
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step-00000006"]
    assert (run / "hf.1" / "config.json").is_file() and (run / "hf" / files.MARK).is_file()
    assert files.read_json(run / "summary.json")["tokens"] == 6 * 128


def test_a_state_is_converted_anew_for_every_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that is there may be damaged, or lack files of ranks that the last resume did not have."""

    def convert(arguments: argparse.Namespace) -> None:
        folder = Path(arguments.output_folder)
        folder.mkdir()
        (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_text("states")

    monkeypatch.setattr(ds_to_universal, "main", convert)
    universal = resize.universal_folder(tmp_path / "state")
    for ranks in (3, 2):
        resize.to_universal(tmp_path / "state", ranks)
        assert len([*universal.rglob("*.pt")]) == ranks
        (universal / resize.TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["state-universal"] and files.remove_folder(universal)


def _copy(stopped: Path, stage: str) -> tuple[Path, Path, Path]:
    """A copy of the stopped run and its checkpoints of steps 4 and 5."""
    run = stopped.with_name(stage)
    shutil.copytree(stopped, run, symlinks=True)
    fourth, fifth = complete_checkpoints(run / "checkpoints")
    return run, fourth, fifth


def _published(run: Path, step: int, keep: int) -> list[str]:
    """Publish a checkpoint of `step`, made from the newest; returns the names of those that are there then."""
    checkpoints = run / "checkpoints"
    meta = run_folder.read_meta(complete_checkpoints(checkpoints)[-1])
    partial = run_folder.new_checkpoint(checkpoints, step)
    shutil.copytree(complete_checkpoints(checkpoints)[-1] / "state", partial / "state")
    run_folder.publish(partial, run_folder.checkpoint_folder(checkpoints, step), {**meta, "step": step}, keep)
    return [path.name for path in complete_checkpoints(checkpoints)]


def test_a_new_checkpoint_is_kept_beside_a_damaged_one_of_a_later_step(stopped: Path) -> None:
    run, fourth, fifth = _copy(stopped, "later")
    _overwrite(fifth / "state" / "checkpoint" / "mp_rank_00_model_states.pt", random.Random(0))  # the size stays
    fifth.rename(later := fifth.with_name("step-00000008"))
    files.write_json(later / "meta.json", {**run_folder.read_meta(later), "step": 8})
    assert _published(run, 5, keep=1) == ["step-00000005", "step-00000008"] and not fourth.exists()


def test_a_renamed_checkpoint_is_passed_over(folder: Path, reference: Path, stopped: Path, capfd: Any) -> None:
    run, _, fifth = _copy(stopped, "renamed")
    fifth.rename(fifth.with_name("step-00000900"))
    code, run = train(folder, CONSTANT, "run.keep_checkpoints=1", stage="renamed")
    said = capfd.readouterr()
    assert code == 0, said.err
    assert "step-00000900/meta.json is that of step 5" in said.out
    for column in ("train/loss", "lr", "grad_norm"):
        assert curve(run, column) == curve(reference, column), column
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000006", "step-00000900", "last"}


@pytest.mark.parametrize(
    "change",
    [{"step": "5"}, {"step": None}, {"tokens": True}, {"model": []}, {"files": []}, {"files": {"state/latest": 7}}],
    ids=str,
)
def test_a_meta_file_of_another_form_is_damage(stopped: Path, change: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000005"
    shutil.copytree(complete_checkpoints(stopped / "checkpoints")[-1], checkpoint)
    assert run_folder.damage(checkpoint, checksums=True) is None
    files.write_json(checkpoint / "meta.json", {**run_folder.read_meta(checkpoint), **change})
    assert "meta.json is not a checkpoint's" in (run_folder.damage(checkpoint, checksums=True) or "")


def test_what_stands_in_the_way_of_a_checkpoint_moves_aside(stopped: Path, capsys: Any) -> None:
    run, _, fifth = _copy(stopped, "in-the-way")
    (fifth / files.MARK).unlink()  # as a copy by `cp a/* b` leaves it
    for name in ("step-00000007", "step-00000007.partial"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "notes.txt").write_text("mine")
    assert _published(run, 5, keep=2) == ["step-00000004", "step-00000005"]
    assert _published(run, 7, keep=2) == ["step-00000005", "step-00000007"]
    assert (run / "checkpoints" / "step-00000005.1" / "meta.json").is_file()
    for name in ("step-00000007.1", "step-00000007.partial.1"):
        assert (run / "checkpoints" / name / "notes.txt").read_text() == "mine"
    assert capsys.readouterr().out.count("it is now") == 3


def test_a_file_of_another_size_is_damage_without_a_look_into_it(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "weights").write_bytes(b"abc")
    meta = {"step": 1, "tokens": 64, "model": {}, "files": files.inventory(folder)}
    files.write_json(folder / "meta.json", meta)
    assert run_folder.damage(folder, checksums=False) is None
    (folder / "state" / "weights").write_bytes(b"ab")
    assert "has 2 bytes" in str(run_folder.damage(folder, checksums=False))
