"""How much less the recipes' layouts keep at 128k tokens than dense models do."""

from pathlib import Path

import pytest
import torch

from s2.inference import KVCache
from s2.model import ModelConfig
from s2.model.layouts import kv_bytes_per_token
from s2.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
LONGEST = 1 << 17
# of the checkpoints that recipes start from, which are not in the repository
LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
SMOLLM2 = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}


def config_of(recipe, sizes, layout=None):
    """Of a recipe, with its layout or another one."""
    said = load_recipe(RECIPES / recipe)["model"]["config"]
    values = {"vocab_size": 64, "intermediate_size": 64, **sizes, **said, "max_position_embeddings": LONGEST}
    return ModelConfig.from_dict(values | ({"attention_layout": layout} if layout else {}))


def bytes_at_128k(config):
    return KVCache.bytes_for(config, 1, LONGEST, torch.bfloat16)


@pytest.mark.parametrize(
    ("recipe", "sizes", "layout", "less"),
    [
        ("1.3b/pretrain.yaml", {}, None, 6.87),  # 2 of 24 layers dense
        ("7b/pretrain.yaml", {}, None, 5.37),  # 5 of 32
        ("llama3.1-8b/extend-8k.yaml", LLAMA, None, 4.13),  # 6 of 32
        ("smollm2/extend-8k.yaml", SMOLLM2, None, 4.17),  # 5 of 30
        ("demo/pretrain.yaml", {}, None, 1.6),  # 2 of 4, with few tokens between
        ("7b/pretrain.yaml", {}, "L8V32+sink1", 27.7),
        ("7b/pretrain.yaml", {}, "L4V24+dense10-22", 2.31),
        ("7b/pretrain.yaml", {}, "L4V24", 22.5),
        ("llama3.1-8b/extend-8k.yaml", LLAMA, "L8V16+sink1", 14.9),
        ("1.3b/pretrain.yaml", {}, "L1V15", 14.7),
    ],
)
def test_what_a_cache_keeps_of_128k_tokens(recipe, sizes, layout, less):
    config = config_of(recipe, sizes, layout)
    dense, kept = (bytes_at_128k(each) for each in (config.replace(attention_layout="dense"), config))
    sizes = f"{dense / 2**30:6.2f} GiB {kept / 2**30:6.2f} GiB"
    print(f"{recipe:28} {config.attention_layout:24} {sizes} {dense / kept:5.2f}")
    assert dense / kept == pytest.approx(less, rel=0.01)
    assert kept == pytest.approx(kv_bytes_per_token(config, LONGEST) * LONGEST, rel=0.03)


@pytest.mark.parametrize(
    ("recipe", "sizes", "less"),
    [("1.3b/pretrain.yaml", {}, 7.06), ("7b/pretrain.yaml", {}, 5.45), ("llama3.1-8b/extend-8k.yaml", LLAMA, 4.18)],
)
def test_a_million_tokens_with_a_mark_take_the_shrunk_cache_and_little_more(recipe, sizes, less):
    """What a sweep of needles in a shared haystack of 1M tokens holds beside the weights."""
    config = config_of(recipe, sizes).replace(max_position_embeddings=1 << 20)
    whole = KVCache(config, 1, 1 << 20, device="meta", dtype=torch.bfloat16, keep_all=True).num_bytes
    cache = KVCache(config, 1, 1 << 20, device="meta", dtype=torch.bfloat16)
    cache.mark()
    marked = cache.marked_bytes
    print(f"{recipe:28} {whole / 2**30:6.2f} GiB {cache.num_bytes / 2**30:6.2f} GiB, mark {marked / 2**20:.1f} MiB")
    assert whole / cache.num_bytes == pytest.approx(less, rel=0.01)
    assert 0 < marked < 0.004 * cache.num_bytes
