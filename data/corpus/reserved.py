"""A tokenizer for the text of documents: what frames them is never found in it.

Many tokenizers find the token that ends a text in text which merely spells it: a unigram model has "</s>" among its
pieces, a BPE may have merged one from HTML, added tokens that are not marked special are looked for before anything
else, and normalizers turn other characters into these. So the tokens that frame documents, and all special ones, get
names here that no text has; their ids, and every other token, stay.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

_DIFFERENCES = {
    "capital letters": ("a Ab", "a ab"),
    "accents": ("a \u00e9", "a e"),
    "full-width letters": ("a \uff41", "a a"),
    "line ends": ("a\nb", "a b"),
    "tabs": ("a\tb", "a b"),
    "runs of spaces": ("a   b", "a b"),
    "spaces": ("a b", "ab"),
}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def text_encoder(settings: Mapping[str, Any], frame: Collection[int]) -> Tokenizer:
    """A tokenizer as it is used on text: without the tokens `frame` and special tokens in it, without truncation,
    padding, and tokens that a post-processor adds.

    The unknown token and those of bytes keep their names, since models look them up.
    Raises ValueError for a token of `frame` that is an ordinary character or byte, without which text would be lost.
    """
    settings = {**settings, "truncation": None, "padding": None, "post_processor": None}
    model = dict(settings["model"])
    names = _names(settings)
    special = {token["id"] for token in settings["added_tokens"] if token["special"]}
    reserved: dict[str, str] = {}
    for i in sorted({*frame, *special}):
        name = names[i]
        if i in frame and i not in special and (len(name) == 1 or _BYTE.fullmatch(name)):
            raise ValueError(f"token {name!r} stands for text in this tokenizer, so it cannot frame documents")
        if name != _unknown_name(model) and not _BYTE.fullmatch(name):
            reserved[name] = f"\U0010ffff{i}\U0010ffff"  # noncharacters, which are in no text
    settings["added_tokens"] = [
        {**token, "content": reserved[token["content"]], "special": True, "normalized": False}
        if token["content"] in reserved
        else token
        for token in settings["added_tokens"]
    ]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[reserved.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {reserved.get(piece, piece): i for piece, i in model["vocab"].items()}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not reserved.keys() & {left, right, left + right[prefix:]}
        ]
    if "dropout" in model:
        model["dropout"] = None  # the same text has the same tokens
    encoder = Tokenizer.from_str(json.dumps({**settings, "model": model}))
    encoder.encode_special_tokens = True
    return encoder


def unknown_id(settings: Mapping[str, Any]) -> int | None:
    """The token that stands for characters which the vocabulary lacks, None where there is none."""
    name = _unknown_name(settings["model"])
    return next((i for i, known in _names(settings).items() if known == name), None)


def drops_characters(settings: Mapping[str, Any]) -> bool:
    """Whether characters that the vocabulary lacks vanish, with no unknown token in their place."""
    model = settings["model"]
    if model["type"] != "BPE" or _unknown_name(model) is not None:
        return False
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        return False
    steps = json.dumps([settings["normalizer"], settings["pre_tokenizer"]])
    return not ('"ByteLevel"' in steps and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet()))


def not_kept(encoder: Tokenizer) -> list[str]:
    """What of a text a tokenizer does not tell apart, as normalizers that lower letters or join white space do."""
    return [what for what, (a, b) in _DIFFERENCES.items() if encoder.encode(a).ids == encoder.encode(b).ids]


def _names(settings: Mapping[str, Any]) -> dict[int, str]:
    vocab = settings["model"]["vocab"]
    names = {i: piece for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else {}
    if isinstance(vocab, dict):
        names = {i: name for name, i in vocab.items()}
    return names | {token["id"]: token["content"] for token in settings["added_tokens"]}


def _unknown_name(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")
