"""What a run says while it trains: the step line, metrics.csv, TensorBoard, the progress bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from s2.model.flops import model_flops_utilization
from s2.training.config import RunConfig
from s2.training.gaps import lightning as gaps
from s2.training.metrics import MetricsFile, clock, peak_flops, peak_memory_gib, read_metrics
from s2.training.saving import RunCheckpoint, tokens_per_step
from s2.training.summary import data_report


class TrainingLog(gaps.EachStep, Callback):
    """One line per `trainer.log_every_n_steps` optimizer steps and per validation, on the console and in the files.
    Throughput and MFU cover the steps since the last line, without validations and checkpoints."""

    def __init__(self, run: RunConfig, checkpoint: RunCheckpoint) -> None:
        self.run = run
        self.checkpoint = checkpoint
        self._file: MetricsFile | None = None
        self._bar: tqdm | None = None
        self._opened_at = 0.0
        self._logged_step = 0
        self._logged_at = 0.0
        self._validating = self._validation_began = 0.0

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            step, tokens = self.checkpoint.began  # maybe in other batches
            tokens += max(0, trainer.max_steps - step) * tokens_per_step(trainer)
            print(data_report(trainer.datamodule, tokens), flush=True)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_validation(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, pl_module)
        if self._owes_validation(trainer):
            gaps.validate_now(trainer)
        super().on_train_start(trainer, pl_module)
        self._logged_step = trainer.global_step
        self._logged_at = self._training_clock()
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step")

    def on_step(self, trainer: Any, module: Any) -> None:
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            self._log_step(trainer, module)
        if step == trainer.max_steps:
            gaps.validate_after_this_batch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating += time.perf_counter() - self._validation_began
        if not trainer.sanity_checking:
            self._log_validation(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, trainer: Trainer, pl_module: Any) -> None:
        if self._opened_at == 0.0:
            self._opened_at = time.perf_counter()
            if trainer.is_global_zero:
                file = self.run.folder / "logs" / "metrics.csv"
                self._file = MetricsFile(file, trainer.global_step, pl_module.validation_names)

    def _owes_validation(self, trainer: Trainer) -> bool:
        """Whether the run was stopped between a step's checkpoint and its validation; Lightning would skip it."""
        step = trainer.global_step
        owed = step > 0 and step % self.run.validate_every == 0 and trainer.enable_validation
        if self._file is not None:
            rows = read_metrics(self._file.path)
            owed &= not any(row["step"] == step and any(key.startswith("val/") for key in row) for row in rows)
        return trainer.strategy.broadcast(owed)

    def _training_clock(self) -> float:
        return time.perf_counter() - self._validating - self.checkpoint.seconds

    def _log_step(self, trainer: Any, module: Any) -> None:
        now, step = self._training_clock(), trainer.global_step
        seconds, steps = max(now - self._logged_at, 1e-9), step - self._logged_step
        self._logged_at, self._logged_step = now, step
        rate = steps * tokens_per_step(trainer) / seconds / trainer.world_size
        loss, device = module.pop_train_loss(), module.device
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        norm = None if engine is None else engine.get_global_grad_norm()  # only DeepSpeed tells it
        row = {
            **({} if math.isnan(loss) else {"train/loss": loss}),  # every step since the last line was skipped
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **({} if norm is None else {"grad_norm": float(norm)}),  # over all ranks, before clipping
            "tokens_per_second_per_device": rate,
            "memory_gib": peak_memory_gib(device),
            "skipped_steps": self.checkpoint.guard.counters.skipped,
        }
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak is not None:
            seq_len = trainer.datamodule.seq_len
            for name, executed in (("mfu_dense_equivalent", False), ("mfu_executed", True)):
                row[name] = model_flops_utilization(module.config, seq_len, rate, peak, executed=executed)
        left = (trainer.max_steps - step) * seconds / max(steps, 1)
        self._record(trainer, row, step_line(step, trainer.max_steps, row, left, device.type))

    def _log_validation(self, trainer: Trainer, module: Any) -> None:
        row: dict[str, float] = {}
        parts = []
        for name, loss in module.validation_losses.items():
            perplexity = math.exp(min(loss, 700.0))
            row |= {f"val/{name}/loss": loss, f"val/{name}/perplexity": perplexity}
            parts.append(f"{name} loss {loss:.4f} perplexity {perplexity:.2f}")
            if trainer.sanity_checking and (source := module.source_losses.get(name)) is not None:
                row[f"val/{name}/source_loss"] = source
                if source != loss:
                    parts[-1] += f" ({module.init_from} as it is: loss {source:.4f})"
        if row:
            self._record(trainer, row, f"held-out at step {trainer.global_step} | " + " | ".join(parts))

    def _record(self, trainer: Trainer, row: Mapping[str, float], line: str) -> None:
        if self._file is None:
            return
        step = trainer.global_step
        seconds = self._file.seconds + time.perf_counter() - self._opened_at
        self._file.write({"step": step, "tokens": self.checkpoint.tokens(trainer), "seconds": seconds, **row})
        for logger in trainer.loggers:
            logger.log_metrics(dict(row), step=step)
        tqdm.write(line)
        sys.stdout.flush()


def step_line(step: int, max_steps: int, row: Mapping[str, float], seconds_left: float, device_type: str) -> str:
    """The console line of a step; MFU only where the device's peak is known."""
    unit = "GPU" if device_type == "cuda" else "process"
    parts = [
        f"step {step}/{max_steps}",
        f"loss {row.get('train/loss', math.nan):.4f}",
        f"lr {row['lr']:.2e}",
        *([f"grad norm {row['grad_norm']:.2f}"] if "grad_norm" in row else []),
        f"{row['tokens_per_second_per_device']:,.0f} tokens/s/{unit}",
    ]
    if "mfu_executed" in row:
        dense, executed = row["mfu_dense_equivalent"], row["mfu_executed"]
        parts.append(f"MFU {dense:.1%} dense-equivalent, {executed:.1%} executed")
    parts += [f"{row['memory_gib']:.2f} GiB", f"{clock(seconds_left)} left"]
    return " | ".join(parts)
