"""The hybrid (sparse and dense layers) Llama: configuration, network, loss, FLOPs, memory, checkpoints."""

from .config import ModelConfig
from .transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]
