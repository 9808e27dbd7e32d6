"""Checkpoints at step boundaries, and preemption.

A signal handler only sets a flag. At the next optimizer step all ranks agree on it, write one checkpoint and leave
together; saving inside the handler would hang ranks that are in the middle of a collective.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from s2 import ending, files
from s2.locks import Lock
from s2.training import run_folder, slurm
from s2.training.config import RunConfig
from s2.training.gaps.lightning import EachStep, StopSignals
from s2.training.guard import StepGuard
from s2.training.strategy import over_ranks


class Preempted(Exception):  # noqa: N818 -- not an error: the run is saved and can go on
    """The run was told to stop and has saved a checkpoint."""

    exit_code = ending.STOPPED


class Stopped(Preempted):
    """The run was told to stop and saves nothing."""

    exit_code = ending.INTERRUPTED


class EndedEarly(Preempted):
    """Something else than the run's last step has ended the training."""


class RunCheckpoint(EachStep, Checkpoint):
    """Save every `run.checkpoint_every` steps, at the end, and when told to stop.

    Lightning runs `Checkpoint` callbacks last, so what the others write for a step is on disk before it counts as
    saved.

    Attributes:
        seconds: time spent saving so far, which throughput leaves out.
        lock: of the run folder, on the process that holds it.
        guard: says whether the last steps were taken.
        recipe: every key as it was resolved, which a checkpoint keeps so that a resume can tell what was changed.
        gate_before: what the gate of the weights to start from said (`s2.training.gate`).
    """

    def __init__(self, run: RunConfig, guard: StepGuard) -> None:
        self.run = run
        self.guard = guard
        self.lock: Lock | None = None
        self.recipe: dict[str, Any] = {}
        self.gate_before: dict[str, Any] = {}
        self.began = (0, 0)  # step and tokens that this process began at
        self.checkpoints = run.folder / "checkpoints"
        self.seconds = 0.0
        self._saved_step = -1
        self._overdue = False
        self._signals = StopSignals()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.take()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._signals.take()
        self._saved_step = trainer.global_step

    def tokens(self, trainer: Trainer) -> int:
        """Tokens trained on so far, over all ranks, whatever the batches of earlier processes were."""
        step, tokens = self.began
        return tokens + (trainer.global_step - step) * tokens_per_step(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens"] = {"step": trainer.global_step, "tokens": self.tokens(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "tokens" in checkpoint:  # versions that did not say have put it into meta.json, which the launch has read
            self.began = (checkpoint["tokens"]["step"], checkpoint["tokens"]["tokens"])

    def on_step(self, trainer: Trainer, module: Any) -> None:
        step = trainer.global_step
        # After the last step the run goes on to its end: a checkpoint of that step says that the export is there.
        if step < trainer.max_steps and trainer.strategy.reduce_boolean_decision(bool(self._signals.seen), all=False):
            if self.run.checkpoint_every is None:
                raise Stopped(f"stopped at step {step}; with run.checkpoint_every=null nothing is saved")
            self._save(trainer, module)
            folder = run_folder.checkpoint_folder(self.checkpoints, step)
            raise Preempted(f"stopped at step {step}; the checkpoint is {folder}{self._requeue(trainer)}")
        every = self.run.checkpoint_every
        due = every is not None and (step % every == 0 or self._overdue)
        # weights that no step can be taken with must not take the place of those that one could be
        self._overdue = due and self.guard.counters.in_a_row > 0
        if due and not self._overdue and step < trainer.max_steps:
            self._save(trainer, module)

    def check_end(self, trainer: Trainer, module: Any) -> None:
        """Refuse to take for finished a stage that a callback of the recipe has ended before its last step.

        Raises EndedEarly, with what was trained in a checkpoint. A run that saves nothing may end by trainer.max_time.
        """
        step, last, every = trainer.global_step, trainer.max_steps, self.run.checkpoint_every
        is_timed = every is None and (self.recipe.get("trainer") or {}).get("max_time") is not None
        if step >= last or is_timed:
            return
        self.on_train_end(trainer, module)
        saved = "nothing is saved (run.checkpoint_every=null)"
        if every is not None:
            folder = run_folder.checkpoint_folder(self.checkpoints, step)
            saved = f"the checkpoint to go on from is {folder}"
        raise EndedEarly(
            f"training was ended at step {step} of {last} by something other than trainer.max_steps, a callback in "
            f"trainer.callbacks as it seems; nothing is exported, {saved}"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved_step and self.run.checkpoint_every is not None:
            self._save(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signals.give_back()

    def _save(self, trainer: Trainer, module: Any) -> None:
        started = time.perf_counter()
        step = trainer.global_step
        final = run_folder.checkpoint_folder(self.checkpoints, step)
        partial = files.partial_of(final)
        if self.lock is not None:
            self.lock.check()
        on_rank_zero(trainer, lambda: run_folder.new_checkpoint(self.checkpoints, step))
        try:
            trainer.save_checkpoint(partial / "state")
        except (OSError, RuntimeError) as error:
            if run_folder.disk_is_full(error, self.checkpoints):
                raise OSError(
                    errno.ENOSPC,
                    f"{self.checkpoints}: the disk was full before the checkpoint of step {step} was written; make "
                    f"room, or keep fewer with run.keep_checkpoints, and run again: earlier checkpoints are whole",
                ) from error
            raise
        trainer.strategy.barrier()
        inventory = files.inventory(partial, (trainer.global_rank, trainer.world_size))
        meta = {
            "step": step,
            "tokens": self.tokens(trainer),
            "world_size": trainer.world_size,
            "zero_stage": getattr(trainer.strategy, "stage", 0),
            "precision": trainer.precision,
            "model": asdict(module.config),
            "recipe": self.recipe,
            "files": {name: entry for part in over_ranks(inventory) for name, entry in part.items()},
        }
        on_rank_zero(trainer, lambda: run_folder.publish(partial, final, meta, self.run.keep_checkpoints))
        self._saved_step = step
        self.seconds += time.perf_counter() - started

    def _requeue(self, trainer: Trainer) -> str:
        """Let the first rank see to the SLURM job and return what it has to say. The others wait for it, because srun
        ends all processes when the first has gone."""
        if not self.run.slurm_requeue or "SLURM_JOB_ID" not in os.environ:
            return ""
        warned = self._signals.seen != {signal.SIGTERM}  # none: the signal has reached another rank first
        self._signals.ignore(trainer)  # SLURM ends what it requeues, and srun the others when the first task has gone
        words = f"; {slurm.requeue(os.environ, warned=warned)}" if trainer.is_global_zero else ""
        trainer.strategy.barrier()
        return words


def tokens_per_step(trainer: Any, data: Any = None) -> int:
    """Tokens of one optimizer step over all ranks. `data`: the datamodule, before the trainer has it."""
    data = data or trainer.datamodule
    return data.micro_batch_size * data.seq_len * trainer.accumulate_grad_batches * trainer.world_size


def on_rank_zero(trainer: Trainer, work: Callable[[], Any]) -> None:
    """Do file work on the first rank while the others wait for it."""
    if trainer.is_global_zero:
        work()
    trainer.strategy.barrier()
