"""A layer's attention as vLLM's memory manager sees it. vLLM has one table of pages for a layer, but here KV heads keep
different blocks. So to vLLM each KV head is a layer with one head: the first is the layer itself, the others are there
for their caches alone. Where everything is kept there is one layer with all heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from s2.attention import HeadRule, Pattern
from s2.attention.paged import warm_up

from .backend import PagedBackend
from .cache import ShardedSpec
from .config import keeps_all

logger = init_logger(__name__)


class HeadCache(nn.Module, AttentionLayerBase):
    """The cache of one KV head that is not the first.

    Attributes:
        layer_name: vLLM's name of it.
        num_heads: query heads of the whole layer: layers whose numbers differ are prepared apart.
        kv_cache: its pages `[P, 2, block, 1, D]`, which vLLM puts here.
    """

    def __init__(self, layer_name: str, num_heads: int, rule: HeadRule, pages: Any) -> None:
        super().__init__()
        self.layer_name, self.num_heads, self.rule, self.pages = layer_name, num_heads, rule, pages
        self.kv_cache = torch.tensor([])
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if layer_name in layers:
            raise ValueError(f"two layers are called {layer_name}")
        layers[layer_name] = self

    def get_attn_backend(self) -> type[PagedBackend]:
        return PagedBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        return spec_of(self.rule, vllm_config, **self.pages)


def spec_of(rule: HeadRule | None, vllm_config: Any, **pages: Any) -> KVCacheSpec:
    """What vLLM is to keep for heads with this rule; None: everything."""
    if rule is None or rule.is_dense:
        return FullAttentionSpec(**pages)
    step = vllm_config.scheduler_config.max_num_batched_tokens
    return ShardedSpec(**pages, rule=rule, max_num_batched_tokens=step)


class PagedAttention(Attention):
    """Attention of the KV heads from `head_offset` on, of `total_kv_heads` in the whole layer.

    Args:
        pattern, rotation: the layer's.
        num_heads, num_kv_heads: those held here.
    """

    _kv_cache: Tensor
    _views: tuple[Any, Any] | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int,
        pattern: Pattern,
        rotation: int,
        head_offset: int,
        total_kv_heads: int,
        cache_config: Any,
        quant_config: Any,
        prefix: str,
    ) -> None:
        super().__init__(
            num_heads, head_dim, head_dim**-0.5, num_kv_heads=num_kv_heads, cache_config=cache_config,
            quant_config=quant_config, prefix=prefix, attn_backend=PagedBackend, pattern=pattern, rotation=rotation,
            head_offset=head_offset, total_kv_heads=total_kv_heads,
        )  # fmt: skip
        self.pages = {
            "block_size": pattern.block_size,
            "num_kv_heads": num_kv_heads,
            "head_size": head_dim,
            "dtype": self.kv_cache_torch_dtype,
        }
        self.first_rule: HeadRule | None = None
        heads: list[HeadCache] = []
        if reason := keeps_all(get_current_vllm_config()):
            logger.warning_once("All keys are kept until their request ends: %s.", reason)
        else:
            self.pages["num_kv_heads"] = 1
            rules = pattern.rules(total_kv_heads, layer=rotation)[head_offset : head_offset + num_kv_heads]
            self.first_rule = rules[0]
            heads = [
                HeadCache(f"{prefix}.kv_head{h}", num_heads, rule, self.pages) for h, rule in enumerate(rules) if h
            ]
        self.other_heads = nn.ModuleList(heads)
        self.device = torch.empty(0).device  # where vLLM builds

    @property
    def kv_cache(self) -> Tensor:
        """The pages of its heads, or of the first. vLLM changes those of all heads together."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, pages: Tensor) -> None:
        self._kv_cache, self._views = pages, None

    def page_views(self) -> tuple[Any, Any]:
        """Pages of keys and of values: of all heads, or of each. They hold memory, so they go with `kv_cache`."""
        if self._views is None:
            if self.other_heads:
                caches: list[Any] = [self.kv_cache, *(head.kv_cache for head in self.other_heads)]
                self._views = [x[:, 0, :, 0] for x in caches], [x[:, 1, :, 0] for x in caches]
            else:
                self._views = self.kv_cache[:, 0], self.kv_cache[:, 1]
        return self._views

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Called by vLLM before it measures memory and captures graphs."""
        super().process_weights_after_loading(act_dtype)
        if self.device.type == "cuda":
            warm_up(
                self.impl.pattern, self.num_heads, self.num_kv_heads, self.head_size, dtype=act_dtype,
                device=self.device, apart=bool(self.other_heads), **self.impl.heads,
            )  # fmt: skip

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        return spec_of(self.first_rule, vllm_config, **self.pages)
