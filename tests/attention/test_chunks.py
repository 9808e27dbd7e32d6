"""A chunk sees of the sequence that its frame makes what it sees of the whole context."""

from __future__ import annotations

import random

import pytest

from s2.attention import Pattern
from s2.attention.chunks import frame_of
from s2.attention.regions import lay_out

SPECS = [
    "L2V3", "L1V15", "L8V16+sink1", "L2V2+sink3", "L3V4+sink5", "W3", "W2+sink2", "L2V3<7V9", "L2V2<5V4<9+sink1",
    "L2V3<7V9<20+sink1", "L1V2<4V6+sink7", "L3V5<9", "L2V3|L2V3+sink2|W4|L1V4", "2*L2V4+sink1|L1V6+sink2|dense",
]  # fmt: skip


def seen_of(pattern, heads, rotation, head, query):
    rule = pattern.rules(heads, layer=rotation)[head]
    return [b for b in range(query + 1) if rule.mask(query + 1)[query, b]]


@pytest.mark.parametrize("spec", SPECS)
def test_a_chunk_sees_of_its_frame_what_it_sees_of_the_context(spec, seed):
    rng = random.Random(f"{seed} {spec}")
    pattern, size = Pattern.parse(spec, 16), 16
    for _ in range(5):
        heads, rotation, chunk = len(pattern.heads) or rng.randint(1, 4), rng.randint(0, 3), rng.randint(1, 5)
        length = rng.randint(1, rng.choice([4, 40, 120]) * size)
        begin, end = length // size, length // size + chunk
        for group in lay_out(pattern, heads, rotation, end, rng.randint(1, 3)):
            if group.is_in_order:
                continue
            frame = frame_of(pattern, heads, rotation, group, length)
            lead = len(frame.blocks[0]) - (begin if length % size == 0 else begin + 1)  # what blocks are moved by
            for own, (blocks, slots) in enumerate(zip(frame.blocks.tolist(), frame.slots.tolist(), strict=True)):
                head = group.begin + own
                for query in range(begin, end):
                    place = [*blocks[: begin + lead], *range(begin, query + 1)]
                    found = [place[b] for b in seen_of(frame.pattern, heads, rotation, head, query + lead)]
                    assert sorted(found) == seen_of(pattern, heads, rotation, head, query), (head, query, frame)
                for block, slot in zip(blocks, slots, strict=True):
                    regions = [r for r in group.regions[own] if r.holds(block)]
                    assert block < 0 or slot in [r.begin // size + r.place(block) for r in regions]


def test_a_frame_leaves_out_what_no_query_sees():
    """Of 2,048 blocks a head keeps every 16th, its window and at most two periods between."""
    (group,) = lay_out(Pattern.parse("L8V16+sink1"), 16, 0, 2048)
    frame = frame_of(Pattern.parse("L8V16+sink1"), 16, 0, group, 2000 * 64)
    assert 2000 // 16 <= len(frame.blocks[0]) <= 2000 // 16 + 8 + 1 + 2 * 16
    assert (frame.blocks == -1).sum(1).max() <= 2 * 16
    (group,) = lay_out(Pattern.parse("W8+sink1"), 16, 0, 2048)
    assert frame_of(Pattern.parse("W8+sink1"), 16, 0, group, 2000 * 64).blocks.shape == (16, 8)
