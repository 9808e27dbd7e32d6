"""Text of tokens that come one by one: what no later token changes, up to the first stop string.

The text of a row is what its tokens add to the text of its prompt, special ones left out, before the first place where
any of its stop strings begins. `RowText` gives the same in pieces: a piece never ends in half a character, nor in what
may become a stop string.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character yet
# Decoders under which a further token only adds to the text; the others (of BERT, CTC) may change what came before.
_ADDING = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace")


_CONTEXT = 64  # tokens of a prompt that say how the next ones are decoded, and a run of bytes before them


class TextDecoder:
    """What a tokenizer's tokens mean for a text that grows.

    Attributes:
        special: ids of special tokens, by what they are spelled.
        bytes: the byte that a token stands for, by id (`<0x0A>`). A run of them is decoded as a whole: one that is
            invalid takes valid characters before it along.
        is_adding: whether the text of some tokens begins with that of the first of them. If not, there is no text
            before the last token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = {index: token.content for index, token in added.items() if token.special}
        decoders = _parts(json.loads(tokenizer.to_str())["decoder"])
        types = [each["type"] for each in decoders]
        # replacing once all are one text, it would look across tokens
        fused = types.index("Fuse") if "Fuse" in types else len(types)
        self.is_adding = "Replace" not in types[fused:] and all(map(_adds, decoders))
        ids = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256) if "ByteFallback" in types}
        self.bytes = {index: byte for index, byte in ids.items() if index is not None}

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def is_shown(self, token: int) -> bool:
        """Whether the token is one of the text: no special one, nor one that only the embedding has."""
        return token not in self.special and self.tokenizer.id_to_token(token) is not None

    def stops_in(self, token: int, stops: Sequence[str]) -> bool:
        """Whether a special token, which no text shows, is spelled with a stop string in it."""
        return any(stop in self.special.get(token, "") for stop in stops)


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:  # tokens are joined by spaces
        return []
    return [part for each in decoder["decoders"] for part in _parts(each)] if "decoders" in decoder else [decoder]


def _adds(decoder: dict[str, Any]) -> bool:
    return decoder["type"] in _ADDING or (decoder["type"] == "Strip" and decoder["stop"] == 0)


class RowText:
    """The text of one row, in pieces.

    Args:
        decoder: of the model's tokenizer.
        stops: texts that end it, none of them empty.
        prompt: the tokens before: the text of the row is that of both together behind its common beginning with the
            prompt's. Without them tokens are decoded by themselves, where SentencePiece drops the first space.

    Attributes:
        is_stopped: a stop string, or a special token that is spelled with one, has come: nothing is added any more.
    """

    def __init__(self, decoder: TextDecoder, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._decoder, self._stops = decoder, tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._tokens = _end(prompt, decoder)  # the last ones of which all is known, and those behind them
        self._prompt = decoder.decode(self._tokens)  # its text, as far as none has come that goes on otherwise
        self._context = 0  # how many the former are
        self._known = 0  # characters of the text of all of them that are known
        self._held = ""  # known text that may begin a stop string
        self._run = bytearray()  # of the byte tokens at the end
        for token in self._tokens:
            self._track_run(token)
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What one more token makes sure of the text."""
        if self.is_stopped:
            return ""
        if token in self._decoder.special:
            if self._decoder.stops_in(token, self._stops):
                rest = self.finish()
                self.is_stopped = True
                return rest
            return ""
        if not self._decoder.is_shown(token):
            return ""
        self._tokens.append(token)
        if not self._decoder.is_adding:
            return ""
        if self._track_run(token):
            return self._stop_in_run()
        text = self._decoder.decode(self._tokens)
        # of bytes at the end that may become a character, decoders make one sign
        sure = text.removesuffix(_INCOMPLETE)
        new = sure[self._known :]
        self._known += len(new)
        if sure == text:
            del self._tokens[: self._context]
            self._context, self._known = len(self._tokens), len(self._decoder.decode(self._tokens))
        return self._show(new, is_last=False)

    def finish(self) -> str:
        """The rest of the text: no token follows."""
        if self.is_stopped:
            return ""
        new = self._decoder.decode(self._tokens)[self._known :]
        self._tokens, self._context, self._known = [], 0, 0
        return self._show(new, is_last=True)

    def _track_run(self, token: int) -> bool:
        """Whether the token is one of a run of bytes."""
        if token not in self._decoder.bytes:
            self._run.clear()
            return False
        self._run.append(self._decoder.bytes[token])
        return True

    def _stop_in_run(self) -> str:
        """The last text of a row that its newest byte ends. Where a run has no stop string, nothing of it is sure."""
        try:
            likely = self._held + self._run.decode()
        except UnicodeDecodeError:
            return ""
        if not any(stop in likely for stop in self._stops):
            return ""
        new = self._decoder.decode(self._tokens)[self._known :]
        text = self._held + new[self._shared(new) :]
        found, begun = self._find(text, is_last=False)
        return self._cut(text, found) if found < len(text) and found <= begun else ""

    def _show(self, new: str, is_last: bool) -> str:
        shared = self._shared(new)
        self._prompt = self._prompt[shared:] if shared == len(new) else ""
        text = self._held + new[shared:]
        found, begun = self._find(text, is_last)
        if found < len(text) and found <= begun:
            return self._cut(text, found)
        shown = min(found, begun)
        self._held = text[shown:]
        return text[:shown]

    def _shared(self, new: str) -> int:
        """Characters of new text that are the prompt's."""
        pairs = enumerate(zip(self._prompt, new, strict=False))
        return next((at for at, (one, other) in pairs if one != other), min(len(self._prompt), len(new)))

    def _find(self, text: str, is_last: bool) -> tuple[int, int]:
        """Where the first stop string begins, and where one that the text ends in may; its length where none does."""
        found = min((at for at in map(text.find, self._stops) if at >= 0), default=len(text))
        # a longer stop string that begins before the one that was found would come first
        nearest = range(max(0, len(text) - self._longest + 1), len(text) if not is_last else 0)
        return found, next((at for at in nearest if self._may_stop(text[at:])), len(text))

    def _cut(self, text: str, found: int) -> str:
        self.is_stopped, self._held = True, ""
        return text[:found]

    def _may_stop(self, text: str) -> bool:
        """Whether the text is the beginning of a stop string."""
        return any(stop.startswith(text) for stop in self._stops)


def _end(prompt: Sequence[int], decoder: TextDecoder) -> list[int]:
    """The last tokens of a prompt that are shown: enough for how what follows is decoded."""
    tokens: list[int] = []
    for token in reversed(prompt):
        if len(tokens) >= _CONTEXT and tokens[-1] not in decoder.bytes:
            break
        if decoder.is_shown(token):
            tokens.append(token)
    return tokens[::-1]
