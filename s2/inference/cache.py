"""The KV cache: keys and values of every earlier token, preallocated, appended in place.

Every layer holds the whole context whatever its pattern; prompts may be fed whole, in pieces or token by
token.

Shapes: B batch, S new tokens, H KV heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2.model.config import ModelConfig


class KVCache:
    """Keys and values `[layers, B, max_length, H, D]`, of which the first `length` tokens are filled.

    Args:
        config: the model's, for the number of layers, KV heads and their width.
        batch_size: sequences decoded side by side, all of one length.
        max_length: tokens of prompt and continuation together.
        device: where the model runs.
        dtype: the model's.

    Raises:
        ValueError: `max_length` beyond max_position_embeddings, or a size below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size={batch_size} and max_length={max_length} must be at least 1")
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"a cache of {max_length} tokens is longer than max_position_embeddings="
                f"{config.max_position_embeddings}; ask for fewer new tokens"
            )
        shape = (
            config.num_hidden_layers,
            batch_size,
            max_length,
            config.num_key_value_heads,
            config.head_dim,
        )
        self._k = torch.empty(shape, device=device, dtype=dtype)
        self._v = torch.empty(shape, device=device, dtype=dtype)
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens of each sequence held so far."""
        return self._length

    @property
    def max_length(self) -> int:
        """Tokens of each sequence there is room for."""
        return self._k.shape[2]

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return 2 * self._k.numel() * self._k.element_size()

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values `[B, S, H, D]`; return views of all so far `[B, length + S, H,
        D]`.

        `length` moves on only with `advance`, once every layer has appended.

        Raises:
            ValueError: another batch size than the cache's, or no room.
        """
        begin, end = self._length, self._length + k.shape[1]
        if k.shape[0] != self._k.shape[1]:
            raise ValueError(f"the cache was made for {self._k.shape[1]} sequences, got {k.shape[0]}")
        if end > self.max_length:
            raise ValueError(f"{end} tokens do not fit in a cache of max_length={self.max_length}")
        self._k[layer, :, begin:end] = k
        self._v[layer, :, begin:end] = v
        return self._k[layer, :, :end], self._v[layer, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` appended by every layer as held."""
        self._length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, e.g. to decode several continuations of one prompt.

        Raises:
            ValueError: `length` is beyond what is held.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate to {length} tokens: the cache holds {self._length}")
        self._length = length
