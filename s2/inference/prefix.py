"""Prompts that begin alike: what one has computed serves the next."""

from __future__ import annotations

import torch
from torch import Tensor

from s2.model.transformer import Transformer

from .checks import check_tokens, check_whole_tensors, whole
from .pool import new_cache
from .prefill import PREFILL_CHUNK, last_logits, prefill


class PrefixCache:
    """Calls a model on batches of rows, one after another; of each only what lies behind its common beginning with the
    batch before is computed, as far as the cache goes back. Keys and values depend on earlier tokens alone, so that
    nothing else changes; rounding may, since fewer queries are computed at once, on Hopper by other kernels.

    Dense layers go back to any token. Sparse ones have dropped what the end of the batch before does not see: they go
    back by a few tokens, or to the end of the beginning that was announced (`following`), of which the cache keeps a
    copy of its rings. So batches are to come in an order in which each has as much in common with the one before it as
    that with the one before, or more: then what they share is computed once. Nothing is wrong in another order; what
    cannot be gone back to is computed again.

    Args:
        model: on its device, in its dtype.
        batch_size, max_length: rows of every batch, and tokens of the longest row.
        prefill_chunk: rows are read in pieces of so many tokens.

    Attributes:
        computed: tokens of each row, over all batches.
    """

    def __init__(
        self, model: Transformer, batch_size: int, max_length: int, prefill_chunk: int = PREFILL_CHUNK
    ) -> None:
        self._model, self.batch_size = model, batch_size
        self._chunk = whole("prefill_chunk", prefill_chunk, 1)
        self._cache = new_cache(model, batch_size, max_length)
        self._held = torch.empty((batch_size, 0), dtype=torch.int64, device=model.model.embed_tokens.weight.device)
        self._marked = 0  # tokens before the cache's mark
        self.computed = 0

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values, with the copy of the rings."""
        return self._cache.num_bytes

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, logits_to_keep: int, following: Tensor | None = None) -> Tensor:
        """Logits `[B, logits_to_keep, V]` of the last positions of rows `[B, S]`.

        Args:
            following: the rows that come next, `[B, S']`: they shall find what they begin with in common.

        Raises:
            ValueError: another number of rows, longer ones than there is room for, fewer tokens than logits to keep, or
                tokens that the model has not.
        """
        for rows in (input_ids, input_ids if following is None else following):
            if rows.dim() != 2 or len(rows) != self.batch_size or not 1 <= logits_to_keep <= input_ids.shape[1]:
                raise ValueError(
                    f"rows {list(rows.shape)} with logits_to_keep={logits_to_keep} do not fit: there must be "
                    f"{self.batch_size} rows, and of each at least one logit and no more than it has tokens"
                )
        if input_ids.shape[1] > self._cache.max_length:
            raise ValueError(
                f"rows of {input_ids.shape[1]} tokens do not fit in a cache of max_length={self._cache.max_length}"
            )
        check_whole_tensors([input_ids])
        check_tokens(input_ids, self._model.config.vocab_size)
        input_ids = input_ids.clone()  # callers may write into theirs
        most = input_ids[:, : input_ids.shape[1] - logits_to_keep]
        begin = known = self._go_back(_alike(self._held, most))
        self._held = input_ids[:, :begin]
        shared = 0 if following is None else _alike(following, most)
        if shared >= begin and shared != self._marked:
            if shared > begin:
                prefill(self._model, self._cache, input_ids[:, begin:shared], self._chunk)
            self._marked = 0  # if something keeps the cache from it
            self._cache.mark()
            self._held, self._marked, begin = input_ids[:, :shared], shared, shared
        logits = last_logits(self._model, self._cache, input_ids[:, begin:], self._chunk, logits_to_keep)
        self._held = input_ids
        self.computed += input_ids.shape[1] - known
        return logits

    def _go_back(self, shared: int) -> int:
        """Have the cache hold the first `shared` tokens or as many fewer as need be; how many it holds."""
        shared = min(shared, self._cache.length)  # less than before where a call was interrupted
        if self._cache.oldest_length <= shared:
            self._cache.truncate(shared)
        elif self._marked <= shared and self._marked:
            self._cache.rewind()
            shared = self._marked
        else:
            self._cache.truncate(0)
            shared = 0
        self._marked = self._marked if self._marked <= shared else 0
        return shared


def _alike(one: Tensor, other: Tensor) -> int:
    """Tokens with which all rows of both begin alike."""
    length = min(one.shape[1], other.shape[1])
    differs = (one[:, :length] != other[:, :length]).any(0).nonzero()
    return int(differs[0]) if len(differs) else length
