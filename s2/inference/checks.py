"""What generation is given by its callers: numbers of the right type and in range, and tokens that the model has. On a
GPU a token beyond the embedding would end the process's use of the device."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Options of transformers' generation that are not implemented, each with the values with which it does nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "diversity_penalty", "min_p", "penalty_alpha"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_new_tokens", "min_length"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "top_h"), ()),
    **dict.fromkeys(("use_cache", "early_stopping"), (True, False)),
}


def whole(name: str, value: Any, least: int, most: int | None = None, *, must: str = "") -> int:
    """`value` as an int.

    Args:
        name: the option that messages name.
        least, most: the range; None: without an end.
        must: what it has to be, in words.

    Raises:
        ValueError: it is no whole number, or out of range.
    """
    if not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            number = least - 1
        if least <= number and (most is None or number <= most):
            return number
    raise ValueError(f"{name}={value!r} must be {must or f'a whole number of at least {least}'}")


def number(name: str, value: Any) -> float:
    """`value` as a float. Raises ValueError, naming the option, for what is none; NaN is one."""
    if not isinstance(value, bool | str | bytes):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise ValueError(f"{name}={value!r} must be a number")


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Raises ValueError, naming the option, for one that is out of range or no number."""
    if not 0 <= number("temperature", temperature) < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if not 0 < number("top_p", top_p) <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    whole("top_k", top_k, 0, must="a whole number of tokens, or 0 for all")


def check_whole_tensors(rows: Iterable[Tensor]) -> None:
    """Raises ValueError for tensors that hold other than whole numbers."""
    for row in rows:
        if row.dtype == torch.bool or row.is_floating_point() or row.is_complex():
            raise ValueError(f"input_ids must be token ids, int64, got {row.dtype}")


def check_tokens(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for a token that the model has not. Waits for the device that `ids` are on, once."""
    least, greatest = torch.stack(torch.aminmax(ids)).tolist()
    if least < 0 or greatest >= vocab_size:
        wrong = least if least < 0 else greatest
        raise ValueError(f"input_ids have token {wrong}, and the model has tokens 0 to {vocab_size - 1}")
