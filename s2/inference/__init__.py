"""Running a trained model: the KV cache and text generation."""

from .cache import KVCache
from .generate import generate
from .prefix import PrefixCache

__all__ = ["KVCache", "PrefixCache", "generate"]
