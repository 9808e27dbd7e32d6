"""Haystacks: long texts as tokens with known sentence starts, and needles hidden in them.

A haystack is tokenised once. Prompts are cut and joined as tokens, never decoded and encoded again, so that
a prompt of N tokens has exactly N tokens and a needle reads the same wherever it lies.
"""

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

# White space after the end of a sentence (closing quotes included), or a line break.
_GAP = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]\u201d\u2019]))\s+|\n\s*")
# A needle goes to the nearest sentence start, unless none is this near: then to its depth to the token.
_MAX_SHIFT = 128

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


@dataclass(frozen=True)
class Haystack:
    """tokens: int32 [T]. starts: sorted positions at which a sentence or line starts; starts[0] is 0."""

    tokens: np.ndarray
    starts: np.ndarray
    source: str

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: Tokenizer, source: str, max_tokens: int = 1 << 20
    ) -> "Haystack":
        """Join texts, with an empty line between them, until `max_tokens` are reached or they end.

        Raises ValueError when there is no text at all.
        """
        separator = tokenizer.encode("\n\n", add_special_tokens=False).ids
        pieces: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        total = 0
        for text in texts:
            if total >= max_tokens:
                break
            text = text.strip()
            if not text:
                continue
            if total:
                pieces.append(np.array(separator, dtype=np.int32))
                total += len(separator)
            encoding = tokenizer.encode(text, add_special_tokens=False)
            starts.append(total + _sentence_starts(text, np.array(encoding.offsets, dtype=np.int64)[:, 0]))
            pieces.append(np.array(encoding.ids, dtype=np.int32))
            total += len(encoding.ids)
        if not total:
            raise ValueError(f"haystack {source}: no text in it")
        tokens, positions = np.concatenate(pieces), np.concatenate(starts)
        return cls(tokens[:max_tokens], positions[positions < max_tokens], source)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16]

    def window(self, size: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """`size` tokens from a random sentence start on, and the sentence starts in them, counted from there.

        Raises ValueError when the haystack has fewer than `size` tokens.
        """
        if size > len(self.tokens):
            raise ValueError(
                f"haystack {self.source} is too short: {len(self.tokens):,} tokens, but {size:,} are needed;"
                " give a longer one with --haystack FILE or drop the longest lengths"
            )
        last = int(np.searchsorted(self.starts, len(self.tokens) - size, side="right"))
        begin = int(self.starts[rng.randrange(last)])
        inside = self.starts[(self.starts >= begin) & (self.starts < begin + size)] - begin
        return self.tokens[begin : begin + size], inside


def _sentence_starts(text: str, token_begins: np.ndarray) -> np.ndarray:
    """Indices of the tokens that open a sentence or a line. `token_begins`: the character each begins at."""
    gaps = np.array([match.span() for match in _GAP.finditer(text)], dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(token_begins, gaps[:, 0], side="left")
    first, ends = first[first < len(token_begins)], gaps[first < len(token_begins), 1]
    # A token that reaches over the gap into the next sentence leaves no place to insert anything.
    return np.unique(np.concatenate([[0], first[token_begins[first] <= ends]]))


@dataclass(frozen=True)
class Needle:
    """One hidden fact.

    depth: percent of the haystack's tokens before it. position: of its first token in the prompt.
    answer: the slice of the prompt that repeats the number and is predicted.
    """

    key: str
    number: str
    depth: float
    position: int
    answer: slice


@dataclass(frozen=True)
class Prompt:
    """`tokens`: haystack with needles, questions and answers, exactly as long as asked for."""

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
    `length` tokens. The first needle lies `depth` percent of the haystack's tokens deep, moved to the
    nearest sentence start; further ones follow at equal distances around the context. Distractors are
    needles under other keys at random sentence starts, never asked for. All of it depends on the arguments
    alone: the same `seed` gives the same prompt.

    Raises ValueError when the questions and needles alone exceed `length`, when the haystack is too short,
    or when the tokenizer writes the number differently in the needle and in the answer.
    """
    rng = random.Random(seed)
    names = rng.sample(range(len(_COLOURS) * len(_THINGS)), needles + distractors)
    keys = [f"{_COLOURS[i % len(_COLOURS)]} {_THINGS[i // len(_COLOURS)]}" for i in names]
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), needles + distractors)]
    facts = [_needle(tokenizer, key, number) for key, number in zip(keys, numbers, strict=True)]
    asked = [_question(tokenizer, keys[i], numbers[i], facts[i], first=i == 0) for i in range(needles)]

    head = [] if bos_id is None else [bos_id]
    size = length - len(head) - sum(map(len, facts)) - sum(len(q) + len(a) for q, a in asked)
    if size < 1:
        raise ValueError(
            f"length {length} leaves no room for a haystack: {needles} needle(s) and {distractors}"
            f" distractor(s) with their questions take {length - size} tokens"
        )
    window, starts = haystack.window(size, rng)

    depths = [(depth + 100 * i / needles) % 100 if i else depth for i in range(needles)]
    places = [_nearest(starts, round(d / 100 * size)) for d in depths]
    places += [int(starts[rng.randrange(len(starts))]) for _ in range(distractors)]

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
        where = slice(begin, begin + len(answer))
        hidden.append(Needle(keys[i], numbers[i], 100 * places[i] / size, positions[i], where))
    return Prompt(tokens, tuple(hidden), bool(np.isin(places[:needles], starts).all()))


def _nearest(starts: np.ndarray, target: int) -> int:
    place = int(starts[np.abs(starts - target).argmin()])
    return place if abs(place - target) <= _MAX_SHIFT else target


def _needle(tokenizer: Tokenizer, key: str, number: str) -> list[int]:
    return tokenizer.encode(f" The magic number of the {key} is {number}.", add_special_tokens=False).ids


def _question(tokenizer: Tokenizer, key: str, number: str, fact: list[int], first: bool) -> tuple[list[int], list[int]]:
    """Tokens of the question and of its answer, split where the answer begins."""
    question = ("\n\n" if first else ".\n") + f"The magic number of the {key} is"
    before = tokenizer.encode(question, add_special_tokens=False).ids
    whole = tokenizer.encode(f"{question} {number}", add_special_tokens=False).ids
    answer = whole[len(before) :]
    windows = (fact[i : i + len(answer)] for i in range(len(fact)))
    if whole[: len(before)] != before or answer not in windows:
        raise ValueError(
            f"the tokenizer writes {number!r} differently in a needle and in its answer; greedy retrieval"
            " cannot be scored token by token with it"
        )
    return before, answer
