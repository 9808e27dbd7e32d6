"""Running a trained model: the KV cache, generation, and texts from a folder."""

from .cache import KVCache
from .folder import ModelFolder
from .generate import generate, stream
from .graph import DecodeGraph
from .pool import DecodePool
from .prefix import PrefixCache
from .text import continue_texts, stream_texts

__all__ = [
    "DecodeGraph",
    "DecodePool",
    "KVCache",
    "ModelFolder",
    "PrefixCache",
    "continue_texts",
    "generate",
    "stream",
    "stream_texts",
]
