"""A chunk sees of the sequence that its frame makes what it sees of the whole context."""

from __future__ import annotations

import random

import pytest
import torch

from s2.attention import Pattern
from s2.attention.chunks import frame_of
from s2.attention.regions import lay_out

SPECS = [
    "L2V3", "L1V15", "L8V16+sink1", "L2V2+sink3", "L3V4+sink5", "W3", "W2+sink2", "L2V3<7V9", "L2V2<5V4<9+sink1",
    "L2V3<7V9<20+sink1", "L1V2<4V6+sink7", "L3V5<9", "L2V3|L2V3+sink2|W4|L1V4", "2*L2V4+sink1|L1V6+sink2|dense",
    "L1V8<60+sink3", "L1V4<60V8+sink1", "L2V2<20V4<60V8+sink2", "L3V4<70V6<90", "2*L1V2<40|L1V2<40+sink1|L1V3<33",
]  # fmt: skip


def masks_of(pattern, heads, rotation, num_blocks):
    return [rule.mask(num_blocks) for rule in pattern.rules(heads, layer=rotation)]


@pytest.mark.parametrize("spec", SPECS)
def test_a_chunk_sees_of_its_frame_what_it_sees_of_the_context(spec, seed):
    rng = random.Random(f"{seed} {spec}")
    pattern, size = Pattern.parse(spec, 16), 16
    for _ in range(20):
        heads, rotation = len(pattern.heads) or rng.randint(1, 4), rng.randint(0, 3)
        length, tokens = rng.randint(1, rng.choice([4, 40, 120]) * size), rng.randint(1, rng.choice([2, 20]) * size)
        begin, end = length // size, -(-(length + tokens) // size)
        seen = masks_of(pattern, heads, rotation, end)
        for group in lay_out(pattern, heads, rotation, end, rng.randint(1, 3)):
            if group.is_in_order:
                continue
            frame = frame_of(pattern, heads, rotation, group, length, tokens)
            lead = len(frame.blocks[0]) - (begin if length % size == 0 else begin + 1)  # what blocks are moved by
            found = masks_of(frame.pattern, heads, rotation, end + lead)
            for own, (blocks, slots) in enumerate(zip(frame.blocks.tolist(), frame.slots.tolist(), strict=True)):
                head, place = group.begin + own, torch.tensor([*blocks[: begin + lead], *range(begin, end)])
                for query in range(begin, end):
                    by_frame, wanted = place[found[head][query + lead]], seen[head][query].nonzero().flatten()
                    assert torch.equal(by_frame.sort().values, wanted), (head, query, frame)
                for block, slot in zip(blocks, slots, strict=True):
                    regions = [r for r in group.regions[own] if r.holds(block)]
                    assert block < 0 or slot in [r.begin // size + r.place(block) for r in regions]


def frames(spec, lengths, chunk):
    (group,) = lay_out(Pattern.parse(spec), 16, 0, 2048)
    for length in lengths:
        yield frame_of(Pattern.parse(spec), 16, 0, group, length * 64, chunk * 64)


def test_a_frame_leaves_out_what_no_query_sees():
    """Of 2,048 blocks a head keeps every 16th, its window and at most two periods between."""
    (frame,) = frames("L8V16+sink1", [2000], 16)
    assert 2000 // 16 <= len(frame.blocks[0]) <= 2000 // 16 + 8 + 1 + 2 * 16
    assert (frame.blocks == -1).sum(1).max() <= 2 * 16
    (frame,) = frames("W8+sink1", [2000], 16)
    assert frame.blocks.shape == (16, 8)


@pytest.mark.parametrize(("spec", "period", "ends"), [("L8V16<1024", 16, 1), ("L8V4<512V16+sink1", 16, 1),
                                                      ("L4V2<128V8<1024", 8, 2), ("L8V64<1500", 64, 1)])  # fmt: skip
def test_a_level_that_ends_far_away_has_holes_only_where_it_ends(spec, period, ends):
    """As many as the chunk has blocks, and a few periods."""
    lengths = [*range(32, 1024, 32), 1500, *range(1536, 2000, 32)]
    if spec == "L8V4<512V16+sink1":  # while the context reaches the end, what is taken out is a multiple of 4 periods
        lengths.remove(512)
    for length, frame in zip(lengths, frames(spec, lengths, 32), strict=True):
        assert (frame.blocks == -1).sum(1).max() <= ends * (32 + 2 * period), length
