"""The closed forms are written twice, in Triton and in CUDA C++ (`cu/plan.cuh`, `cu/n_blocks.cuh`): both say the same
of random rules. Triton runs in its interpreter, C++ is compiled for the host."""

import random
import subprocess
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from s2.attention import Pattern
from s2.attention.kernels.hopper.n_blocks import n_block_run
from s2.attention.kernels.hopper.problem import TILE
from s2.attention.kernels.index import count_tiles, key_plan, load_rule, nth_tile
from s2.attention.schedule import rule_schedule
from tests.attention.checks import call_with
from tests.attention.hopper.host import COMPILER, CPU, compile_for_host

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]
HEADS, LIST = 4, 256
CASES = [(16, 2, True), (32, 1, False), (64, 1, True), (64, 2, False), (256, 0, False), (256, 2, True)]


def draw_pattern(rng: random.Random, levels: int, sinks: bool, block: int) -> Pattern:
    local, stride = rng.randint(1, 9), rng.randint(1, 9)
    ends = sorted(rng.sample(range(local + 1, local + 40), 2))
    ends[-1] = rng.choice((None, ends[-1]))
    ranges = [(stride, ends[0]), (stride * rng.randint(2, 5), ends[1])][2 - levels :]
    return Pattern.from_ranges(local, ranges, block_size=block, sinks=rng.randint(1, 9) if sinks else 0)


def run_cpp(program: Path, cases: list[list[int]]) -> list[list[int]]:
    text = "\n".join(" ".join(map(str, case)) for case in cases)
    lines = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    return [[int(word) for word in line.split()] for line in lines]


@triton.jit
def runs(table, out, num_blocks, low, high, N: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
         SINKS: tl.constexpr):  # fmt: skip
    rule = load_rule(table, LEVELS, SINKS)
    lane = tl.arange(0, N)
    for level in tl.static_range(LEVELS + 2 if SINKS else LEVELS + 1):
        key, begin, end = n_block_run(lane, level, num_blocks, low, high, rule, BLOCK, LEVELS, SINKS)
        to = out + 3 * (level * N + lane)
        tl.store(to, key)
        tl.store(to + 1, begin)
        tl.store(to + 2, end)


@pytest.mark.parametrize(("block", "levels", "sinks"), CASES)
def test_runs_of_queries_agree(block, levels, sinks, tmp_path):
    constants = {"BLOCK": block, "LEVELS": levels, "SINKS": int(sinks)}
    program = compile_for_host(Path(__file__).with_name("runs.cpp"), tmp_path, constants | {"CONSUMERS": 2})
    rng = random.Random(block + 10 * levels + sinks)
    cases, found = [], []
    for _ in range(4):
        pattern, head = draw_pattern(rng, levels, sinks, block), rng.randrange(HEADS)
        schedule = rule_schedule(call_with(pattern, HEADS), HEADS, CPU)
        length = rng.randint(1, 30 * block)
        count, low = (
            triton.next_power_of_2(-(-length // TILE) + 1),
            rng.choice((0, TILE * rng.randint(0, length // TILE))),
        )
        high = rng.choice((-(-length // TILE) * TILE, low + TILE * rng.randint(1, 9)))
        out = torch.full(((levels + 1 + sinks) * count, 3), -1, dtype=torch.int32)
        runs[(1,)](schedule.table[head], out, -(-length // block), low, high, N=count, **constants)
        cases.append([length, low, high, count, *schedule.rows[head]])
        found.append(out.flatten().tolist())
    for case, ours, theirs in zip(cases, found, run_cpp(program, cases), strict=True):
        assert ours == theirs, f"{case=}"


@triton.jit
def key_tiles(table, out, first_row, last_row, N: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
              LEVELS: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    full, masked = key_plan(first_row, last_row, load_rule(table, LEVELS, SINKS), BLOCK, TILE, LEVELS, SINKS)
    tl.store(out, count_tiles(masked))
    tl.store(out + 1, count_tiles(full))
    lane = tl.arange(0, N)
    first, stride, index, blocks = nth_tile(lane, masked)
    full_first, full_stride, full_index, _ = nth_tile(lane, full)
    to = out + 2 + 7 * lane
    tl.store(to, first + lane * 0)
    tl.store(to + 1, stride + lane * 0)
    tl.store(to + 2, index)
    tl.store(to + 3, blocks + lane * 0)
    tl.store(to + 4, full_first + lane * 0)
    tl.store(to + 5, full_stride + lane * 0)
    tl.store(to + 6, full_index)


def keys_of(first: int, stride: int, index: int, blocks: int, block: int) -> set[int]:
    """First keys of the blocks, or of the part of a larger one, of the `index`-th key tile of a range."""
    if block > TILE:
        parts = block // TILE
        return {(first + index // parts * stride) * block + index % parts * TILE}
    members = range(index * (TILE // block), min((index + 1) * (TILE // block), blocks))
    return {(first + i * stride) * block for i in members}


@pytest.mark.parametrize(("block", "levels", "sinks"), CASES)
def test_key_tiles_agree(block, levels, sinks, tmp_path, consumers=3):
    constants = {"BLOCK": block, "LEVELS": levels, "SINKS": int(sinks)}
    program = compile_for_host(Path(__file__).with_name("plans.cpp"), tmp_path, constants | {"CONSUMERS": consumers})
    rng = random.Random(block + 10 * levels + sinks)
    cases, found = [], []
    for _ in range(4):
        pattern, head = draw_pattern(rng, levels, sinks, block), rng.randrange(HEADS)
        schedule = rule_schedule(call_with(pattern, HEADS), HEADS, CPU)
        length, tokens = rng.randint(1, 30 * block), min(block, TILE)
        m_block = rng.randrange(-(-length // tokens)) // consumers * consumers
        last_row = min((m_block + consumers) * tokens, length) - 1
        out = torch.zeros(2 + 7 * LIST, dtype=torch.int32)
        key_tiles[(1,)](schedule.table[head], out, m_block * tokens, last_row, N=LIST, TILE=TILE, **constants)
        masked, full, *tiles = out.tolist()
        assert max(masked, full) <= LIST
        tiles = [tiles[7 * n : 7 * n + 7] for n in range(LIST)]
        partial = set().union(*(keys_of(*tile[:4], block) for tile in tiles[:masked]))
        partial = {key for key in partial if key <= last_row}  # C++ leaves out what a larger block has after the rows
        cases.append([m_block, 1, length, *schedule.rows[head]])
        found.append((partial, set().union(*(keys_of(*tile[4:], 1 << 20, block) for tile in tiles[:full]))))
    entries = max(TILE // block, 1)
    for case, (partial, full), (masked, _, *numbers) in zip(cases, found, run_cpp(program, cases), strict=True):
        assert partial == set(numbers[: 2 * masked * entries : 2]) - {-1}, f"{case=}"
        assert full == set(numbers[2 * masked * entries :]), f"{case=}"
