"""FLOPs per token against a case worked out by hand and against what torch counts in the network."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from s2.model import ModelConfig, Transformer
from s2.model.flops import (
    attention_flops_per_token,
    flops_per_token,
    matmul_parameters,
    model_flops_utilization,
)


def config(**changes):
    return ModelConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "block_size": 16,
            **changes,
        }
    )


def test_hand_computed_case():
    # q and o 32x32, k and v 32x16, MLP 3 x 32x64; two layers; head 32x100
    parameters = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 100
    assert matmul_parameters(config()) == parameters == 21_632
    # 64 tokens have 64 * 65 / 2 = 2080 causal pairs; 4 heads of width 8, 12 FLOPs a pair and dimension
    dense = 2 * 12 * 4 * 8 * 2080 / 64
    assert flops_per_token(config(), 64, executed=False) == 6 * parameters + dense
    # a window of 2 blocks over 4: 4 diagonal blocks of 136 pairs and 3 full ones of 256
    window = config(attention_layout="W2+dense1")
    sparse = 12 * 4 * 8 * (4 * 136 + 3 * 256 + 2080) / 64
    assert flops_per_token(window, 64, executed=True) == pytest.approx(6 * parameters + sparse)
    assert flops_per_token(window, 64, executed=False) == 6 * parameters + dense


@pytest.mark.parametrize("tied", [False, True])
def test_matrix_products_with_weights_are_what_torch_counts(tied):
    built = Transformer(config(tie_word_embeddings=tied))
    ids = torch.zeros(1, 48, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        loss, _ = built(ids, labels=ids)
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert matmuls == 48 * 6 * matmul_parameters(built.config)


def test_dense_layout_executes_all_and_sparse_less():
    assert flops_per_token(config(), 500, executed=True) == flops_per_token(config(), 500, executed=False)
    sparse = config(attention_layout="L1V4+dense0")
    ratio = attention_flops_per_token(sparse, 4096, executed=True) / attention_flops_per_token(
        sparse, 4096, executed=False
    )
    assert ratio == pytest.approx(sparse.layout.density(4096, 2))
    assert 0.6 < ratio < 0.65  # one layer whole, one at about a quarter


def test_utilization_is_achieved_over_peak():
    per_token = flops_per_token(config(), 64, executed=False)
    assert model_flops_utilization(config(), 64, 1000, per_token * 4000, executed=False) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="peak_flops=0"):
        model_flops_utilization(config(), 64, 1000, 0, executed=False)
    with pytest.raises(ValueError, match="seq_len=0"):
        flops_per_token(config(), 0, executed=False)
