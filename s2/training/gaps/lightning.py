"""Lightning 2.6. Nothing here imports it before it is called."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from s2.training import slurm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the signals that ask a run to stop. Lightning's own handler broadcasts from inside of it, which hangs ranks
    that are in a collective, and is put over ours whenever the trainer runs; `take` comes after that."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def take(self) -> None:
        for number in STOP_SIGNALS:
            self._before.setdefault(number, signal.signal(number, self._note))

    def give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def ignore(self, trainer: Any) -> None:
        """Until the process ends, which has to say why. Lightning puts back what was there before it ran as soon as it
        has cleaned up, and SIGTERM would end the process before its last sentence."""
        trainer._signal_connector._original_handlers |= dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)

    def _note(self, number: int, frame: Any) -> None:
        self.seen.add(number)


class EachStep:
    """For callbacks: `on_step` after each optimizer step; Lightning calls them after each micro-batch."""

    _seen_step = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self.on_step(trainer, pl_module)

    def on_step(self, trainer: Any, module: Any) -> None:
        raise NotImplementedError


def is_helper() -> bool:
    """Whether Lightning has started this process. Some seconds after one of those ended with another code than 0 it
    kills the main process too, which may still be closing down: they tell of no stop by their exit code."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def end_helpers(trainer: Any) -> None:
    """End the processes that Lightning has started, which would wait for this one in a collective for minutes."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.terminate()


def was_interrupted(error: BaseException) -> bool:
    """Whether an interrupt from the keyboard is behind an error: Lightning makes it SystemExit(1)."""
    return isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)


@contextmanager
def value_errors() -> Iterator[None]:
    """What Lightning says of wrong settings as ValueError; it has a class of its own, which is none."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


def cluster_environment() -> Any:
    """How the processes of a SLURM job find each other. Lightning by itself waits in every batch script for the job's
    other tasks, also where srun has started none, and requeues from inside of a signal handler."""
    from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

    tasks = slurm.layout(os.environ)
    if tasks is None:
        return LightningEnvironment()
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks[0])  # the step's; it may be missing, or the job's
    return SLURMEnvironment(auto_requeue=False)


def set_accumulation(trainer: Any, micro_batches: int | None, validate_every: int) -> None:
    """Accumulate so many micro-batches (None: as it is) and validate every `validate_every` optimizer steps. Both
    follow from the number of ranks; Lightning takes them before it tells that, and counts validations in
    micro-batches."""
    if micro_batches is not None:
        trainer.accumulate_grad_batches = micro_batches
    trainer.val_check_interval = validate_every * trainer.accumulate_grad_batches


def is_accumulating(trainer: Any) -> bool:
    """Whether this micro-batch is not the last of its step; `on_before_optimizer_step` is called for each."""
    return trainer.fit_loop._should_accumulate()


def validate_after_this_batch(trainer: Any) -> None:
    """Have the validation loop run once this batch is done: Lightning does not validate the last step by itself."""
    trainer.val_check_batch = 1


def validate_now(trainer: Any) -> None:
    """Run the validation loop inside `fit`, as Lightning does between two batches: a run that was stopped between a
    step's checkpoint and its validation goes on without it."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def set_progress(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Have a checkpoint say that `micro_batches` were trained on. Lightning restores its count as it was, with another
    accumulation in the middle of a step; windows of accumulation, validations and the data position follow from it, and
    DeepSpeed's count begins at 0 in every process."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        unfinished = counts["ready"] - counts["completed"]  # 1 where the checkpoint is from on_train_batch_end
        counts.update(dict.fromkeys(("ready", "started", "processed"), micro_batches))
        counts["completed"] = micro_batches - unfinished


def quieten() -> None:
    """Keep the console for the run's own lines; warnings that are about other ways of using Lightning go."""
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*`?srun`? command is available.*", ".*treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
