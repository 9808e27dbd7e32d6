"""The cache on a GPU: logits as of whole passes, and no step that waits for the device."""

import pytest
import torch

from s2.inference import KVCache, generate
from s2.model import ModelConfig, Transformer

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["dense", "L2V4+sink1-inter", "L1V2<4V4", "dense|W2"])
def model(request):
    config = ModelConfig(
        vocab_size=128, hidden_size=512, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, attention_layout=request.param,
        block_size=64, initializer_range=0.05,
    )  # fmt: skip
    return Transformer(config).to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("pieces", [[1000] + [1] * 100, [300, 1, 500, 8, 3, 200]], ids=["decode", "chunks"])
def test_cached_forward_equals_full_forward(model, pieces):
    ids = torch.randint(128, (2, sum(pieces)), device="cuda")
    cache = KVCache(model.config, 2, ids.shape[1], device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
        expected = model(ids)
        exact = model.float()(ids)
    assert (logits - exact).norm() < 2 * (expected - exact).norm() + 1e-3 * exact.norm()


def test_a_decode_step_does_not_wait_for_the_device(model):
    ids = torch.randint(128, (3, 400), device="cuda")
    cache = KVCache(model.config, 3, 420, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        model(ids, cache=cache, lengths=[400, 7, 129])
        model(ids[:, :1], cache=cache)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(ids[:, :1], cache=cache, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_rows_of_several_lengths_are_generated(model):
    prompts = [torch.randint(128, (length,), device="cuda") for length in (700, 64, 333)]
    new = generate(model, prompts, 20, prefill_chunk=256)
    assert new.shape == (3, 20) and new.is_cuda
