"""Memory: what a run will take, what it took, and what to turn where that is too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from s2.model.config import ModelConfig
from s2.model.recompute import tile_rows

GIB = 2**30

_ALMOST_NONE = 0.03  # share of the device's memory that is free when a library finds none for its workspace


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device. Activations are those of one micro-batch; communication buckets, the allocator's slack and
    the CUDA context (a few GiB together) come on top."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in vars(self).items())
        return f"{self.total / GIB:.2f} GiB per device ({parts})"


def estimate_memory(
    config: ModelConfig,
    tokens: int,
    *,
    stage: int,
    world_size: int,
    precision: str,
    checkpointing: str,
    offload_optimizer: bool = False,
) -> MemoryEstimate:
    """Memory of one rank.

    Model states follow Rajbhandari et al., arXiv 1910.02054, with fp32 gradient accumulation: in bf16 a parameter
    costs 2 bytes of weight, 4 of gradient and 12 of fp32 master weight and Adam moments; in fp32 4, 4 and 8.
    ZeRO-1 shards the optimizer, ZeRO-2 the gradients too, ZeRO-3 the weights too.

    Args:
        tokens: of a micro-batch on one rank.
        stage: ZeRO stage (0: nothing is sharded).
        precision: Lightning's name, for example 32-true or bf16-mixed.
        checkpointing: none, selective or full.
    """
    low = "16" in precision
    parameters = config.num_parameters()
    shard = [1.0 if stage < level else 1.0 / world_size for level in (1, 2, 3)]
    return MemoryEstimate(
        weights=parameters * (2 if low else 4) * shard[2],
        gradients=parameters * 4 * shard[1],
        optimizer=0.0 if offload_optimizer else parameters * (12 if low else 8) * shard[0],
        activations=_activations(config, checkpointing, tokens) * (2 if low else 4),
    )


def _activations(config: ModelConfig, checkpointing: str, tokens: int) -> int:
    """Elements of so many tokens that exist at most between forward and backward.

    A block keeps: two residual inputs and two norm outputs (4 E), rotated q, k, v (Q + 2 K), with qk_norm what is
    normed (Q + K), the attention output (Q), and gate, up, their activation and product (4 F).
    `selective` keeps the block's input, q, k, v, the attention output and its projection, and holds one whole block at
    a time in the backward.
    `full` keeps the block's input, and holds first a tile of the MLP beside what attention keeps, then attention beside
    its gradients, that of q in fp32 too.
    The head keeps the last hidden states, their norm and their gradient (3 E); its logits exist a chunk at a time.
    """
    E, F = config.hidden_size, config.intermediate_size
    Q = config.num_attention_heads * config.head_dim
    K = config.num_key_value_heads * config.head_dim
    attention = E + 2 * Q + 2 * K + config.qk_norm * (Q + K)
    whole = tokens * (3 * E + attention + 4 * F)
    kept, working = {
        "none": (whole, 0),
        "selective": (tokens * (2 * E + 2 * Q + 2 * K), whole),
        "full": (
            tokens * E,
            max(
                tokens * (attention + 3 * E) + tile_rows(tokens, F) * 7 * F,
                tokens * (attention + 2 * E + 4 * Q + 2 * K),
            ),
        ),
    }[checkpointing]
    return config.num_hidden_layers * kept + working + tokens * 3 * E


def memory_of(module: Any, data: Any, trainer: Any, precision: str | None = None) -> MemoryEstimate:
    """`estimate_memory` of a run, in another precision where one is given."""
    strategy = trainer.strategy
    return estimate_memory(
        module.config,
        data.micro_batch_size * data.seq_len,
        stage=getattr(strategy, "stage", 0),
        world_size=trainer.world_size,
        precision=precision or trainer.precision,
        checkpointing=module.activation_checkpointing,
        offload_optimizer=getattr(strategy, "offloads_optimizer", False),
    )


def device_is_full() -> bool:
    """Whether next to no memory of this process's GPU is free outside of torch's cache; False without one."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < _ALMOST_NONE * total


def usage() -> str:
    """What this process's GPU held at most, to stand beside the estimate; empty without one."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    free, total = torch.cuda.mem_get_info()
    ours, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    others = max(total - free - torch.cuda.memory_reserved(), 0)
    return (
        f"; of {total / GIB:.1f} GiB torch held at most {ours / GIB:.1f} in tensors, {reserved / GIB:.1f} with "
        f"its cache, libraries and other processes {others / GIB:.1f}"
    )


def advice(module: Any, data: Any, trainer: Any) -> str:
    """The sentence that a run out of memory ends with: where it was, the estimate, and what can still be turned."""
    phase = module.phase.format(step=trainer.global_step + 1)
    stage, checkpointing = getattr(trainer.strategy, "stage", 0), module.activation_checkpointing
    turns = []
    if data.micro_batch_size > 1:
        turns.append(f"data.micro_batch_size below {data.micro_batch_size}")
    if checkpointing != "full":
        turns.append(f"model.activation_checkpointing={'selective or full' if checkpointing == 'none' else 'full'}")
    if stage < 3 and trainer.world_size > 1:
        turns.append(f"trainer.strategy=zero_{stage + 1}")
    if stage == 3 or trainer.world_size == 1:
        turns.append("more GPUs with trainer.strategy=zero_3")
    turns.append(f"trainer.strategy={'zero_3_offload' if stage == 3 else 'zero_2_offload'}")
    estimate = f"{memory_of(module, data, trainer)}{usage()}"
    return f"out of memory in {phase}; the estimate was {estimate}. In this order: {'; '.join(turns)}"
