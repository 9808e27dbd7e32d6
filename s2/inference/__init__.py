"""Running a trained model: the KV cache and text generation."""

from .cache import KVCache
from .generate import generate, stream
from .graph import DecodeGraph
from .prefix import PrefixCache

__all__ = ["DecodeGraph", "KVCache", "PrefixCache", "generate", "stream"]
