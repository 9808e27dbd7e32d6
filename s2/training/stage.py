"""From a recipe to a trained stage: module, datamodule and trainer, the run folder, resume."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry

from s2 import ending, files, settings
from s2.locks import lock
from s2.model.hf import fingerprint
from s2.out_of_memory import is_out_of_memory
from s2.recipe import differences, dump_yaml
from s2.training import gate, memory, run_folder, slurm
from s2.training.callbacks import TrainingLog
from s2.training.config import StageConfig
from s2.training.environment import record_environment
from s2.training.gaps import lightning as gaps
from s2.training.guard import StepGuard
from s2.training.module import PretrainModule
from s2.training.saving import RunCheckpoint
from s2.training.strategy import STRATEGIES, ZeROStrategy, register_strategies
from s2.training.summary import Finish, closing_words, launch_report


def topology(environment: Mapping[str, str]) -> dict[str, int]:
    """`trainer.devices` and `trainer.num_nodes` as torchrun or srun (one task per GPU) laid the processes out; empty
    for a process that is alone."""
    if "TORCHELASTIC_RUN_ID" in environment:
        devices = int(environment["LOCAL_WORLD_SIZE"])
        return {"devices": devices, "num_nodes": int(environment["WORLD_SIZE"]) // devices}
    if tasks := slurm.layout(environment):
        return {"devices": tasks[0], "num_nodes": tasks[1]}
    return {}


class Stage:
    """A recipe's stage, ready to train.

    Raises:
        ValueError: the recipe asks for what torch, Lightning or the machine do not have, or for what does not fit
            together: a sequence beyond the model's context, a global batch that is no number of micro-batches.
        FileNotFoundError: the data or the weights to start from are not there.
    """

    def __init__(self, config: StageConfig) -> None:
        self.config, self.run = config, config.run
        self.trainer_keys = {**topology(os.environ), **config.trainer}
        if (seed := config.seed_everything) is not False:
            seed_everything(None if seed is True else seed, workers=True)
        register_strategies()
        with config.origin.named():
            _check_strategy(config.trainer.get("strategy", "auto"))
            arguments = settings.arguments(self.trainer_keys, Trainer, "trainer")
            self.data: Any = settings.instantiate(config.data, LightningDataModule, "data")
            self.module = PretrainModule(config.model)
        self.guard = self.module.guard = StepGuard(self.run)
        self.checkpoint = RunCheckpoint(self.run, self.guard)
        self.trainer = self._trainer(arguments)
        self.checkpoint.recipe = self.resolved
        with config.origin.named():
            _check_lengths(self.module, self.data)
            accumulation = self.run.accumulation(self.data.micro_batch_size, self.data.seq_len, self.trainer.world_size)
        gaps.set_accumulation(self.trainer, accumulation, self.run.validate_every)

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """Every key of the recipe with its value, defaults too; as a recipe, it trains the same."""
        config = self.config
        values = {
            "seed_everything": config.seed_everything,
            "run": asdict(self.run) | {"resume": "auto"},  # what was done once is not to be done again
            "model": asdict(config.model),
            "data": {
                "class_path": config.data["class_path"],
                "init_args": _defaults(type(self.data)) | config.data.get("init_args", {}),
            },
            "trainer": _defaults(Trainer) | self.trainer_keys,
        }
        return json.loads(json.dumps(values, default=str))

    def report(self) -> str:
        """The text printed before the first step."""
        return launch_report(self.run, self.module, self.data, self.trainer, self.config.trainer.get("precision"))

    def _trainer(self, arguments: dict[str, Any]) -> Trainer:
        run = self.run
        callbacks = [self.guard, TrainingLog(run, self.checkpoint), Finish(run, self.checkpoint), self.checkpoint]
        asked = arguments.get("callbacks") or []
        arguments |= {
            "callbacks": [*(asked if isinstance(asked, list) else [asked]), *callbacks],
            "default_root_dir": str(run.folder),
            "val_check_interval": run.validate_every,
        }
        if arguments.get("logger") is None:
            logs = run.folder / "logs"
            arguments["logger"] = TensorBoardLogger(logs, name="tensorboard", version="", default_hp_metric=False)
        if arguments.get("accelerator", "auto") == "auto":
            arguments["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments["accelerator"] == "cpu":
            arguments["precision"] = CPU_PRECISION
            os.environ["DS_ACCELERATOR"] = "cpu"
        else:
            torch.set_float32_matmul_precision("high")
        if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_JOB_ID" in os.environ:
            asked = arguments.get("plugins") or []
            arguments["plugins"] = [*(asked if isinstance(asked, list) else [asked]), gaps.cluster_environment()]
        with self.config.origin.named():
            try:
                with gaps.value_errors():
                    return Trainer(**arguments)
            except (TypeError, ValueError, ImportError) as error:  # of devices and accelerators that there are not
                raise settings.SettingError("trainer", str(error)) from error

    def train(self) -> None:
        """Train from where the stage stands, or say that there is nothing left to do.

        Raises:
            ValueError, OSError: of the run folder, the disk or the checkpoint; nothing was trained then.
            Preempted, DivergedError, DamagedError, MemoryError: see `saving`, `guard`, `run_folder`, `memory`.
        """
        run, trainer = self.run, self.trainer
        if run.resume == "auto" and run_folder.is_finished(run, trainer.max_steps):
            self._keep_gate(gate.recorded(run.folder))
            self._say(f"{run.folder} is finished, nothing to do\n{closing_words(run.folder)}")
            self._say_changes(run_folder.complete_checkpoints(run.folder / "checkpoints")[-1], finished=True)
            return
        batches = trainer.limit_val_batches
        if batches != 0 and (isinstance(batches, int) or batches != 1.0):
            self._say(
                f"trainer.limit_val_batches={batches} counts micro-batches of each rank: another number of GPUs scores "
                f"other held-out text, and its curve does not compare. max_windows of the sets in data.validation does"
            )
        parameters = self.module.config.num_parameters()
        run_folder.check_disk(run, parameters, low_precision=trainer.precision != "32-true")
        if trainer.is_global_zero:
            run_folder.make_run_folder(run)
        with lock(run.folder) if trainer.is_global_zero else nullcontext() as self.checkpoint.lock:
            ending.keep_crashes_in(run.folder / "logs")
            resume = self._resume_from()
            if resume is not None:
                self._say(gate.gate_warning(self.checkpoint.gate_before))
            elif trainer.is_global_zero:
                self._begin()
            self._say(self.report())
            if trainer.is_global_zero:
                self._record()
            self._fit(resume and resume / "state")
            self._say(closing_words(run.folder))

    def _begin(self) -> None:
        """Look at the gate of the weights to start from, and keep what it says."""
        run = self.run
        found = gate.check_gate(self.config.model.init_from, run.gate, self.config.origin.file)
        self._say(gate.gate_warning(found) or found["said"])
        files.write_json(run.folder / gate.BEFORE, found)
        self._keep_gate(found)

    def _keep_gate(self, record: dict[str, Any]) -> None:
        """A gate is asked once: what the stage began with is what its recipe says from then on."""
        self.checkpoint.gate_before = record
        self.resolved["run"]["gate"] = record.get("asked", self.run.gate)

    def _record(self) -> None:
        folder = self.run.folder
        slurm.keep_record(os.environ, folder)
        record_environment(folder)
        again = f"python -m s2.training.cli {folder}/config.yaml"
        header = f"# {self.config.origin.file} as it was resolved; train it again with: {again}\n"
        files.write_text(folder / "config.yaml", header + dump_yaml(self.resolved))

    def _resume_from(self) -> Path | None:
        """The checkpoint to continue from, if there is one. Every rank decides by itself, from sizes alone; checksums
        are read where ranks divide the work (`ZeROStrategy.load_checkpoint`), or here without that strategy."""
        if self.run.resume == "never":
            return None
        strategy = self.trainer.strategy
        newest = run_folder.newest_whole(
            run_folder.complete_checkpoints(self.run.folder / "checkpoints"),
            lambda path: run_folder.damage(path, checksums=not isinstance(strategy, ZeROStrategy)),
            self._say,
        )
        if newest is None:
            return None
        meta, stage = run_folder.read_meta(newest), getattr(strategy, "stage", 0)
        run_folder.check_resumable(meta, asdict(self.module.config), stage, str(self.trainer.precision), newest)
        _check_start(meta, self.config.model.init_from, newest)
        self.checkpoint.began = (meta["step"], meta["tokens"])
        self._say(f"continuing from {newest} (step {meta['step']}, {meta['tokens']:,} tokens)")
        self._keep_gate(gate.recorded(self.run.folder))
        self._say_changes(newest)
        return newest

    def _say_changes(self, checkpoint: Path, *, finished: bool = False) -> None:
        """What the recipe says differently since a checkpoint was written."""
        if (before := run_folder.read_meta(checkpoint).get("recipe")) is None:
            return  # written by a version that did not keep it
        found = [line for line in differences(before, self.resolved) if line[0] != "run.resume"]
        if found:
            what = "changed since then, " + ("and not trained with" if finished else "from here on in force")
            advice = "; train it anew with run.resume=never or another run.stage" if finished else ""
            self._say("\n  ".join([f"{what}{advice}:", *(f"{key}: {old!r} -> {new!r}" for key, old, new in found)]))

    def _fit(self, resume: Path | None) -> None:
        try:
            with self.config.origin.keys_named(), gaps.value_errors():
                self.trainer.fit(self.module, datamodule=self.data, ckpt_path=resume, weights_only=False)
        except BaseException as error:
            full = memory.device_is_full()  # before what holds it is let go
            if is_out_of_memory(error, device_is_full=full):
                error = MemoryError(memory.advice(self.module, self.data, self.trainer))
            gaps.end_helpers(self.trainer)
            if gaps.was_interrupted(error):
                raise KeyboardInterrupt from None
            raise error

    def _say(self, text: str) -> None:
        if text and self.trainer.is_global_zero:
            print(text, flush=True)


CPU_PRECISION = "32-true"  # bf16 gains nothing there


def _defaults(cls: type) -> dict[str, Any]:
    return {name: each.default for name, each in settings.parameters(cls).items() if each.default is not each.empty}


def _check_start(meta: Mapping[str, Any], init_from: str | None, place: Path) -> None:
    """Refuse to resume by a recipe that says other weights to start from: they would not be read, and the export and
    summary.json would name them. The same weights may lie elsewhere; where they lay may be gone.

    Args:
        meta: of the checkpoint in the folder `place`.
        init_from: of the recipe.

    Raises:
        ValueError: names both values and the checkpoint.
    """
    if (recipe := meta.get("recipe")) is None or (before := recipe["model"].get("init_from")) == init_from:
        return  # None: written by a version that did not keep it
    if before is not None and init_from is not None:
        then, now = Path(before), Path(init_from)
        if not then.is_dir() or then.samefile(now) or fingerprint(then) == fingerprint(now):
            return
    raise ValueError(
        f"checkpoint {place} is of a run that began with model.init_from={before!r} but the recipe says "
        f"{init_from!r}, which a resume does not read; go back to the old value, or start over with run.resume=never "
        f"or another run.stage"
    )


def _check_strategy(name: Any) -> None:
    """Refuse a strategy that Lightning has no name for."""
    known = [*STRATEGIES, "auto", *StrategyRegistry.available_strategies()]
    if isinstance(name, str) and name not in known:
        hint = "".join(f"; did you mean {close}?" for close in difflib.get_close_matches(name, known, n=1))
        raise settings.SettingError("trainer.strategy", f"expected auto, {', '.join(STRATEGIES)}, got {name!r}{hint}")


def _check_lengths(module: PretrainModule, data: Any) -> None:
    """Refuse a sequence beyond the model's context."""
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
