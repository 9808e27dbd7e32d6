"""What a block keeps for the backward pass and what it recomputes.

    none       keep everything autograd wants
    selective  keep attention outputs and the narrow projections (q, k, v, o), recompute norms, RoPE and MLP
    full       keep the block's input, recompute the block

Selective keeps what costs most to recompute per byte: attention grows with the sequence while its output does
not, and the narrow projections are small beside the MLP's hidden layer, which is most of the memory.
`down_proj` is not recomputed either: nothing in the block needs its output, so recomputation stops before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

CheckpointMode = Literal["none", "selective", "full"]
CHECKPOINT_MODES: tuple[str, ...] = get_args(CheckpointMode)

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default)


def run_checkpointed(function: Callable[..., Any], mode: str, narrow: int, *args: Any) -> Any:
    """Call `function(*args)`, keeping for the backward what `mode` says.

    Args:
        function: a block's computation; no random numbers are drawn in it.
        mode: one of `CHECKPOINT_MODES`.
        narrow: matrix products whose input and output are at most this wide are kept by "selective".
        args: its tensors (and constants).
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    if mode == "full":
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, narrow))
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(narrow: int, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if _is_attention(op):
        return CheckpointPolicy.MUST_SAVE
    if op in _MATMULS:
        left, right = args[-2:] if op is torch.ops.aten.addmm.default else args[:2]
        if max(*left.shape[-1:], *right.shape) <= narrow:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_attention(op: Any) -> bool:
    """The S2 op or torch's fused SDPA kernels."""
    namespace, _, name = str(op).partition(".")
    return (namespace == "s2" and name.startswith("attention_forward")) or (
        namespace == "aten" and name.startswith("_scaled_dot_product")
    )
