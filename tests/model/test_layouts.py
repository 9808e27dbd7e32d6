"""What a layout keeps and how it is said."""

import pytest

from s2.model.config import ModelConfig
from s2.model.layouts import kv_bytes_per_token, layout_table, ranges


def config(layout, layers=4, heads=8, kv_heads=4):
    return ModelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        attention_layout=layout,
        block_size=16,
    )


@pytest.mark.parametrize(
    "layout,blocks",  # that a KV head keeps of 128, summed over 4 layers of 4 KV heads
    [
        ("dense", 4 * 4 * 128),
        ("W8", 4 * 4 * 8),
        ("W8+sink2", 4 * 4 * (8 + 2)),
        ("L8V4", 4 * 4 * (8 + 120 // 4)),
        ("L8V4+sink1", 4 * (4 * (8 + 120 // 4) + 3)),  # the sink is the strided block of one head of four
        ("L8V4+dense0", 4 * 128 + 3 * 4 * (8 + 120 // 4)),
        ("2*dense|2*W8", 4 * (2 * 128 + 2 * 8)),
        ("4*dense|4*W8", 4 * (2 * 128 + 2 * 8)),  # a rule a query head: two share a KV head
    ],
)
def test_a_cache_keeps_what_the_next_token_sees(layout, blocks):
    assert kv_bytes_per_token(config(layout), 128 * 16) == blocks / 128 * 2 * 32 * 2


def test_layers_of_one_kind_stand_in_one_line():
    table = layout_table(config("L2V8-inter"), 1024)
    assert table.splitlines()[-1].split()[:2] == ["all", "L2V8-inter"] and "never" not in table
    assert "all of it over 2 layers" in table and "1,3" in table
    assert ranges((0, 1, 2, 5)) == "0-2,5"
