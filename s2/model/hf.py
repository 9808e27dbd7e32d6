"""Checkpoints that users take away: Hugging Face Llama folders, written and read.

A folder holds `config.json`, `model*.safetensors` (with an index when sharded), `generation_config.json` and,
when a tokenizer is given, its files. `config.json` is written last: a folder without it was not finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ModelConfig
from .tokenizer_files import write_tokenizer
from .transformer import Transformer

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_pretrained(
    model: nn.Module | Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    tokenizer_file: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a Hugging Face Llama folder.

    Args:
        model: a `Transformer` or its full (gathered) state dict; any float dtype, any device.
        config: the model's.
        folder: created if need be; weights of an earlier export in it are replaced.
        tokenizer_file: a `tokenizer.json`. A `tokenizer_config.json` beside it is taken over, else one is
            written.
        dtype: of the saved weights.
        max_shard_size: bytes, or text such as "5GB".

    Returns:
        The folder.

    Raises:
        ValueError: tensors missing, unexpected or of the wrong shape; a tokenizer that does not fit the
            config.
        FileNotFoundError: no tokenizer_file.
    """
    folder = Path(folder)
    weights = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    _check_tensors({name: list(x.shape) for name, x in weights.items()}, config, "save_pretrained")
    if config.tie_word_embeddings:
        weights.pop(_HEAD, None)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / "config.json", folder / _INDEX, *folder.glob("model*.safetensors")]:
        stale.unlink(missing_ok=True)
    if tokenizer_file is not None:
        write_tokenizer(Path(tokenizer_file), config, folder)
    _write_weights(weights, folder, dtype, max_shard_size)

    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", {**config.to_hf_dict(), "dtype": name, "torch_dtype": name})  # 5.x, 4.x
    return folder


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face Llama folder (ours or any other).

    Raises:
        FileNotFoundError: no folder or no config.json.
        ValueError: not JSON, or a model we do not support (see `ModelConfig.from_hf_dict`).
    """
    path = Path(folder) / "config.json"
    return ModelConfig.from_hf_dict(_read_json(path), source=str(path))


def load_state_dict(folder: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, in their stored dtype.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a damaged file, or a tensor the index promises is not in its shard.
    """
    folder = Path(folder)
    state: dict[str, Tensor] = {}
    for path, names in _shards(folder).items():
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                present = set(file.keys())
                if absent := sorted(set(names or present) - present):
                    raise ValueError(f"{path}: lacks tensor {absent[0]!r}, which {_INDEX} places there")
                state |= {name: file.get_tensor(name) for name in names or present}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None
    return state


def load_pretrained(
    folder: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """A `Transformer` with the weights of a Hugging Face Llama folder.

    Args:
        folder: with config.json and safetensors.
        overrides: `ModelConfig` keys to change, typically rope_theta, rope_scaling, max_position_embeddings,
            attention_layout, block_size. Keys that change a tensor's shape fail when its weight is compared.
        device: where the weights go.
        dtype: of the weights; None keeps the stored one.

    Raises:
        FileNotFoundError, ValueError: as `load_config` and `load_state_dict`; missing, unexpected or wrongly
            shaped tensors are named with both shapes and the folder.
    """
    config = load_config(folder)
    if overrides:
        try:
            config = config.replace(**overrides)
        except ValueError as error:
            raise ValueError(f"overrides of {folder}: {error}") from None
    with torch.device("meta"):
        model = Transformer(config)
    state = load_state_dict(folder, device=device)
    _drop_derived(state)
    _check_tensors({name: list(x.shape) for name, x in state.items()}, config, str(folder))
    common = dtype or state[_EMBEDDING].dtype
    state = {name: x.to(common) for name, x in state.items()}
    if config.tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDING]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.requires_grad_(True)


# -------------------------------------------------------------------- helpers


def _check_tensors(shapes: dict[str, list[int]], config: ModelConfig, source: str) -> None:
    with torch.device("meta"):
        expected = {name: list(x.shape) for name, x in Transformer(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(_HEAD)
        shapes = {name: shape for name, shape in shapes.items() if name != _HEAD}
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"{source}: tensor {name!r} of shape {shape} is missing")
        if shapes[name] != shape:
            raise ValueError(f"{source}: tensor {name!r} has shape {shapes[name]}, but the config asks for {shape}")
    if unexpected := sorted(set(shapes) - set(expected)):
        raise ValueError(f"{source}: unexpected tensors {unexpected[:4]}; the config has no place for them")


def _drop_derived(state: dict[str, Tensor]) -> None:
    """Old exports store the rotary frequencies, which follow from the config."""
    for name in [name for name in state if name.endswith("rotary_emb.inv_freq")]:
        del state[name]


def _write_weights(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> None:
    # planned on meta tensors of the target dtype, so that at most one shard is copied at a time
    planned = {name: torch.empty(x.shape, dtype=dtype, device="meta") for name, x in weights.items()}
    plan = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        _write_json(folder / _INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Weight files and the tensors to take from each (none named: all)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a Hugging Face checkpoint")
    if (folder / _INDEX).exists():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / _INDEX}: lacks weight_map; it should name the file of every tensor")
        shards: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(folder / file, []).append(name)
        for path in shards:
            if not path.exists():
                raise FileNotFoundError(f"{path}: missing, but {_INDEX} lists it; was the copy interrupted?")
        return shards
    if (folder / _SINGLE).exists():
        return {folder / _SINGLE: []}
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there (found {found})")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face checkpoint folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
