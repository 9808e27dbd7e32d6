"""What a stage will do, said before its first step, and what came out of it: loss plot, export, summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from s2 import files
from s2.ending import DamagedError
from s2.model.config import ModelConfig
from s2.model.layouts import layout_table
from s2.training.config import RunConfig
from s2.training.gate import gate_warning
from s2.training.guard import DivergedError
from s2.training.memory import memory_of
from s2.training.metrics import clock, plot_losses, read_metrics
from s2.training.saving import RunCheckpoint, on_rank_zero, tokens_per_step
from s2.training.weights import export


def launch_report(run: RunConfig, module: Any, data: Any, trainer: Any, precision: Any) -> str:
    """The text printed before the first step. `precision` is the recipe's, which the CPU does not train in."""
    config: ModelConfig = module.config
    strategy = trainer.strategy
    on_cpu = strategy.root_device.type == "cpu"
    wanted = str(precision or trainer.precision) if on_cpu else str(trainer.precision)
    step = tokens_per_step(trainer, data)
    return "\n".join(
        [
            f"{run.recipe} {run.stage} -> {run.folder}",
            f"model: {config.num_parameters():,} parameters, {config.num_hidden_layers} layers, hidden "
            f"{config.hidden_size}, {config.num_attention_heads} query / {config.num_key_value_heads} KV heads of "
            f"{config.head_dim}, vocabulary {config.vocab_size:,}, rope_theta {config.rope_theta:g}"
            + (f", weights from {module.init_from}" if module.init_from else ""),
            layout_table(config, data.seq_len),
            f"batch: {data.seq_len:,} tokens x {data.micro_batch_size} x {trainer.accumulate_grad_batches} accumulated "
            f"x {trainer.world_size} ranks = {step:,} tokens a step, {trainer.max_steps:,} steps, "
            f"{step * trainer.max_steps:,} tokens",
            f"memory estimate: {memory_of(module, data, trainer, wanted)}; {wanted}, ZeRO stage "
            f"{getattr(strategy, 'stage', 0)}, checkpointing {module.activation_checkpointing}"
            + (f" (of a GPU; here on the CPU, in {trainer.precision}, it is not estimated)" if on_cpu else ""),
        ]
    )


def data_report(data: Any, total_tokens: int) -> str:
    """How often a run goes through its data, and what of its text the tokens lack; printed once the data is there."""
    passes = data.passes(total_tokens)
    lines = [
        f"data: {each.component}: {each.asked:,} tokens of {each.available:,}, {each.passes:.2f} passes"
        for each in passes
    ]
    if repeated := [each for each in passes if each.passes > 1]:
        most = max(repeated, key=lambda each: each.passes)
        lines.append(
            f"warning: data is repeated, {most.component} {most.passes:.2f} times; prepare more of it, give it less "
            f"weight, or train on fewer tokens"
        )
    lines += [f"warning: not in the tokens: {line}" for line in data.lost_text()]
    return "\n".join(lines)


class Finish(Callback):
    """Runs before the last checkpoint is written: a stage counts as finished once that one is there."""

    def __init__(self, run: RunConfig, checkpoint: RunCheckpoint) -> None:
        self.run = run
        self.checkpoint = checkpoint

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        data = trainer.datamodule
        self.checkpoint.check_end(trainer, pl_module)
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
            loss, source = f"val/{name}/loss", f"val/{name}/source_loss"
            losses = {row["step"]: row[loss] for row in rows if loss in row}
            last = losses[max(losses)] if losses else None
            validation[name] = {
                "initial_loss": losses.get(0),
                "source_loss": next((row[source] for row in rows if source in row), None),
                "loss": last,
                "unigram_loss": data.unigram_loss(name),
                "bits_per_byte": None if last is None else data.bits_per_byte(name, last),
            }
        step = trainer.global_step
        summary = {
            "recipe": self.run.recipe,
            "stage": self.run.stage,
            "step": step,
            "tokens": self.checkpoint.tokens(trainer),
            "seconds": max((row["seconds"] for row in rows), default=0.0),
            "memory_gib": max((row.get("memory_gib", 0.0) for row in rows), default=0.0),
            "skipped_steps": self.checkpoint.guard.counters.skipped,
            "world_size": trainer.world_size,
            "init_from": module.init_from,
            "gate_before": self.checkpoint.gate_before,
            "data": [vars(passes) for passes in data.passes(data.consumed_samples * data.seq_len)],
            "validation": validation,
        }
        files.write_json(folder / "summary.json", summary)
        if step < trainer.max_steps:
            print(f"trainer.max_time has ended the stage at step {step} of {trainer.max_steps}", flush=True)
        baselines = {name: values["unigram_loss"] for name, values in validation.items()}
        plot_losses(rows, folder / "loss.png", baselines, f"{self.run.recipe} {self.run.stage}")


def closing_words(folder: Path) -> str:
    """What came out of a finished stage and where it lies. Raises DamagedError where summary.json is not what was
    written."""
    try:
        summary = files.read_json(folder / "summary.json")
        lines = [
            f"{summary['recipe']} {summary['stage']}: {summary['step']} steps, {summary['tokens']:,} tokens, "
            f"{clock(summary['seconds'])} on {summary['world_size']} process(es), {summary['memory_gib']:.2f} GiB"
        ]
        for name, each in summary["validation"].items():
            if each["loss"] is None:
                continue
            line = f"  held-out {name}: loss {each['loss']:.4f} nats/token ({each['bits_per_byte']:.3f} bits per byte)"
            if each["initial_loss"] is not None:
                line += f", before training {each['initial_loss']:.4f}"
            if each.get("source_loss") not in (None, each["initial_loss"]):
                line += f" ({summary['init_from']} as it is {each['source_loss']:.4f})"
            lines.append(f"{line}, unigram {each['unigram_loss']:.4f}")
        if said := gate_warning(summary.get("gate_before")):
            lines.append(f"  {said}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{folder / 'summary.json'} is not as it was written ({type(error).__name__}: {error}); remove the newest "
            f"folder in {folder / 'checkpoints'} to train its last steps and write it again"
        ) from error
    places = {"weights": "hf", "checkpoints": "checkpoints", "metrics": "logs/metrics.csv", "plot": "loss.png"}
    there = {what: path for what, place in places.items() if (path := folder / place).is_file() or any(path.glob("*"))}
    return "\n".join([*lines, *(f"  {what}: {path}" for what, path in there.items())])
