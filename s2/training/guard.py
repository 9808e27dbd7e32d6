"""Steps that must not be taken: a gradient that is no number, or a loss that jumps.

Such a step is skipped: weights and optimizer stay as they are, the data goes on, and the step is counted, said and
written to `logs/skipped.jsonl` with the data position of its batch. Several in a row end the run with a diagnosis.
DeepSpeed skips steps whose gradient norm is not finite by itself; a step that the guard refuses is made one of these.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from s2 import ending, files
from s2.training.config import RunConfig
from s2.training.gaps.lightning import EachStep

MEMORY = 0.99  # decay of the running mean of losses
SETTLING = 50  # steps of a run before a loss can be called a jump


class DivergedError(FloatingPointError):
    """Training cannot go on: too many steps in a row were skipped, or what came out is not a model."""

    exit_code = ending.DIVERGED


@dataclass
class Counters:
    """What a checkpoint keeps, so that a resumed run decides as an uninterrupted one."""

    skipped: int = 0  # steps since the run began
    in_a_row: int = 0  # skipped since the last that was taken
    mean_loss: float = 0.0
    steps: int = 0  # that the mean is of


class StepGuard(EachStep, Callback):
    """Decides about each step once its loss is known, and counts what was skipped.

    The module tells it the losses of its micro-batches (`add`) and asks at the last of a step (`refuses`); what came of
    the step it sees itself.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.counters = Counters()
        self._begin_step()

    def _begin_step(self) -> None:
        self._loss = self._valid = 0.0  # of the step so far, over all ranks
        self._position: int | None = None  # of the step's first batch
        self._bad: list[str] = []  # what was wrong in the step so far

    def add(self, loss_sum: float, valid: float, position: int) -> None:
        """Note a micro-batch: its loss summed over its valid tokens on all ranks, and where in the data it begins."""
        if self._position is None:
            self._position = position
        self._loss += loss_sum
        self._valid += valid
        if not math.isfinite(loss_sum):
            self._bad.append(f"the loss is {loss_sum} in the batch at data position {position}")

    def refuses(self) -> bool:
        """Whether the step whose losses have all been added must not be taken."""
        loss = self._loss / max(self._valid, 1.0)
        factor, counters = self.run.loss_spike_factor, self.counters
        if factor is not None and counters.steps >= SETTLING and loss > factor * counters.mean_loss:
            self._bad.append(f"the loss jumped to {loss:.4f}, over {factor:g} times the mean {counters.mean_loss:.4f}")
        return bool(self._bad)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin_step()

    def on_step(self, trainer: Trainer, module: Any) -> None:
        norm = module.skipped_gradient_norm()
        if norm is None:
            self._take(self._loss / max(self._valid, 1.0))
        else:
            self._skip(trainer, trainer.global_step, norm)
        self._begin_step()

    def _take(self, loss: float) -> None:
        counters = self.counters
        counters.in_a_row = 0
        counters.steps += 1
        decay = min(MEMORY, 1 - 1 / counters.steps)  # the plain mean of the first hundred
        counters.mean_loss = decay * counters.mean_loss + (1 - decay) * loss

    def _skip(self, trainer: Trainer, step: int, norm: float) -> None:
        counters = self.counters
        counters.skipped += 1
        counters.in_a_row += 1
        why = "; ".join(self._bad) or f"the norm of the gradient is {norm}"
        if trainer.is_global_zero:
            tqdm.write(
                f"step {step} skipped (data position {self._position}): {why}; {counters.in_a_row} in a row, "
                f"{counters.skipped} in all"
            )
            record = {"step": step, "position": self._position, "why": why, "in_a_row": counters.in_a_row}
            path = self.run.folder / "logs" / "skipped.jsonl"
            with files.naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if counters.in_a_row < self.run.max_skipped_steps:
            return
        advice = (
            "The checkpoints hold the weights from before; look at this batch, or resume with a lower "
            "model.optimizer.lr or trainer.gradient_clip_val"
            if counters.steps
            else "No step was ever taken, so look at the weights that training began with (model.init_from) and at "
            "this batch before the learning rate"
        )
        raise DivergedError(
            f"{counters.in_a_row} steps in a row were skipped (run.max_skipped_steps={self.run.max_skipped_steps}), up "
            f"to step {step}, whose first batch lies at data position {self._position}: {why}. {advice}"
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.counters)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counters = Counters(**state_dict)
