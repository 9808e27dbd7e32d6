"""AdamW and learning-rate schedules.

A schedule is a pure function of the step, so it has no state to save and a resumed run cannot drift from an
uninterrupted one.

    cosine   linear warmup, then half a cosine from the peak down to min_ratio * peak
    wsd      warmup, a stable plateau at the peak, then decay over the last decay_ratio of the run
    linear   warmup, then a straight line down to min_ratio * peak
    constant warmup, then the peak
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from s2.settings import Check, Count, Ratio, Settings, Weight

if TYPE_CHECKING:  # recipes are checked without it
    import torch
    from torch import nn

_Decay = Annotated[float, Check("a number from 0 to below 1", lambda x: 0 <= x < 1)]
_NotNegative = Annotated[float, Check("a number that is not negative", lambda x: 0 <= x < math.inf)]


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Attributes:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled decay of the matrices; norms and biases (one-dimensional) are never decayed.
    """

    lr: Weight = 3e-4
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    eps: _NotNegative = 1e-8
    weight_decay: _NotNegative = 0.1


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Learning rate over the run, as a share of the peak.

    Attributes:
        name: cosine, wsd, linear or constant.
        warmup_steps: steps of linear warmup; step 0 already has a rate above zero.
        min_ratio: rate at the last step over the peak rate.
        decay_ratio: wsd only, the share of the run spent decaying (Hu et al., arXiv 2404.06395, use 0.1).
        decay_shape: wsd only; `sqrt` is 1 - sqrt(progress) (Hägele et al., arXiv 2405.18392), or `linear`.
    """

    name: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: Count = 0
    min_ratio: Ratio = 0.1
    decay_ratio: Annotated[float, Check("a number above 0 and up to 1", lambda x: 0 < x <= 1)] = 0.1
    decay_shape: Literal["sqrt", "linear"] = "sqrt"

    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step` (0-based) over the peak.

        Raises:
            ValueError: the warmup does not fit into the run.
        """
        if self.warmup_steps >= total_steps:
            raise ValueError(
                f"model.schedule.warmup_steps={self.warmup_steps} must be below trainer.max_steps={total_steps}"
            )
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        start = self.warmup_steps
        if self.name == "wsd":
            start = max(start, total_steps - round(self.decay_ratio * total_steps))
        if self.name == "constant" or step < start:
            return 1.0
        # 0 at the first step after `start`, 1 at the last step of the run and beyond.
        progress = min((step - start) / max(total_steps - 1 - start, 1), 1.0)
        left = 1 - progress
        if self.name == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
        elif self.name == "wsd" and self.decay_shape == "sqrt":
            left = 1 - math.sqrt(progress)
        return self.min_ratio + (1 - self.min_ratio) * left


def build_adamw(model: nn.Module, config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW in two groups: matrices with decay, everything one-dimensional without; `fused` runs one kernel per group
    on CUDA."""
    import torch

    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a partitioned one empty
            (decayed if len(shape) >= 2 else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
