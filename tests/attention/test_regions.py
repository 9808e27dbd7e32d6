"""What heads keep is what queries see, each key once, and nothing is overwritten that is seen later."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2.attention import Pattern, s2_attention
from s2.attention.decode_sdpa import masked_decode
from s2.attention.grammar import UNBOUNDED
from s2.attention.regions import Region, held_blocks, lay_out, regions_of, slots_of
from tests.attention.test_pattern import rule_patterns

BLOCK = 16


@st.composite
def layers(draw):
    """Pattern, KV heads, rotation, blocks of the longest sequence and spare blocks."""
    if draw(st.booleans()):
        pattern, heads = draw(rule_patterns(BLOCK)), draw(st.integers(1, 5))
    else:
        runs = draw(st.lists(st.tuples(rule_patterns(BLOCK), st.integers(1, 3)), min_size=1, max_size=3))
        pattern = Pattern.per_head([pattern for pattern, count in runs for _ in range(count)])
        heads = len(pattern.heads) or 2
    return pattern, heads, draw(st.integers(0, 9)), draw(st.integers(1, 150)), draw(st.integers(1, 4))


def sees(group, newest, query, num_blocks):
    """How often a query in block `query` finds each key block, `[H, num_blocks]`, when `newest` was the last to be
    begun; what it reads `[H, n]`, and of which key blocks it is (-1: not read)."""
    lengths = torch.tensor([newest * BLOCK + 1], dtype=torch.int32)
    (held,), near, far = held_blocks(group.table, lengths, group.num_blocks, BLOCK)
    read = torch.where((near <= query - held) & (query - held < far), held, -1).long()
    times = torch.zeros(len(read), num_blocks + 1, dtype=torch.long).scatter_add_(1, read + 1, torch.ones_like(read))
    return times[:, 1:], read


@settings(max_examples=40, deadline=None)
@given(layers())
def test_each_query_finds_each_key_that_it_sees_once_and_not_overwritten(layer):
    pattern, heads, rotation, num_blocks, spare = layer
    groups = lay_out(pattern, heads, rotation, num_blocks, spare)
    assert [head for group in groups for head in range(group.begin, group.end)] == list(range(heads))
    mask = pattern.block_mask(num_blocks, heads, layer=rotation)
    for group in groups:
        wanted = mask[group.begin : group.end].long()
        stands = torch.full((len(wanted), group.num_blocks), -1)
        for newest in range(num_blocks):
            slots = slots_of(group.table, torch.tensor([[newest * BLOCK + 5]]), BLOCK)[0, :, :, 0]
            assert (slots % BLOCK == 5).all() and (slots // BLOCK < group.num_blocks).all()
            stands.scatter_(1, slots // BLOCK, newest)
            if num_blocks > 30 and newest % 6 and newest + 1 < num_blocks:
                continue
            oldest = group.oldest_block(newest)
            assert oldest <= max(0, newest - spare)
            for query in {newest, max(0, newest - spare), oldest}:
                times, read = sees(group, query, query, num_blocks)
                assert torch.equal(times, wanted[:, query])
                assert (read == stands)[read >= 0].all(), "overwritten"
            for query in range(max(0, newest - spare), newest):  # in one call with tokens of later blocks
                assert torch.equal(sees(group, newest, query, num_blocks)[0], wanted[:, query])
            if oldest:
                _, read = sees(group, oldest - 1, oldest - 1, num_blocks)
                assert (read != stands)[read >= 0].any(), "a shorter length would do"


def test_a_sparse_layer_keeps_sinks_window_and_its_share_of_the_strides():
    for spec, blocks in (("L8V16", 8 + 128), ("L8V16+sink1", 1 + 8 + 128), ("W16", 16), ("L4V24", 4 + 2048 / 24)):
        (group,) = lay_out(Pattern.parse(spec, 64), 8, 3, (1 << 17) // 64)
        assert blocks <= group.num_blocks <= max(1.03 * blocks, blocks + 1), spec
    (group,) = lay_out(Pattern.parse("L8V4<64V16", 64), 16, 0, 2048)
    assert group.num_blocks == 8 + 1 + (64 + 4) // 4 + (2048 - 64) // 16  # 1: the spare block, in the ring of 64 too


def test_blocks_that_no_query_is_far_enough_to_see_are_not_kept():
    (group,) = lay_out(Pattern.parse("L8V2", 64), 2, 0, 8)
    assert group.num_blocks == 8 and [len(regions) for regions in group.regions] == [1, 1]


def test_heads_of_one_rule_stand_together_and_masks_and_rules_of_query_heads_keep_everything():
    groups = lay_out(Pattern.parse("2*dense|3*L2V4|W2", 64), 6, 0, 100)
    assert [(group.begin, group.end) for group in groups] == [(0, 2), (2, 5), (5, 6)]
    assert [group.num_blocks for group in groups] == [100, 2 + 1 + 25, 3]
    assert [group.is_in_order for group in groups] == [True, False, False]
    mask = Pattern.from_mask(torch.ones(2, 9, 9, dtype=torch.bool))
    for pattern, heads in ((Pattern.parse("2*dense|2*L2V4", 64), 2), (mask, 2)):
        (group,) = lay_out(pattern, heads, 0, 9)
        assert group.is_whole and group.is_in_order and group.num_blocks == 9
    assert not lay_out(Pattern.parse("dense", 64), 2, 0, 9)[0].is_whole


def test_columns_of_a_table_are_as_the_kernel_reads_them():
    assert Region._fields == ("begin", "capacity", "stride", "residue", "first", "last", "near", "far")
    (group,) = lay_out(Pattern.parse("L2V4+sink1", 16), 2, 1, 40)
    assert group.table.dtype == torch.int32
    assert group.table[1].tolist() == [
        [0, 1, 1, 0, 0, 1, 0, UNBOUNDED], [16, 3, 1, 0, 1, UNBOUNDED, 0, 2], [64, 9, 4, 3, 1, 38, 2, UNBOUNDED],
    ]  # fmt: skip
    assert len(regions_of(Pattern.parse("dense").rules(1)[0])) == 1


@pytest.mark.parametrize("length", [1, 15, 16, 17, 160, 161])
def test_unused_rows_of_a_table_hold_nothing(length):
    (group,) = lay_out(Pattern.parse("W3", 16), 1, 0, 20)
    table = torch.cat([group.table, torch.zeros(1, 1, 8, dtype=torch.int32)], dim=1)
    lengths = torch.tensor([length], dtype=torch.int32)
    for a, b in zip(held_blocks(table, lengths, 4, 16), held_blocks(group.table, lengths, 4, 16), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=25, deadline=None)
@given(layers(), st.integers(1, 8), st.integers(1, 3), st.integers(0, 1 << 20))
def test_a_decode_step_is_attention_over_the_whole_context(layer, tokens, group_size, seed):
    pattern, heads, rotation, num_blocks, _ = layer
    num_blocks = min(num_blocks, 40)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(min(tokens, BLOCK), num_blocks * BLOCK + 1, (2,), generator=generator).tolist()
    for group in lay_out(pattern, heads, rotation, num_blocks):
        members = slice(group.begin, group.end)
        size = group.end - group.begin
        held = torch.full((2, 2, size, group.num_blocks * BLOCK, 8), 1e4)  # keys and values; what is not seen is large
        queries, wanted = [], []
        for row, length in enumerate(lengths):
            kv = torch.randn(2, 1, length, heads, 8, generator=generator)
            q = torch.randn(1, length, heads * group_size, 8, generator=generator)
            out = s2_attention(q, *kv, pattern, rotation=rotation, backend="reference").unflatten(2, (heads, -1))
            wanted.append(out[0, -tokens:, members].flatten(1, 2))
            queries.append(q.unflatten(2, (heads, -1))[0, -tokens:, members].flatten(1, 2))
            for begin in range(0, length, 5):  # as they come
                position = torch.arange(begin, min(begin + 5, length))
                slots = slots_of(group.table, position[None], BLOCK)[0]  # [H, R, S]
                for head in range(size):
                    new = kv[:, 0, position, group.begin + head]
                    held[:, row, head, slots[head]] = new[:, None].expand(-1, slots.shape[1], -1, -1)
        inputs = torch.stack(queries), *held, group.table, torch.tensor(lengths, dtype=torch.int32)
        out = masked_decode(*inputs, block=BLOCK, scale=8**-0.5)
        torch.testing.assert_close(out, torch.stack(wanted), atol=2e-6, rtol=1e-4)
