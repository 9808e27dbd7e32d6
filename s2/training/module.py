"""The Lightning module: a Transformer, its loss over all ranks, and held-out losses.

Shape letters: B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from s2.model.config import ModelConfig
from s2.model.hf import load_config
from s2.model.transformer import Transformer
from s2.settings import SettingError, read
from s2.training.config import ModelSection
from s2.training.gaps import lightning as gaps
from s2.training.guard import StepGuard
from s2.training.optim import build_adamw
from s2.training.strategy import ZeROStrategy
from s2.training.weights import check_same_tokens, cut_batch, load_into, sink_warning


def resolve_config(keys: Mapping[str, Any], init_from: str | None) -> ModelConfig:
    """The model's config: the recipe's keys, on top of those of the checkpoint it starts from.

    Raises:
        ValueError: an unknown key (the closest known one is named) or a bad value.
        FileNotFoundError: `init_from` is not a Hugging Face folder.
    """
    source, base = "model.config", dict[str, Any]()
    if init_from is not None:
        if not (Path(init_from) / "config.json").is_file():
            raise FileNotFoundError(_missing_checkpoint(init_from))
        source, base = f"model.config (on top of {init_from}/config.json)", asdict(load_config(init_from))
    try:
        return read(ModelConfig, {**base, **keys}, "model.config")
    except SettingError:
        raise
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _missing_checkpoint(init_from: str) -> str:
    message = f"model.init_from={init_from!r} has no config.json: there is no trained model to start from"
    path = Path(init_from)
    if path.name == "hf" and len(path.parts) >= 3:
        stage, recipe = path.parts[-2], path.parts[-3]
        command = f"make pretrain RECIPE={recipe}"
        if stage.startswith("extend-"):
            command = f"make extend RECIPE={recipe} TO={stage.removeprefix('extend-')}"
        message += f"; run `{command}` first, or point model.init_from at a Hugging Face folder"
    elif download := _download(init_from):
        message += f"; get it with `{download}`, or point model.init_from at another Hugging Face folder"
    else:
        message += "; point model.init_from at a Hugging Face folder"
    return message


def _download(init_from: str) -> str | None:
    """The command in the head of a recipe that brings a checkpoint to this folder."""
    for file in sorted(Path("recipes").glob("*/*.yaml")):
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.removeprefix("#").split()
            if line.startswith("#") and words[:2] == ["hf", "download"] and init_from in words:
                return " ".join(words)
    return None


class PretrainModule(LightningModule):
    """Next-token training of a Transformer, as the recipe's section `model` says.

    A step's gradient is that of the mean loss over the step's valid tokens, on all ranks and in all its micro-batches,
    so that a token counts the same wherever it lies. How many are valid is known only after the last micro-batch:
    until then a micro-batch's loss is its sum over its places, valid or not, which are equally many everywhere, and
    the accumulated gradient is divided by the step's share of valid places before its norm is taken and clipped.
    """

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.section, self.init_from = section, section.init_from
        self.config = resolve_config(section.config, section.init_from)
        own = () if self.init_from is not None else ("bos_token_id", "eos_token_id")
        self._ids_of_data = [key for key in own if key not in section.config]
        self._source: ModelConfig | None = None  # of `init_from`, while it is validated as it is
        self.activation_checkpointing = section.activation_checkpointing
        self.model: Transformer | None = None
        self.train_totals = [0.0, 0.0]  # loss sum and valid tokens since `pop_train_loss`, over all ranks
        self._settings: list[dict[str, Any]] = []  # of the optimizer's groups, as the recipe has them
        self.guard: StepGuard | None = None  # decides which steps are taken; set by the launch
        self._step_places = self._step_valid = 0.0  # of the step so far, over all ranks
        self._skipped_norm: float | None = None
        self.validation_names: list[str] = []
        self.validation_losses: dict[str, float] = {}
        # of `init_from` before training, with its own layout, RoPE and length
        self.source_losses: dict[str, float] = {}
        self.validation_is_finite = True
        self.phase = "setting up"  # what is being done, in words
        self._validation_totals = torch.zeros(0)

    def configure_model(self) -> None:
        """Build the model; under ZeRO-3 Lightning calls this where every parameter is sharded as it is made."""
        if self.model is not None:
            return
        model = Transformer(self.config)
        if self.init_from is not None:
            load_into(model, self.init_from)
        model.set_activation_checkpointing(self.activation_checkpointing)
        self.model = model

    def on_fit_start(self) -> None:
        # not in `configure_model`: while ZeRO-3 shards parameters, torch's own functions are not what compilation knows
        if self.section.compile and self.model is not None:
            self.model.compile_blocks()

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        data.check_vocab_size(self.config.vocab_size)
        self.config = replace(self.config, **{key: getattr(data, key) for key in self._ids_of_data})
        if self.init_from is not None:
            check_same_tokens(data.tokenizer_file, self.init_from)
            if data.eos_token_id not in self.config.eos_token_ids and self.trainer.is_global_zero:
                print(
                    f"documents end with token {data.eos_token_id} in the data; the model's eos_token_id stays "
                    f"{self.config.eos_token_id}, as in {self.init_from} (model.config.eos_token_id changes it)"
                )
        self.validation_names = list(data.validation_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count whole steps with today's accumulation. Checkpoints are written at step boundaries, so the number of
        steps says it all; micro-batches of another size or on another number of ranks do not count."""
        gaps.set_progress(checkpoint, checkpoint["global_step"] * self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        offloaded = getattr(self.trainer.strategy, "offloads_optimizer", False)
        fused = self.trainer.strategy.root_device.type == "cuda" and not offloaded
        optimizer = build_adamw(self, self.section.optimizer, fused=fused)
        keys = ("betas", "eps", "weight_decay")
        self._settings = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        return optimizer

    def on_train_start(self) -> None:
        # A checkpoint may bring back the settings that it was trained with; those of the recipe hold.
        for group, settings in zip(self.trainer.optimizers[0].param_groups, self._settings, strict=True):
            group.update(settings)

    @property
    def learning_rate(self) -> float:
        """Rate of the next optimizer step."""
        factor = self.section.schedule.factor(self.trainer.global_step, self.trainer.max_steps)
        return self.section.optimizer.lr * factor

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        rate = self.learning_rate
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.phase = "step {step}"
        loss_sum, num_valid = self._loss(batch)
        total, count = self._sum_over_ranks(torch.stack((loss_sum.detach().double(), num_valid.double()))).tolist()
        if math.isfinite(total):
            self.train_totals[0] += total
            self.train_totals[1] += count
        places = batch["labels"].numel()
        self._step_places += places * self.trainer.world_size
        self._step_valid += count
        loss = loss_sum / places
        if self.guard is not None:
            self.guard.add(total, count, int(batch["position"]))
            if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 and self.guard.refuses():
                return loss * math.nan  # so that every rank finds a gradient that is no number, and skips the step
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if gaps.is_accumulating(self.trainer):
            return  # DeepSpeed is asked to step after every micro-batch, and does so at the last one
        # a step without any valid token has no gradient to divide
        share = self._step_valid / self._step_places if self._step_valid else 1.0
        self._step_places = self._step_valid = 0.0
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeROStrategy):
            strategy.divide_gradients(share)
        else:
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            for gradient in gradients:
                gradient /= share
            norm = float(torch.nn.utils.get_total_norm(gradients))
            self._skipped_norm = None if math.isfinite(norm) else norm
            if self._skipped_norm is not None:
                optimizer.zero_grad(set_to_none=True)  # which makes the optimizer leave everything as it is

    def skipped_gradient_norm(self) -> float | None:
        """Norm of the last step's gradient if the step was skipped for it, None if it was taken."""
        if isinstance(self.trainer.strategy, ZeROStrategy):
            return self.trainer.strategy.skipped_gradient_norm()
        return self._skipped_norm

    def pop_train_loss(self) -> float:
        """Mean loss per token since the last call, over all ranks and micro-batches; NaN where no token counted."""
        total, count = self.train_totals
        self.train_totals = [0.0, 0.0]
        return total / count if count else math.nan

    def on_validation_epoch_start(self) -> None:
        self.phase = "the validation before step {step}"
        self._source = self._other_attention() if self.trainer.sanity_checking else None
        self._validation_totals = torch.zeros(2, max(len(self.validation_names), 1), 2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._count(0, dataloader_idx, batch)
        if self._source is not None:
            assert self.model is not None
            self.model.attend_as(self._source)
            self._count(1, dataloader_idx, cut_batch(batch, self._source.max_position_embeddings))
            self.model.attend_as(self.config)

    def on_validation_epoch_end(self) -> None:
        totals = self._sum_over_ranks(self._validation_totals.to(self.device)).cpu()
        self.validation_is_finite = bool(totals[0].isfinite().all())
        means = (totals[..., 0] / totals[..., 1]).tolist()  # NaN where nothing was counted
        self.validation_losses = dict(zip(self.validation_names, means[0], strict=True))
        if self.trainer.sanity_checking and self.init_from is not None:
            source = means[0 if self._source is None else 1]
            self.source_losses = dict(zip(self.validation_names, source, strict=True))
            if self._source is not None and self.trainer.is_global_zero:
                warning = sink_warning(self._source, self.config, self.source_losses, self.validation_losses)
                print(warning, end="", flush=True)

    def _other_attention(self) -> ModelConfig | None:
        """The config of `init_from` if that attends otherwise than this recipe: the number to beat is that of the
        checkpoint as it is (longer documents cut to its own length), the number to begin with that of the recipe's
        layout and RoPE."""
        if self.init_from is None:
            return None
        source = load_config(self.init_from)
        keys = ("attention_layout", "block_size", "rope_theta", "rope_scaling")
        alike = all(getattr(source, key) == getattr(self.config, key) for key in keys)
        longer = self.config.max_position_embeddings > source.max_position_embeddings
        return None if alike and not longer else source

    def _count(self, row: int, index: int, batch: dict[str, Tensor]) -> None:
        loss_sum, num_valid = self._loss(batch)
        self._validation_totals[row, index] += torch.stack((loss_sum.double(), num_valid.double())).cpu()

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.model is not None
        return self.model(batch["input_ids"], labels=batch["labels"], cu_seqlens=batch.get("cu_seqlens"))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            dist.all_reduce(values)
        return values
