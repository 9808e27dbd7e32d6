"""DeepSpeed 0.19, and Lightning's strategy for it (2.6)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn


class MendedDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy, on the CPU too (its class refuses all but CUDA; its parents' methods will do), and with
    gradients that can be divided by a number that is known only at a step's end."""

    @property
    def root_device(self) -> torch.device:
        """This rank's device, always with an index: DeepSpeed reads `device.index` as the local rank."""
        device = super().root_device
        return torch.device(device.type, self.local_rank) if device.index is None else device

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_environment()
        os.environ["DS_ACCELERATOR"] = "cpu"
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_distributed()
        import deepspeed

        # it would be compiled with the machine's C++ compiler in every first run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        engine, optimizer = super()._setup_model_and_optimizer(model, *args, **kwargs)
        if hasattr(optimizer, "reduce_ipg_grads"):  # ZeRO-1/2 with hooks
            OrderedReduction(optimizer, engine.module.parameters())
        return engine, optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuse to train where Lightning and DeepSpeed, who both count micro-batches, disagree about where a step
        begins: gradients would be zeroed in the middle of one."""
        engine: Any = self.deepspeed_engine
        accumulate = engine.gradient_accumulation_steps()
        if engine.micro_steps % accumulate != batch_idx % accumulate:
            raise RuntimeError(
                f"micro-batch {batch_idx} is number {batch_idx % accumulate} of {accumulate} in its step for the "
                f"trainer, but number {engine.micro_steps % accumulate} for DeepSpeed"
            )

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Back-propagate; Lightning has already divided the loss by the accumulation, so DeepSpeed must not."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def divide_gradients(self, divisor: float) -> None:
        """Divide the gradient of the step that is about to be taken, before its norm is measured and clipped. DeepSpeed
        has nothing for that but the loss scale, which is 1 otherwise."""
        optimizer: Any = self.deepspeed_engine.optimizer
        if hasattr(optimizer, "loss_scaler"):
            optimizer.loss_scale = divisor
        else:  # ZeRO-1 in bf16 knows no loss scale and holds all gradients of a step in fp32
            for gradients in optimizer.fp32_groups_gradients_flat:
                gradients /= divisor

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, *args, **kwargs)
        if hasattr(optimizer, "loss_scaler"):
            optimizer.loss_scale = 1.0  # after `divide_gradients`
        return output

    def skipped_gradient_norm(self) -> float | None:
        """Norm of the last step's gradient if DeepSpeed skipped the step for it, None if the step was taken."""
        engine: Any = self.deepspeed_engine
        return float(engine.get_global_grad_norm() or math.inf) if engine.optimizer.overflow else None


class OrderedReduction:
    """Gradients of ZeRO-1 and ZeRO-2 enter DeepSpeed's reduction buckets in one order on all ranks.

    DeepSpeed flattens gradients into buckets in the order in which autograd finishes them, and reduces a bucket as soon
    as it is full. That order belongs to the graph that a rank ran: where one rank's micro-batch has document borders
    and another's has none they may run graphs compiled differently, and gradients of different weights would be
    averaged, or the ranks would wait for each other in collectives of different sizes. Here a gradient waits until
    those before it have been handed over, in the reverse order of the model's parameters, which is nearly the order of
    any backward: overlap of reduction and backward stays, and out of turn are the gradients of one block at most.

    ZeRO-3 needs none of this: gradients of a block are handed over at its end, in the order of its parameters. Nor does
    ZeRO-1 in bf16, which reduces all gradients of a step at its end.

    Args:
        optimizer: `DeepSpeedZeroOptimizer`; its two methods are wrapped.
        parameters: the model's, in the order of the model.
    """

    def __init__(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
        self._place = {id(parameter): place for place, parameter in enumerate(reversed(list(parameters)))}
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self._next = 0
        self._reduce = optimizer.reduce_ready_partitions_and_remove_grads
        self._end_backward = optimizer.independent_gradient_partition_epilogue
        optimizer.reduce_ready_partitions_and_remove_grads = self._take
        optimizer.independent_gradient_partition_epilogue = self._finish

    def _take(self, parameter: nn.Parameter, group: int) -> None:
        self._waiting[self._place[id(parameter)]] = (parameter, group)
        while self._next in self._waiting:
            self._reduce(*self._waiting.pop(self._next))
            self._next += 1

    def _finish(self) -> None:
        for place in sorted(self._waiting):  # behind parameters that took no part in this backward, on no rank
            self._reduce(*self._waiting.pop(place))
        self._next = 0
        self._end_backward()


@contextmanager
def whole_modules() -> Iterator[None]:
    """Have modules that are made meanwhile keep their parameters whole, also inside of `deepspeed.zero.Init`, where
    each would be sharded at once and show no shape."""
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


@contextmanager
def universal_load(engine: Any) -> Iterator[None]:
    """Let `engine.load_checkpoint` read the universal format, and mend what it gets wrong.

    On ZeRO-3 it hands every parameter group the settings of the first one (its weight decay too), and all parameters
    one step tensor, which AdamW would then advance once for each of them.
    """
    optimizer = engine.optimizer
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)
    fused = any(before.get("fused") for before in settings)
    for parameter, state in optimizer.optimizer.state.items():
        if "step" in state:
            step = torch.as_tensor(state["step"], dtype=torch.float32)
            state["step"] = step.clone().to(parameter.device if fused else "cpu")


def add_missing_ranks(folder: Path, world_size: int) -> None:
    """ZeRO-3 asks a universal checkpoint for one model-state file per rank; they all hold the same metadata, so rank
    0's serves."""
    first = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    if first.is_file():
        for rank in range(world_size):
            file = first.with_name(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            if not file.exists():
                os.link(first, file)
