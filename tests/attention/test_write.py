"""Writing new keys and values into slots: plain torch and the kernel (in the interpreter on a CPU) against a loop over
tokens, to the bit."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2.attention import Pattern
from s2.attention.kernels.triton.write import run_write_slots
from s2.attention.regions import lay_out
from s2.attention.store import LayerStore, Step
from tests.attention.test_pattern import rule_patterns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNHURRIED = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}


def write_by_loop(store, new, group, before, after, block):
    """What stands in `[B, H, C, D]` after tokens `[B, S, H, D]` have come, sequence by sequence."""
    for row, (begin, end) in enumerate(zip(before, after, strict=True)):
        for head, regions in enumerate(group.regions):
            for region in regions:
                lost = region.overwritten((end - 1) // block)
                for position in range(begin, end):
                    key = position // block
                    if region.holds(key) and (lost is None or key > lost):
                        slot = region.begin + region.place(key) * block + position % block
                        store[row, head, slot] = new[row, position - begin, head]


def write_both_ways(part, step, k, v):
    """`write` of a group's slots by the kernel and by plain torch, which give the same."""
    copies = part.k.clone(), part.v.clone()
    run_write_slots(*copies, k, v, part.group, part.table, step.before, step.after, part.block_size)
    part.write_by_torch(step, k, v)
    assert torch.equal(copies[0], part.k) and torch.equal(copies[1], part.v)


def step_of(before, after, num_tokens):
    lengths = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (before, after)]
    counts = [end - begin for begin, end in zip(before, after, strict=True)]
    positions = lengths[0][:, None] + torch.arange(num_tokens, device=DEVICE)
    return Step(num_tokens, list(before), counts, *lengths, positions)


def part_of(group, values, block):
    """Slots of a group in values `[2, B, H, C, D]`."""
    groups = [(group, group.table.to(values.device))]
    (part,) = LayerStore(Pattern(block), 0, groups, values.flatten(), values.shape[1], values.shape[-1]).parts
    return part


def assert_writes(group, calls, block, *, head_dim=8, dtype=torch.float32, seed=0):
    """Of `calls`, `(before, after)` of each sequence, all written both ways. Padding is NaN, which goes nowhere."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, slots = len(calls[0][0]), len(group.regions), group.num_blocks * block
    wanted = torch.randn(2, batch, heads, slots, head_dim, generator=generator).to(dtype)
    part = part_of(group, wanted.to(DEVICE, copy=True), block)
    for before, after in calls:
        counts = [end - begin for begin, end in zip(before, after, strict=True)]
        # keys and values of a part of a layer's heads, side by side
        new = torch.randn(batch, max(counts), 2, heads + 1, head_dim, generator=generator).to(dtype)[:, :, :, 1:]
        for row, count in enumerate(counts):
            new[row, count:] = torch.nan
        for store, side in zip(wanted, new.unbind(2), strict=True):
            write_by_loop(store, side, group, before, after, block)
        write_both_ways(part, step_of(before, after, max(counts)), *new.to(DEVICE).unbind(2))
        assert torch.equal(torch.stack([part.k, part.v]).cpu(), wanted)


@st.composite
def cases(draw):
    block = draw(st.sampled_from([16, 16, 32, 64]))
    num_blocks, batch, heads = draw(st.integers(1, 14)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pattern = draw(st.one_of(st.just(Pattern.parse("dense", block)), rule_patterns(block), rule_patterns(block)))
    groups = lay_out(pattern, heads, draw(st.integers(0, 5)), num_blocks, draw(st.integers(1, 2)))
    room = num_blocks * block
    held, calls = [0] * batch, []
    for _ in range(draw(st.integers(1, 4))):
        before = [draw(st.sampled_from([length, length, length // 2])) for length in held]  # of some less, as truncated
        most = draw(st.sampled_from([1, 8, block + 1, room, room]))
        held = [begin + draw(st.integers(0, min(most, room - begin))) for begin in before]
        if held != before:
            calls.append((before, held))
    return groups, calls or [([0] * batch, [1] * batch)], block


@settings(max_examples=12, **UNHURRIED)
@given(cases(), st.sampled_from([torch.float32, torch.float16]), st.integers(0, 1 << 20))
def test_any_calls_write_what_a_loop_over_tokens_writes(case, dtype, seed):
    groups, calls, block = case
    for group in groups:
        assert_writes(group, calls, block, dtype=dtype, seed=seed)


@pytest.mark.nightly
@settings(max_examples=100, **UNHURRIED)
@given(cases(), st.sampled_from([torch.float32, torch.float16]), st.integers(0, 1 << 20))
def test_many_calls_write_what_a_loop_over_tokens_writes(case, dtype, seed):
    groups, calls, block = case
    for group in groups:
        assert_writes(group, calls, block, dtype=dtype, seed=seed)


@pytest.mark.parametrize("spec", ["dense", "W2+sink1", "L1V3", "L1V2<4V4", "L1V2<5"])
def test_a_prompt_that_overflows_its_rings_leaves_its_last_blocks(spec):
    """Also where it begins in a ring that is full, and ends within a block."""
    (group,) = lay_out(Pattern.parse(spec, 16), 2, 1, 12)
    assert_writes(group, [([0, 0], [165, 3]), ([70, 3], [192, 190])], 16)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block"),
    [(80, torch.float16, 64), (256, torch.float32, 64), (128, torch.float32, 128), (64, torch.float16, 256)],
)
def test_blocks_in_several_tiles_and_heads_of_any_width(head_dim, dtype, block):
    (group,) = lay_out(Pattern.parse("L1V3+sink1", block), 1, 0, 5)
    ends = [0, block - 3, 2 * block - 3, 2 * block + 5, 2 * block + 42, 4 * block + 3, 4 * block + 4]
    calls = [([begin], [end]) for begin, end in itertools.pairwise(ends)]
    assert_writes(group, calls, block, head_dim=head_dim, dtype=dtype)


def test_rows_whose_elements_are_apart_and_calls_without_tokens():
    (group,) = lay_out(Pattern.parse("W2", 16), 2, 0, 4)
    k, v = torch.zeros(2, 1, 2, group.num_blocks * 16, 8, device=DEVICE)
    new = torch.randn(1, 40, 8, 2, device=DEVICE).transpose(2, 3)
    before, after = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (0, 40))
    run_write_slots(k, v, new[:, :0], new[:, :0], group, group.table.to(DEVICE), before, before, 16)
    assert not k.any() and not v.any()
    run_write_slots(k, v, new, -new, group, group.table.to(DEVICE), before, after, 16)
    wanted = torch.zeros(1, 2, group.num_blocks * 16, 8)
    write_by_loop(wanted, new.cpu(), group, [0], [40], 16)
    assert torch.equal(k.cpu(), wanted) and torch.equal(v.cpu(), -wanted)


def test_what_a_write_costs_goes_by_what_is_kept():
    """Of 32,768 tokens before others, and of one."""
    for spec, blocks, of_one in (
        ("dense", 513, 1), ("W8", 9, 1), ("L8V16", 9 + 33, 2), ("L8V16+sink1", 1 + 9 + 33, 3),
        ("L8V4<64V16", 9 + 17 + 33, 3),
    ):  # fmt: skip
        (group,) = lay_out(Pattern.parse(spec, 64), 4, 0, 2048)
        assert (group.most_blocks_of(513), group.most_blocks_of(1)) == (blocks, of_one), spec
