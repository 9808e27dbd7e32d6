"""The network: documents, losses, initialisation."""

import pytest
import torch
import torch.nn.functional as F

from s2.model import ModelConfig, Transformer

SPARSE = "L2V4+dense1"


def build(layout=SPARSE, **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "attention_layout": layout,
            "block_size": 16,
            "initializer_range": 0.1,
            **changes,
        }
    )
    return Transformer(config)


def tokens(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def borders(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "layout", ["dense", SPARSE, "L1V3-inter", "W2", "L1V2<3V4+sink1+dense2", "W2|L1V4-inter", "3*dense|3*L1V2<4"]
)  # fmt: skip
def test_packed_documents_equal_documents_alone(layout):
    model = build(layout)
    ids = tokens(2, 150)
    packed = model(ids, cu_seqlens=borders(0, 1, 90, 90, 150, 217, 300, 300)).flatten(0, 1)
    for begin, end in [(0, 1), (1, 90), (90, 150), (150, 217), (217, 300)]:
        alone = model(ids.flatten()[None, begin:end])[0]
        torch.testing.assert_close(packed[begin:end], alone, atol=1e-5, rtol=1e-4)


def test_window_layer_forgets_what_a_dense_layer_sees():
    window = build("W2", num_hidden_layers=1)
    dense = build("dense", num_hidden_layers=1)
    dense.load_state_dict(window.state_dict())
    ids = tokens(1, 128)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 61  # block 1: in the window of blocks 1 and 2 only
    for model, sees in [(window, slice(20, 48)), (dense, slice(20, 128))]:
        differs = (model(ids) - model(changed))[0].abs().amax(dim=-1) > 0
        expected = torch.zeros(128, dtype=torch.bool)
        expected[sees] = True
        assert torch.equal(differs, expected)


def test_no_token_sees_the_future():
    model = build()
    ids = tokens(1, 100)
    changed = ids.clone()
    changed[0, 60:] = (ids[0, 60:] + 1) % 61
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :60], after[:, :60], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 60:], after[:, 60:], atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_cross_entropy_of_the_logits(tied):
    model = build(tie_word_embeddings=tied)
    ids, labels = tokens(2, 80), tokens(2, 80).roll(1, 1)
    labels[0, :30] = -100
    cu_seqlens = borders(0, 30, 80, 160)
    loss, count = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    assert loss.dtype == torch.float32 and int(count) == 130
    ours = torch.autograd.grad(loss / count, list(model.parameters()))
    logits = model(ids, cu_seqlens=cu_seqlens)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    theirs = torch.autograd.grad(expected / count, list(model.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_all_labels_ignored_trains_nothing_and_gives_no_nan():
    model = build()
    ids = tokens(1, 40)
    loss, count = model(ids, labels=torch.full_like(ids, -100))
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())


def test_logits_to_keep_are_the_last_ones():
    model = build()
    ids = tokens(2, 50)
    torch.testing.assert_close(model(ids, logits_to_keep=3), model(ids)[:, -3:], atol=1e-6, rtol=1e-5)


def test_bf16_model_stays_close_to_fp32_and_keeps_exact_positions():
    model = build("dense", max_position_embeddings=4096)
    ids = tokens(1, 2000)
    exact = model(ids, logits_to_keep=200).detach()
    low = model.to(torch.bfloat16)(ids, logits_to_keep=200)
    assert low.dtype == torch.float32  # the head's products are not rounded
    assert (low.float() - exact).norm() / exact.norm() < 3e-2


def test_initial_weights_follow_the_config():
    model = build(num_hidden_layers=8, hidden_size=192, initializer_range=0.05)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert (layer.input_layernorm.weight == 1).all()


def test_meta_device_construction_and_reset_gives_the_same_kind_of_weights():
    with torch.device("meta"):
        model = build(tie_word_embeddings=True)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.reset_parameters()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(tokens(1, 20)).isfinite().all()


def test_layers_of_one_pattern_rotate_residues_and_share_them_where_they_repeat():
    rotations = [b.self_attn.rotation for b in build("L1V4+dense2", num_hidden_layers=6).model.blocks]
    assert rotations == [0, 1, 0, 0, 1, 0]  # stride 4 over 2 heads repeats after two sparse layers
    complete = build("L1V4", num_key_value_heads=6, num_hidden_layers=4)
    assert [b.self_attn.rotation for b in complete.model.blocks] == [0, 0, 0, 0]


# -------------------------------------------------------------------- errors


def test_wrong_calls_are_named():
    model = build(max_position_embeddings=64)
    with pytest.raises(ValueError, match="65 tokens is longer than max_position_embeddings=64"):
        model(tokens(1, 65))
    with pytest.raises(ValueError, match=r"labels \[1, 63\].*\[1, 64\]"):
        model(tokens(1, 64), labels=tokens(1, 63))
    with pytest.raises(ValueError, match="input_ids must be"):
        model(tokens(64))
    with pytest.raises(ValueError, match="logits_to_keep=-1"):
        model(tokens(1, 64), logits_to_keep=-1)
    with pytest.raises(ValueError, match="labels cannot be combined"):
        model(tokens(1, 8), labels=tokens(1, 8), logits_to_keep=1)
