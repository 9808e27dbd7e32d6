"""S2-Attention in Megatron-core's `GPTModel`: layer specs, the core attention that they name, settings and weights.

Needs megatron-core 0.16 to 0.19 (the extra `megatron`); nothing else of this package imports it.
"""

from .config import gpt_model_arguments, transformer_config
from .core_attention import S2CoreAttention, S2SelfAttention
from .specs import get_s2_block_spec, get_s2_layer_spec, with_s2_attention
from .weights import from_megatron, to_megatron

__all__ = [
    "S2CoreAttention",
    "S2SelfAttention",
    "from_megatron",
    "get_s2_block_spec",
    "get_s2_layer_spec",
    "gpt_model_arguments",
    "to_megatron",
    "transformer_config",
    "with_s2_attention",
]
