"""The module that stands as `core_attention` in a layer spec: attention by the layer's pattern.

Megatron hands it what its own `DotProductAttention` gets. What a setting asks for and it does not do is refused when
the model is built, what a call asks for when it is called.

Shapes: S sequence, B batch, T packed tokens, D head dimension; H query heads, G query groups (KV heads) of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from s2.attention import LayerLayout, s2_attention

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)

# settings of TransformerConfig -> values that ask for nothing, and why others are refused
_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_dropout": ((0, None), "the kernels have no dropout"),
    "context_parallel_size": ((1,), "a rank attends to whole sequences"),
    "window_size": ((None,), "which keys a layer sees is the layout's to say"),
    "softmax_type": (("vanilla",), "there is no logit beside the keys'; '+sink<n>' in a layout keeps blocks of keys"),
    "attn_logit_softcapping": ((None, 0), "scores are not capped"),
    "qk_clip": ((False,), "the largest score is not known"),
    "log_max_attention_logit": ((False,), "the largest score is not known"),
    "fp8_dot_product_attention": ((False,), "attention runs in the dtype of its input"),
    "fp8_multi_head_attention": ((False,), "attention runs in the dtype of its input"),
    "batch_invariant_mode": ((False,), "it is a mode of Megatron's own kernels"),
    "flash_decode": ((False,), "it would attend to every key"),
    "multi_latent_attention": ((False,), "its heads share one latent key"),
    "experimental_attention_variant": ((None,), "it chooses keys by itself"),
    "mtp_num_layers": ((None, 0), "layers that predict further tokens are not in a layout"),
    "is_hybrid_model": ((False,), "it counts layers without attention, which a layout does not"),
}


class S2CoreAttention(MegatronModule):
    """Attention of one layer by its pattern in a layout.

    Args:
        config: Megatron's. With more tensor-parallel ranks than KV heads it comes with as many query groups as ranks,
            so `num_kv_heads` is in the spec.
        layer_number: of the whole model, from 1, whatever the pipeline stage.
        attn_mask_type: a causal one.
        attention_type: "self".
        attention_dropout: as in config where None.
        softmax_scale: factor of the scores, default `1 / sqrt(D)`.
        cp_comm_type: not used.
        pg_collection: has the tensor-parallel group, default Megatron's global one. Patterns go by the KV head's index
            in the whole model.
        layout: a pattern for each of the model's layers.
        num_kv_heads: of the whole model.

    Raises:
        ValueError: a setting that attention by patterns does not have; a layout of other layers or heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        layout: LayerLayout,
        num_kv_heads: int,
    ) -> None:
        super().__init__(config=config)
        for key, (harmless, reason) in _SETTINGS.items():
            value = getattr(config, key, harmless[0])
            if key == "attention_dropout" and attention_dropout is not None:
                value = attention_dropout
            if value not in harmless:
                raise ValueError(f"S2 attention: {key}={value!r} must be {harmless[0]!r}: {reason}")
        if attention_type != "self":
            raise ValueError(
                f"S2 attention: attention_type={attention_type!r} must be 'self': blocks count one sequence"
            )
        if attn_mask_type not in _CAUSAL:
            raise ValueError(f"S2 attention: attn_mask_type={attn_mask_type.name} must be causal")
        num_heads = config.num_attention_heads
        check_layout(layout, config.num_layers, num_heads, num_kv_heads)
        if not 1 <= layer_number <= len(layout):
            raise ValueError(f"S2 attention: layer_number={layer_number} must be from 1 to the layout's {len(layout)}")
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        rank, ranks = pg_collection.tp.rank(), pg_collection.tp.size()
        if num_heads % ranks or max(num_kv_heads, ranks) % min(num_kv_heads, ranks):
            raise ValueError(
                f"S2 attention: tensor parallel size {ranks} must divide num_attention_heads={num_heads}, and divide "
                f"num_query_groups={num_kv_heads} or be a multiple of it"
            )
        if layout.ruled_heads(num_kv_heads) != num_kv_heads and ranks > num_kv_heads:
            raise ValueError(
                f"S2 attention: attention_layout {layout.spec!r} has rules for query heads, so tensor parallel size "
                f"{ranks} must not be above num_query_groups={num_kv_heads}"
            )
        self.layer_number = layer_number
        self.pattern = layout[layer_number - 1]
        self.rotation = layout.distinct_rotations(num_kv_heads)[layer_number - 1]
        self.head_offset, self.total_kv_heads = rank * num_kv_heads // ranks, num_kv_heads
        self.softmax_scale = softmax_scale

    def extra_repr(self) -> str:
        return f"layer_number={self.layer_number}, pattern={self.pattern}, rotation={self.rotation}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[S, B, H, D]`, or `[T, H, D]` with packed_seq_params of format thd.
            key, value: the same with G heads.
            attention_mask: None, or bool `[B or 1, 1, S, S]` that hides (True) exactly the later tokens. It is read
                once, for which the host waits. Documents in a sequence are said by packed_seq_params.
            attn_mask_type: as for the module. `no_mask`, as it comes in decoding, for a single query, the last token.
            attention_bias: None.
            packed_seq_params: the borders of documents; of `cu_seqlens_q` and `cu_seqlens_q_padded` the latter, where
                padding behind a document counts to it, which no token before it sees. `cu_seqlens_kv` must be the same:
                on a GPU, where nothing waits for them, other ones make the output NaN.

        Returns:
            `[S, B, H * D]`, packed `[T, H * D]`.

        Raises:
            ValueError: what attention by patterns does not have, by name.
        """
        if attention_bias is not None:
            raise ValueError("S2 attention: attention_bias must be None: nothing is added to the scores")
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            if attention_mask is not None:
                raise ValueError("S2 attention: attention_mask must be None where packed_seq_params says the documents")
            if attn_mask_type is not None and attn_mask_type not in _CAUSAL:
                raise ValueError(f"S2 attention: attn_mask_type={attn_mask_type.name} must be causal")
            return self._attend(query, key, value, _borders(packed_seq_params)).flatten(1)
        if packed_seq_params is not None and packed_seq_params.cu_seqlens_q is not None:
            raise ValueError(
                f"S2 attention: packed_seq_params.qkv_format={packed_seq_params.qkv_format!r} must be 'thd'"
            )
        _check_mask(attention_mask, attn_mask_type, query.shape[0], key.shape[0])
        out = self._attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), None)
        return out.transpose(0, 1).flatten(2).contiguous()  # Transformer Engine's layers view it

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return s2_attention(
            q,
            k,
            v,
            self.pattern,
            rotation=self.rotation,
            cu_seqlens=cu_seqlens,
            softmax_scale=self.softmax_scale,
            head_offset=self.head_offset,
            total_kv_heads=self.total_kv_heads,
        )


class S2SelfAttention(SelfAttention):
    """Megatron's, but for its inference with batches that change, which goes past the core attention to dense kernels:
    here that is an error."""

    def flash_decode_and_prefill(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError(
            "S2 attention: dynamic batching attends to every key with kernels of its own; generate with s2.inference "
            "from the weights that from_megatron returns"
        )


def check_layout(layout: LayerLayout, num_layers: int, num_heads: int, num_kv_heads: int) -> None:
    """ValueError: the layout is that of a model with other layers or heads."""
    if len(layout) != num_layers:
        raise ValueError(f"attention_layout {layout.spec!r} is of {len(layout)} layers, but num_layers={num_layers}")
    layout.check_heads(num_heads, num_kv_heads)


def _borders(packed: PackedSeqParams) -> Tensor:
    """Of the documents. ValueError: other borders for keys than for queries; on a GPU the op then gets borders that it
    answers with NaN."""
    ranks = getattr(packed, "local_cp_size", None)
    if ranks not in (None, 1):
        raise ValueError(
            f"S2 attention: packed_seq_params.local_cp_size={ranks} must be 1: {_SETTINGS['context_parallel_size'][1]}"
        )
    borders, of_keys = packed.cu_seqlens_q, packed.cu_seqlens_kv
    if packed.cu_seqlens_q_padded is not None:
        borders, of_keys = packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded
    if borders is None:
        raise ValueError("S2 attention: packed_seq_params of format 'thd' lacks cu_seqlens_q")
    if of_keys is None or of_keys is borders:
        return borders
    alike = of_keys.shape == borders.shape
    if alike and borders.is_cuda:
        return torch.where((of_keys == borders).all(), borders, -1)
    if not alike or not torch.equal(of_keys, borders):
        raise ValueError("S2 attention: packed_seq_params.cu_seqlens_kv must be cu_seqlens_q, padded or not")
    return borders


def _check_mask(mask: Tensor | None, kind: AttnMaskType | None, queries: int, keys: int) -> None:
    """ValueError: not causal, as far as `attn_mask_type` and the mask say."""
    if kind is AttnMaskType.no_mask and queries == 1 and (mask is None or not bool(mask.any())):
        return  # the last token sees every earlier one
    if kind is not None and kind not in _CAUSAL:
        raise ValueError(f"S2 attention: attn_mask_type={kind.name} must be causal")
    if queries != keys and kind is not AttnMaskType.causal_bottom_right:
        raise ValueError(
            f"S2 attention: {queries} queries and {keys} keys must be as many, or attn_mask_type=causal_bottom_right"
        )
    if mask is not None and not _is_causal(mask, queries, keys):
        raise ValueError(
            f"S2 attention: attention_mask {list(mask.shape)} hides other tokens than the later ones; say documents by "
            f"packed_seq_params, leave padding at the end of a sequence to the loss mask, and pass None"
        )


_KNOWN: Any = WeakTensorKeyDictionary()  # causal masks -> their version; all layers get the same one


def _is_causal(mask: Tensor, queries: int, keys: int) -> bool:
    if _KNOWN.get(mask) == (mask._version, queries, keys):
        return True
    if mask.dtype != torch.bool or mask.shape[-2:] != (queries, keys):
        return False
    later = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu_(1 + keys - queries)
    if not bool((mask == later).all()):
        return False
    _KNOWN[mask] = (mask._version, queries, keys)
    return True
