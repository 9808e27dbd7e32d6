"""The network over the Triton op (interpreted without a GPU): block capture, what checkpointing saves of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import s2.attention.op
from s2.model import ModelConfig, Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(s2.attention.op, "_default_backend", lambda q: "triton")
    torch._dynamo.reset()
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_layout="L1V2",
        block_size=16,
    )
    return Transformer(config).to(DEVICE)


def packed_loss(model):
    ids = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    borders = torch.tensor([0, 12, 32, 32], dtype=torch.int32, device=DEVICE)
    loss, count = model(ids, labels=ids.roll(-1, 1), cu_seqlens=borders)
    return loss / count


def gradients(model):
    loss = packed_loss(model)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def test_packed_sparse_blocks_are_captured_whole(model):
    loss, expected = gradients(model)
    model.set_activation_checkpointing("selective")
    model.compile_blocks(backend="aot_eager")
    compiled_loss, compiled = gradients(model)
    torch.testing.assert_close(compiled_loss, loss)
    for mine, other in zip(compiled, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("mode", "recomputed"), [("none", 0), ("selective", 0), ("full", 2)])
def test_selective_checkpointing_does_not_run_the_op_again(model, mode, recomputed):
    model.set_activation_checkpointing(mode)
    loss = packed_loss(model)
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Record():
        loss.backward()
    assert names.count("s2::attention_forward") == recomputed
    assert names.count("s2::attention_backward") == 2
