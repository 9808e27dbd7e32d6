"""From a resolved recipe to a running trainer: devices, the run folder, checks, resume."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from tqdm import tqdm

from s2 import ending, files
from s2.locks import acquire
from s2.recipe import differences, dump_yaml
from s2.training import memory, saved, slurm
from s2.training.callbacks import TrainingLog
from s2.training.checkpoint import RunCheckpoint
from s2.training.finish import Finish, closing_words, is_finished
from s2.training.guard import StepGuard
from s2.training.module import PretrainModule
from s2.training.parser import RecipeCLI
from s2.training.report import launch_report, memory_of
from s2.training.run import RunConfig
from s2.training.strategy import ZeROStrategy, register_strategies


def launch(recipe: dict[str, Any], source: Path, overridden: Sequence[str]) -> None:
    """Train the stage that `recipe` describes, from where it stands.

    Args:
        recipe: keys after overrides.
        source: the file they came from.
        overridden: keys that were set on the command line.
    """
    quieten()
    register_strategies()
    trainer_keys = recipe.setdefault("trainer", {})
    for key, value in topology(os.environ).items():
        trainer_keys.setdefault(key, value)
    cli = RecipeCLI(recipe, source, overridden, trainer_extras)
    run, trainer, module, data = cli.config_init.run, cli.trainer, cli.model, cli.datamodule
    resolved = json.loads(cli.parser.dump(cli.config, format="json", skip_none=False))
    check_settings(module, data, trainer)
    if run.resume == "auto" and is_finished(run, trainer.max_steps):
        _say(trainer, f"{run.folder} is finished, nothing to do\n{closing_words(run.folder)}")
        _say_changes(trainer, saved.complete_checkpoints(run.folder / "checkpoints")[-1], resolved, finished=True)
        return
    _set_accumulation(run, trainer, data)
    check_disk(run, module.config.num_parameters(), low_precision=trainer.precision != "32-true")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoint = next(callback for callback in callbacks if isinstance(callback, RunCheckpoint))
    checkpoint.recipe = resolved
    module.guard = checkpoint.guard
    if trainer.is_global_zero:
        _make_folder(run)
        checkpoint.lock = acquire(run.folder)
    ending.keep_crashes_in(run.folder / "logs")
    try:
        resume = _resume_from(run, module, trainer, resolved)
        if resume is not None:
            meta = saved.read_meta(resume)
            checkpoint.began = (meta["step"], meta["tokens"])
        _say(trainer, launch_report(run, module, data, trainer, resolved["trainer"]["precision"]))
        if trainer.is_global_zero:
            slurm.keep_record(os.environ, run.folder)
            again = f"python -m s2.training.cli {run.folder}/config.yaml"
            header = f"# {source} as it was resolved; train it again with: {again}\n"
            files.write_text(run.folder / "config.yaml", header + dump_yaml(resolved))
        _fit(trainer, module, data, resume and resume / "state")
        _say(trainer, closing_words(run.folder))
    finally:
        if checkpoint.lock is not None:
            checkpoint.lock.release()


def topology(environment: Mapping[str, str]) -> dict[str, int]:
    """`trainer.devices` and `trainer.num_nodes` as torchrun or srun (one task per GPU) laid the processes out; empty
    for a process that is alone. Keys that the recipe sets win."""
    if "TORCHELASTIC_RUN_ID" in environment:
        devices = int(environment["LOCAL_WORLD_SIZE"])
        return {"devices": devices, "num_nodes": int(environment["WORLD_SIZE"]) // devices}
    if tasks := slurm.layout(environment):
        return {"devices": tasks[0], "num_nodes": tasks[1]}
    return {}


def trainer_extras(config: Any) -> dict[str, Any]:
    """Trainer arguments that a recipe cannot write down: callbacks, loggers, and what depends on the machine."""
    run: RunConfig = config.run
    for key, instead in (("val_check_interval", "run.validate_every"), ("default_root_dir", "run.root")):
        if (value := config.trainer[key]) is not None:
            raise ValueError(f"trainer.{key}={value} would not be looked at; {instead} says it")
    guard = StepGuard(run, tqdm.write)
    checkpoint = RunCheckpoint(run, guard)
    ours = [guard, TrainingLog(run, checkpoint), Finish(run, checkpoint), checkpoint]
    extras: dict[str, Any] = {
        "callbacks": [*(config.trainer.callbacks or []), *ours],
        "default_root_dir": str(run.folder),
        "val_check_interval": run.validate_every,
        "logger": TensorBoardLogger(run.folder / "logs", name="tensorboard", version="", default_hp_metric=False)
        if config.trainer.logger is None
        else config.trainer.logger,
    }
    if config.trainer.accelerator == "auto":
        extras["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
    if extras.get("accelerator", config.trainer.accelerator) == "cpu":
        extras["precision"] = "32-true"  # bf16 gains nothing there
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.set_float32_matmul_precision("high")
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_JOB_ID" in os.environ:
        extras["plugins"] = [*(config.trainer.plugins or []), _slurm_environment()]
    return extras


def _slurm_environment() -> ClusterEnvironment:
    """How the processes find each other.

    Lightning by itself waits in every batch script for the job's other tasks, also where srun has started none.
    """
    tasks = slurm.layout(os.environ)
    if tasks is None:
        return LightningEnvironment()
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks[0])  # the step's; it may be missing, or the job's
    # Lightning's requeue saves inside the signal handler; `RunCheckpoint` does it at the step boundary.
    return SLURMEnvironment(auto_requeue=False)


def check_settings(module: PretrainModule, data: Any, trainer: Trainer) -> None:
    """Refuse what would fail or mean nothing later.

    Raises:
        ValueError: a sequence beyond the model's context, no end of training, or a warmup beyond that end.
    """
    if trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps={trainer.max_steps}: a stage needs a number of optimizer steps")
    if (clip := trainer.gradient_clip_val) is not None and not clip >= 0:
        raise ValueError(f"trainer.gradient_clip_val={clip} must be above 0; null or 0 clips nothing")
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must be at least 1")
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every < 1:
        raise ValueError(f"trainer.log_every_n_steps={every} must be at least 1")
    module.schedule_config.factor(0, trainer.max_steps)
    batches = trainer.limit_val_batches
    if batches != 0 and (isinstance(batches, int) or batches != 1.0):
        _say(
            trainer,
            f"trainer.limit_val_batches={batches} counts micro-batches of each rank: another number of GPUs scores "
            f"other held-out text, and its curve does not compare. max_windows of the sets in data.validation does",
        )
    limit = module.config.max_position_embeddings
    lengths = {"data.seq_len": data.seq_len}
    for heldout in getattr(data, "heldout_sets", []):
        lengths[f"data.validation {heldout.name} seq_len"] = heldout.seq_len or data.seq_len
    for key, length in lengths.items():
        if length > limit:
            raise ValueError(
                f"{key}={length} is longer than the model's max_position_embeddings={limit}; raise "
                f"model.config.max_position_embeddings (and rope_theta with it), or shorten the sequence"
            )


def check_disk(run: RunConfig, parameters: int, *, low_precision: bool) -> None:
    """Refuse a run whose checkpoints would fill the disk.

    A checkpoint holds fp32 weights and two moments, and bf16 weights beside them in low precision; one more than
    `run.keep_checkpoints` exists while it is written. The export takes 2 bytes a parameter.

    Raises:
        ValueError: the space needed and the space there is.
    """
    if run.checkpoint_every is None:
        return
    each = parameters * (14 if low_precision else 12)
    kept = sum(f.stat().st_size for f in (run.folder / "checkpoints").rglob("*") if f.is_file() and not f.is_symlink())
    needed = (run.keep_checkpoints + 1) * each + 2 * parameters - kept
    checkpoints = (run.folder / "checkpoints").absolute()  # or a link to another disk
    existing = next(folder for folder in (checkpoints, *checkpoints.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"run.keep_checkpoints={run.keep_checkpoints}: that many checkpoints of {each / 1e9:.1f} GB and one being "
            f"written need {needed / 1e9:.1f} GB more below {run.folder}, which has {free / 1e9:.1f} GB free; keep "
            f"fewer, or point run.root at a larger disk"
        )


def _make_folder(run: RunConfig) -> None:
    """Make the run folder and see that it can be written to. With run.resume=never what lies there moves aside to
    <stage>.1, .2, ...: nothing is deleted.

    Raises:
        LockedError: another process is training there.
        OSError: a file stands where a folder has to be, or nothing can be written there.
    """
    if run.resume == "never" and run.folder.exists():
        running = acquire(run.folder)
        aside = files.move_aside(run.folder)
        running.release()
        print(f"run.resume=never: the earlier run is now {aside}")
    for folder in ("logs", "checkpoints"):
        files.require_writable(run.folder / folder)


def _resume_from(run: RunConfig, module: PretrainModule, trainer: Trainer, recipe: dict[str, Any]) -> Path | None:
    """The checkpoint to continue from, if there is one.

    Every rank decides by itself here, from sizes alone; checksums are read where ranks can divide the work among them
    (`ZeROStrategy.load_checkpoint`), or here where there is one.

    Raises:
        DamagedError: there are checkpoints, and none is whole.
        ValueError: the recipe is not that of the checkpoint.
    """
    if run.resume == "never":
        return None
    alone = not isinstance(trainer.strategy, ZeROStrategy)
    checkpoints = saved.complete_checkpoints(run.folder / "checkpoints")
    newest = saved.newest_whole(
        checkpoints, lambda path: saved.damage(path, checksums=alone), lambda text: _say(trainer, text)
    )
    if newest is None:
        return None
    meta = saved.read_meta(newest)
    stage = getattr(trainer.strategy, "stage", 0)
    saved.check_resumable(meta, asdict(module.config), stage, str(trainer.precision), newest)
    _say(trainer, f"continuing from {newest} (step {meta['step']}, {meta['tokens']:,} tokens)")
    _say_changes(trainer, newest, recipe)
    return newest


def _say_changes(trainer: Trainer, checkpoint: Path, recipe: dict[str, Any], *, finished: bool = False) -> None:
    """What the recipe says differently since a checkpoint was written."""
    before = saved.read_meta(checkpoint).get("recipe")
    if before is None:
        return  # written by a version that did not keep it
    changes = [f"{key}: {old!r} -> {new!r}" for key, old, new in differences(before, recipe)]
    if changes:
        what = "changed since then, and not trained with" if finished else "changed since then, from here on in force"
        advice = "; train it anew with run.resume=never or another run.stage" if finished else ""
        _say(trainer, f"{what}{advice}:\n" + "\n".join(f"  {line}" for line in changes))


def _set_accumulation(run: RunConfig, trainer: Trainer, data: Any) -> None:
    steps = run.accumulation(data.micro_batch_size, data.seq_len, trainer.world_size)
    if steps is not None:
        trainer.accumulate_grad_batches = steps
    # Lightning counts micro-batches here, a recipe counts optimizer steps.
    trainer.val_check_interval = run.validate_every * trainer.accumulate_grad_batches


def _fit(trainer: Trainer, module: PretrainModule, data: LightningDataModule, resume: Path | None) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    except BaseException as error:
        full = memory.device_is_full()  # before what holds it is let go
        if memory.is_out_of_memory(error, device_is_full=full):
            error = memory.OutOfMemoryError(_out_of_memory(trainer, module, data))
        # Ranks that wait for this one in a collective would wait for the process group's timeout.
        for process in getattr(trainer.strategy.launcher, "procs", []):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.terminate()
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # Lightning makes it exit code 1
        raise error


def _out_of_memory(trainer: Trainer, module: PretrainModule, data: Any) -> str:
    phase = "setting up" if module.phase is None else module.phase.format(step=trainer.global_step + 1)
    return memory.advice(
        phase,
        f"{memory_of(module, data, trainer)}{memory.usage()}",
        module.activation_checkpointing,
        getattr(trainer.strategy, "stage", 0),
        data.micro_batch_size,
        trainer.world_size,
    )


def _say(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(text)
        sys.stdout.flush()


def quieten() -> None:
    """Keep the console for the run's own lines; warnings that are about other ways of using Lightning go."""
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*`?srun`? command is available.*", ".*treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
