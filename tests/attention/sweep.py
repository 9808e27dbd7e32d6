"""Random property sweep of a GPU backend against the float64 definition, with fresh seeds until the time is up.

    python -m tests.attention.sweep --backend hopper --minutes 10
    compute-sanitizer --tool memcheck python -m tests.attention.sweep --backend hopper --cases 20 --max-tokens 300
    compute-sanitizer --tool racecheck python -m tests.attention.sweep --every-lane --passes 1 --cases 6 --each 1
    python -m tests.attention.sweep --backend hopper --seed 1234 --cases 1        # one case again

A family (dtype, head dimension, block, kind of pattern, packed or not, on Hopper one or two passes of the backward) is
what kernels are compiled for; `--each` cases are drawn from one before the next. A failed case prints its seed and does
not end the sweep; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from typing import Any
from unittest import mock

import torch

from s2.attention import Pattern
from s2.attention.kernels.hopper import driver, one_pass, support
from tests.attention.checks import Case, assert_correct

DTYPES = {
    "hopper": (torch.bfloat16, torch.float16),
    "triton": (torch.bfloat16, torch.float16, torch.float32),
}
HEAD_DIMS = {"hopper": (64, 128), "triton": (64, 80, 96, 128, 256)}
BLOCKS = (16, 32, 64, 128, 256)
KINDS = ("dense", "window", "stride", "sinks", "ranges", "mixed")


def draw_rule(random: random.Random, kind: str, block: int) -> Pattern:
    local, stride = random.randint(1, 9), random.randint(2, 17)
    if kind == "dense":
        return Pattern.parse("dense", block)
    if kind == "window":
        return Pattern.parse(f"W{local}", block)
    if kind == "stride":
        return Pattern.parse(f"L{local}V{stride}", block)
    if kind == "sinks":
        return Pattern.parse(f"L{local}V{stride}+sink{random.randint(1, 3)}", block)
    end = local + random.randint(1, 8)
    last = random.choice((None, end + random.randint(1, 12)))
    ranges = [(stride, end), (stride * random.randint(2, 4), last)]
    return Pattern.from_ranges(local, ranges, block_size=block, sinks=random.choice((0, 0, 2)))


def draw_pattern(random: random.Random, kind: str, block: int, heads: int) -> Pattern:
    if kind == "mixed":
        return Pattern.per_head([draw_rule(random, random.choice(KINDS[:4]), block) for _ in range(heads)])
    return draw_rule(random, kind, block)


def draw_borders(random: random.Random, max_tokens: int) -> tuple[int, ...]:
    lengths = [int(2 ** random.uniform(0, 11)) for _ in range(random.randint(1, 12))]
    lengths = [n * random.choice((0, 1, 1, 1)) for n in lengths] + [random.randint(1, 70)]
    borders = [0]
    for length in lengths:
        borders.append(min(borders[-1] + length, max_tokens))
    return tuple(borders)


def draw_case(seed: int, backend: str, kind: str, block: int, head_dim: int, packed: bool, max_tokens: int) -> Case:
    rng = random.Random(seed)
    kv_heads, group, batch = rng.randint(1, 6), rng.choice((1, 1, 2, 3, 4, 8)), rng.randint(1, 3)
    if backend == "hopper" and block < 64:  # several query heads to a KV head
        kv_heads, group = rng.randint(1, 3), 64 // block * rng.choice((1, 1, 2, 3))
    if backend == "hopper" and kind == "ranges" and head_dim == 128:
        block = min(block, 128)  # it takes no levels that end with larger ones
    offset, total = 0, None
    pattern = draw_pattern(rng, kind, block, kv_heads)
    while backend == "hopper" and not support.is_deadlock_free(pattern.key, head_dim):
        pattern = draw_pattern(rng, kind, block, kv_heads)
    if kind != "mixed" and rng.random() < 0.3:  # some heads of a wider layer
        offset = rng.randint(0, 5)
        total = offset + kv_heads + rng.randint(0, 5)
    shape: dict[str, Any] = {
        "head_dim": head_dim,
        "rotation": rng.randint(0, 3),
        "head_offset": offset,
        "total_kv_heads": total,
    }
    if packed:
        borders = draw_borders(rng, max_tokens)
        tokens = keys = borders[-1]
        shape["cu_seqlens"] = borders
        if rng.random() < 0.4 and (backend == "triton" or tokens >= support._FEWEST_QUERIES):  # the last of longer keys
            more = itertools.accumulate(rng.choice((0, 1, rng.randint(0, max_tokens // 4))) for _ in borders[1:])
            borders_k = (0, *(border + n for border, n in zip(borders[1:], more, strict=True)))
            keys, shape["cu_seqlens_k"] = borders_k[-1], borders_k
        return Case(pattern, tokens, keys, kv_heads * group, kv_heads, **shape)
    tokens = min(int(2 ** rng.uniform(0, 12)), max_tokens)
    queries = tokens
    if rng.random() < 0.3:  # the last of longer keys
        fewest = support._FEWEST_QUERIES if backend == "hopper" else 1
        queries = rng.randint(min(fewest, tokens), tokens)
    return Case(pattern, queries, tokens, kv_heads * group, kv_heads, batch=batch, **shape)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="hopper", choices=sorted(DTYPES))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    parser.add_argument("--each", type=int, default=8, help="cases of one family")
    parser.add_argument("--max-tokens", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=None, help="first seed (default: fresh)")
    parser.add_argument("--passes", type=int, choices=(1, 2), help="of the backward on Hopper (default: either)")
    parser.add_argument("--every-lane", action="store_true", help="kernels whose barriers racecheck can follow")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(arguments)
    if (args.passes or args.every_lane) and args.backend != "hopper":
        parser.error("--passes and --every-lane are for the hopper backend")
    if args.every_lane:
        driver._OPTIONS = (*driver._OPTIONS, "--define-macro=EVERY_LANE")
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 30)
    end, done, failed = time.monotonic() + 60 * args.minutes, 0, 0
    while time.monotonic() < end and (args.cases is None or done < args.cases):
        family = random.Random((seed + done) // args.each)
        kind, packed = family.choice(KINDS), family.random() < 0.5
        dtype = family.choice(DTYPES[args.backend])
        block, dim = family.choice(BLOCKS), family.choice(HEAD_DIMS[args.backend])
        if args.passes == 1:
            dim = one_pass.HEAD_DIM
        once = dim == one_pass.HEAD_DIM and (family.random() < 0.5 if args.passes is None else args.passes == 1)
        case = draw_case(seed + done, args.backend, kind, block, dim, packed, args.max_tokens)
        try:
            with mock.patch.object(one_pass, "is_taken", return_value=once):
                assert_correct(case, dtype, backend=args.backend, device=args.device, seed=seed + done)
        except Exception as error:
            failed += 1
            print(
                f"FAILED --seed {seed + done}{f' --passes {args.passes}' if args.passes else ''}: {case} in {dtype}, "
                f"one_pass={once}: {type(error).__name__}: {error}",
                flush=True,
            )
        done += 1
        if done % 50 == 0:
            print(f"{done} cases, {failed} failed", flush=True)
    print(f"{args.backend}: {done} cases from seed {seed}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
