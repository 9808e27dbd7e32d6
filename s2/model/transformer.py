"""The network: a Llama decoder whose layers attend by the patterns of `ModelConfig.layout`.

Parameter names equal `LlamaForCausalLM`'s (with `qkv_bias` Qwen2's, with `qk_norm` Qwen3's), so a state dict needs no
conversion. The head computes the loss in its own forward, so that DeepSpeed ZeRO-3 gathers its weight there like any
other.

Shapes: B batch, S sequence, T = B * S packed tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, overload

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .layers import Block, Cache, Embedding, Linear
from .loss import chunked_cross_entropy, wide_logits
from .recompute import CHECKPOINT_MODES, CheckpointMode
from .rope import RotaryEmbedding, document_positions


class Decoder(nn.Module):
    """Embedding, blocks and final norm: token ids `[B, S]` to hidden states `[B, S, E]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.initializer_range)
        # reduced, since torch.compile makes one graph for each distinct value
        rotations = config.layout.distinct_rotations(config.num_key_value_heads)
        self.layers = nn.ModuleList(
            Block(config, i, pattern, rotations[i]) for i, pattern in enumerate(config.layout.patterns)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ropes = _ropes(config)

    @property
    def blocks(self) -> list[Block]:
        """The layers, as what they are."""
        return [cast(Block, layer) for layer in self.layers]

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None, cache: Cache | None) -> Tensor:
        B, S = input_ids.shape
        if cu_seqlens is not None:
            positions = document_positions(cu_seqlens, B * S).view(B, S)
        elif cache is not None:
            positions = cache.positions  # [B or 1, S]
        else:
            positions = torch.arange(S, device=input_ids.device)[None]  # [1, S]
        return self.norm(self.through(self.embed_tokens(input_ids), positions, cu_seqlens, cache))

    def through(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        *,
        begin: int = 0,
        end: int | None = None,
    ) -> Tensor:
        """What stands before layer `begin`, `[B, S, E]`, after the layers up to `end` (None: the last), which is left
        out. positions: of the tokens, `[B or 1, S]`."""
        rotations = {rope: rope(positions) for rope in dict.fromkeys(self.ropes)}
        for block in self.blocks[begin:end]:
            x = block(x, *rotations[self.ropes[block.self_attn.pattern.is_dense]], cu_seqlens, cache)
        return x


def _ropes(config: ModelConfig) -> tuple[RotaryEmbedding, RotaryEmbedding]:
    """Of sparse and of dense layers; the same one where they rotate alike."""
    sparse, dense = config.rope(dense=False), config.rope(dense=True)
    embedding = RotaryEmbedding(config.head_dim, *sparse)
    return embedding, embedding if dense == sparse else RotaryEmbedding(config.head_dim, *dense)


class LMHead(nn.Module):
    """Hidden states to logits or, given labels, to the summed loss without ever holding all logits."""

    def __init__(self, config: ModelConfig, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.std = config.initializer_range
        self.loss_backend: str | None = None  # of torch.compile; None is eager
        if tied is not None:
            self.weight = tied
        else:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`[..., S, E]` -> logits `[..., S, V]`, or with labels `[B, S]` -> (loss sum, number of labels)."""
        if labels is None:
            return wide_logits(hidden, self.weight)
        return chunked_cross_entropy(
            hidden.flatten(0, 1), self.weight, labels.flatten(), compile_backend=self.loss_backend
        )


class Transformer(nn.Module):
    """A causal language model; its state dict has the keys of Hugging Face's `LlamaForCausalLM`.

    Args:
        config: sizes and layout. Weights are drawn from N(0, initializer_range**2), the projections into the
            residual stream (o_proj, down_proj) narrower by `sqrt(2 * num_hidden_layers)` (GPT-2), norms are
            ones.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        table = cast(nn.Parameter, self.model.embed_tokens.weight)
        self.lm_head = LMHead(config, table if config.tie_word_embeddings else None)

    @overload
    def forward(
        self, input_ids: Tensor, *, labels: None = None, cu_seqlens: Tensor | None = None,
        cache: Cache | None = None, logits_to_keep: int = 0, lengths: Sequence[int] | None = None,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input_ids: Tensor, *, labels: Tensor, cu_seqlens: Tensor | None = None, cache: None = None,
        logits_to_keep: int = 0, lengths: None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the loss when labels are given.

        Args:
            input_ids: int64 `[B, S]`.
            labels: int64 `[B, S]`, already shifted: `labels[b, t]` is the target at position t, -100 is
                ignored.
            cu_seqlens: int32 `[n + 1]`, document borders over the flattened B * S tokens (0 first, B * S
                last, repeats allowed). Attention stays within documents and positions restart in each. Every
                row start must be a border.
            cache: earlier keys and values; `input_ids` continue them and are kept. No gradients go through it.
            logits_to_keep: compute logits of the last so many positions only (0: of all).
            lengths: real tokens of each row, the longest S; padding stands behind them and is not kept. The last
                positions are then those of the real tokens; what a row has too few of is any number.

        Returns:
            Logits `[B, S or logits_to_keep, V]`, fp32 (fp64 of an fp64 model), or (summed loss in nats, fp32 scalar;
            number of labels that counted, int64 scalar).

        Raises:
            ValueError: a row (with the cache before it) beyond max_position_embeddings, shapes or options
                that do not fit together.
        """
        self._check(input_ids, labels, cu_seqlens, cache, logits_to_keep, lengths)
        if cache is not None and torch.is_grad_enabled():  # gradients would lack what goes through the cache
            with torch.no_grad():
                return self.forward(input_ids, cache=cache, logits_to_keep=logits_to_keep, lengths=lengths)
        if cache is not None:
            cache.begin(input_ids.shape[0], input_ids.shape[1], lengths)
        hidden = self.model(input_ids, cu_seqlens, cache)
        if lengths is not None and logits_to_keep:
            last = [range(length - logits_to_keep, length) for length in lengths]
            index = torch.tensor(last, device=hidden.device).clamp(min=0)
            hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        result = self.lm_head(hidden[:, -logits_to_keep:], labels)
        if cache is not None:
            cache.advance()  # the last thing: what failed before has not been fed
        return result

    def _check(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
        logits_to_keep: int,
        lengths: Sequence[int] | None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be [B, S] with at least one token, got {list(input_ids.shape)}")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels {list(labels.shape)} must have the shape of input_ids {list(input_ids.shape)}")
        if labels is not None and (cache is not None or logits_to_keep):
            raise ValueError("labels cannot be combined with cache or logits_to_keep")
        if cu_seqlens is not None and cache is not None:
            raise ValueError("cu_seqlens cannot be combined with cache: a cache holds one document a row")
        if lengths is not None and (labels is not None or cu_seqlens is not None):
            raise ValueError("lengths cannot be combined with labels or cu_seqlens, which say what is real themselves")
        if lengths is not None and (
            len(lengths) != len(input_ids) or not 0 <= min(lengths) <= max(lengths) <= input_ids.shape[1]
        ):
            raise ValueError(f"lengths={list(lengths)} do not fit input_ids {list(input_ids.shape)}")
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must be 0 (all) or more")
        real = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths
        length = max(real) if cache is None else max(map(sum, zip(real, cache.lengths, strict=False)))
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"a row of {length} tokens is longer than max_position_embeddings="
                f"{self.config.max_position_embeddings}; shorten it or load the model with a larger value"
            )

    def reset_parameters(self) -> None:
        """Draw all weights anew, e.g. after building on the meta device and `to_empty`."""
        for module in self.modules():
            tied = module is self.lm_head and self.config.tie_word_embeddings
            if isinstance(module, Linear | Embedding | nn.RMSNorm | LMHead) and not tied:
                module.reset_parameters()

    def tie_weights(self) -> None:
        """Make head and embedding one parameter again after an assigning `load_state_dict`."""
        self.lm_head.weight = cast(nn.Parameter, self.model.embed_tokens.weight)

    def attend_as(self, config: ModelConfig) -> None:
        """Attend by the layout and the rotary frequencies of `config`, which has this model's sizes; weights stay."""
        self.model.ropes = _ropes(config)
        rotations = config.layout.distinct_rotations(config.num_key_value_heads)
        rules = zip(self.model.blocks, config.layout.patterns, rotations, strict=True)
        for block, pattern, rotation in rules:
            block.self_attn.pattern, block.self_attn.rotation = pattern, rotation

    def set_activation_checkpointing(self, mode: CheckpointMode) -> None:
        """Choose what blocks recompute in the backward: "none", "selective" or "full" (see `recompute`).

        Raises:
            ValueError: another mode.
        """
        if mode not in CHECKPOINT_MODES:
            raise ValueError(f"activation_checkpointing={mode!r} does not exist; use one of {list(CHECKPOINT_MODES)}")
        for block in self.model.blocks:
            block.checkpointing = mode

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compile each block (and the loss's elementwise part) in place; parameter names do not change.

        Blocks share one compiled graph for each distinct pattern, and always all of a block is compiled: what cannot
        be captured whole, or would need more graphs than any mixture of lengths does, is an error. A fallback to eager
        code would be slower and larger than planned, on this rank alone perhaps, and nobody would know. Decoding with
        a cache stays eager.

        Args:
            backend: of torch.compile.
        """
        variants = {(block.self_attn.pattern, block.self_attn.rotation) for block in self.model.blocks}
        graphs = 32 * len(variants)  # packed or not, with gradients or not, and each for some lengths and any length
        for block in self.model.blocks:
            block.compile(graphs, backend=backend)
        self.lm_head.loss_backend = backend
