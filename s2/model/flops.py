"""Floating-point operations of training, per token.

Both figures count the useful work of one forward and one backward (twice the forward); recomputation under
activation checkpointing and inside attention kernels is not counted. With S the sequence length, Hq and D
query heads and head dimension, N the parameters that take part in matrix products
(projections, MLP and language-model head; not norms, biases and the embedding lookup):

    per token = 6 N + 12 * Hq * D * sum over layers of (pairs of the layer / S)

A query-key pair costs 4 * D a head forward (QK^T and PV, a multiply and an add each) and 8 * D backward. The
pairs of a layer, averaged over heads:

    dense-equivalent   S (S + 1) / 2 in every layer: what the same model with dense causal attention needs.
                       The causal half only, as FlashAttention counts; the formula of PaLM and torchtitan
                       (12 L Hq D S) counts the masked half as well.
    executed           density(pattern) * S (S + 1) / 2: what the layer's pattern lets a query see.

One document of S tokens is assumed. Rows packed with shorter documents need less attention than either
figure.
"""

from __future__ import annotations

from .config import ModelConfig

_FORWARD_AND_BACKWARD = 3  # the backward is two matrix products for each one of the forward


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that multiply activations: projections, MLP and language-model head."""
    return config.num_hidden_layers * config.layer_matrices + config.vocab_size * config.hidden_size


def attention_flops_per_token(config: ModelConfig, seq_len: int, *, executed: bool) -> float:
    """FLOPs of all layers' attention (scores, weighted values), forward and backward, for each token."""
    if not isinstance(seq_len, int) or seq_len < 1:
        raise ValueError(f"seq_len={seq_len!r} must be a positive whole number")
    layers = float(config.num_hidden_layers)
    if executed:
        layers *= config.layout.density(seq_len, config.num_key_value_heads)
    pairs_per_token = layers * (seq_len + 1) / 2
    return _FORWARD_AND_BACKWARD * 4 * config.num_attention_heads * config.head_dim * pairs_per_token


def flops_per_token(config: ModelConfig, seq_len: int, *, executed: bool) -> float:
    """Training FLOPs for each token of a sequence of `seq_len`: matrix products with weights, plus attention.

    Args:
        config: the model.
        seq_len: tokens of a sequence (one document).
        executed: count the pairs that the patterns let queries see; False counts dense causal attention.

    Raises:
        ValueError: seq_len below 1.
    """
    weights = _FORWARD_AND_BACKWARD * 2 * matmul_parameters(config)
    return weights + attention_flops_per_token(config, seq_len, executed=executed)


def full_square_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """As `flops_per_token`, every layer dense and with the masked half counted: 6 N + 12 L Hq D S."""
    causal = attention_flops_per_token(config, seq_len, executed=False)
    return flops_per_token(config, seq_len, executed=False) + causal * (2 * seq_len / (seq_len + 1) - 1)


def model_flops_utilization(
    config: ModelConfig, seq_len: int, tokens_per_second: float, peak_flops: float, *, executed: bool
) -> float:
    """MFU, 0..1: achieved over peak FLOP/s of one device.

    Args:
        tokens_per_second: of one device.
        peak_flops: of one device in FLOP/s, for the training dtype, without structured sparsity.
        executed: as in `flops_per_token`. Dense-equivalent MFU may exceed 1 on a sparse model.
    """
    if peak_flops <= 0:
        raise ValueError(f"peak_flops={peak_flops!r} must be positive")
    return flops_per_token(config, seq_len, executed=executed) * tokens_per_second / peak_flops
