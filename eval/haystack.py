"""Haystacks: long texts as tokens with known sentence starts.

A haystack is tokenised once. Prompts are cut and joined as tokens, never decoded and encoded again, so that
a prompt of N tokens has exactly N tokens and a needle reads the same wherever it lies.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Encoding, Tokenizer

from eval.heldout import CHARS_A_TOKEN

# Ends of sentences: with white space behind them (Latin, Cyrillic, Greek, Armenian, Arabic, Devanagari, Ethiopic,
# Khmer, Burmese, Tibetan), and of scripts that write none (Chinese, Japanese). Up to two closing signs may follow.
_SPACED = ".!?\u2026\u0589\u061f\u06d4\u0964\u0965\u1362\u1367\u17d4\u104b\u0f0d"
_UNSPACED = "\u3002\uff01\uff1f\uff61\uff0e"
_CLOSING = "\"')\\]\u00bb\u201d\u2019\u300d\u300f\uff09\u3011\u300b\u3009"
# What lies between two sentences or lines: white space, or nothing.
_GAP = re.compile(
    rf"(?:(?<=[{_SPACED}])|(?<=[{_SPACED}][{_CLOSING}])|(?<=[{_SPACED}][{_CLOSING}]{{2}}))\s+"
    rf"|(?:(?<=[{_UNSPACED}])|(?<=[{_UNSPACED}][{_CLOSING}])|(?<=[{_UNSPACED}][{_CLOSING}]{{2}}))"
    rf"(?![{_UNSPACED}{_CLOSING}])\s*"
    r"|\n\s*"
)
_SPARSE = 512  # with fewer sentence starts than one in so many tokens, a window begins anywhere
_LEADS = ("a", "0", ")")  # characters before a text; some tokenizers join one with what follows
_FEW = 64  # where fewer windows than one in so many suit a needle, all are taken: samples are to have different ones


@dataclass(frozen=True)
class Haystack:
    """A text as tokens.

    tokens: int32 [T]. starts: sorted positions at which a sentence or line starts; starts[0] is 0.
    between: bool [T], where a token begins with a character (and not within one, as tokens of bytes may).
    """

    tokens: np.ndarray
    starts: np.ndarray
    between: np.ndarray
    source: str

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Tokenizer, source: str, max_tokens: int = 1 << 20) -> Haystack:
        """Join texts, with an empty line between them, until `max_tokens` are reached or they end.

        Raises ValueError when there is no text at all.
        """
        separator = tokenizer.encode("\n\n", add_special_tokens=False).ids
        tokens: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        between: list[np.ndarray] = []
        total = 0
        for text in texts:
            if total >= max_tokens:
                break
            text = text.strip()[: CHARS_A_TOKEN * (max_tokens - total)]
            encoding = tokenizer.encode(text, add_special_tokens=False)
            if not encoding.ids:  # nothing, or nothing that the tokenizer's normalizer leaves
                continue
            if total:
                tokens.append(np.array(separator, dtype=np.int32))
                between.append(np.ones(len(separator), dtype=bool))
                total += len(separator)
            offsets = np.array(encoding.offsets, dtype=np.int64)
            whole = np.concatenate([[True], offsets[1:, 0] >= offsets[:-1, 1]])
            starts.append(total + _sentence_starts(text, offsets[:, 0], whole))
            between.append(whole)
            tokens.append(np.array(encoding.ids, dtype=np.int32))
            total += len(encoding.ids)
        if not total:
            raise ValueError(f"haystack {source}: no text in it")
        first = np.concatenate(starts)
        first = first[first < max_tokens]
        return cls(np.concatenate(tokens)[:max_tokens], first, np.concatenate(between)[:max_tokens], source)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16]

    def window(self, size: int, rng: random.Random, place: int = 0, shift: int = 0) -> slice:
        """A random stretch of `size` tokens that begins with a sentence, and that has the start of a sentence (or the
        end of the text) within `shift` tokens of its token `place`; where such stretches are rare, any.

        Raises ValueError when the haystack has fewer than `size` tokens.
        """
        if size > len(self.tokens):
            raise ValueError(
                f"haystack {self.source} is too short: {len(self.tokens):,} tokens, but {size:,} are needed;"
                " give a longer one with --haystack FILE or drop the longest lengths"
            )
        last = len(self.tokens) - size
        begins = self.starts[: np.searchsorted(self.starts, last, side="right")]
        if len(begins) * _SPARSE < last:
            begins = np.flatnonzero(self.between[: last + 1])
        marks = np.append(self.starts, len(self.tokens))
        next_mark = marks[np.searchsorted(marks, begins + place - shift)]
        fits = next_mark <= begins + min(place + shift, size)
        if fits.sum() * _FEW >= len(begins):
            begins = begins[fits]
        begin = int(begins[rng.randrange(len(begins))])
        return slice(begin, begin + size)

    def marks(self, window: slice) -> np.ndarray:
        """Sentence starts in a window, counted from there; its end is one where a sentence, or the text, ends there."""
        marks = np.append(self.starts, len(self.tokens))
        return marks[(marks >= window.start) & (marks <= window.stop)] - window.start


def _sentence_starts(text: str, token_begins: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Indices of the tokens that open a sentence or a line.

    Args:
        token_begins: the character that each token begins at.
        whole: whether that is the character's first token.
    """
    gaps = np.array([match.span() for match in _GAP.finditer(text)], dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(token_begins, gaps[:, 0], side="left")
    first, ends = first[first < len(token_begins)], gaps[first < len(token_begins), 1]
    # A token that reaches over the gap into the next sentence leaves no place to insert anything.
    return np.unique(np.concatenate([[0], first[(token_begins[first] <= ends) & whole[first]]]))


def encode_inside(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of `text` and the character at which each ends, without the space that a tokenizer may put before a text.

    For that it is encoded behind a character, and that character's tokens are taken off.
    """
    for lead in _LEADS:
        alone = tokenizer.encode(lead, add_special_tokens=False).ids
        both = tokenizer.encode(lead + text, add_special_tokens=False)
        if _is_apart(both, lead, alone):
            return both.ids[len(alone) :], [end - len(lead) for _, end in both.offsets[len(alone) :]]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [end for _, end in encoding.offsets]


def encode_each_inside(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, those of `encode_inside`; the tokenizer encodes all of them at once, on all cores."""
    lead = _LEADS[0]
    alone = tokenizer.encode(lead, add_special_tokens=False).ids
    together = tokenizer.encode_batch([lead + text for text in texts], add_special_tokens=False)
    return [
        both.ids[len(alone) :] if _is_apart(both, lead, alone) else encode_inside(tokenizer, text)[0]
        for text, both in zip(texts, together, strict=True)
    ]


def _is_apart(both: Encoding, lead: str, alone: list[int]) -> bool:
    """Whether a text behind `lead` begins with a token of its own, after those that `lead` has `alone`."""
    if not alone or len(both) <= len(alone) or both.ids[: len(alone)] != alone:
        return False
    place = both.token_to_chars(len(alone))
    return place is not None and place[0] >= len(lead)
