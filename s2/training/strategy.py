"""DeepSpeed ZeRO under Lightning, on GPUs and on the CPU.

    trainer.strategy: zero_1   optimizer states sharded over the data-parallel ranks
    trainer.strategy: zero_2   + gradients
    trainer.strategy: zero_3   + parameters, created sharded
    zero_2_offload, zero_3_offload: optimizer states (and parameters) live in host memory

Precision comes from `trainer.precision`: 32-true, bf16-mixed or bf16-true (DeepSpeed keeps fp32 master weights
and fp32 optimizer states for both). Gradient clipping comes from `trainer.gradient_clip_val`.

On the CPU the same ZeRO code runs over gloo, which is how tests and the demo cover the training path.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry

from s2.training import resize, run_folder
from s2.training.gaps import deepspeed as gaps
from s2.training.gaps.workers import shield_workers

STRATEGIES: dict[str, dict[str, Any]] = {
    "zero_1": {"stage": 1},
    "zero_2": {"stage": 2},
    "zero_2_offload": {"stage": 2, "offload_optimizer": True},
    "zero_3": {"stage": 3},
    "zero_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


class ZeROStrategy(gaps.MendedDeepSpeedStrategy):
    """DeepSpeed ZeRO with checkpoints that are checked before they are loaded, by any number of ranks.

    Args:
        stage: ZeRO stage 1, 2 or 3.
        offload_optimizer: keep optimizer states in host memory.
        offload_parameters: stage 3 only, keep parameters in host memory.
        bucket_size: elements per reduce and all-gather bucket; sets the size of the communication buffers.
        prefetch_elements: stage 3 only, parameters gathered ahead of use.
        persistence_threshold: stage 3 only, parameters of at most so many elements stay whole on every rank.
        reuse_distance: stage 3 only, parameters stay gathered if they are used again within so many elements of others.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        bucket_size: int = 200_000_000,
        prefetch_elements: int = 50_000_000,
        persistence_threshold: int = 100_000,
        reuse_distance: int = 1_000_000_000,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO stage {stage} does not exist; use 1, 2 or 3")
        if offload_parameters and stage != 3:
            raise ValueError(f"offload_parameters needs ZeRO stage 3, not {stage}")
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            allgather_bucket_size=bucket_size,
            reduce_bucket_size=bucket_size,
            # DeepSpeed only reports with it, and Lightning's guess would build a second dataloader.
            logging_batch_size_per_gpu=1,
            logging_level=logging.ERROR,  # it warns of skipped steps, which `StepGuard` counts
        )
        self.stage, self.offloads_optimizer = stage, offload_optimizer
        assert isinstance(self.config, dict)
        zero = self.config["zero_optimization"]
        if stage == 3:
            zero["stage3_prefetch_bucket_size"] = prefetch_elements
            zero["stage3_param_persistence_threshold"] = persistence_threshold
            zero["stage3_max_reuse_distance"] = reuse_distance
            # A block's weights are gathered and released as one, by hooks on the block. Inside it they would be part of
            # what is recomputed or compiled, which has to do the same every time; hooks that find weights gathered
            # ahead one time and absent the next do not.
            zero["leaf_module"] = {"classes": ["s2.model.layers.Block"]}
            zero["stage3_gather_16bit_weights_on_model_save"] = False
        # With offload torch's AdamW stays the optimizer, so that no compiled DeepSpeed op is needed.
        self.config["zero_force_ds_cpu_optimizer"] = False
        # Long accumulations in bf16 lose small gradients.
        self.config["data_types"] = {"grad_accum_dtype": "fp32"}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and optimizer, also when they were saved by another number of ranks.

        Every byte is compared with its checksum first, each rank reading its share. Where the checkpoint is not as it
        was written, that is said, and the newest whole one before it is restored; DamagedError where there is none.
        """
        wanted = Path(checkpoint_path)
        older = run_folder.complete_checkpoints(wanted.parent.parent)
        candidates = [path for path in older if path <= wanted.parent] or [wanted.parent]
        whole = run_folder.newest_whole(candidates, self._damage, self._say)
        assert whole is not None
        if whole != wanted.parent:
            self._say(f"continuing from {whole} instead")
        state = whole / wanted.name
        if resize.saved_ranks(state) in (0, self.world_size):
            return super().load_checkpoint(state, weights_only)
        if self.is_global_zero:
            resize.to_universal(state, self.world_size)
        self.barrier()
        with gaps.universal_load(self.deepspeed_engine):
            return super().load_checkpoint(resize.universal_folder(state), weights_only)

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank."""
        mine = run_folder.damage(checkpoint, checksums=True, share=(self.global_rank, self.world_size))
        return next((wrong for wrong in over_ranks(mine) if wrong), None)

    def _say(self, text: str) -> None:
        if self.is_global_zero:
            print(text, flush=True)

    def process_dataloader(self, dataloader: object) -> object:
        """Schedulers signal every process of a job; loader workers must live on until the checkpoint is written."""
        return shield_workers(super().process_dataloader(dataloader))


def over_ranks(value: Any) -> list[Any]:
    """`value` of every rank, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def register_strategies() -> None:
    """Make the names of `STRATEGIES` known to `trainer.strategy`."""
    for name, arguments in STRATEGIES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, ZeROStrategy, description="DeepSpeed ZeRO", **arguments)
