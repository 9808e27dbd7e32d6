"""Checkpoints that users take away: Hugging Face folders of the Llama family, written and read.

A folder holds `config.json`, `model*.safetensors` (with an index when sharded), `generation_config.json` and,
when a tokenizer is given, its files; with sparse layers also the modeling files that transformers opens it with
(`s2.integrations`). `config.json` is written last: a folder without it was not finished.

Nothing of a folder is dropped without a word: every tensor in its files is loaded, or equal to one that is, or named
in an error.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from s2.files import MARK, checksum, make_folder, remove_files, write_json
from s2.integrations import HF_FILES

from .config import ModelConfig, read_object
from .rope import rope_frequencies
from .tokenizer_files import copy_terms, write_slow_tokenizer, write_tokenizer
from .transformer import Transformer

FOLDER_KIND = "a Hugging Face checkpoint"  # in the mark of folders that `save_pretrained` made
_ERRNO = re.compile(r"\(os error (\d+)\)")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_pretrained(
    model: nn.Module | Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    tokenizer_file: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    *,
    source: str | Path | None = None,
) -> Path:
    """Write a Hugging Face Llama folder.

    Args:
        model: a `Transformer` or its full (gathered) state dict; any float dtype, any device.
        config: the model's.
        folder: new, empty, or of an earlier export, whose weights are replaced.
        tokenizer_file: a `tokenizer.json`; what lies beside it goes along (see `write_tokenizer`).
        dtype: of the saved weights.
        max_shard_size: bytes, or text such as "5GB".
        source: the Hugging Face folder that training started from. Its generation_config.json, licenses and, without
            `tokenizer_file`, its tokenizer go with the weights; where it has no tokenizer.json, `tokenizer_file` is
            that of its tokenizer, whose other files go too. Of its token ids only those change that `config` changes.

    Returns:
        The folder.

    Raises:
        ValueError: tensors missing, unexpected or of the wrong shape; a head that differs from the embedding although
            the config ties them; a tokenizer that does not fit the config; a folder with files of others in it.
        FileNotFoundError: no tokenizer_file.
    """
    folder = Path(folder)
    weights = _fitted(model.state_dict() if isinstance(model, nn.Module) else model, config, "save_pretrained")
    inherited = read_object(Path(source) / "config.json") if source is not None else {}
    changed = _changed_ids(config, inherited, str(source))
    origin = None if source is None else Path(source)
    is_fast = origin is not None and (origin / "tokenizer.json").is_file()
    if tokenizer_file is None and origin is not None and is_fast:
        tokenizer_file = origin / "tokenizer.json"
    make_folder(folder, FOLDER_KIND)
    remove_files(folder, "config.json", _INDEX, "model*.safetensors", *(file.name for file in HF_FILES))
    for file in () if config.is_dense else HF_FILES:
        shutil.copyfile(file, folder / file.name)
    if tokenizer_file is not None:
        tokens = {key.removesuffix("_id"): changed[key] for key in changed}
        write_tokenizer(Path(tokenizer_file), config, folder, tokens, None if is_fast else origin)
    elif origin is not None:
        write_slow_tokenizer(origin, config, folder)
    if origin is not None:
        copy_terms(origin, folder)
    _write_weights(weights, folder, dtype, max_shard_size)

    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    generation: dict[str, Any] = {"_from_model_config": True, **special}
    if source is not None and (Path(source) / "generation_config.json").is_file():
        generation = read_object(Path(source) / "generation_config.json") | {key: special[key] for key in changed}
    write_json(folder / "generation_config.json", generation)
    kept = {key: inherited[key] for key in ("pad_token_id", "unk_token_id") if key in inherited}
    name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**config.to_hf_dict(), **kept, "dtype": name, "torch_dtype": name})  # 5.x, 4.x
    return folder


def _changed_ids(config: ModelConfig, inherited: dict[str, Any], source: str) -> dict[str, int | None]:
    """bos_token_id and eos_token_id (its first) where `config` has others than the folder it comes from."""
    if not inherited:
        return {}
    before = ModelConfig.from_hf_dict(inherited, source)
    ids: dict[str, int | None] = {}
    if config.bos_token_id != before.bos_token_id:
        ids["bos_token_id"] = config.bos_token_id
    if config.eos_token_ids != before.eos_token_ids:
        ids["eos_token_id"] = config.eos_token_ids[0] if config.eos_token_ids else None
    return ids


def fingerprint(folder: str | Path) -> str:
    """Identity of a checkpoint's content: config.json, tokenizer.json and all weights, which are read for it.

    Less would not do: training may leave most of a file as it was, and results of other weights must not be taken for
    this one's.
    """
    folder, digest = Path(folder), hashlib.sha256()
    for file in (folder / "config.json", folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))):
        if file.is_file():
            digest.update(f"{file.name}:{checksum(file)}\n".encode())
    return digest.hexdigest()[:16]


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face Llama folder (ours or any other).

    Raises:
        FileNotFoundError: no folder or no config.json.
        ValueError: not JSON, or a model we do not support (see `ModelConfig.from_hf_dict`).
    """
    path = Path(folder) / "config.json"
    return ModelConfig.from_hf_dict(read_object(path), source=str(path))


def load_state_dict(folder: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, in their stored dtype.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a damaged file, or index and files do not name the same tensors.
    """
    folder = Path(folder)
    state: dict[str, Tensor] = {}
    for path, names in _shards(folder).items():
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                present = set(file.keys())
                if absent := sorted(set(names or present) - present):
                    raise ValueError(f"{path}: lacks tensor {absent[0]!r}, which {_INDEX} places there")
                if unlisted := sorted(present - set(names or present)):
                    raise ValueError(f"{path}: holds tensor {unlisted[0]!r}, which {_INDEX} does not place there")
                state |= {name: file.get_tensor(name) for name in names or present}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None
    return state


def load_weights(folder: str | Path, config: ModelConfig, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a folder that a `Transformer` of `config` takes, in their stored dtype; without the head where
    `config` ties it to the embedding.

    Raises:
        FileNotFoundError: as `load_state_dict`.
        ValueError: as `load_state_dict`; a tensor is missing, has no place in the model, has another shape or kind, is
            not finite, or differs from the one it should equal (a tied head from the embedding, stored rotary
            frequencies from those of the folder's config.json).
    """
    state = load_state_dict(folder, device=device)
    _drop_frequencies(state, Path(folder))
    state = _fitted(state, config, str(folder))
    for name, tensor in state.items():
        if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):  # NaN is both least and greatest
            raise ValueError(f"{folder}: tensor {name!r} holds NaN or infinite values; the checkpoint is of no use")
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
        FileNotFoundError, ValueError: as `load_config` and `load_weights`.
    """
    config = load_config(folder)
    if overrides:
        try:
            config = config.replace(**overrides)
        except ValueError as error:
            raise ValueError(f"overrides of {folder}: {error}") from None
    with torch.device("meta"):
        model = Transformer(config)
    state = load_weights(folder, config, device=device)
    common = dtype or state[_EMBEDDING].dtype
    state = {name: x.to(common) for name, x in state.items()}
    if config.tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDING]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.requires_grad_(True)


# -------------------------------------------------------------------- helpers


def _fitted(state: Mapping[str, Tensor], config: ModelConfig, source: str) -> dict[str, Tensor]:
    """`state` after a look at whether a `Transformer(config)` takes it as it is; without a tied head."""
    with torch.device("meta"):
        expected = {name: list(x.shape) for name, x in Transformer(config).state_dict().items()}
    state = dict(state)
    if config.tie_word_embeddings:
        expected.pop(_HEAD)
        head, embedding = state.pop(_HEAD, None), state.get(_EMBEDDING)
        if head is not None and embedding is not None and head is not embedding and not torch.equal(head, embedding):
            raise ValueError(
                f"{source}: {_HEAD} is not {_EMBEDDING}, although the config says tie_word_embeddings: true; say false "
                f"there if the model has a head of its own"
            )
    for name, shape in expected.items():
        if name not in state:
            tied = f"; with tie_word_embeddings: true {_EMBEDDING} takes its place" if name == _HEAD else ""
            raise ValueError(f"{source}: tensor {name!r} of shape {shape} is missing{tied}")
        if list(state[name].shape) != shape:
            raise ValueError(
                f"{source}: tensor {name!r} has shape {list(state[name].shape)}, but the config asks for {shape}"
            )
        if state[name].dtype not in _DTYPES:
            raise ValueError(f"{source}: tensor {name!r} holds {state[name].dtype}; quantised weights cannot be read")
    if unexpected := sorted(set(state) - set(expected)):
        raise ValueError(f"{source}: unexpected tensors {unexpected[:4]}; the config has no place for them")
    return state


def _drop_frequencies(state: dict[str, Tensor], folder: Path) -> None:
    """Old exports store the rotary frequencies, which follow from the config; scaled or as they were before."""
    stored = [name for name in state if name.endswith("rotary_emb.inv_freq")]
    if not stored:
        return
    config = load_config(folder)
    kinds = (config.rope(dense=True), config.rope(dense=False), (config.rope_theta, None))
    known = [rope_frequencies(config.head_dim, *kind)[0] for kind in kinds]
    for name in stored:
        found = state.pop(name).float().cpu()
        # they may have been kept in bf16, which has a precision of 1/256
        if found.shape != known[0].shape or not any(torch.allclose(found, x, rtol=1e-2, atol=0) for x in known):
            raise ValueError(
                f"{folder}: tensor {name!r} does not hold the rotary frequencies of config.json (rope_theta "
                f"{config.rope_theta:g}); set rope_theta and rope_scaling there to what the model was trained with"
            )


def _write_weights(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> None:
    # planned on meta tensors of the target dtype, so that at most one shard is copied at a time
    planned = {name: torch.empty(x.shape, dtype=dtype, device="meta") for name, x in weights.items()}
    plan = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            if number := _ERRNO.search(str(error)):  # a full disk is no fault of the program
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / file)) from None
            raise
        (folder / file).chmod((folder / MARK).stat().st_mode)  # safetensors lets the owner alone read them
    if plan.is_sharded:
        write_json(folder / _INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Weight files and the tensors to take from each (none named: all)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a Hugging Face checkpoint")
    present = {path.name for path in folder.glob("model*.safetensors")}
    if (folder / _INDEX).exists():
        weight_map = read_object(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(
                f"{folder / _INDEX}: weight_map={weight_map!r:.80} must be a mapping that names the file of each tensor"
            )
        shards: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file:
                raise ValueError(f"{folder / _INDEX}: weight_map[{name!r}]={file!r} must be the name of a file")
            shards.setdefault(folder / file, []).append(name)
        for path in shards:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: missing, but {_INDEX} lists it; was the copy interrupted?")
        if unlisted := sorted(present - {path.name for path in shards}):
            raise ValueError(f"{folder / unlisted[0]}: {_INDEX} does not list it; remove what is no part of the model")
        return shards
    if _SINGLE in present:
        if others := sorted(present - {_SINGLE}):
            raise ValueError(f"{folder}: {_SINGLE} and {others[0]} are there; remove the one that is not to be loaded")
        return {folder / _SINGLE: []}
    if present:
        raise FileNotFoundError(f"{folder}: {_INDEX} is missing, which says what is in {sorted(present)}")
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there (found {found})")
