"""Prompts that begin alike: what one has computed serves the next."""

from __future__ import annotations

import torch
from torch import Tensor

from s2.model.transformer import Transformer

from .cache import KVCache


class PrefixCache:
    """Calls a model on batches of rows, one after another; of each only what lies behind its common beginning with the
    batch before is computed. Keys and values depend on earlier tokens alone, so that nothing else changes; rounding
    may, since fewer queries are computed at once, on Hopper by other kernels.

    Args:
        model: on its device, in its dtype.
        batch_size, max_length: rows of every batch, and tokens of the longest row.
    """

    def __init__(self, model: Transformer, batch_size: int, max_length: int) -> None:
        self._model, self.batch_size = model, batch_size
        weight = model.model.embed_tokens.weight
        self._cache = KVCache(  # the next batch may begin to differ anywhere
            model.config, batch_size, max_length, device=weight.device, dtype=weight.dtype, keep_all=True
        )
        self._held = weight.new_empty((batch_size, 0), dtype=torch.int64)
        self.computed = 0  # tokens of each row, over all batches

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, logits_to_keep: int) -> Tensor:
        """Logits `[B, logits_to_keep, V]` of the last positions of rows `[B, S]`.

        Raises:
            ValueError: another number of rows, longer ones than there is room for, or fewer tokens than logits to keep.
        """
        if len(input_ids) != self.batch_size or not 1 <= logits_to_keep <= input_ids.shape[1]:
            raise ValueError(
                f"rows {list(input_ids.shape)} with logits_to_keep={logits_to_keep} do not fit: there must be "
                f"{self.batch_size} rows, and of each at least one logit and no more than it has tokens"
            )
        shorter = min(self._held.shape[1], input_ids.shape[1] - logits_to_keep)
        differs = (self._held[:, :shorter] != input_ids[:, :shorter]).any(0).nonzero()
        shared = int(differs[0]) if len(differs) else shorter
        self._cache.truncate(shared)
        self._held = input_ids[:, :shared]
        logits = self._model(input_ids[:, shared:], cache=self._cache, logits_to_keep=logits_to_keep)
        self._held = input_ids.clone()  # callers may write into theirs
        self.computed += input_ids.shape[1] - shared
        return logits
