"""The synthetic tasks of RULER (arXiv 2404.06654) as token ids: the paper's definitions, our own sentences.

| task | context | asked for | new tokens |
|---|---|---|---|
| niah_single_1, 2, 3 | a sentence over and over; essays; essays | a number, a number, a UUID of a key | 128 |
| niah_multikey_1 | essays, three more needles | a number | 128 |
| niah_multikey_2, 3 | nothing but needles | a number; a UUID of a UUID | 128 |
| niah_multivalue, niah_multiquery | essays | four numbers of a key; of four keys | 128 |
| vt | a sentence over and over, a chain of five assignments | the five variables | 30 |
| cwe | a numbered list: ten words 30 times (6 below 4k), others 3 times (once) | the ten | 120 |
| fwe | coded words with Zipf counts of exponent 2, the first of them dots | the three most frequent | 50 |
| qa | numbered paragraphs, the right one among them | the answer | 32 |

A question has exactly `length - new tokens` tokens, so that questions of a task and length are one batch: essays and
repeated sentences are cut to it, and so is the last needle or paragraph; a list of words is filled up with line breaks,
coded text with dots. `vt` and `cwe` show a short worked example first. The answer's beginning is part of the question.
"""

from __future__ import annotations

import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from eval.haystack import Haystack, encode_each_inside, encode_inside
from eval.needle_prompts import FILLER, insert

_DEPTHS = 40  # where needles may lie, evenly from the start to the end of the context
_WORD = re.compile(r"\b[a-z]{4,10}\b")
_AT_ONCE = 512  # texts that are encoded together
_SHORT = 4096  # below it lists of words repeat less


@dataclass(frozen=True)
class Question:
    """tokens: with the answer's beginning. expected: texts that a right answer contains."""

    tokens: list[int]
    expected: list[str]


@dataclass(frozen=True)
class Reading:
    """Questions about paragraphs, of a file in SQuAD's form."""

    paragraphs: list[str]
    questions: list[tuple[str, list[str], int]]  # question, answers, number of its paragraph
    source: str

    @classmethod
    def load(cls, file: Path) -> Reading:
        """Raises ValueError for a file that is not `{"data": [{"paragraphs": [{"context", "qas": [{"question",
        "answers": [{"text"}]}]}]}]}`, or without a question that has an answer."""
        paragraphs: list[str] = []
        questions: list[tuple[str, list[str], int]] = []
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for paragraph in (paragraph for article in content["data"] for paragraph in article["paragraphs"]):
                for asked in paragraph["qas"]:
                    answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                    if answers and not asked.get("is_impossible"):
                        questions.append((asked["question"], answers, len(paragraphs)))
                paragraphs.append(paragraph["context"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--qa {file}: not in the form of SQuAD's files ({type(error).__name__}: {error})"
            ) from None
        if not questions:
            raise ValueError(f"--qa {file}: no question with an answer in it")
        return cls(paragraphs, questions, file.name)


@dataclass
class Maker:
    """Makes questions. `bos_id` opens each; None: nothing does."""

    haystack: Haystack
    tokenizer: Tokenizer
    bos_id: int | None
    reading: Reading | None = None
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def make(self, task: str, length: int, seed: str) -> Question:
        """The question of this seed, of `length` tokens together with the tokens that answer it.

        Raises ValueError for a length without room for the task, or a haystack that is too short for it.
        """
        size = length - TASKS[task].new_tokens - (self.bos_id is not None)
        return TASKS[task].make(self, _Room(task, length, size), random.Random(seed))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that follows another; kept, since most come again."""
        if (ids := self._known.get(text)) is None:
            ids = self._known[text] = self.encode_once(text)
        return ids

    def encode_once(self, text: str) -> list[int]:
        return encode_inside(self.tokenizer, text)[0]

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_once` of many texts, on all cores."""
        return encode_each_inside(self.tokenizer, texts)

    def encode_many(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """`encode` of each text, some of them encoded at once."""
        texts = iter(texts)
        while some := list(islice(texts, _AT_ONCE)):
            new = list(dict.fromkeys(text for text in some if text not in self._known))
            self._known.update(zip(new, self.encode_each(new), strict=True))
            yield from map(self._known.__getitem__, some)

    def join(self, *parts: str | Sequence[int]) -> list[int]:
        head = [] if self.bos_id is None else [self.bos_id]
        return [*head, *(i for part in parts for i in (self.encode(part) if isinstance(part, str) else part))]

    @cached_property
    def words(self) -> list[str]:
        """Words of the haystack, in an order of their own."""
        text = self.tokenizer.decode(self.haystack.tokens.tolist(), skip_special_tokens=False)
        words = sorted(set(_WORD.findall(text)))
        random.Random(0).shuffle(words)
        return words

    @cached_property
    def pairs(self) -> list[str]:
        """Made-up words of two: lists of a million tokens take more different ones than a million tokens of text."""
        rng = random.Random(1)
        pairs = {rng.choice(self.words) + rng.choice(self.words) for _ in range(_PAIRS)} if self.words else set()
        return sorted(pairs - set(self.words))

    def draw(self, rng: random.Random, count: int) -> list[str]:
        """Different words in random order, those of the haystack first."""
        words = rng.sample(self.words, min(count, len(self.words)))
        if (missing := count - len(words)) > 0:
            if missing > len(self.pairs):
                raise ValueError(
                    f"haystack {self.haystack.source}: {count} different words are needed and it has {len(words)};"
                    " give a longer one with --haystack FILE"
                )
            words += rng.sample(self.pairs, missing)
        return words

    def repeated(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` tokens of a few sentences over and over, and where one begins or they end."""
        unit = self.encode("\n" + "".join(FILLER).strip())
        tokens = np.tile(np.array(unit, dtype=np.int64), size // len(unit) + 1)[:size]
        return tokens, np.append(np.arange(0, size, len(unit)), size)


@dataclass(frozen=True)
class _Room:
    task: str
    length: int
    size: int  # tokens of the question, BOS aside

    def left(self, *taken: int) -> int:
        """What is left for the context. Raises ValueError for nothing."""
        if (left := self.size - sum(taken)) < 1:
            raise ValueError(
                f"--lengths {self.length}: no room for {self.task}, which takes {self.length - left + 1} tokens at"
                " least; drop the length or the task (--tasks)"
            )
        return left


# --- needles ----------------------------------------------------------------------------------------------------------


def _needles(
    maker: Maker, room: _Room, rng: random.Random, *,
    context: str, uuid_keys: bool = False, uuid_values: bool = False, keys: int = 1, values: int = 1, queries: int = 1,
) -> Question:  # fmt: skip
    noun = "code" if uuid_values else "number"

    def key() -> str:
        return _uuid(rng) if uuid_keys else "-".join(maker.draw(rng, 2))

    def value() -> str:
        return _uuid(rng) if uuid_values else str(rng.randrange(1_000_000, 10_000_000))

    def fact(name: str, held: str) -> str:
        return f"\nThe secret {noun} of {name} is {held}."

    names: list[str] = []
    while len(names) < keys:
        names += [name for name in [key()] if name not in names]
    held = {name: [value() for _ in range(values)] for name in names}
    asked = rng.sample(names, queries)
    expected = [text for name in asked for text in held[name]]
    facts = maker.encode_each([fact(name, text) for name in names for text in held[name]])
    rng.shuffle(facts)
    listed = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
    nouns, be = (noun, "is") if len(expected) == 1 else (f"{noun}s", "are")
    begin = (
        f"The text below hides secret {noun}s. Read it and remember them: you will be asked for"
        f" {'one' if len(expected) == 1 else 'some'} at its end.\n\n"
    )
    end = f"\n\nQuestion: What {be} the secret {nouns} of {listed} in the text above?\nAnswer: The secret {nouns} of"
    end += f" {listed} {be}"
    before, after = maker.encode(begin), maker.encode_once(end)
    size = room.left(len(before), len(after), *map(len, facts))
    if context == "needles":

        def other() -> str:
            while (name := key()) in held:
                pass
            return fact(name, value())

        lines = _lines(maker, rng, other, size)
        text = np.array([i for line in lines for i in line][:size])
        marks = np.cumsum([0, *map(len, lines[:-1])])
    elif context == "sentence":
        text, marks = maker.repeated(size)
    else:
        where = maker.haystack.window(size, rng)
        text, marks = maker.haystack.tokens[where], maker.haystack.marks(where)
    targets = [size * depth / (_DEPTHS - 1) for depth in sorted(rng.sample(range(_DEPTHS), len(facts)))]
    places = [int(marks[np.abs(marks - target).argmin()]) for target in targets]
    middle, _ = insert([], text, places, facts)
    return Question(maker.join(before, middle, after), expected)


def _lines(maker: Maker, rng: random.Random, draw: Callable[[], str], size: int) -> list[list[int]]:
    """Tokens of texts that `draw` takes from `rng`, one after another until they are `size` tokens or more. Some are
    encoded at once; `rng` is left as if none had been drawn after the last."""
    lines: list[list[int]] = []
    total = 0
    while total < size:
        state = rng.getstate()
        few = 1 if not lines else 1 + (size - total) * len(lines) // total  # as many as are probably missing
        some = maker.encode_each([draw() for _ in range(min(few, _AT_ONCE))])
        taken = int(np.searchsorted(total + np.cumsum([len(line) for line in some]), size)) + 1
        lines += some[:taken]
        total = sum(map(len, lines))
        if taken < len(some):
            rng.setstate(state)
            for _ in range(taken):
                draw()
    return lines


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


# --- variables --------------------------------------------------------------------------------------------------------

_HOPS = 4
_EXAMPLE_TOKENS = 100  # of noise in the worked example


def _variables(maker: Maker, room: _Room, rng: random.Random) -> Question:
    def chain(letters: int) -> tuple[list[str], str, list[list[int]]]:
        names = _names(rng, _HOPS + 1, letters, string.ascii_uppercase)
        value = str(rng.randrange(10_000, 100_000))
        sources = [value, *(f"VAR {name}" for name in names[:-1])]
        lines = [f"\nVAR {name} = {source}" for name, source in zip(names, sources, strict=True)]
        return names, value, [maker.encode_once(line) for line in lines]

    def text(size: int, lines: list[list[int]]) -> list[int]:
        noise, marks = maker.repeated(size)
        return insert([], noise, sorted(int(mark) for mark in rng.choices(marks, k=len(lines))), lines)[0]

    def end(value: str) -> list[int]:
        return maker.encode_once(
            f"\n\nQuestion: Which variables hold the value {value}, directly or through other variables?\nAnswer: The"
            f" {_HOPS + 1} variables that hold {value} are"
        )

    begin = maker.encode("The text below assigns values to variables. Follow the chain of assignments.\n")
    known, value, lines = chain(3)
    example = [*begin, *text(_EXAMPLE_TOKENS, lines), *end(value), *maker.encode_once(f" {' '.join(known)}\n\n")]
    names, value, lines = chain(5)
    after = end(value)
    size = room.left(len(example), len(begin), len(after), *map(len, lines))
    return Question(maker.join(example, begin, text(size, lines), after), names)


def _names(rng: random.Random, count: int, letters: int, alphabet: str) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(alphabet, k=letters))] = None
    return list(names)


# --- words ------------------------------------------------------------------------------------------------------------

_PAIRS = 200_000  # a list of a million tokens has fewer words
_COMMON = 10


def _common_words(maker: Maker, room: _Room, rng: random.Random) -> Question:
    begin = maker.encode("Below is a numbered list of words, some of which come more often than others.\n\n")
    end = maker.encode(
        f"\nQuestion: Which {_COMMON} words come most often in the list?\nAnswer: The {_COMMON} words are:"
    )

    def numbered(words: Sequence[str]) -> list[int]:
        texts = (text for n, word in enumerate(words, 1) for text in (f" {n}.", f" {word}"))
        return list(chain.from_iterable(maker.encode_many(texts)))

    is_short = room.length < _SHORT
    shown = maker.draw(rng, _COMMON + (10 if is_short else 30))
    listed = shown[:_COMMON] * (3 if is_short else 10) + shown[_COMMON:] * (1 if is_short else 3)
    example = [*begin, *numbered(_shuffled(rng, listed)), *end, *numbered(shown[:_COMMON]), *maker.encode("\n\n")]
    size = room.left(len(example), len(begin), len(end))
    often, seldom = (6, 1) if is_short else (30, 3)
    most = size // 2 // seldom  # a number and a word take two tokens at least
    words = maker.draw(rng, _COMMON + most)
    costs = map(len, maker.encode_many(f" {word}" for word in words))
    numbers = map(len, maker.encode_many(f" {n}." for n in count(1)))
    common, items = words[:_COMMON], often * _COMMON
    total = often * sum(islice(costs, _COMMON)) + sum(islice(numbers, items))
    room.left(len(example), len(begin), len(end), total - 1)
    others = 0
    for cost in costs:
        more = seldom * cost + sum(islice(numbers, seldom))
        if total + more > size:
            break
        total, items, others = total + more, items + seldom, others + 1
    listed = common * often + words[_COMMON : _COMMON + others] * seldom
    filled = maker.encode("\n")[-1:] * (size - total)
    return Question(maker.join(example, begin, numbered(_shuffled(rng, listed)), filled, end), common)


def _shuffled(rng: random.Random, items: list[Any]) -> list[Any]:
    return rng.sample(items, len(items))


def _coded_words(maker: Maker, room: _Room, rng: random.Random) -> Question:
    begin = maker.encode("Below is a coded text. Count how often each coded word comes; dots mean nothing.\n\n")
    end = maker.encode(
        "\n\nQuestion: Which three coded words come most often in the text above?\nAnswer: The three coded words are:"
    )
    size = room.left(len(begin), len(end))
    codes = _names(rng, max(10, room.length // 50), 6, string.ascii_lowercase)
    words = [" ...", *(f" {code}" for code in codes)]
    encoded = dict(zip(words, maker.encode_each(words), strict=True))
    costs = np.array([len(encoded[word]) for word in words])
    shares = 6 / math.pi**2 / np.arange(1, len(words) + 1) ** 2.0  # zeta(2) is pi^2 / 6

    def counts(total: int) -> np.ndarray:
        return (shares * total).astype(int)

    low, high = 0, size  # words altogether: the most that fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if counts(middle) @ costs <= size else (low, middle)
    number = counts(low)
    if number[3] <= number[4]:
        room.left(room.size)  # too short for the third to come more often than the fourth
    text = _shuffled(rng, [word for word, count in zip(words, number, strict=True) for _ in range(count)])
    body = list(chain.from_iterable(encoded[word] for word in text))
    dots = maker.encode(words[0])
    filled = (dots * (size - len(body)))[: size - len(body)]
    return Question(maker.join(begin, body, filled, end), codes[:3])


# --- reading ----------------------------------------------------------------------------------------------------------


def _reading(maker: Maker, room: _Room, rng: random.Random) -> Question:
    assert maker.reading is not None, "qa needs a file"
    paragraphs = maker.reading.paragraphs
    question, answers, right = rng.choice(maker.reading.questions)
    begin = maker.encode("Answer the question from the documents below, with nothing but the answer.")
    end = maker.encode_once(f"\n\nQuestion: {question}\nAnswer:")
    own = maker.encode(paragraphs[right])
    title = max(len(maker.encode(f"\n\nDocument {n}:\n")) for n in (1, 10, 100, 1000))
    size = room.left(len(begin), len(end), len(own), title) + len(own) + title
    others = [n for n in range(len(paragraphs)) if paragraphs[n] != paragraphs[right]]
    rng.shuffle(others)
    chosen, total = [own], len(own) + title
    while total < size and others:
        chosen.append(maker.encode(paragraphs[others.pop()]))
        total += len(chosen[-1]) + title
    if total < size:
        raise ValueError(f"--qa {maker.reading.source}: too few paragraphs for a context of {room.length} tokens")
    body: list[int] = []
    for n, paragraph in enumerate([*_shuffled(rng, chosen[:-1]), chosen[-1]], 1):  # the last one is cut
        body += [*maker.encode(f"\n\nDocument {n}:\n"), *paragraph]
    filled = maker.encode("\n")[-1:] * (size - len(body))
    return Question(maker.join(begin, body[:size], filled, end), answers)


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """new_tokens: how long an answer may be. metric: RULER's string match, of "all" or of any "part" expected."""

    make: Callable[[Maker, _Room, random.Random], Question]
    new_tokens: int
    metric: str = "all"


def _niah(**options: Any) -> Task:
    return Task(lambda maker, room, rng: _needles(maker, room, rng, **options), 128)


TASKS = {
    "niah_single_1": _niah(context="sentence"),
    "niah_single_2": _niah(context="essays"),
    "niah_single_3": _niah(context="essays", uuid_values=True),
    "niah_multikey_1": _niah(context="essays", keys=4),
    "niah_multikey_2": _niah(context="needles"),
    "niah_multikey_3": _niah(context="needles", uuid_keys=True, uuid_values=True),
    "niah_multivalue": _niah(context="essays", values=4),
    "niah_multiquery": _niah(context="essays", keys=4, queries=4),
    "vt": Task(_variables, 30),
    "cwe": Task(_common_words, 120),
    "fwe": Task(_coded_words, 50),
    "qa": Task(_reading, 32, "part"),
}


def match(task: str, said: str, expected: Sequence[str]) -> float:
    """RULER's score of an answer, 0..1: the share of the expected texts in it, or whether any is; case aside."""
    found = [text.lower() in said.lower() for text in expected]
    return float(any(found)) if TASKS[task].metric == "part" else sum(found) / len(found)
