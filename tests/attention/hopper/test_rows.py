"""How the forward and dQ on Hopper divide rows: the key tiles of a tile of query rows are those that its rows see
(`plan.cuh` compiled for the host), and TMA stores what it can."""

import itertools
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from s2.attention import Pattern
from s2.attention.kernels.hopper import forward, support
from s2.attention.kernels.hopper.problem import TILE
from s2.attention.schedule import MAX_LEVELS, has_closed_form, rule_schedule
from tests.attention import sweep
from tests.attention.checks import call_with
from tests.attention.hopper.host import COMPILER, CPU, compile_for_host, unit_mask, unit_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="index arithmetic, checked on machines without a GPU")

PLANS, STORES = (Path(__file__).with_name(name) for name in ("plans.cpp", "stores.cpp"))


def compile_plans(folder: Path, block: int, levels: int, sinks: bool, consumers: int) -> Path:
    constants = {"BLOCK": block, "LEVELS": levels, "SINKS": int(sinks), "CONSUMERS": consumers}
    return compile_for_host(PLANS, folder, constants)


def draw_rules(random: random.Random, block: int) -> tuple[Pattern, int]:
    """A pattern of one rule and the number of its heads, of which each has its own residues."""
    heads = random.choice((1, 4, 16))
    pattern = sweep.draw_rule(random, random.choice(sweep.KINDS[:5]), block)
    if random.random() < 0.2:
        local, stride = random.randint(1, 40), random.randint(1, 9)
        end = local + random.randint(1, 40)
        levels = [(stride, end), (stride * random.randint(1, 5), random.choice((None, end + random.randint(1, 40))))]
        pattern = Pattern.from_ranges(local, levels, block_size=block, sinks=random.randint(0, 9))
    return pattern, heads


def check_plan(
    line: str, seen_by: np.ndarray, first: int, share: int, block: int, consumers: int, most_skipped: int
) -> None:
    """Of the tile of m_blocks from `first` on. `seen_by` bool `[query unit, key unit]`: what the pattern says. Within
    `most_skipped` key tiles a consumer must come to one that it sees, or the pipeline could deadlock."""
    unit, entries = unit_of(block), max(TILE // block, 1)
    edges, fulls, *numbers = map(int, line.split())
    edge_keys, seen = np.array(numbers[: 2 * edges * entries]).reshape(-1, 2).T
    full_keys = np.array(numbers[2 * edges * entries :], dtype=int)
    assert len(full_keys) == fulls * entries
    assert 0 < edges * entries <= 32, "the consumers have a bit for each entry"
    own = (first + np.arange(consumers)) // share
    row = own[0] * unit
    boxes = np.minimum(own, len(seen_by) - 1)  # a consumer past the last row looks where that one does
    listed = np.concatenate([edge_keys[edge_keys >= 0], full_keys])
    assert (listed % unit == 0).all() and len(set(listed)) == len(listed)
    assert sorted(listed // unit) == np.flatnonzero(seen_by[boxes].any(0)).tolist()
    assert seen_by[boxes][:, full_keys // unit].all() and (full_keys + unit - 1 <= row).all()
    for consumer, box in enumerate(boxes):
        sees = seen >> consumer & 1 == 1
        exists = edge_keys >= 0
        assert (sees == exists & seen_by[box, edge_keys // unit]).all()
        assert sees.any(), "every consumer has a first key tile"
        tile = np.flatnonzero(sees)[0] // entries
        shown = edge_keys[tile * entries : (tile + 1) * entries][sees[tile * entries : (tile + 1) * entries]]
        assert shown.min() <= own[consumer] * unit, "all its rows see a key of it"
        places = np.flatnonzero(sees.reshape(-1, entries).any(1))
        assert np.diff(places, prepend=places[0]).max() - 1 <= most_skipped, "between two partial tiles"
        assert edges - 1 - places[-1] <= consumers - 1, "after the last one, whose keys dQ keeps meanwhile"
        assert places[0] + consumers - 1 <= most_skipped, "from the tile before to the first one"


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("head_dim", forward.CONSUMERS)
def test_the_key_tiles_of_a_tile_of_rows_are_those_that_it_sees(block, head_dim, tmp_path):
    consumers, two_pipelines = forward.CONSUMERS[head_dim], 2 * forward.STAGES[head_dim]
    rng = random.Random(seed := block + head_dim)
    cases: dict[tuple[int, bool], list] = {(n, sinks): [] for n in range(MAX_LEVELS + 1) for sinks in (False, True)}
    for _ in range(120):
        pattern, heads = draw_rules(rng, block)
        if not has_closed_form(pattern):
            continue
        head, layer = rng.randrange(heads), rng.randrange(30)
        schedule = rule_schedule(call_with(pattern, heads, layer), heads, CPU)
        length = rng.choice((rng.randint(1, 2 * TILE), rng.randint(1, 40 * block), rng.randint(1, 12 * TILE)))
        mask = unit_mask(pattern, length, heads, layer)[head].T.numpy()
        # kernels may be compiled for more than a head needs: for the other heads
        levels = rng.randint(schedule.num_levels, MAX_LEVELS)
        sinks = schedule.has_sinks or rng.random() < 0.5
        share = rng.choice((1, 1, 2, 3, 4, 8))
        first = rng.choice((0, 0, rng.randrange(len(mask))))  # the unit of the first query
        starts = list(range(first * share, len(mask) * share, consumers))
        for box in sorted({starts[0], starts[-1], *rng.sample(starts, min(len(starts), 12))}):
            cases[levels, sinks].append((box, share, length, schedule.rows[head], mask, pattern))
    for (levels, sinks), own in cases.items():
        program = compile_plans(tmp_path, block, levels, sinks, consumers)
        text = "\n".join(" ".join(map(str, (*case[:3], *case[3]))) for case in own)
        result = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
        for line, (box, share, length, rule, mask, pattern) in zip(result.stdout.splitlines(), own, strict=True):
            most_skipped = two_pipelines - 2 if support.is_deadlock_free(pattern.key, head_dim) else 1 << 30
            try:
                check_plan(line, mask, box, share, block, consumers, most_skipped)
            except AssertionError as error:
                case = f"{seed=}, {pattern}, {rule=}, {box=}, {share=}, {length=}, {levels=}, {sinks=}"
                raise AssertionError(case) from error


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("block", [16, 32, 64, 256])
def test_boxes_are_stored_neither_before_the_queries_nor_over_neighbours(block, tmp_path):
    """All others are: TMA leaves out what comes after the tensor, but traps at a store that begins before it."""
    tokens = unit_of(block)
    program = compile_for_host(STORES, tmp_path, {"BLOCK": block, "LEVELS": 0, "SINKS": 0, "CONSUMERS": 3})
    cases = [
        (packed, before, before + queries, share, (-(-(before + queries) // tokens) - before // tokens + 3) * share)
        for packed, before, queries, share in itertools.product(
            (0, 1), (0, 1, tokens - 1, tokens, 5 * tokens + 7), (1, tokens, 256, 4 * tokens + 1), (1, 2)
        )
    ]
    text = "\n".join(" ".join(map(str, case)) for case in cases)
    result = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    for case, line in zip(cases, result.stdout.splitlines(), strict=True):
        packed, before, length, share, m_blocks = case
        rows, boxes = np.array(line.split(), dtype=int).reshape(-1, 2).T
        assert rows.tolist() == [(before // tokens + n // share) * tokens for n in range(m_blocks)], case
        ends = length if packed else rows[-1] + tokens
        assert boxes.tolist() == ((rows - before >= 0) & (rows + tokens <= ends)).tolist(), case


def test_patterns_that_could_deadlock_the_forward_are_left_to_other_kernels():
    def is_taken(levels: list, block: int, head_dim: int) -> bool:
        return support.is_deadlock_free(Pattern.from_ranges(2, levels, block_size=block).key, head_dim)

    assert not is_taken([(2, 5), (4, 7)], 256, 128)  # a thread block would hang on its first tile
    assert not is_taken([(2, 5)], 256, 128) and is_taken([(2, 5)], 256, 64)
    assert is_taken([(2, 5), (4, 7)], 64, 128) and is_taken([(2, 5), (4, None)], 128, 128)
    for spec in ("L1V15", "L8V16", "W9", "dense", "L3V4+sink2"):
        assert all(support.is_deadlock_free(Pattern.parse(spec, 256).key, dim) for dim in (64, 128))
    mixed = Pattern.per_head([Pattern.parse("L1V15", 256), Pattern.from_ranges(2, [(2, 5)], block_size=256)])
    assert not support.is_deadlock_free(mixed.key, 128)
