"""Texts continued by the model of a Hugging Face folder: prompts to tokens, tokens to text, stop strings.

folder = ModelFolder.load("runs/1.3b/extend-32k/hf")
for said in continue_texts(folder, ["The river", "Once upon a time"], 100, stop=["\n\n"]):
    print(said.text, said.reason)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from .cache import KVCache
from .detokenize import RowText
from .encoding import Message, TextEncoder
from .folder import ModelFolder
from .generate import stream

# Options of `s2.inference.generate` that texts have no use for.
_NOT_FOR_TEXTS = {
    "eos_token_id": "a text ends at the tokens that its folder names (ModelFolder.eos_ids)",
    "is_enough": "a text ends at those tokens and at its stop strings; close the iterator to end all of them",
    "lengths": "prompts are as long as they are",
}
_OPTIONS = sorted({*signature(stream).parameters} - {"model", "input_ids", "max_new_tokens", *_NOT_FOR_TEXTS})

Reason = Literal["eos", "stop", "length"]
Prompt = str | Sequence[int] | Sequence[Message]


class Piece(NamedTuple):
    """What a step adds to a row.

    Attributes:
        text: what is sure of it: never half a character, nor what may become a stop string.
        tokens: the new token; none where the row had ended before.
        reason: why the row has ended, None while it goes on.
    """

    text: str
    tokens: tuple[int, ...]
    reason: Reason | None


@dataclass(frozen=True)
class Continuation:
    """What a row was continued with.

    Attributes:
        text: what the tokens, without special ones, add to the text of the prompt, up to the first stop string.
        tokens: all that were drawn, with the one that ended the row.
        reason: "eos", a token that ends texts; "stop", a stop string; "length", max_new_tokens.
        prompt_tokens: how many the prompt has, BOS included.
    """

    text: str
    tokens: tuple[int, ...]
    reason: Reason
    prompt_tokens: int


def continue_texts(
    folder: ModelFolder,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    stop: Iterable[str] | None = (),
    **options: Any,
) -> list[Continuation]:
    """`stream_texts`, with its arguments, to the end."""
    ids = encode_prompts(folder, prompts)
    rows = zip(*stream_texts(folder, ids, max_new_tokens, stop=stop, **options), strict=True)
    return [
        Continuation(
            "".join(piece.text for piece in row),
            tuple(token for piece in row for token in piece.tokens),
            cast(Reason, row[-1].reason),
            len(prompt),
        )
        for prompt, row in zip(ids, rows, strict=True)
    ]


def stream_texts(
    folder: ModelFolder,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    stop: Iterable[str] | None = (),
    is_apart: bool = False,
    **options: Any,
) -> Iterator[list[Piece]]:
    """Continue prompts side by side; of each step a piece for each row. The pieces of a row make its text, and those of
    the last step have a reason each.

    With a tokenizer whose tokens change the text before them (BERT's), a row's text comes with its last piece, and stop
    strings cut it without ending it sooner.

    Args:
        folder: the model, the tokenizer and the tokens that end a text.
        prompts: texts; token ids, taken as they are; or chats, lists of messages with `role` and `content`, which go
            through the folder's chat template.
        max_new_tokens: of each row.
        stop: a row ends before the first of these texts; None: at none. A special token that is spelled with one ends
            it too.
        is_apart: new tokens are decoded without the prompt's, as lm-eval's `hf` does it. Tokenizers that mark words by
            a space before them (SentencePiece) drop that of the first word then.
        options: of `s2.inference.generate`: temperature, top_p, top_k, generator, cache, graph, pool; prefill_chunk,
            where it is not to be the folder's.

    Raises:
        ValueError: no prompt, one without a token, an empty stop string, no such option; as `generate` and
            `TextEncoder`.
    """
    for name in sorted(options.keys() - set(_OPTIONS)):
        reason = _NOT_FOR_TEXTS.get(name) or f"no such option; there are {', '.join(_OPTIONS)}"
        raise ValueError(f"{name}: {reason}")
    stop = _texts(stop)
    ids = encode_prompts(folder, prompts)
    rows = [
        _Row(RowText(folder.decoder, stop, () if is_apart else prompt), folder.eos_ids, max_new_tokens)
        for prompt in ids
    ]
    return _stream_texts(folder, ids, rows, max_new_tokens, options)


def _texts(stop: Iterable[str] | None) -> list[str]:
    given = [] if stop is None else list(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else [None]
    if not all(isinstance(text, str) and text for text in given):
        raise ValueError(f"stop={stop!r} must be a list of texts, none of them empty")
    return cast(list[str], given)


def encode_prompts(folder: ModelFolder, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, with exactly one BOS where the tokenizer puts one.

    Raises:
        ValueError: no prompt, one that is of no such kind, without a token or with one that the model does not have; as
            `TextEncoder`.
    """
    if not isinstance(folder, ModelFolder):
        raise ValueError(f"folder={folder!r:.80} must be a ModelFolder, as ModelFolder.load(path) opens it")
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts={prompts!r:.80} must be a list with at least one prompt")
    encoder = TextEncoder(folder)
    ids = []
    for i, prompt in enumerate(prompts):
        try:
            ids.append(_encode(encoder, prompt))
        except TypeError:
            raise ValueError(
                f"prompt {i + 1} of {len(prompts)} must be a text, a list of token ids or a chat (a list of messages), "
                f"got {prompt!r:.80}"
            ) from None
    if not all(ids):
        raise ValueError(f"prompt {ids.index([]) + 1} of {len(ids)} is empty: there is no token to continue")
    for i, row in enumerate(ids):
        if not 0 <= min(row) <= max(row) < folder.config.vocab_size:
            wrong = next(index for index in row if not 0 <= index < folder.config.vocab_size)
            raise ValueError(
                f"prompt {i + 1} of {len(ids)} has token {wrong}, and {folder.folder} has tokens 0 to "
                f"{folder.config.vocab_size - 1}"
            )
    return ids


def _encode(encoder: TextEncoder, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"a prompt holds half a character (a lone surrogate), which no tokenizer takes: {prompt!r:.80}"
            ) from None
        return encoder.encode(prompt)
    if isinstance(prompt, Mapping | bytes):  # one message of a chat, a text that is not decoded
        raise TypeError
    if len(prompt) and isinstance(prompt[0], Mapping):
        return encoder.encode_chat(cast(Sequence[Message], prompt))
    ids = prompt.tolist() if isinstance(prompt, Tensor) else cast(Sequence[int], prompt)
    return [_token(index) for index in ids]


def _token(index: Any) -> int:
    if isinstance(index, bool):
        raise TypeError
    return operator.index(index)


def cache_size(folder: ModelFolder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Bytes of the KV cache that prompts and new tokens take side by side."""
    # the last token drawn is never fed back
    return KVCache.bytes_for(folder.config, len(prompts), max(map(len, prompts)) + max_new_tokens - 1, folder.dtype)


def _stream_texts(
    folder: ModelFolder, prompts: list[list[int]], rows: list[_Row], max_new_tokens: int, options: dict[str, Any]
) -> Iterator[list[Piece]]:
    def have_ended(new: Tensor) -> list[bool]:
        return [row.add(token) for row, token in zip(rows, new[:, -1].tolist(), strict=True)]

    ids = [torch.tensor(prompt, device="cpu") for prompt in prompts]
    options = {"prefill_chunk": folder.prefill_chunk, **options}
    for _ in stream(folder.model, ids, max_new_tokens, is_enough=have_ended, **options):
        yield [row.piece for row in rows]


class _Row:
    """A row while it is continued; `piece` is what the last token added."""

    def __init__(self, text: RowText, eos_ids: Sequence[int], max_new_tokens: int) -> None:
        self._text, self._eos_ids, self._left = text, eos_ids, max_new_tokens
        self.piece = Piece("", (), None)

    def add(self, token: int) -> bool:
        """Whether the row has ended, with this token or before."""
        if self.piece.reason is not None:
            self.piece = Piece("", (), self.piece.reason)
            return True
        self._left -= 1
        is_eos = token in self._eos_ids
        text = "" if is_eos else self._text.add(token)
        reason: Reason | None = "eos" if is_eos else "length" if self._left == 0 else None
        if reason is not None:
            text += self._text.finish()
        if self._text.is_stopped:
            reason = "stop"
        self.piece = Piece(text, (token,), reason)
        return reason is not None
