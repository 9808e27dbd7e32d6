"""Sparsely-sharded attention: pattern -> op -> kernels. Knows torch and triton only.

from s2.attention import Pattern, s2_attention
out = s2_attention(q, k, v, Pattern.parse("L8V16", block_size=64))
"""

from .layout import LayerLayout
from .op import s2_attention
from .pattern import HeadRule, Level, Pattern

__all__ = ["HeadRule", "LayerLayout", "Level", "Pattern", "s2_attention"]
