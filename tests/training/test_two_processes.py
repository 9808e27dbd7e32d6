"""Two gloo processes train the same model as one, go on as one, and stop together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from s2 import ending
from s2.training.cli import main
from s2.training.run_folder import complete_checkpoints, read_meta
from tests.training.processes import start
from tests.training.tiny import curve, tiny_recipe, write_recipe

TWO = ("trainer.devices=2", "data.micro_batch_size=1")


@pytest.mark.parametrize("strategy", [pytest.param("zero_1", marks=pytest.mark.nightly), "zero_3"])
def test_uneven_masks_on_two_ranks_give_the_loss_of_one_rank_and_the_run_goes_on_there(
    tmp_path: Path, strategy: str
) -> None:
    recipe = tiny_recipe(tmp_path, "two")
    recipe["data"]["class_path"] = "tests.training.masked_data.MaskedDataModule"
    recipe["model"]["schedule"] = {"name": "constant"}
    recipe["trainer"]["strategy"] = strategy
    path = write_recipe(tmp_path, recipe)
    assert main([str(path), "run.stage=one"]) == 0
    process = start(path, *TWO, "trainer.max_steps=4")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    runs = tmp_path / "runs" / "tiny"
    meta = read_meta(complete_checkpoints(runs / "two" / "checkpoints")[-1])
    assert (meta["step"], meta["world_size"]) == (4, 2)
    assert main([str(path)]) == 0  # steps 5 and 6 on one rank, from two ranks' optimizer shards
    for column in ("train/loss", "grad_norm"):
        assert curve(runs / "two", column) == pytest.approx(curve(runs / "one", column), rel=1e-5), column
    weights, expected = (load_file(runs / stage / "hf" / "model.safetensors") for stage in ("two", "one"))
    for name, value in weights.items():
        assert (value - expected[name]).abs().max() < 1e-5, name


@pytest.mark.nightly
def test_two_ranks_whose_weights_are_sharded_start_from_a_folder_as_one_does(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "start")
    recipe["trainer"] |= {"strategy": "zero_3", "max_steps": 3}
    path = write_recipe(tmp_path, recipe)
    assert main([str(path), "trainer.strategy=auto"]) == 0
    runs = tmp_path / "runs" / "tiny"
    init_from = f"model.init_from={runs}/start/hf"
    assert main([str(path), init_from, "run.stage=one"]) == 0
    process = start(path, *TWO, init_from, "run.stage=two")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for column in ("train/loss", "val/heldout/loss"):
        assert curve(runs / "two", column) == pytest.approx(curve(runs / "one", column), rel=1e-5), column
    assert curve(runs / "one", "val/heldout/loss")[0] == curve(runs / "start", "val/heldout/loss")[3]


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["zero_1", "zero_3"])
def test_fewer_ranks_after_a_resume_change_nothing(tmp_path: Path, strategy: str) -> None:
    """Three steps of one micro-batch each are no whole number of windows of two or six; held-out sets stay the same."""
    recipe = tiny_recipe(tmp_path, "one")
    recipe["model"]["schedule"] = {"name": "constant"}
    recipe["run"] |= {"tokens_per_step": 384, "validate_every": 2, "checkpoint_every": 3}
    recipe["trainer"]["strategy"] = strategy
    path = write_recipe(tmp_path, recipe)
    assert main([str(path)]) == 0
    expected = tmp_path / "runs" / "tiny" / "one"
    process = start(path, "run.stage=rows-3", "trainer.devices=2", "data.micro_batch_size=3", "trainer.max_steps=3")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    shutil.copytree(expected.with_name("rows-3"), expected.with_name("rows-1"), symlinks=True)
    for micro_batch_size in (3, 1):  # ranks alone, ranks and micro-batch
        run = expected.with_name(f"rows-{micro_batch_size}")
        assert main([str(path), f"run.stage={run.name}", f"data.micro_batch_size={micro_batch_size}"]) == 0
        for column in ("train/loss", "grad_norm", "val/heldout/loss"):
            values = curve(run, column)
            values.pop(3, None) if column.startswith("val/") else None  # the end of the first part
            assert values == pytest.approx(curve(expected, column), rel=1e-4), (column, micro_batch_size)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_weights_gathered_ahead_do_not_disturb_checkpointing(tmp_path: Path, mode: str) -> None:
    """After a validation DeepSpeed knows which weights come next, and gathers them ahead in the first forward of
    training, but not when that forward is recomputed."""
    recipe = tiny_recipe(tmp_path, "whole")
    recipe["model"] |= {"activation_checkpointing": mode, "schedule": {"name": "constant"}}
    recipe["trainer"]["max_steps"] = 3
    path = write_recipe(tmp_path, recipe)
    assert main([str(path)]) == 0
    settings = {"stage": 3, "persistence_threshold": 0, "reuse_distance": 0}
    strategy = json.dumps({"class_path": "s2.training.strategy.ZeROStrategy", "init_args": settings})
    process = start(path, *TWO, "run.stage=sharded", f"trainer.strategy={strategy}")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for column in ("train/loss", "grad_norm", "val/heldout/loss"):
        whole, sharded = (curve(tmp_path / "runs" / "tiny" / stage, column) for stage in ("whole", "sharded"))
        assert sharded == pytest.approx(whole, rel=1e-5), column


def test_a_signal_to_every_process_of_a_job_ends_in_one_checkpoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "job")
    recipe["data"]["init_args"]["num_workers"] = 1  # its worker gets the signal too
    path = write_recipe(tmp_path, recipe)
    process = start(path, *TWO, "trainer.max_steps=100000", "run.checkpoint_every=100000")
    run = tmp_path / "runs" / "tiny" / "job"
    deadline = time.monotonic() + 200
    while len(curve(run)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ending.STOPPED, errors
    assert "stopped at step" in errors and "Traceback" not in errors
    assert len(complete_checkpoints(run / "checkpoints")) == 1
