"""The run folder: where a recipe's stage puts its files.

runs/<recipe>/<stage>/config.yaml            every key as it was resolved
                      logs/metrics.csv       one row per logged step, appended on resume
                      logs/tensorboard/
                      checkpoints/step-00000500/   see `s2.training.saved`
                      checkpoints/last       link to the newest complete one
                      hf/                    Hugging Face export of the final weights
                      loss.png, summary.json
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SAFE_NAME = re.compile(r"[\w.\-]+")


@dataclass
class RunConfig:
    """How a stage is run; what it trains is said by the other keys.

    Attributes:
        recipe: first folder level below `root`, for example 1.3b.
        stage: second level, for example pretrain or extend-32k.
        root: where runs live.
        resume: `auto` continues from the newest complete checkpoint, `never` starts over (the old run moves aside).
        tokens_per_step: global batch in tokens. Gradient accumulation follows from it, so the same recipe takes
            the same optimizer steps on any number of GPUs. None: trainer.accumulate_grad_batches as it is.
        validate_every: optimizer steps between validations; the first and the last step are always validated.
        checkpoint_every: optimizer steps between checkpoints; the last step always writes one. None: nothing is saved,
            neither checkpoints nor the export, as when only rates and memory are measured.
        keep_checkpoints: newest checkpoints kept.
        max_skipped_steps: so many steps in a row whose gradient is not finite, or whose loss jumps, end the run.
        loss_spike_factor: a step whose loss is over so many times the running mean is skipped. None: none is.
        slurm_requeue: stopped by SLURM's warning signal or time limit, put the job back into the queue after the
            checkpoint (see `s2.training.slurm`).
    """

    recipe: str
    stage: str
    root: str = "runs"
    resume: Literal["auto", "never"] = "auto"
    tokens_per_step: int | float | None = None
    validate_every: int = 500
    checkpoint_every: int | None = 1000
    keep_checkpoints: int = 2
    max_skipped_steps: int = 10
    loss_spike_factor: float | None = None
    slurm_requeue: bool = False

    def __post_init__(self) -> None:
        for name in ("recipe", "stage"):
            value = getattr(self, name)
            if not _SAFE_NAME.fullmatch(str(value)) or not str(value).strip("."):
                raise ValueError(
                    f"run.{name}={value!r} is a folder name: letters, digits, '-', '_', and '.' among them"
                )
        if self.tokens_per_step is not None:
            if not 1 <= self.tokens_per_step < math.inf or self.tokens_per_step != int(self.tokens_per_step):
                raise ValueError(f"run.tokens_per_step={self.tokens_per_step} is a whole number of tokens, at least 1")
            self.tokens_per_step = int(self.tokens_per_step)  # 4.2e6 is one
        for name in ("validate_every", "checkpoint_every", "keep_checkpoints", "max_skipped_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"run.{name}={value} must be at least 1")
        if self.loss_spike_factor is not None and not self.loss_spike_factor > 1:
            raise ValueError(f"run.loss_spike_factor={self.loss_spike_factor} must be above 1, or null")

    @property
    def folder(self) -> Path:
        """runs/<recipe>/<stage>"""
        return Path(self.root) / self.recipe / self.stage

    def accumulation(self, sequences_per_micro_batch: int, seq_len: int, world_size: int) -> int | None:
        """Micro-batches per optimizer step that make up `tokens_per_step`, or None where that is not set.

        Raises:
            ValueError: the global batch is not a whole number of micro-batches over all ranks.
        """
        if self.tokens_per_step is None:
            return None
        wanted = int(self.tokens_per_step)
        tokens = sequences_per_micro_batch * seq_len * world_size
        if wanted < tokens or wanted % tokens:
            raise ValueError(
                f"run.tokens_per_step={wanted} must be a multiple of {tokens} = data.micro_batch_size "
                f"{sequences_per_micro_batch} x data.seq_len {seq_len} x {world_size} ranks"
            )
        return wanted // tokens
