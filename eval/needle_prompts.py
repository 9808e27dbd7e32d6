"""Needles hidden in a haystack, and the questions that ask for them, as token ids.

| kind | hidden | asked for |
|---|---|---|
| single | a number of a key | the number |
| multi-key | and numbers of three other keys | the one |
| distractors | and numbers of eight keys that share a word with it | the one |
| multi-value | four numbers of one key | all of them, in the order of the text |
| multi-query | numbers of four keys | all of them, one after another |
| passkey | a pass key in a few sentences over and over (arXiv 2305.16300) | the pass key |
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from eval.haystack import Haystack, encode_inside

# A needle may lie off its depth by so much, in percent of the haystack's tokens (and by one token), to stand between
# two sentences. Where no window of the haystack allows it, the needle breaks one.
MAX_SHIFT = 0.25
_FURTHER = 128  # tokens by which the other needles of a prompt may; the map does not show where they lie
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
FILLER = (
    " The road runs along the river.",
    " The boats come home at noon.",
    " Nobody is in a hurry here.",
    " The wind turns, and the leaves turn with it.",
    " Then the bells ring, and it is evening.",
)


@dataclass(frozen=True)
class Kind:
    """How many needles are asked for, how many others are hidden, and how they read: `lead` number, `ask` number
    [`further` number ...]."""

    needles: int = 1
    distractors: int = 0
    lead: str = " The magic number of the {key} is"
    ask: str = "\n\nThe magic number of the {key} is"
    further: str = ".\nThe magic number of the {key} is"
    digits: int = 7


KINDS = {
    "single": Kind(),
    "multi-key": Kind(distractors=3),
    "distractors": Kind(distractors=8),
    "multi-value": Kind(4, 0, " One magic number of the {key} is", "\n\nThe magic numbers of the {key} are", ","),
    "multi-query": Kind(4),
    "passkey": Kind(1, 0, " The pass key is", "\n\nWhat is the pass key? The pass key is", "", 5),
}
_PASSKEY_AGAIN = (". Remember it.", " is the pass key.")


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
    """tokens: haystack with needles, questions and answers. on_boundary: no needle breaks a sentence. first: position
    of the first fact, before which prompts of one window are alike."""

    tokens: list[int]
    needles: tuple[Needle, ...]
    on_boundary: bool
    first: int


def filler(tokenizer: Tokenizer, tokens: int) -> Haystack:
    """The haystack of the passkey: the same few sentences over and over."""
    text = "".join(FILLER)
    repeats = tokens // len(tokenizer.encode(text, add_special_tokens=False).ids) + 2
    return Haystack.from_texts([text * repeats], tokenizer, "filler", tokens)


def check_counts(kind: str, needles: int, distractors: int) -> None:
    """Raises ValueError for more needles than a kind has names for."""
    most = {"distractors": len(_COLOURS) + len(_THINGS) - 1, "passkey": 1}.get(kind, NAMES)
    if needles + distractors > most:
        raise ValueError(
            f"--needles {needles} --distractors {distractors}: there are names for {most} together of --kind {kind}"
        )
    if kind == "distractors" and needles > 1:
        raise ValueError(f"--needles {needles}: --kind distractors asks for one")


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
    kind: str = "single",
    begin: int | None = None,
) -> Prompt:
    """Hide needles in a window of the haystack, then ask for each.

    The prompt is `bos? haystack-with-needles question answer [question answer ...]` and has exactly
    `length` tokens. The first needle lies `depth` percent of the haystack's tokens deep: the window is one in which a
    sentence starts there, within MAX_SHIFT, or if there is none, the needle breaks a sentence; further ones follow at
    equal distances around the context. Distractors are needles under other keys at random sentence starts, never asked
    for. All of it depends on the arguments alone: the same `seed` gives the same prompt.

    Args:
        begin: the window begins at this token of the haystack, so that prompts of several depths begin alike; the first
            needle may then lie off its depth by as much as the further ones.
    Raises:
        ValueError: the questions and needles alone exceed `length`, the haystack is too short, or the tokenizer cannot
            write a number.
    """
    rng, text = random.Random(seed), KINDS[kind]
    count = needles + distractors
    keys = _keys(rng, kind, needles, distractors)
    numbers = [str(n) for n in rng.sample(range(10 ** (text.digits - 1), 10**text.digits), count)]
    asked = [
        _question(tokenizer, (text.further if i else text.ask).format(key=keys[i]), numbers[i]) for i in range(count)
    ]
    answers = [answer for _, answer in asked]
    if kind == "multi-value":  # within the fact a number is written as after its own lead
        answers = [_question(tokenizer, text.lead.format(key=keys[i]), numbers[i])[1] for i in range(count)]
    facts = [_fact(tokenizer, kind, text.lead.format(key=keys[i]), numbers[i], answers[i]) for i in range(count)]
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
    further = max(shift, min(_FURTHER, size // (8 * needles)))
    if begin is None:
        where = haystack.window(size, rng, targets[0], shift)
    else:
        where, shift = slice(begin, begin + size), max(shift, min(_FURTHER, size // 64))
    window, marks = haystack.tokens[where], haystack.marks(where)
    between = np.flatnonzero(np.append(haystack.between[where], True))
    places = [_near(marks, target, further if i else shift) for i, target in enumerate(targets)]
    places = [int(between[np.abs(between - p).argmin()]) for p in places]
    places += [int(marks[rng.randrange(len(marks))]) if len(marks) else 0 for _ in range(distractors)]

    tokens, positions = insert(head, window, places, facts)
    hidden: list[Needle | None] = [None] * needles
    order = sorted(range(needles), key=positions.__getitem__) if kind == "multi-value" else range(needles)
    for (question, _), i in zip(asked, order, strict=True):
        answer = asked[i][1]
        begins = len(tokens) + len(question)
        tokens += question + answer
        answered = slice(begins, begins + len(answer))
        hidden[i] = Needle(keys[i], numbers[i], 100 * places[i] / size, positions[i], answered)
    on_boundary = bool(np.isin(places[:needles], marks).all())
    return Prompt(tokens, tuple(filter(None, hidden)), on_boundary, min(positions))


def insert(
    head: list[int], window: np.ndarray, places: list[int], pieces: list[list[int]]
) -> tuple[list[int], list[int]]:
    """`head`, then the window with a piece at each of `places`; and the positions of the pieces."""
    tokens, positions, taken = list(head), [0] * len(pieces), 0
    for i in sorted(range(len(pieces)), key=places.__getitem__):
        tokens += window[taken : places[i]].tolist()
        taken = places[i]
        positions[i] = len(tokens)
        tokens += pieces[i]
    return tokens + window[taken:].tolist(), positions


def _keys(rng: random.Random, kind: str, needles: int, distractors: int) -> list[str]:
    """Names of the facts, the one at the sample's depth first."""
    colours, things = len(_COLOURS), len(_THINGS)
    if kind == "passkey":
        return ["pass key"]
    if kind == "multi-value":
        first, *others = rng.sample(range(NAMES), 1 + distractors)
        chosen = [first] * needles + others
    elif kind == "distractors":
        first = rng.randrange(NAMES)
        colour, thing = first % colours, first // colours
        alike = [colour + colours * i for i in range(things)] + [i + colours * thing for i in range(colours)]
        chosen = [first, *rng.sample([name for name in alike if name != first], distractors)]
    else:
        chosen = rng.sample(range(NAMES), needles + distractors)
    return [f"{_COLOURS[name % colours]} {_THINGS[name // colours]}" for name in chosen]


def _near(marks: np.ndarray, target: int, shift: int) -> int:
    """The mark nearest to `target`, if there is one within `shift`, else `target`."""
    if len(marks) and abs(mark := int(marks[np.abs(marks - target).argmin()]) - target) <= shift:
        return target + mark
    return target


def _fact(tokenizer: Tokenizer, kind: str, lead: str, number: str, answer: list[int]) -> list[int]:
    """Tokens of a needle, with the number in the answer's tokens also where a full stop would change them."""
    before, _ = _split(tokenizer, f"{lead} {number}", len(lead))
    if kind == "passkey":
        again, end = (encode_inside(tokenizer, text)[0] for text in _PASSKEY_AGAIN)
        return before + answer + again + answer + end
    return before + answer + encode_inside(tokenizer, ".")[0]


def _question(tokenizer: Tokenizer, question: str, number: str) -> tuple[list[int], list[int]]:
    """Tokens of the question and of its answer."""
    before, answer = _split(tokenizer, f"{question} {number}", len(question))
    if number not in tokenizer.decode(answer, skip_special_tokens=False).replace(" ", ""):
        raise ValueError(f"the tokenizer cannot write the number {number}; a needle cannot be scored with it")
    return before, answer


def _split(tokenizer: Tokenizer, text: str, at: int) -> tuple[list[int], list[int]]:
    """Tokens of `text`, before and from the first one that reaches over character `at`."""
    ids, ends = encode_inside(tokenizer, text)
    count = sum(end <= at for end in ends)
    return ids[:count], ids[count:]
