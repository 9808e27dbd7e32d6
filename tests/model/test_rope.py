"""RoPE frequencies, angles and rotation against transformers, for every scaling kind."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from s2.model.rope import RotaryEmbedding, apply_rotary, document_positions

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024},
    "yarn-options": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn-temperature": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotation_equals_transformers(kind, head_dim):
    theta = 5e5
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", **(SCALINGS[kind] or {}), "rope_theta": theta},
        )
    )
    positions = torch.tensor([[0, 1, 2, 77, 1023, 1024, 5000, 8191]])
    torch.manual_seed(0)
    q = torch.randn(1, 8, 4, head_dim)
    cos, sin = RotaryEmbedding(head_dim, theta, SCALINGS[kind])(positions)
    expected, _ = apply_rotary_pos_emb(q, q, *theirs(q, positions), unsqueeze_dim=2)
    # the angle itself is rounded: 8191 rad * 2**-24 per operation
    torch.testing.assert_close(apply_rotary(q, cos, sin), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(apply_rotary(q, cos, sin)[:, :4], expected[:, :4], atol=3e-5, rtol=0)


def test_frequencies_survive_a_bf16_default_dtype():
    positions = torch.arange(120_000, 120_064)[None]
    expected = RotaryEmbedding(64, 1e4, None)(positions)
    torch.set_default_dtype(torch.bfloat16)
    try:
        cos, sin = RotaryEmbedding(64, 1e4, None)(positions)
    finally:
        torch.set_default_dtype(torch.float32)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])


def test_rotation_depends_on_distance_only():
    torch.manual_seed(0)
    rope = RotaryEmbedding(64, 1e4, None)
    q, k = torch.randn(2, 1, 1, 1, 64)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        cos, sin = rope(torch.tensor([[query_at, key_at]]))
        return (apply_rotary(q, cos[:, :1], sin[:, :1]) * apply_rotary(k, cos[:, 1:], sin[:, 1:])).sum()

    torch.testing.assert_close(score(17, 5), score(1012, 1000), atol=1e-3, rtol=0)
    assert (score(17, 5) - score(17, 6)).abs() > 1e-2


def test_positions_restart_in_each_document_with_empty_documents_and_padding():
    borders = torch.tensor([0, 3, 3, 4, 9, 9, 9], dtype=torch.int32)
    assert document_positions(borders, 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    leading = torch.tensor([0, 0, 2], dtype=torch.int32)
    assert document_positions(leading, 2).tolist() == [0, 1]
