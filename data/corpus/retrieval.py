"""Synthetic retrieval documents: training data that asks for what stands earlier in the same text.

    sources: [{path: retrieval, name: facts, retrieval: {documents: 5000, facts: [2, 16]}}]

Each document states facts that exist nowhere else (a made-up number under a made-up key), in one of several wordings,
and at its end asks for each of them, in the same or another wording; with `filler`, the facts lie scattered in ordinary
text. A model learns no knowledge from it, only to look things up in its context. Say so where such a model is reported.

The sentences and keys of the evaluations (`eval.needle`, `eval.tasks.passkey`) do not occur here, and a test keeps it
so. What a document says depends on the settings, the seed and its number alone.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np

from data.corpus.readers import Document
from data.corpus.tokenizer import TextTokenizer
from data.shards.reader import TokenShards, identity_of, read_manifest
from s2.settings import Check, Count, Positive, Ratio, SettingError, Settings

_ADJECTIVES = (  # noqa: SIM905
    "tall narrow broken frozen hidden painted wooden quiet crooked dusty hollow rusty polished wild heavy gentle "
    "striped curved ancient paper woollen folded sunken northern southern eastern western upper lower outer inner round"
).split()
_NOUNS = (  # noqa: SIM905
    "ladder cabin pump gate mill stable trunk lamp cellar barn archive shelf tent drawer locker cart kiln bakery "
    "chapel depot quarry vault canoe basket pulley furnace workshop cottage granary signal platform warehouse"
).split()
_ATTRIBUTES = (
    *("gate code", "locker number", "account number", "serial number", "room number", "ticket number"),
    *("phone extension", "order number", "house number", "catalogue number", "badge number", "batch number"),
)
_CONSONANTS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr sh th".split()  # noqa: SIM905
_VOWELS = "a e i o u ai ea oo".split()  # noqa: SIM905
_ENDINGS = ("", "k", "l", "m", "n", "r", "s", "t")
# Words that the syllables can spell and that the evaluations ask for.
_NOT_NAMES = frozenset("beacon comet coral drum maple river teal tower wagon".split())  # noqa: SIM905
_STATEMENTS = (
    "the {attribute} for {key} is {value}.",
    "{key} has {attribute} {value}.",
    "for {key} the {attribute} reads {value}.",
    "{key}, {attribute}: {value}.",
    "they gave {key} the {attribute} {value}.",
)
_QUESTIONS = (
    "which {attribute} belongs to {key}? It is {value}.",
    "the {attribute} for {key} is {value}.",
    "what {attribute} does {key} have? {key} has {value}.",
    "{key}, {attribute}: {value}.",
)

_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_ITEMS = (4, 16)  # of a line in lists among filler; the last may have more
_SLACK = 64  # tokens that a document of a number of tokens may lack
_TRIES = 8  # to find a line that fits
_LOOKS = 64  # for one, before any document is made


def _range(most: int) -> Check:
    return Check(f"[least, most] with 1 <= least <= most <= {most:,}", lambda r: 1 <= r[0] <= r[1] <= most)


@dataclass(frozen=True)
class Retrieval(Settings):
    """`retrieval` of a source with `path: retrieval`.

    documents: how many. facts: [fewest, most] of a document. rounds: [fewest, most] times that all of them are asked
        for.
    tokens: [shortest, longest] document, in tokens of the filler's tokenizer, those that frame it included; filled up
        from `filler`. Up to the length of a window none is cut. Without it, or where they need more, a document is as
        long as its facts and questions.
    chars: the same in characters.
    filler: a folder of token shards whose text lies around the facts; give a `train` folder, so that nothing held out
        is trained on.
    opening: the share of the documents with filler that begin with a fact: a place at random is hardly ever the first,
        and the first tokens of a text are what attention falls back on.
    recite: no sentences, but a list of that many names and numbers, given again `rounds` times in its order; with
        `filler`, of names, numbers and codes, in lines that lie scattered and are given again in a random order.
    seed: another one, other documents.
    """

    documents: Positive
    facts: Annotated[tuple[int, int], _range(1000)]
    rounds: Annotated[tuple[int, int], _range(100)] = (1, 1)
    tokens: Annotated[tuple[int, int], _range(1 << 30)] | None = None
    chars: Annotated[tuple[int, int], _range(1 << 30)] | None = None
    filler: str | None = None
    opening: Ratio = 0.0
    recite: bool = False
    seed: Count = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.chars is not None:
            raise SettingError("", "tokens and chars both say how long the documents are; give one")
        if (self.length is None) != (self.filler is None):
            raise SettingError(
                "", "tokens (or chars) and filler belong together: how long the documents are, and what fills them up"
            )
        if self.opening and self.filler is None:
            raise SettingError("opening", "is about documents with filler; without it each begins with a fact")

    @property
    def length(self) -> tuple[int, int] | None:
        return self.chars if self.tokens is None else self.tokens

    @property
    def mean_chars(self) -> int:
        """A rough size of a document."""
        if self.tokens is not None:
            return 2 * sum(self.tokens)
        return sum(self.chars) // 2 if self.chars is not None else 20 * sum(self.facts) * (1 + sum(self.rounds))

    @property
    def text(self) -> str | None:
        """What tells the text of `filler` from another one, as it is now; None without. Raises as `read_manifest`."""
        return None if self.filler is None else identity_of(read_manifest(Path(self.filler).expanduser()))

    def check(self) -> None:
        """Raises FileNotFoundError, ValueError where `filler` is no finished shard folder, or one whose text has hardly
        a line that even the longest document has room for."""
        if self.filler is None or self.length is None:
            return
        unit = "characters" if self.tokens is None else "tokens"
        if not _filler(self.filler).has_lines(self.length[1], unit):
            raise ValueError(
                f"retrieval filler {self.filler}: none of {_LOOKS} places in its text has a whole line of less than"
                f" {self.length[1]:,} {unit}, and whole lines fill up the documents, so that they would be their facts"
                f" and questions alone; name a folder whose text has more line breaks, or make the documents longer"
            )


def read_retrieval(settings: Retrieval, first: int, stop: int) -> Iterator[Document]:
    """Documents [first, stop); the id of each is its seed and number."""
    for number in range(first, stop):
        yield Document(document(settings, number), f"{settings.seed}:{number}")


def document(settings: Retrieval, number: int) -> str:
    """The text of one document."""
    rng = random.Random(f"{settings.seed}/{number}")
    count = rng.randint(*settings.facts)
    if settings.recite and settings.filler is None:
        items = " ".join(_name(rng) if rng.random() < 0.7 else _number(rng) for _ in range(count))
        return "\n".join([items] * (1 + rng.randint(*settings.rounds)))
    stated, asked = _lists(settings, rng, count) if settings.recite else _facts(settings, rng, count)
    return "\n".join(_scattered(settings, rng, stated, asked)) + "\n\n" + "\n".join(asked)


def _facts(settings: Retrieval, rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    """Statements, and questions with their answers."""
    keys = _different(count, lambda: _key(rng))
    one = rng.choice(_ATTRIBUTES) if rng.random() < 0.5 else None
    facts = [{"attribute": one or rng.choice(_ATTRIBUTES), "key": key, "value": _number(rng)} for key in keys]
    usual = rng.choice(_QUESTIONS)
    statements = [_sentence(rng.choice(_STATEMENTS), fact) for fact in facts]
    asked = [fact for _ in range(rng.randint(*settings.rounds)) for fact in rng.sample(facts, count)]
    return statements, [_sentence(usual if rng.random() < 0.5 else rng.choice(_QUESTIONS), fact) for fact in asked]


def _lists(settings: Retrieval, rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    """`count` different names, numbers and codes in lines, and the lines in a random order: the first item of a line
    says which one it is. Too few for another line lengthen the last."""
    items = _different(count, lambda: rng.choices((_name, _number, _code), (0.4, 0.4, 0.2))[0](rng))
    lines: list[str] = []
    while items:
        size = rng.randint(*_ITEMS)
        if len(items) < size + _ITEMS[0]:
            size = len(items)
        lines.append(" ".join(items[:size]))
        del items[:size]
    return lines, [line for _ in range(rng.randint(*settings.rounds)) for line in rng.sample(lines, len(lines))]


def _scattered(settings: Retrieval, rng: random.Random, statements: list[str], questions: list[str]) -> list[str]:
    """The statements at random places between lines of filler, in their order."""
    if settings.length is None or settings.filler is None:
        return statements
    filler = _filler(settings.filler)
    room = rng.randint(*settings.length)
    if settings.tokens is not None:
        # a newline may be a token, and a statement may divide another that was one
        newlines = 2 * len(statements) + len(questions) + 1
        taken = sum(filler.count([*statements, *questions])) + newlines + len(filler.frame)
        lines = filler.lines_of_tokens(room - taken, rng)
    else:
        taken = sum(map(len, questions)) + sum(len(statement) + 1 for statement in statements)
        lines = filler.lines(room - taken, rng)
    places = sorted(rng.randint(0, len(lines)) for _ in statements)
    if settings.opening and rng.random() < settings.opening:
        places[0] = 0
    body: list[str] = []
    for place, end, statement in zip([0, *places], places, statements, strict=False):
        body += [*lines[place:end], statement]
    return body + lines[places[-1] :]


class _Filler:
    """Text of a shard folder, taken from random places."""

    def __init__(self, folder: str):
        self.shards = TokenShards(folder)
        self.tokenizer = TextTokenizer(self.shards.tokenizer_file)
        self.frame = [i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id) if i is not None]

    def has_lines(self, length: int, unit: str) -> bool:
        """Whether one of `_LOOKS` places, the same every time, has a line of less than so many tokens or characters."""
        rng = random.Random(0)
        for _ in range(_LOOKS):
            lines = self._some(length // 2 if unit == "characters" else 2 * length, rng)
            if min(map(len, lines) if unit == "characters" else self.count(lines), default=length) < length:
                return True
        return False

    def lines(self, chars: int, rng: random.Random) -> list[str]:
        """About `chars` characters in whole lines, none where that is too few for one."""
        found: list[str] = []
        while chars > 0:
            for line in self._some(chars // 2, rng):
                chars -= len(line) + 1
                if chars < 0:
                    return found
                found.append(line)
            chars -= 1
        return found

    def lines_of_tokens(self, tokens: int, rng: random.Random) -> list[str]:
        """The same, of at most `tokens` tokens, and hardly less."""
        found: list[str] = []
        left, in_vain = tokens, 0
        while left > _SLACK and in_vain < _TRIES:
            lines, before = self._some(2 * left, rng), len(found)
            for line, count in zip(lines, self.count(lines), strict=True):
                if count < left:
                    found.append(line)
                    left -= count + 1
            if len(found) == before:  # lines are longer than what is left
                in_vain += 1
            else:  # newlines may be part of other tokens, so there may be more room than that
                in_vain, left = 0, min(tokens - self.count(["\n".join(found)])[0], left + len(found) - before) - 1
        return found

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each, without a frame."""
        return [len(ids) - len(self.frame) for ids in self.tokenizer.encode_documents(texts)]

    def _some(self, tokens: int, rng: random.Random) -> list[str]:
        """The whole lines in about so many tokens."""
        tokens = min(max(64, tokens), int(self.shards.offsets[-1]))
        start = rng.randrange(int(self.shards.offsets[-1]) - tokens + 1)
        ids = self.shards.read(start, start + tokens)
        text = self.tokenizer.decode(ids[~np.isin(ids, self.frame)])
        return text.split("\n")[1:-1]  # the first and the last may be cut


_filler = lru_cache(maxsize=4)(_Filler)


def _sentence(wording: str, fact: dict[str, str]) -> str:
    text = wording.format(**fact)
    return text[0].upper() + text[1:]


def _different(count: int, make: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def _key(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return f"the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
    return _name(rng) if kind < 0.8 else f"{_name(rng)} {_name(rng)}"


def _name(rng: random.Random) -> str:
    """A made-up word of one or two syllables."""
    syllables = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 2))]
    name = "".join(syllables) + rng.choice(_ENDINGS)
    return _name(rng) if name in _NOT_NAMES else name


def _code(rng: random.Random) -> str:
    """Letters and digits without a pattern, in groups."""
    return "-".join("".join(rng.choices(_LETTERS, k=rng.randint(3, 6))) for _ in range(rng.randint(2, 4)))


def _number(rng: random.Random) -> str:
    digits = rng.randint(3, 8)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
