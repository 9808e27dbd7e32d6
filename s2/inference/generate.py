"""Text generation: prefill the prompt, then decode token by token from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from s2.model.transformer import Transformer

from .cache import KVCache


@torch.inference_mode()
def generate(
    model: Transformer,
    input_ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
    is_enough: Callable[[Tensor], Sequence[bool]] | None = None,
) -> Tensor:
    """Continue a batch of prompts, each as if it were alone.

    Args:
        model: on its device, in its dtype.
        input_ids: int64 `[B, S]`, with padding on the right where `lengths` say so; or prompts `[S_b]` one by one.
        max_new_tokens: at most so many tokens are added.
        temperature: 0 takes the likeliest token, otherwise logits are divided by it and a token is drawn.
        top_p: draw only from the likeliest tokens that together reach this probability (nucleus sampling,
            arXiv 1904.09751). With `top_k`, of those.
        eos_token_id: one or several ids that end a row; None: none does. Rows that ended are filled with their last
            token; generation stops early when all have.
        lengths: tokens of each prompt, of whatever token the padding behind them is. None: all rows are full.
        top_k: draw only from so many of the likeliest tokens, and those as likely as the last of them; 0 from all.
        generator: random numbers for the draw, on the model's device.
        prefill_chunk: feed the prompt in pieces of so many tokens, which bounds activation memory at long
            context.
        is_enough: is asked after each token, of the new ones `[B, n]`, which rows need no more. A row for which it once
            said so counts as ended.

    Returns:
        int64 `[B, n]`, the new tokens only, `n <= max_new_tokens`.

    Raises:
        ValueError: prompt and new tokens exceed max_position_embeddings, or an option is out of range.
    """
    check_sampling(temperature, top_p, top_k)
    input_ids, prompts = _padded(input_ids, lengths)
    _check(model, prompts, max_new_tokens, prefill_chunk)
    batch, prompt = input_ids.shape
    weight = model.model.embed_tokens.weight
    stop = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    stop_ids = torch.tensor(stop, dtype=input_ids.dtype, device=input_ids.device)
    # the last token drawn is never fed back
    cache = KVCache(model.config, batch, prompt + max_new_tokens - 1, device=weight.device, dtype=weight.dtype)
    logits = _prefill(model, cache, input_ids, prompts, prefill_chunk or prompt)

    tokens: list[Tensor] = []
    ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    while True:
        token = _draw(logits[:, -1], temperature, top_p, top_k, generator)
        if tokens:
            token = torch.where(ended, tokens[-1], token)
        tokens.append(token)
        if stop:
            ended |= torch.isin(token, stop_ids)
        if is_enough is not None:
            ended |= _enough(is_enough(torch.stack(tokens, dim=1)), ended)
        # without either no row ends, and the device need not be waited for
        if len(tokens) == max_new_tokens or ((stop or is_enough is not None) and bool(ended.all())):
            return torch.stack(tokens, dim=1)
        logits = model(token[:, None], cache=cache, logits_to_keep=1)


def _padded(input_ids: Tensor | Sequence[Tensor], lengths: Tensor | Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """Prompts as `[B, S]` and the tokens of each, S of the longest."""
    if not isinstance(input_ids, Tensor):
        rows = list(input_ids)
        if lengths is not None or not rows or any(row.dim() != 1 for row in rows):
            shapes = [list(row.shape) for row in rows]
            raise ValueError(f"input_ids must be [B, S], with lengths, or prompts [S] one by one, got {shapes}")
        lengths, input_ids = [len(row) for row in rows], pad_sequence(rows, batch_first=True)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [B, S] with at least one token, got {list(input_ids.shape)}")
    batch, width = input_ids.shape
    prompts = [width] * batch if lengths is None else [int(length) for length in lengths]
    if len(prompts) != batch or not all(1 <= length <= width for length in prompts):
        raise ValueError(f"lengths={prompts} must be {batch} numbers from 1 to {width}, the width of input_ids")
    return input_ids[:, : max(prompts)], prompts


def _prefill(model: Transformer, cache: KVCache, input_ids: Tensor, prompts: list[int], chunk: int) -> Tensor:
    """Logits `[B, 1, V]` of the last token of each prompt."""
    logits: Tensor | None = None
    for begin in range(0, input_ids.shape[1], chunk):
        piece = input_ids[:, begin : begin + chunk]
        width = piece.shape[1]
        counts = [min(max(length - begin, 0), width) for length in prompts]
        if min(counts) == width:
            logits = model(piece, cache=cache, logits_to_keep=1)
            continue
        new = model(piece, cache=cache, logits_to_keep=1, lengths=counts)
        has_any = torch.tensor(counts, device=new.device)[:, None, None] > 0
        logits = new if logits is None else torch.where(has_any, new, logits)
    assert logits is not None
    return logits


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Raises ValueError, naming the option, for one that is out of range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k={top_k!r} must be a whole number of tokens, or 0 for all")


def _draw(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits `[B, V]`, int64 `[B]`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # the greatest is 0, so that no temperature is too low to divide by
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = torch.softmax(logits, dim=-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # probability of all likelier tokens
        ranked = ranked.masked_fill(before >= top_p, 0.0)
        drawn = torch.multinomial(ranked, 1, generator=generator)
        return order.gather(1, drawn).squeeze(1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def _enough(said: Sequence[bool] | Tensor, ended: Tensor) -> Tensor:
    """What `is_enough` returned, as `ended` is."""
    enough = torch.as_tensor(said, dtype=torch.bool, device=ended.device)
    if enough.shape != ended.shape:
        raise ValueError(f"is_enough gave {list(enough.shape)} for {len(ended)} rows; it must say it of each row")
    return enough


def _check(model: Transformer, prompts: list[int], max_new_tokens: int, prefill_chunk: int | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1 token")
    total, longest = max(prompts) + max_new_tokens, model.config.max_position_embeddings
    if total > longest:
        raise ValueError(
            f"{max(prompts)} prompt tokens and max_new_tokens={max_new_tokens} make {total}, more than "
            f"max_position_embeddings={longest}; shorten the prompt or load the model with a larger value"
        )
