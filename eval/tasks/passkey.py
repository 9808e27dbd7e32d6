"""Documents and score of the `s2_passkey` task."""

import random
from typing import Any

import datasets

from eval.needle_prompts import FILLER
from s2.inference.folder import load_tokenizer

LENGTHS = tuple(2**power for power in range(8, 21))


def load(
    pretrained: str, max_length: int, samples: int = 20, seed: int = 0, num_lengths: int = 4, **_: Any
) -> dict[str, datasets.Dataset]:
    """Rows {prompt, answer, length, depth}: `samples` for each of the `num_lengths` longest LENGTHS that fit.

    Prompt and answer together, BOS included, have at most `length` tokens and at least `length` less two
    sentences.
    The same arguments give the same rows.

    Raises ValueError for a max_length below 256, or no samples.
    """
    for name, value in (("samples", samples), ("num_lengths", num_lengths)):
        if type(value) is not int or value < 1:
            raise ValueError(f"s2_passkey: {name}={value!r}; expected a whole number of at least 1")
    lengths = [length for length in LENGTHS if length <= max_length][-num_lengths:]
    if not lengths:
        raise ValueError(f"s2_passkey: max_length={max_length}, but its shortest prompts have {LENGTHS[0]} tokens")
    tokenizer = load_tokenizer(pretrained)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    rows = []
    for length in lengths:
        for index in range(samples):
            rng = random.Random(f"{seed}/{length}/{index}")
            key, depth = str(rng.randrange(10_000, 100_000)), rng.random()
            room = length - 1 - count(_prompt(0, depth, key) + f" {key}")
            sentences = room * len(FILLER) // count("".join(FILLER)) + len(FILLER)
            while count(_prompt(sentences, depth, key) + f" {key}") > length - 1:
                sentences -= 1
            rows.append(
                {
                    "prompt": _prompt(sentences, depth, key),
                    "answer": f" {key}",
                    "length": length,
                    "depth": depth,
                }
            )
    return {"test": datasets.Dataset.from_list(rows)}


def _prompt(sentences: int, depth: float, key: str) -> str:
    filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
    filler.insert(round(depth * sentences), f" The pass key is {key}. Remember it. {key} is the pass key.")
    return "There is a pass key hidden in this text." + "".join(filler) + "\n\nWhat is the pass key? The pass key is"


def score(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """`acc` over all lengths, and the same at the document's own length."""
    value = float(results[0][1])
    return {"acc": value, f"acc_{document['length']}": value}
