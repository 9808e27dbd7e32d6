"""The tokenizer part of an exported folder: `AutoTokenizer` must give the ids the model was trained on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from s2.files import write_json

from .config import ModelConfig, read_object

# What transformers and other readers find beside tokenizer.json, and what goes with it.
_COMPANIONS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",  # Llama's license asks for it and the others
)
_MORE_TEMPLATES = "additional_chat_templates"


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tokenizer.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from None


def write_tokenizer(
    tokenizer_file: Path, config: ModelConfig, folder: Path, changed: Mapping[str, int | None] | None = None
) -> None:
    """Copy `tokenizer.json` and write `tokenizer_config.json` into `folder`.

    What lies beside the source goes along (chat templates, special tokens, slow tokenizers); where there is no
    `tokenizer_config.json`, a `PreTrainedTokenizerFast` with the config's bos and eos is described. `model_max_length`
    always becomes max_position_embeddings.

    Args:
        changed: `bos_token`, `eos_token` that are no longer what lies beside the source says, by id.

    Raises:
        FileNotFoundError: no such tokenizer file.
        ValueError: not a tokenizer, or an id of it is beyond the config's vocab_size, or the config's bos or eos id is
            no token of it.
    """
    tokenizer = read_tokenizer(tokenizer_file)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if size > config.vocab_size:
        raise ValueError(f"{tokenizer_file}: {size} tokens do not fit in vocab_size={config.vocab_size}")

    beside = tokenizer_file.parent
    eos = config.eos_token_ids[0] if config.eos_token_ids else None
    if (beside / "tokenizer_config.json").is_file():
        settings = read_object(beside / "tokenizer_config.json")
        tokens = _tokens(tokenizer, changed or {}, tokenizer_file)
    else:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        tokens = _tokens(tokenizer, {"bos_token": config.bos_token_id, "eos_token": eos}, tokenizer_file)
        tokens = {key: token for key, token in tokens.items() if token is not None}
    settings |= tokens
    settings["model_max_length"] = config.max_position_embeddings
    if folder.resolve() != beside.resolve() or tokenizer_file.name != "tokenizer.json":
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        for source in (beside / name for name in _COMPANIONS):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
        if (beside / _MORE_TEMPLATES).is_dir():
            shutil.copytree(beside / _MORE_TEMPLATES, folder / _MORE_TEMPLATES, dirs_exist_ok=True)
    special = folder / "special_tokens_map.json"
    if tokens and special.is_file():
        write_json(special, read_object(special) | tokens)
    write_json(folder / "tokenizer_config.json", settings)


def _tokens(tokenizer: Tokenizer, ids: Mapping[str, int | None], source: Path) -> dict[str, str | None]:
    tokens: dict[str, str | None] = {}
    for key, token_id in ids.items():
        tokens[key] = None if token_id is None else tokenizer.id_to_token(token_id)
        if token_id is not None and tokens[key] is None:
            raise ValueError(f"{source}: has no token with id {token_id}, which the config calls {key}_id")
    return tokens
