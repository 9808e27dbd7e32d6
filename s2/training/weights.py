"""Weights in and out of a model that may be sharded by ZeRO-3: start from a folder, export to one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2 import files
from s2.model.config import ModelConfig
from s2.model.hf import FOLDER_KIND, load_weights, save_pretrained
from s2.model.rope import cut_documents
from s2.model.tokenizer_files import read_tokenizer
from s2.model.transformer import Transformer
from s2.training.gaps.deepspeed import whole_modules

_WITHOUT_SINK = re.compile(r"(L\d+(?:V\d+(?:<\d+)?)*|W\d+)(?:\+sink0+(?!\d))?(?![\dV<]|\+sink)")


def load_into(model: Transformer, folder: str) -> None:
    """Copy a Hugging Face folder's weights into `model` on rank 0. The others get them from there: ZeRO-3 broadcasts
    each parameter as its gathering ends, ZeRO-1/2 the whole model when the engine starts.

    Raises:
        ValueError: the folder does not hold exactly the tensors that the recipe's config asks for (`load_weights`).
    """
    weights: dict[str, Tensor] = {}
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if _rank() == 0:
        try:
            with whole_modules() if sharded else nullcontext():  # shapes are compared with those of a model of its own
                weights = load_weights(folder, model.config)
        except ValueError as error:
            raise ValueError(
                f"{error} (that is {folder}/config.json with the keys of the recipe's model.config)"
            ) from None
    for name, parameter in model.named_parameters():
        with gathered(parameter, modifier_rank=0), torch.no_grad():
            if _rank() == 0:
                parameter.copy_(weights[name])


def check_same_tokens(data_tokenizer: Path, init_from: str) -> None:
    """Refuse data whose token ids mean something else to the model that training starts from.

    A checkpoint may have further tokens (those of a chat template), and a folder without a tokenizer says nothing.

    Raises:
        ValueError: names a token and its two ids.
    """
    own = Path(init_from) / "tokenizer.json"
    if not own.is_file() or own.read_bytes() == data_tokenizer.read_bytes():
        return
    known = read_tokenizer(own).get_vocab(with_added_tokens=True)
    for token, token_id in read_tokenizer(data_tokenizer).get_vocab(with_added_tokens=True).items():
        if known.get(token) != token_id:
            raise ValueError(
                f"the data was tokenized with {data_tokenizer}, where {token!r} is token {token_id}, but in "
                f"{own} of model.init_from it is {known.get(token, 'none')}; prepare the data with the "
                f"model's tokenizer (prepare.tokenizer.path: {own})"
            )


def cut_batch(batch: dict[str, Tensor], longest: int) -> dict[str, Tensor]:
    """A batch `[B, S]` in which no document is longer than a model reads: the rest begins another."""
    B, S = batch["input_ids"].shape
    rows = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=batch["input_ids"].device)
    return batch | {"cu_seqlens": cut_documents(batch.get("cu_seqlens", rows), B * S, longest)}


def sink_warning(
    source: ModelConfig, config: ModelConfig, as_it_is: Mapping[str, float], under_layout: Mapping[str, float]
) -> str:
    """A line for weights that were trained dense under a layout whose sparse heads lose the first block; else "".

    Args:
        source, config: of the checkpoint and of the recipe.
        as_it_is, under_layout: held-out losses before training by set, of the one and of the other.
    """
    heads = [head for pattern in config.layout for head in pattern.heads or (pattern,)]
    if not source.is_dense or all(head.is_dense or head.sinks for head in heads):
        return ""
    losses = ", ".join(f"{name} {as_it_is[name]:.4f} -> {loss:.4f}" for name, loss in under_layout.items())
    keeping = _WITHOUT_SINK.sub(r"\1+sink1", config.attention_layout)
    return (
        f"warning: heads trained dense rest on the first tokens, which attention_layout={config.attention_layout} takes"
        f" from them (held-out loss as it is -> under the layout: {losses}); model.config.attention_layout='{keeping}'"
        f" keeps them\n"
    )


def export(
    model: nn.Module, config: ModelConfig, folder: Path, tokenizer_file: Path, init_from: str | None = None
) -> None:
    """Write the Hugging Face folder from rank 0; every rank must call it, because ZeRO-3 gathers.

    The folder appears whole or not at all (`files.publish`).

    Args:
        tokenizer_file: of the data; used where `init_from` has no tokenizer of its own.
        init_from: the Hugging Face folder that training started from; its tokenizer files (chat template, special
            tokens) and generation_config.json go with the weights.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter):
            if _rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    if _rank() != 0:
        return
    dtype = torch.float32 if any(value.dtype == torch.float32 for value in state.values()) else torch.bfloat16
    own = init_from is not None and (Path(init_from) / "tokenizer.json").is_file()
    partial = files.begin(folder, FOLDER_KIND)
    save_pretrained(state, config, partial, None if own else tokenizer_file, dtype=dtype, source=init_from)
    files.publish(partial, folder)


def gathered(parameter: nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager:
    """Have a parameter whole for a while, also where ZeRO-3 shards it; `modifier_rank` gives its value to all."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
