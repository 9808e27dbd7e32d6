"""The tokenizer part of an exported folder: `AutoTokenizer` must give the ids the model was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .config import ModelConfig

_COMPANIONS = ("special_tokens_map.json", "chat_template.jinja", "added_tokens.json")


def write_tokenizer(tokenizer_file: Path, config: ModelConfig, folder: Path) -> None:
    """Copy `tokenizer.json` and write `tokenizer_config.json` into `folder`.

    A `tokenizer_config.json` beside the source is taken over (chat template, special tokens); otherwise a
    `PreTrainedTokenizerFast` with the config's bos and eos is described. `model_max_length` always becomes
    max_position_embeddings.

    Raises:
        FileNotFoundError: no such tokenizer file.
        ValueError: not a tokenizer, or it has more tokens than the config's vocab_size, or the config's bos
            or eos id is no token of it.
    """
    if not tokenizer_file.is_file():
        raise FileNotFoundError(f"{tokenizer_file}: no such tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{tokenizer_file}: not a tokenizer.json ({error})") from None
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise ValueError(f"{tokenizer_file}: {size} tokens do not fit in vocab_size={config.vocab_size}")

    beside = tokenizer_file.parent / "tokenizer_config.json"
    if beside.is_file():
        settings = json.loads(beside.read_text(encoding="utf-8"))
    else:
        settings = _describe(tokenizer, config, tokenizer_file)
    settings["model_max_length"] = config.max_position_embeddings
    if folder.resolve() != tokenizer_file.parent.resolve() or tokenizer_file.name != "tokenizer.json":
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        for name in _COMPANIONS:
            if (tokenizer_file.parent / name).is_file():
                shutil.copyfile(tokenizer_file.parent / name, folder / name)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _describe(tokenizer: Tokenizer, config: ModelConfig, source: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    eos = config.eos_token_ids[0] if config.eos_token_ids else None
    for key, token_id in (("bos_token", config.bos_token_id), ("eos_token", eos)):
        if token_id is None:
            continue
        token = tokenizer.id_to_token(token_id)
        if token is None:
            raise ValueError(f"{source}: has no token with id {token_id}, which the config calls {key}_id")
        settings[key] = token
    return settings
