"""Running a trained model: the KV cache and text generation."""

from .cache import KVCache
from .generate import generate

__all__ = ["KVCache", "generate"]
