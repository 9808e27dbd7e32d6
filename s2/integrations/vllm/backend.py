"""Attention of our layers in vLLM: `s2.attention.paged` on vLLM's pages. KV heads have tables of their own, or one
together where everything is kept (`layer`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from s2.attention import Pattern
from s2.attention.paged import paged_attention, write_pages
from s2.attention.pattern import BLOCK_SIZES


@dataclass
class PagedMetadata(AttentionMetadata):
    """A batch as the layers of one group of tables see it.

    Attributes:
        cu_seqlens, seq_lens, block_table: as `paged_attention` takes them.
        parts: `(first sequence, sequence behind the last, most queries of one, tokens of the longest or more)`: those
            that decode, and the others.
    """

    cu_seqlens: Tensor
    seq_lens: Tensor
    block_table: Tensor
    parts: tuple[tuple[int, int, int, int], ...]


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1  # vLLM puts sequences that decode first

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.max_model_len = vllm_config.model_config.max_model_len

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedMetadata:
        batch = common_attn_metadata
        decodes = split_decodes_and_prefills(batch)[0]
        parts = (
            # a graph is replayed with any lengths, and the kernel that it holds has been warmed up with one token
            (0, decodes, 1, self.max_model_len),
            (decodes, batch.num_reqs, batch.max_query_len, batch.max_seq_len),
        )
        return PagedMetadata(
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table_tensor,
            tuple(part for part in parts if part[0] < part[1]),
        )


class PagedBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # a name that vLLM knows and takes for no backend of its own

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[PagedMetadataBuilder]:
        return PagedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        return list(BLOCK_SIZES)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and head_size <= 256

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, 2, block_size, num_kv_heads, head_size


class PagedImpl(AttentionImpl[PagedMetadata]):
    """What a layer's attention computes. `pattern` and the rest from there on: as of `paged_attention`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        pattern: Pattern,
        rotation: int,
        head_offset: int,
        total_kv_heads: int,
    ) -> None:
        for name, value in (
            ("alibi_slopes", alibi_slopes), ("sliding_window", sliding_window), ("logits_soft_cap", logits_soft_cap),
            ("kv_sharing_target_layer_name", kv_sharing_target_layer_name),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name}={value!r} is not supported by the attention of s2_llama")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.pattern = pattern
        self.heads: dict[str, Any] = {
            "rotation": rotation,
            "head_offset": head_offset,
            "total_kv_heads": total_kv_heads,
        }

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes the new keys and values `[T, H, D]`, and into `output` `[T, Hq, D]` the attention of `query`."""
        if attn_metadata is None:  # vLLM measures how much memory there is: no pages yet
            return output.fill_(0)
        batch, (k_cache, v_cache), tables = attn_metadata, layer.page_views(), _tables(layer, attn_metadata)
        write_pages(key, value, k_cache, v_cache, tables, batch.seq_lens, batch.cu_seqlens)
        for first, last, max_query_len, max_seq_len in batch.parts:
            part = tables
            if last - first < len(batch.seq_lens):
                part = tables[first:last] if isinstance(tables, Tensor) else [table[first:last] for table in tables]
            paged_attention(
                query, k_cache, v_cache, part, batch.seq_lens[first:last], batch.cu_seqlens[first : last + 1],
                self.pattern, max_query_len=max_query_len, max_seq_len=max_seq_len, softmax_scale=self.scale,
                out=output, **self.heads,
            )  # fmt: skip
        return output


def _tables(layer: Any, metadata: PagedMetadata) -> Tensor | list[Tensor]:
    """Tables of all heads, or of each."""
    if not layer.other_heads:
        return metadata.block_table
    all_metadata = get_forward_context().attn_metadata
    of_layers = all_metadata[0] if isinstance(all_metadata, list) else all_metadata
    return [metadata.block_table, *(of_layers[head.layer_name].block_table for head in layer.other_heads)]
