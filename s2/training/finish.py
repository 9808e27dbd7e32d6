"""The end of a stage: loss plot, Hugging Face export, and a summary of what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from s2 import files
from s2.training import saved
from s2.training.checkpoint import RunCheckpoint, on_rank_zero
from s2.training.guard import DivergedError
from s2.training.metrics import plot_losses, read_metrics, validation_curve
from s2.training.run import RunConfig
from s2.training.throughput import clock
from s2.training.weights import export


class Finish(Callback):
    """Runs before the last checkpoint is written: a stage counts as finished once that one is there."""

    def __init__(self, run: RunConfig, checkpoint: RunCheckpoint) -> None:
        self.run = run
        self.checkpoint = checkpoint

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        data = trainer.datamodule
        if not pl_module.validation_is_finite:
            raise DivergedError(
                f"held-out losses at the last step are {pl_module.validation_losses}, so nothing is exported; the "
                f"checkpoints in {self.run.folder / 'checkpoints'} are from before, logs/metrics.csv shows since when"
            )
        on_rank_zero(trainer, lambda: self._write_summary(trainer, pl_module, data))
        if self.run.checkpoint_every is not None:
            hf = self.run.folder / "hf"
            export(pl_module.model, pl_module.config, hf, data.tokenizer_file, pl_module.init_from)
        trainer.strategy.barrier()

    def _write_summary(self, trainer: Trainer, module: Any, data: Any) -> None:
        folder = self.run.folder
        rows = read_metrics(folder / "logs" / "metrics.csv")
        validation = {}
        for name in data.validation_names:
            curve = validation_curve(rows, name)
            source = [row[f"val/{name}/source_loss"] for row in rows if f"val/{name}/source_loss" in row]
            validation[name] = {
                "initial_loss": curve[0][1] if curve and curve[0][0] == 0 else None,
                "source_loss": source[0] if source else None,
                "loss": curve[-1][1] if curve else None,
                "unigram_loss": data.unigram_loss(name),
                "bits_per_byte": data.bits_per_byte(name, curve[-1][1]) if curve else None,
            }
        step = trainer.global_step
        summary = {
            "recipe": self.run.recipe,
            "stage": self.run.stage,
            "step": step,
            "tokens": self.checkpoint.tokens(trainer),
            "seconds": max((row["seconds"] for row in rows), default=0.0),
            "memory_gib": max((row.get("memory_gib", 0.0) for row in rows), default=0.0),
            "skipped_steps": self.checkpoint.guard.skipped,
            "world_size": trainer.world_size,
            "init_from": module.init_from,
            "data": [vars(passes) for passes in data.passes(data.consumed_samples * data.seq_len)],
            "validation": validation,
        }
        files.write_json(folder / "summary.json", summary)
        baselines = {name: values["unigram_loss"] for name, values in validation.items()}
        plot_losses(
            folder / "logs" / "metrics.csv", folder / "loss.png", baselines, f"{self.run.recipe} {self.run.stage}"
        )


def is_finished(run: RunConfig, max_steps: int) -> bool:
    """Whether the stage's newest complete checkpoint is its last step.

    Raises:
        ValueError: it is, but the export is gone.
    """
    checkpoints = saved.complete_checkpoints(run.folder / "checkpoints")
    if not checkpoints or saved.damage(checkpoints[-1], checksums=False):
        return False
    step = saved.read_meta(checkpoints[-1])["step"]
    if step < max_steps:
        return False
    for name in ("hf/config.json", "summary.json"):
        if not (run.folder / name).is_file():
            raise ValueError(
                f"{run.folder} is trained to step {step} but has no {name}; remove {checkpoints[-1]} to train "
                f"from the checkpoint before it and export again"
            )
    return True


def closing_words(folder: Path) -> str:
    """What came out of a finished stage and where it lies."""
    summary = files.read_json(folder / "summary.json")
    lines = [
        f"{summary['recipe']} {summary['stage']}: {summary['step']} steps, {summary['tokens']:,} tokens, "
        f"{clock(summary['seconds'])} on {summary['world_size']} process(es), {summary['memory_gib']:.2f} GiB"
    ]
    for name, values in summary["validation"].items():
        if values["loss"] is None:
            continue
        line = f"  held-out {name}: loss {values['loss']:.4f} nats/token ({values['bits_per_byte']:.3f} bits per byte)"
        if values["initial_loss"] is not None:
            line += f", before training {values['initial_loss']:.4f}"
        if values.get("source_loss") not in (None, values["initial_loss"]):
            line += f" ({summary['init_from']} as it is {values['source_loss']:.4f})"
        lines.append(f"{line}, unigram {values['unigram_loss']:.4f}")
    places = {"weights": "hf", "checkpoints": "checkpoints", "metrics": "logs/metrics.csv", "plot": "loss.png"}
    there = {what: path for what, place in places.items() if (path := folder / place).is_file() or any(path.glob("*"))}
    lines += [f"  {what}: {path}" for what, path in there.items()]
    return "\n".join(lines)
