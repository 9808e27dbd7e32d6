"""Prompts are read in pieces, which bounds the activations that a long one takes: each attends to the keys and values
that the cache has kept of those before it, and what all of them give is what one pass gives, but for rounding."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from s2.model.transformer import Transformer

from .cache import KVCache

PREFILL_CHUNK = 1 << 15  # tokens of each row


def add_prefill_chunk(parser: argparse.ArgumentParser) -> None:
    """The option of command lines that read prompts."""
    parser.add_argument(
        "--prefill-chunk", type=int, default=PREFILL_CHUNK,
        help="read prompts in pieces of so many tokens (%(default)s); fewer take less memory",
    )  # fmt: skip


def prefill(
    model: Transformer,
    cache: KVCache,
    input_ids: Tensor,
    chunk: int,
    *,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Feed prompts `[B, S]`, of which the first `lengths[b]` tokens count (None: all), in pieces of `chunk` tokens.

    Returns:
        Logits `[B, 1, V]` after the last token of each.
    """
    logits: Tensor | None = None
    for begin in range(0, input_ids.shape[1], chunk):
        piece = input_ids[:, begin : begin + chunk]
        width = piece.shape[1]
        counts = [width] * len(piece) if lengths is None else [min(max(n - begin, 0), width) for n in lengths]
        if min(counts) == width:
            logits = model(piece, cache=cache, logits_to_keep=1)
            continue
        new = model(piece, cache=cache, logits_to_keep=1, lengths=counts)
        has_any = torch.tensor(counts, device=new.device)[:, None, None] > 0
        logits = new if logits is None else torch.where(has_any, new, logits)
    assert logits is not None
    return logits


def last_logits(model: Transformer, cache: KVCache, input_ids: Tensor, chunk: int, count: int) -> Tensor:
    """`prefill` of full rows. Returns the logits `[B, count, V]` after their last `count` tokens."""
    first, found = input_ids.shape[1] - count, []
    for begin in range(0, input_ids.shape[1], chunk):
        piece = input_ids[:, begin : begin + chunk]
        wanted = min(piece.shape[1], begin + piece.shape[1] - first)
        logits = model(piece, cache=cache, logits_to_keep=max(1, wanted))
        if wanted > 0:
            found.append(logits)
    return torch.cat(found, dim=1)
