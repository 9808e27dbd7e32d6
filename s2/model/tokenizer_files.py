"""The tokenizer part of an exported folder: `AutoTokenizer` must give the ids the model was trained on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from tokenizers import Tokenizer

from s2.files import write_json

from .config import ModelConfig, read_object

# What transformers and other readers find beside tokenizer.json, and what goes with it; as patterns.
_COMPANIONS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece*.model",
    "vocab.txt",
    "*.tiktoken",
    "tokenization_*.py",
)
# Licenses ask for it, Llama's for its policy too.
_TERMS = ("licen[cs]e*", "notice*", "copying*", "use_policy*")
_MORE_TEMPLATES = "additional_chat_templates"
_SETTINGS = "tokenizer_config.json"


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
    tokenizer_file: Path,
    config: ModelConfig,
    folder: Path,
    changed: Mapping[str, int | None] | None = None,
    origin: Path | None = None,
) -> None:
    """Copy `tokenizer.json` and write `tokenizer_config.json` into `folder`.

    What lies beside the source goes along (chat templates, special tokens, slow tokenizers); where there is no
    `tokenizer_config.json`, a `PreTrainedTokenizerFast` with the config's bos and eos is described. `model_max_length`
    always becomes max_position_embeddings.

    Args:
        changed: `bos_token`, `eos_token` that are no longer what lies beside the source says, by id.
        origin: a folder whose tokenizer this is without a tokenizer.json there; what it has goes along first.

    Raises:
        FileNotFoundError: no such tokenizer file.
        ValueError: not a tokenizer, or an id of it is beyond the config's vocab_size, or the config's bos or eos id is
            no token of it.
    """
    tokenizer = read_tokenizer(tokenizer_file)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if size > config.vocab_size:
        raise ValueError(f"{tokenizer_file}: {size} tokens do not fit in vocab_size={config.vocab_size}")

    places = [place for place in (origin, tokenizer_file.parent) if place is not None]
    eos = config.eos_token_ids[0] if config.eos_token_ids else None
    described = next((place for place in places if (place / _SETTINGS).is_file()), None)
    if described is not None:
        settings = read_object(described / _SETTINGS)
        tokens = _tokens(tokenizer, changed or {}, tokenizer_file)
    else:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        tokens = _tokens(tokenizer, {"bos_token": config.bos_token_id, "eos_token": eos}, tokenizer_file)
        tokens = {key: token for key, token in tokens.items() if token is not None}
    settings |= tokens
    settings["model_max_length"] = config.max_position_embeddings
    if folder.resolve() != tokenizer_file.parent.resolve() or tokenizer_file.name != "tokenizer.json":
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        for place in reversed(places):
            copy_companions(place, folder)
    special = folder / "special_tokens_map.json"
    if tokens and special.is_file():
        write_json(special, read_object(special) | tokens)
    write_json(folder / _SETTINGS, settings)


def write_slow_tokenizer(origin: Path, config: ModelConfig, folder: Path) -> None:
    """Copy the tokenizer of a folder that has no tokenizer.json, if it has any, as it is but for its longest text."""
    copy_companions(origin, folder)
    if (origin / _SETTINGS).is_file():
        settings = read_object(origin / _SETTINGS) | {"model_max_length": config.max_position_embeddings}
        write_json(folder / _SETTINGS, settings)


def copy_companions(origin: Path, folder: Path) -> None:
    """Copy what goes with a tokenizer, chat templates among it, and the terms under which it may be used."""
    if origin.resolve() == folder.resolve():
        return
    copy_terms(origin, folder)
    for file in origin.iterdir():
        if file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in _COMPANIONS):
            shutil.copyfile(file, folder / file.name)
    if (origin / _MORE_TEMPLATES).is_dir():
        shutil.copytree(origin / _MORE_TEMPLATES, folder / _MORE_TEMPLATES, dirs_exist_ok=True)


def copy_terms(origin: Path, folder: Path) -> None:
    """Copy the licenses and policies of a folder, however their names are written."""
    if origin.resolve() == folder.resolve():
        return
    for file in origin.iterdir():
        if file.is_file() and any(fnmatchcase(file.name.lower(), pattern) for pattern in _TERMS):
            shutil.copyfile(file, folder / file.name)


def _tokens(tokenizer: Tokenizer, ids: Mapping[str, int | None], source: Path) -> dict[str, str | None]:
    tokens: dict[str, str | None] = {}
    for key, token_id in ids.items():
        tokens[key] = None if token_id is None else tokenizer.id_to_token(token_id)
        if token_id is not None and tokens[key] is None:
            raise ValueError(f"{source}: has no token with id {token_id}, which the config calls {key}_id")
    return tokens
