"""Haystacks: long texts as tokens with known sentence starts, and needles hidden in them.

A haystack is tokenised once. Prompts are cut and joined as tokens, never decoded and encoded again, so that
a prompt of N tokens has exactly N tokens and a needle reads the same wherever it lies.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

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
# A needle may lie off its depth by so much, in percent of the haystack's tokens (and by one token), to stand between
# two sentences. Where no window of the haystack allows it, the needle breaks one.
MAX_SHIFT = 0.25
_FURTHER = 128  # tokens by which the other needles of a prompt may; the map does not show where they lie
_SPARSE = 512  # with fewer sentence starts than one in so many tokens, a window begins anywhere
_FEW = 64  # where fewer windows than one in so many suit a needle, all are taken: samples are to have different ones

_COLOURS = (  # noqa: SIM905
    "amber azure black blue bronze brown coral copper cream crimson emerald golden green grey indigo "
    "ivory lilac olive orange pearl pink purple red ruby scarlet silver teal turquoise violet white "
    "yellow"
).split()
_THINGS = (  # noqa: SIM905
    "anchor badger barrel beacon bell bridge candle castle clock comet compass crane drum eagle falcon "
    "ferry forest garden glacier hammer harbour island kettle lantern lighthouse maple meadow mirror "
    "mountain orchard otter river saddle tower valley violin wagon willow window"
).split()
NAMES = len(_COLOURS) * len(_THINGS)


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
            encoding = tokenizer.encode(text.strip(), add_special_tokens=False)
            if not encoding.ids:  # nothing, or nothing that the tokenizer's normalizer leaves
                continue
            if total:
                tokens.append(np.array(separator, dtype=np.int32))
                between.append(np.ones(len(separator), dtype=bool))
                total += len(separator)
            offsets = np.array(encoding.offsets, dtype=np.int64)
            whole = np.concatenate([[True], offsets[1:, 0] >= offsets[:-1, 1]])
            starts.append(total + _sentence_starts(text.strip(), offsets[:, 0], whole))
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


@dataclass(frozen=True)
class Needle:
    """One hidden fact. depth: percent of the haystack's tokens before it, as measured. position: of its first token in
    the prompt. answer: the slice of the prompt that repeats the number and is predicted."""

    key: str
    number: str
    depth: float
    position: int
    answer: slice


@dataclass(frozen=True)
class Prompt:
    """tokens: haystack with needles, questions and answers. on_boundary: no needle breaks a sentence."""

    tokens: list[int]
    needles: tuple[Needle, ...]
    on_boundary: bool


def build_prompt(
    haystack: Haystack,
    tokenizer: Tokenizer,
    bos_id: int | None,
    *,
    length: int,
    depth: float,
    seed: str,
    needles: int = 1,
    distractors: int = 0,
) -> Prompt:
    """Hide needles in a window of the haystack, then ask for each.

    The prompt is `bos? haystack-with-needles question answer [question answer ...]` and has exactly
    `length` tokens. The first needle lies `depth` percent of the haystack's tokens deep: the window is one in which a
    sentence starts there, within MAX_SHIFT, or if there is none, the needle breaks a sentence; further ones follow at
    equal distances around the context. Distractors are needles under other keys at random sentence starts, never asked
    for. All of it depends on the arguments alone: the same `seed` gives the same prompt.

    Raises ValueError when the questions and needles alone exceed `length`, when the haystack is too short,
    or when the tokenizer cannot write a number.
    """
    rng = random.Random(seed)
    count = needles + distractors
    keys = [f"{_COLOURS[i % len(_COLOURS)]} {_THINGS[i // len(_COLOURS)]}" for i in rng.sample(range(NAMES), count)]
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
    asked = [_question(tokenizer, keys[i], numbers[i], first=i == 0) for i in range(count)]
    facts = [_fact(tokenizer, keys[i], numbers[i], asked[i][1]) for i in range(count)]
    asked = asked[:needles]

    head = [] if bos_id is None else [bos_id]
    size = length - len(head) - sum(map(len, facts)) - sum(len(q) + len(a) for q, a in asked)
    if size < 1:
        raise ValueError(
            f"length {length} leaves no room for a haystack: {needles} needle(s) and {distractors}"
            f" distractor(s) with their questions take {length - size} tokens"
        )
    targets = [round(((depth + 100 * i / needles) % 100 if i else depth) / 100 * size) for i in range(needles)]
    shift = max(1, int(size * MAX_SHIFT / 100))
    where = haystack.window(size, rng, targets[0], shift)
    window, marks = haystack.tokens[where], haystack.marks(where)
    between = np.flatnonzero(np.append(haystack.between[where], True))
    further = max(shift, min(_FURTHER, size // (8 * needles)))
    places = [_near(marks, target, further if i else shift) for i, target in enumerate(targets)]
    places = [int(between[np.abs(between - p).argmin()]) for p in places]
    places += [int(marks[rng.randrange(len(marks))]) if len(marks) else 0 for _ in range(distractors)]

    tokens = list(head)
    positions = [0] * len(facts)
    taken = 0
    for i in sorted(range(len(facts)), key=places.__getitem__):
        tokens += window[taken : places[i]].tolist()
        taken = places[i]
        positions[i] = len(tokens)
        tokens += facts[i]
    tokens += window[taken:].tolist()

    hidden = []
    for i, (question, answer) in enumerate(asked):
        begin = len(tokens) + len(question)
        tokens += question + answer
        answered = slice(begin, begin + len(answer))
        hidden.append(Needle(keys[i], numbers[i], 100 * places[i] / size, positions[i], answered))
    return Prompt(tokens, tuple(hidden), bool(np.isin(places[:needles], marks).all()))


def _near(marks: np.ndarray, target: int, shift: int) -> int:
    """The mark nearest to `target`, if there is one within `shift`, else `target`."""
    if len(marks) and abs(mark := int(marks[np.abs(marks - target).argmin()]) - target) <= shift:
        return target + mark
    return target


def _fact(tokenizer: Tokenizer, key: str, number: str, answer: list[int]) -> list[int]:
    """Tokens of a needle, with the number in the answer's tokens also where a full stop would change them."""
    lead = f" The magic number of the {key} is"
    before, _ = _split(tokenizer, f"{lead} {number}", len(lead))
    return before + answer + _encode_inside(tokenizer, ".")[0]


def _question(tokenizer: Tokenizer, key: str, number: str, first: bool) -> tuple[list[int], list[int]]:
    """Tokens of the question and of its answer."""
    question = ("\n\n" if first else ".\n") + f"The magic number of the {key} is"
    before, answer = _split(tokenizer, f"{question} {number}", len(question))
    if number not in tokenizer.decode(answer, skip_special_tokens=False).replace(" ", ""):
        raise ValueError(f"the tokenizer cannot write the number {number}; a needle cannot be scored with it")
    return before, answer


def _split(tokenizer: Tokenizer, text: str, at: int) -> tuple[list[int], list[int]]:
    """Tokens of `text`, before and from the first one that reaches over character `at`."""
    ids, ends = _encode_inside(tokenizer, text)
    count = sum(end <= at for end in ends)
    return ids[:count], ids[count:]


def _encode_inside(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of `text` and the character at which each ends, without the space that a tokenizer may put before a text.

    For that it is encoded behind a character, and that character's tokens are taken off.
    """
    for lead in ("a", "0", ")"):
        alone = tokenizer.encode(lead, add_special_tokens=False).ids
        both = tokenizer.encode(lead + text, add_special_tokens=False)
        if alone and both.ids[: len(alone)] == alone and len(both.ids) > len(alone):
            ids, offsets = both.ids[len(alone) :], both.offsets[len(alone) :]
            if offsets[0][0] >= len(lead):
                return ids, [end - len(lead) for _, end in offsets]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [end for _, end in encoding.offsets]
