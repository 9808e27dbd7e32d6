"""Thousands of decoded tokens on a GPU have the logits of whole passes, and a cache takes the memory that is said."""

from pathlib import Path

import pytest
import torch

from s2.inference import DecodeGraph, KVCache
from s2.inference.graph import eager_step, obstacle
from s2.model import ModelConfig, Transformer
from s2.recipe import load_recipe

pytestmark = pytest.mark.gpu

NEW = 4096
PIECE = 256  # tokens whose errors are compared at a time
LONGEST = 1 << 17
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("layout", "block", "heads", "kv_heads", "head_dim"),
    [
        ("dense", 64, 8, 2, 64),
        ("W4", 64, 4, 4, 128),
        ("W3+sink2", 32, 8, 1, 64),
        ("L8V16+sink1", 64, 8, 4, 128),
        ("L8V16+sink1+dense1", 64, 16, 16, 64),
        ("L1V15", 64, 8, 8, 64),
        ("L4V24", 64, 16, 8, 128),
        ("L2V4-inter", 128, 8, 2, 64),
        ("L4V3", 16, 9, 3, 64),
        ("L1V2", 256, 8, 2, 64),
        ("L1V2<4V8", 64, 8, 4, 64),
        ("L2V4<20+sink1", 64, 8, 4, 128),
        ("L4V4<16V12", 32, 8, 2, 64),
        ("dense|W2", 64, 8, 2, 64),
        ("2*L2V8|W3+sink1|L1V4", 64, 8, 4, 64),
        ("L1V3|L1V3|W2|W2", 64, 4, 2, 64),  # rules of query heads: all is kept
    ],
)
@torch.inference_mode()
def test_4k_decoded_tokens_have_the_logits_of_a_whole_pass(layout, block, heads, kv_heads, head_dim):
    config = ModelConfig(
        vocab_size=128, hidden_size=heads * head_dim, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=8192,
        attention_layout=layout, block_size=block, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).to("cuda", torch.bfloat16).eval()
    lengths = [block - 1, block, block + 1, 5 * block + 7]  # prompts around borders
    rows = [torch.randint(128, (length + NEW,), device="cuda") for length in lengths]
    prompts = torch.nn.utils.rnn.pad_sequence(
        [row[:length] for row, length in zip(rows, lengths, strict=True)], batch_first=True
    )
    new = torch.stack([row[length:] for row, length in zip(rows, lengths, strict=True)])
    cache = KVCache(config, len(rows), max(lengths) + NEW, device="cuda", dtype=torch.bfloat16)
    model(prompts, cache=cache, lengths=lengths)
    step = eager_step(model, cache) if obstacle(new.device, cache) else DecodeGraph(model, cache)
    logits = torch.cat([step(tokens).clone() for tokens in new.split(1, dim=1)], dim=1)
    assert cache.lengths == tuple(length + NEW for length in lengths)
    whole = [model(row[None])[0, -NEW:] for row in rows]
    model.float()
    for row, ours, expected in zip(rows, logits, whole, strict=True):
        exact = model(row[None])[0, -NEW:]
        for piece in range(0, NEW, PIECE):
            here = slice(piece, piece + PIECE)
            error, usual = (ours[here] - exact[here]).norm(), (expected[here] - exact[here]).norm()
            assert error < 1.5 * usual + 1e-3 * exact[here].norm(), f"tokens {piece} on of a prompt of {len(row) - NEW}"


@pytest.mark.parametrize(
    ("recipe", "layout", "sparse", "sinks", "local", "stride"),
    [
        ("1.3b/pretrain.yaml", "L1V15", 24, 0, 1, 15),
        ("1.3b/pretrain.yaml", "L8V16+sink1+dense8,16", 22, 1, 8, 16),
        ("7b/pretrain.yaml", "L8V32+sink1+dense5,10,15,20,25", 27, 1, 8, 32),
        ("7b/pretrain.yaml", "L4V24", 32, 0, 4, 24),
        ("7b/pretrain.yaml", "L4V24+dense10-22", 19, 0, 4, 24),
    ],
)
def test_a_cache_of_128k_tokens_takes_of_the_allocator_what_its_layout_keeps(
    recipe, layout, sparse, sinks, local, stride
):
    said = load_recipe(RECIPES / recipe)["model"]["config"]
    config = ModelConfig.from_dict(said | {"max_position_embeddings": LONGEST, "attention_layout": layout})
    tokens = sparse * ((sinks + local) * config.block_size + LONGEST / stride)
    tokens += (config.num_hidden_layers - sparse) * LONGEST
    expected = tokens * config.num_key_value_heads * config.head_dim * 2 * torch.bfloat16.itemsize
    if torch.cuda.mem_get_info()[0] < 1.1 * expected:
        pytest.skip(f"needs {expected / 2**30:.0f} GiB")
    begun = torch.cuda.memory_allocated()
    cache = KVCache(config, 1, LONGEST, device="cuda", dtype=torch.bfloat16)
    taken = torch.cuda.memory_allocated() - begun
    print(f"{recipe} {layout}: {taken / 2**30:.2f} GiB, {expected / 2**30:.2f} by its layout")
    assert taken == pytest.approx(cache.num_bytes, rel=0.01)
    assert taken == pytest.approx(expected, rel=0.03)
