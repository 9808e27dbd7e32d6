"""Options of generation in lm-eval's words: what is implemented is used, what is not is refused by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from s2.inference.checks import NEUTRAL, check_sampling

MAX_NEW_TOKENS = 256  # lm-eval's, where a task does not say
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts


@dataclass(frozen=True)
class Sampling:
    """How a request is continued.

    until: texts that end it. temperature: 0 is greedy. seed: None takes torch's own random numbers.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "Sampling":
        """The `generation_kwargs` of a task.

        As in lm-eval and transformers, `do_sample: false` is greedy whatever else is there, and a temperature above 0
        alone means sampling; `do_sample: true` without a temperature samples with 1. Nulls are options not given.

        Raises ValueError for an option that is not implemented, or a value out of range.
        """
        given = {key: value for key, value in options.items() if value is not None}
        for key, value in given.items():
            if key not in (*_KNOWN, *_LENGTHS) and value not in NEUTRAL.get(key, ()):
                raise ValueError(
                    f"generation option {key}={value!r} is not supported; supported are {', '.join(_KNOWN)}"
                )
        until = given.get("until", [])
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list) or not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"generation option until={until!r}: expected a text or a list of texts")
        sample = given.get("do_sample", _number("temperature", given.get("temperature", 0)) > 0)
        temperature = _number("temperature", given.get("temperature", 1)) if sample else 0.0
        greedy = temperature == 0.0
        read = cls(
            tuple(until),
            _whole("max_gen_toks", next((given[key] for key in _LENGTHS if key in given), MAX_NEW_TOKENS), 1),
            temperature,
            1.0 if greedy else _number("top_p", given.get("top_p", 1)),
            0 if greedy else _whole("top_k", given.get("top_k", 0), 0),
            None if greedy or "seed" not in given else _whole("seed", given["seed"], 0),
        )
        check_sampling(read.temperature, read.top_p, read.top_k)
        return read

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Random numbers from the seed on, for all requests of these options."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"generation option {name}={value!r}: expected a number")
    return float(value)


def _whole(name: str, value: Any, least: int) -> int:
    if _number(name, value) != int(value) or value < least:
        raise ValueError(f"generation option {name}={value!r}: expected a whole number of at least {least}")
    return int(value)
