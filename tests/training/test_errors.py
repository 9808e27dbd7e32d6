"""Whatever is wrong with a recipe is said in one line that names it, before any work is done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from s2 import ending
from s2.locks import lock
from s2.recipe import apply_overrides, load_recipe
from s2.training import cli
from s2.training.cli import main
from s2.training.config import ModelSection, RunConfig, names_in_source
from s2.training.saving import Preempted
from tests.training.tiny import tiny_recipe, train, write_recipe

ROOT = Path(__file__).parents[2]
_MAPPINGS = ("run", "trainer", "data", "data.init_args", "model", "model.optimizer", "model.schedule")


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the tiny recipe with overrides that must be refused; returns the one line said."""

    def run(*overrides: str, recipe: dict[str, Any] | None = None) -> str:
        path = write_recipe(tmp_path, recipe or tiny_recipe(tmp_path))
        assert main([str(path), *overrides]) == ending.BAD_INPUT
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in error, error
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("override", "named", "hint"),
    [
        ("trainer.max_step=5", "trainer.max_step", "trainer.max_steps"),
        ("model.optimizer.learning_rate=1", "model.optimizer.learning_rate", "model.optimizer.lr"),
        ("model.config.rope_thetas=1e6", "rope_thetas", "rope_theta"),
        ("data.sequence_len=128", "data.sequence_len", "data.seq_len"),
        ("run.stag=x", "run.stag", "run.stage"),
        ("modle.compile=true", "modle", "model.compile"),
    ],
)
def test_an_unknown_key_names_itself_and_the_closest_known_one(
    refuse: Callable[..., str], override: str, named: str, hint: str
) -> None:
    error = refuse(override)
    assert named in error and hint in error


def test_held_out_sets_that_depend_on_the_ranks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "trainer.limit_val_batches=2", "trainer.max_steps=3")[0] == 0
    said = capsys.readouterr().out
    assert "limit_val_batches=2 counts micro-batches of each rank" in said and "max_windows" in said


def test_wrong_keys_and_values_are_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    program = (
        "import sys; from s2.training.cli import main; c = main(sys.argv[1:]); print(list(sys.modules)); sys.exit(c)"
    )
    keys = ("trainer.max_step=5", "model.config.rope_thetas=1", "data.sequence_len=1", "run.stag=x")
    values = ("trainer.max_steps=many", "model.optimizer.lr=-1", "run.tokens_per_step=x", "seed_everything=a")
    for override in (*keys, *values):
        done = subprocess.run(
            [sys.executable, "-c", program, str(recipe), override], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        key, _, value = override.partition("=")
        assert key in done.stderr and ("unknown key" if override in keys else value) in done.stderr
        assert "'torch'" not in done.stdout and "'lightning'" not in done.stdout


def test_what_cannot_be_read_from_source_is_left_to_the_class() -> None:
    assert {"max_steps", "strategy"} <= set(names_in_source("lightning.pytorch.trainer.trainer", "Trainer"))
    for unknown in (
        ("tests.training.masked_data", "MaskedDataModule"),
        ("no.such.module", "Class"),
        ("json", "NoClass"),
    ):
        assert names_in_source(*unknown) == []


def test_an_unknown_key_in_the_file_names_the_file(refuse: Callable[..., str], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["trainer"]["max_step"] = 5
    error = refuse(recipe=recipe)
    assert "trainer.max_step " in error and "pretrain.yaml" in error and "trainer.max_steps" in error


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_steps=many", ["trainer.max_steps=many", "a whole number"]),
        ("trainer.max_steps=0", ["trainer.max_steps", "0"]),
        ("model.schedule.name=cosin", ["model.schedule.name", "cosin", "cosine"]),
        ("model.schedule.warmup_steps=6", ["warmup_steps=6", "max_steps=6"]),
        ("model.optimizer.lr=-1", ["model.optimizer.lr=-1"]),
        ("model.config.attention_layout=L1V2+dens1", ["attention_layout", "L1V2+dens1"]),
        ("model.config.attention_layout=L1V2+dense7", ["dense layer 7", "0 to 1"]),
        ("model.config.num_key_value_heads=3", ["num_key_value_heads=3"]),
        ("data.seq_len=128", ["data.seq_len=128", "max_position_embeddings=64"]),
        ("data.validation.0.seq_len=128", ["validation heldout", "128", "max_position_embeddings=64"]),
        ("data.class_path=data.Missing", ["data.class_path", "data.Missing"]),
        ("run.tokens_per_step=100", ["tokens_per_step=100", "multiple of 128"]),
        ("run.stage=a/b", ["run.stage='a/b'"]),
        ("trainer.strategy=zero3", ["trainer.strategy=zero3", "did you mean zero_3", "zero_1, zero_2"]),
        ("trainer.precision=fp8", ["trainer.precision=fp8", "bf16-mixed"]),
        ("trainer.gradient_clip_val=-1", ["trainer.gradient_clip_val=-1"]),
        ("trainer.gradient_clip_val=.inf", ["trainer.gradient_clip_val=inf"]),
        ("run.loss_spike_factor=.inf", ["run.loss_spike_factor=inf"]),
        ("model.config.rope_scaling={rope_type: linear, factor: .nan}", ["rope_scaling.factor=nan"]),
        ("trainer.log_every_n_steps=0", ["trainer.log_every_n_steps=0"]),
        ("trainer.logger={class_path: lightning.pytorch.loggers.WandbLogger}", ["WandbLogger", "wandb", "install"]),
        ("run.tokens_per_step=.inf", ["run.tokens_per_step=inf", "whole number"]),
        ("run.stage=..", ["run.stage='..'"]),
        ("run.resume=", ["run.resume", "got null"]),
        ("trainer.max_steps=", ["trainer.max_steps", "got null"]),
        ("model.optimizer.lr=", ["model.optimizer.lr", "got null"]),
        ("model.optimizer.lr=.inf", ["model.optimizer.lr=inf"]),
        ("model.optimizer.weight_decay=.nan", ["model.optimizer.weight_decay=nan"]),
        ("model.optimizer.eps=-1", ["model.optimizer.eps=-1"]),
        ("seed_everything=-1", ["seed_everything=-1", "0 to"]),
        ("trainer.devices=x", ["pretrain.yaml", "devices"]),
        ("trainer.accelerator=tpu", ["pretrain.yaml", "torch_xla"]),
        ("trainer.val_check_interval=7", ["trainer.val_check_interval=7", "run.validate_every"]),
        ("trainer.default_root_dir=x", ["trainer.default_root_dir=x", "run.root"]),
        ("data.class_path=json.JSONDecoder", ["data.class_path=json.JSONDecoder", "subclass of LightningDataModule"]),
        ("data.class_path=.datamodule.X", ["data.class_path=.datamodule.X", "package.module.Class"]),
        ("data.class_path=data.datamodule", ["data.class_path=data.datamodule"]),
        ("data.class_path=x", ["data.class_path=x", "package.module.Class"]),
        ("data.class_path=nowhere.X", ["data.class_path=nowhere.X", "No module named 'nowhere'"]),
        ("data.class_path=data.datamodule.PackdDataModule", ["did you mean PackedDataModule"]),
        ("trainer.callbacks=[{class_path: Nope}]", ["trainer.callbacks[0].class_path=Nope", "package.module.Class"]),
        (
            "trainer.callbacks=[{class_path: lightning.pytorch.callbacks.LearningRateMonitor, init_args: {every: 1}}]",
            ["trainer.callbacks[0].every", "trainer.callbacks[0].log_weight_decay"],
        ),
        *[
            (f"{key}={value}", [f"{key}=", "pretrain.yaml", "a mapping"])
            for key in _MAPPINGS
            for value in ("", "[]", "3")
        ],
        ("run.tokens_per_step=1.5", ["run.tokens_per_step=1.5", "whole number"]),
        ("run.resume=yes", ["run.resume=yes", "auto or never"]),
        ("model.compile=yes", ["model.compile=yes", "true or false"]),
        ("data.document_mask=on", ["data.document_mask=on", "true or false"]),
        ("data.micro_batch_size=0", ["data.micro_batch_size", "got 0"]),
        ("data.seq_len=64.5", ["data.seq_len=64.5", "a whole number"]),
        ("data.mixture.0.wieght=1", ["data.mixture[0]", "wieght"]),
        ("model.init_from=runs/nowhere/pretrain/hf", ["runs/nowhere/pretrain/hf", "make pretrain RECIPE=nowhere"]),
        ("model.init_from=runs/x/extend-32k/hf", ["make extend RECIPE=x TO=32k"]),
        ("max_steps", ["'max_steps'", "key=value"]),
        ("data.mixture.3.weight=1", ["data.mixture", "'3'"]),
    ],
)
def test_a_wrong_value_names_key_value_and_remedy(
    refuse: Callable[..., str], override: str, expected: list[str]
) -> None:
    error = refuse(override)
    for part in expected:  # `key=value`, or the key, what it takes, and then the value
        key, equals, value = part.partition("=")
        assert re.search(re.escape(key) + ("(=|: .*)" if equals else "") + re.escape(value), error), (part, error)
    assert "Namespace(" not in error and "Union" not in error and "<class" not in error
    assert "pretrain.yaml" in error or override in ("max_steps", "data.mixture.3.weight=1")  # these are in no file


def test_a_value_is_said_to_be_of_the_command_line_where_it_is(refuse: Callable[..., str], tmp_path: Path) -> None:
    betas = "model.optimizer.betas[0]: expected a number from 0 to below 1, got 2"
    assert refuse("model.optimizer.betas=[2, 0.9]").endswith(f"pretrain.yaml: {betas} (on the command line)")
    recipe = tiny_recipe(tmp_path)
    recipe["model"]["optimizer"]["betas"] = [2, 0.9]
    assert refuse("model.optimizer.lr=1e-3", recipe=recipe).endswith(f"pretrain.yaml: {betas}")


def test_a_folder_of_shards_that_is_not_there_is_named_with_its_key(refuse: Callable[..., str]) -> None:
    for key in ("data.mixture", "data.validation"):
        said = refuse(f"{key}.0.path=nowhere")
        assert f"pretrain.yaml: {key}[0].path: shard folder nowhere does not exist" in said
        assert said.endswith("(on the command line)")


def test_what_the_data_refuses_is_named_with_its_key_and_the_recipe(refuse: Callable[..., str]) -> None:
    for settings, said in (
        ({"data.mixture.0.source": "poems"}, "data.mixture[0].source: "),
        ({"data.mixture.0.min_tokens": "100000000"}, "data.mixture[0]: none of the "),
    ):
        assert f"pretrain.yaml: {said}" in refuse(*(f"{key}={value}" for key, value in settings.items()))


def test_a_missing_corpus_is_named(refuse: Callable[..., str]) -> None:
    assert "nowhere/*.parquet" in refuse("data.prepare.sources=['nowhere/*.parquet']", "data.prepare.output=nowhere")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(refuse: Callable[..., str]) -> None:
    error = refuse("model.config.vocab_size=290")
    assert "pretrain.yaml: model.config.vocab_size: 290 is smaller than the tokenizer's 300" in error


def test_a_missing_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path)
    del recipe["run"]["stage"]
    path = tmp_path / "nameless.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main([str(path)]) == ending.BAD_INPUT
    assert f"error: {path}: run: missing key 'stage'" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_not_resumed(refuse: Callable[..., str], tmp_path: Path) -> None:
    train(tmp_path, "trainer.max_steps=3")
    error = refuse("model.config.intermediate_size=96")
    assert "intermediate_size=64" in error and "96" in error and "step-00000003" in error
    error = refuse("model.config.attention_layout=dense")
    assert "attention_layout='L1V2-inter'" in error


def test_a_checkpoint_of_other_data_is_not_resumed(refuse: Callable[..., str], tmp_path: Path) -> None:
    train(tmp_path, "trainer.max_steps=3")
    assert "seed" in refuse("data.seed=5")


def test_a_checkpoint_that_began_with_other_weights_is_not_resumed(refuse: Callable[..., str], tmp_path: Path) -> None:
    """A resume reads none, so that summary.json would name a start that there never was."""
    _, other = train(tmp_path, "trainer.max_steps=3", "seed_everything=8", stage="other")
    _, run = train(tmp_path, "trainer.max_steps=3")
    error = refuse(f"model.init_from={other}/hf")
    assert f"model.init_from=None but the recipe says '{other}/hf'" in error and "step-00000003" in error
    start = f"model.init_from={run}/hf"
    train(tmp_path, "trainer.max_steps=3", start, stage="next")
    assert f"{run}/hf' but the recipe says '{other}/hf'" in refuse(f"model.init_from={other}/hf", "run.stage=next")
    assert f"{run}/hf' but the recipe says None" in refuse("run.stage=next")
    alike = shutil.copytree(run / "hf", tmp_path / "copy")
    assert train(tmp_path, "trainer.max_steps=4", f"model.init_from={alike}", stage="next")[0] == 0
    moved = shutil.move(alike, tmp_path / "moved")
    assert train(tmp_path, "trainer.max_steps=5", f"model.init_from={moved}", stage="next")[0] == 0


def test_weights_that_do_not_fit_are_named(refuse: Callable[..., str], tmp_path: Path) -> None:
    _, run = train(tmp_path, "trainer.max_steps=3")
    error = refuse(f"model.init_from={run}/hf", "model.config.intermediate_size=96", "run.stage=next")
    assert "mlp.gate_proj.weight" in error and "[64, 32]" in error and "[96, 32]" in error


def test_a_finished_run_without_its_export_says_what_to_do(refuse: Callable[..., str], tmp_path: Path) -> None:
    _, run = train(tmp_path)
    (run / "hf" / "config.json").unlink()
    error = refuse()
    assert "hf/config.json" in error and "step-00000006" in error
    assert "raise trainer.max_steps above 6 to go on" in error
    error = refuse("trainer.max_steps=4")  # of a stage that was to be longer
    assert f"trainer.max_steps=4: {run} is trained to step 6" in error and "remove" not in error
    assert "raise trainer.max_steps above 6 to go on" in error
    assert train(tmp_path, "trainer.max_steps=7")[0] == ending.DONE  # as it says


def test_a_missing_recipe_and_bad_yaml_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == ending.BAD_INPUT
    assert "none.yaml does not exist" in capsys.readouterr().err
    broken = tmp_path / "broken.yaml"
    broken.write_text("run:\n  recipe: a\n  stage: [b\n")
    assert main([str(broken)]) == ending.BAD_INPUT
    assert f"{broken}:4: not valid YAML" in capsys.readouterr().err


def test_the_command_line_exits_with_2_and_one_line() -> None:
    command = [sys.executable, "-m", "s2.training.cli", "recipes/demo/pretrain.yaml", "trainer.max_step=5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == ending.BAD_INPUT
    assert done.stderr.strip() == (
        "error: unknown key trainer.max_step on the command line; did you mean trainer.max_steps?"
    )


def test_overrides_reach_lists_init_args_and_floats_without_a_point(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny_recipe(tmp_path)))
    arguments = ["model.config.rope_theta=8e6", "data.mixture.0.weight=0.5", "--data.seq_len=32", "run.resume=never"]
    keys = apply_overrides(recipe, arguments)
    assert recipe["model"]["config"]["rope_theta"] == 8e6
    assert recipe["data"]["init_args"]["mixture"][0]["weight"] == 0.5
    assert recipe["data"]["init_args"]["seq_len"] == 32
    assert keys[2] == "data.seq_len"
    assert json.loads(json.dumps(recipe))["run"]["resume"] == "never"


@pytest.mark.parametrize(
    ("launcher", "code"),
    [
        ({}, ending.STOPPED),
        ({"LOCAL_RANK": "0"}, ending.STOPPED),
        ({"LOCAL_RANK": "1"}, 0),
        ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, ending.STOPPED),
    ],
)
def test_only_the_main_process_tells_that_a_run_was_stopped(launcher, code, monkeypatch, capsys):
    """One that Lightning started would have the main process killed while it closes down."""

    def stop(*_):
        raise Preempted("stopped at step 4")

    monkeypatch.setattr(cli, "train", stop)
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # of a run in this process
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["recipe.yaml"]) == code
    assert "stopped at step 4" in capsys.readouterr().err


def test_a_second_run_in_one_folder_is_refused_and_names_the_first(refuse: Callable[..., str], tmp_path: Path) -> None:
    _, run = train(tmp_path, "trainer.max_steps=3")
    metrics = (run / "logs" / "metrics.csv").read_text()
    with lock(run):
        error = refuse()
        assert str(run) in error and f"process {os.getpid()} on " in error
        assert "process" in refuse("run.resume=never")
    assert (run / "logs" / "metrics.csv").read_text() == metrics and not run.with_name("pretrain.1").exists()


def test_what_was_changed_before_a_resume_is_said_and_in_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = train(tmp_path, "trainer.max_steps=3")
    capsys.readouterr()
    changed = ("model.optimizer.weight_decay=0.5", "model.optimizer.betas=[0.8,0.9]", "data.document_mask=false")
    assert train(tmp_path, *changed)[0] == 0
    said = capsys.readouterr().out
    for line in ("model.optimizer.weight_decay: 0.1 -> 0.5", "data.init_args.document_mask: True -> False", "betas"):
        assert line in said
    state = torch.load(next((run / "checkpoints" / "last").rglob("*optim_states.pt")), weights_only=False)
    groups = state["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0} and groups[0]["betas"] == (0.8, 0.9)
    assert train(tmp_path, *changed, "model.optimizer.lr=1e-3")[0] == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said and "not trained with" in said and "model.optimizer.lr: 0.003 -> 0.001" in said


@pytest.mark.parametrize("strategy", ["zero_3", "auto"])
def test_optimizer_states_of_another_form_are_refused_by_name(
    refuse: Callable[..., str], tmp_path: Path, strategy: str
) -> None:
    train(tmp_path, "trainer.max_steps=3")
    error = refuse(f"trainer.strategy={strategy}")
    assert "saved by ZeRO stage 1" in error and "step-00000003" in error


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_a_run_folder_that_cannot_be_written_to_is_refused_before_training(
    name: str, refuse: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny" / "pretrain"
    run.mkdir(parents=True)
    (run / name).write_text("a file")
    assert str(run / name) in refuse() and not (run / "config.yaml").exists()


def test_runs_and_weights_may_lie_below_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(RunConfig("a", "b", root="~/runs").folder) == "/home/someone/runs/a/b"
    assert ModelSection(init_from="~/hf").init_from == "/home/someone/hf"


def test_a_run_without_a_logger_has_none(tmp_path: Path) -> None:
    steps = ("trainer.max_steps=1", "model.schedule.warmup_steps=0")
    code, run = train(tmp_path, "trainer.logger=false", *steps)
    assert code == 0 and not (run / "logs" / "tensorboard").exists()
