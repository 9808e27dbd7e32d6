"""Weights in and out of a model that may be sharded by ZeRO-3: start from a folder, export to one."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2.model.config import ModelConfig
from s2.model.hf import load_state_dict, save_pretrained


def load_into(model: nn.Module, folder: str) -> None:
    """Copy a Hugging Face folder's weights into `model` on rank 0; the others get them from rank 0.

    ZeRO-3 broadcasts each parameter as its gathering ends, ZeRO-1/2 broadcast the whole model when the engine
    starts, so only rank 0 reads the files.

    Raises:
        ValueError: a tensor is missing or has another shape than the recipe's config asks for.
    """
    weights = load_state_dict(folder) if _rank() == 0 else {}
    for name, parameter in model.named_parameters():
        with gathered(parameter, modifier_rank=0):
            if _rank() == 0:
                _copy(parameter, name, weights, folder)


def _copy(parameter: nn.Parameter, name: str, weights: dict[str, Tensor], folder: str) -> None:
    if name not in weights:
        raise ValueError(f"{folder} has no tensor {name!r}, which the recipe's model.config asks for")
    if weights[name].shape != parameter.shape:
        raise ValueError(
            f"{folder}: tensor {name!r} is {list(weights[name].shape)} but the recipe's model.config makes it "
            f"{list(parameter.shape)}; drop the keys of model.config that change shapes"
        )
    with torch.no_grad():
        parameter.copy_(weights[name])


def export(model: nn.Module, config: ModelConfig, folder: Path, tokenizer_file: Path | None) -> None:
    """Write the Hugging Face folder from rank 0; every rank must call it, because ZeRO-3 gathers.

    The folder appears whole or not at all: it is written beside its place and renamed.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter):
            if _rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    if _rank() != 0:
        return
    dtype = torch.float32 if any(value.dtype == torch.float32 for value in state.values()) else torch.bfloat16
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    save_pretrained(state, config, partial, tokenizer_file=tokenizer_file, dtype=dtype)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def gathered(parameter: nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager:
    """Have a parameter whole for a while, also where ZeRO-3 shards it; `modifier_rank` gives its value to all."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
