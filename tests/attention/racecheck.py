"""compute-sanitizer's racecheck over random cases, with Triton's own dispatch of warps told apart.

    python -m tests.attention.racecheck [--processes 4] [--cases 2] [--passes 2] [--log FOLDER]

In a kernel with `warp_specialize` the first warps write into a few bytes of shared memory which partition every other
warp runs, between two barriers of the whole thread block; racecheck does not follow those and reports the bytes for
every such kernel. Here each process runs cases of one family of `sweep`, says where these bytes are in the kernels that
it compiled, and every hazard that is reported elsewhere counts. The exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESERVED = 1024  # bytes at the beginning of a thread block's shared memory, the system's
_READ = re.compile(r"ld\.shared\.b8\s+%rs?\d+, \[%r\d+\+(\d+)\];")
_THREADS = re.compile(r"\.reqntid (\d+)")
_HAZARD = re.compile(r"hazard detected at __shared__ (0x[0-9a-f]+)")
_KERNEL = re.compile(r"\battention_\w+")
_DISPATCH = re.compile(r"^DISPATCH (\w+) (\d+) (\d+)$", re.MULTILINE)

Place = tuple[str, int]  # kernel and address in shared memory


def dispatch_bytes(ptx: str) -> range:
    """Where a kernel's warps beyond the first four read, each its own byte, which partition they run; counted from the
    beginning of Triton's shared memory. Empty where a kernel has no partitions."""
    read, threads = _READ.search(ptx), _THREADS.search(ptx)
    if not read or not threads:
        return range(0)
    first = int(read[1])
    return range(first + 4, first + int(threads[1]) // 32)


def hazards(text: str) -> collections.Counter[Place]:
    """How often racecheck reports each place."""
    found: collections.Counter[Place] = collections.Counter()
    address = None
    for line in text.splitlines():
        if match := _HAZARD.search(line):
            if address is not None:
                found["?", address] += 1
            address = int(match[1], 16)
        elif address is not None and (kernel := _KERNEL.search(line)):
            found[kernel[0], address] += 1
            address = None
    if address is not None:
        found["?", address] += 1
    return found


def elsewhere(text: str) -> collections.Counter[Place]:
    """Hazards of a process's output that are not at the bytes it names."""
    known = {
        (kernel, RESERVED + byte)
        for kernel, first, end in _DISPATCH.findall(text)
        for byte in range(int(first), int(end))
    }
    return collections.Counter({place: count for place, count in hazards(text).items() if place not in known})


def run_cases(arguments: list[str]) -> int:
    """What runs under racecheck."""
    from s2.attention.kernels.hopper import triton_launcher
    from tests.attention import sweep

    status = sweep.main(arguments)
    for kernel in triton_launcher._KERNELS.values():
        own = dispatch_bytes(kernel.asm["ptx"])
        if own:
            print(f"DISPATCH {kernel.metadata.name} {own.start} {own.stop}")
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="at a time, each with a family of its own")
    parser.add_argument("--cases", type=int, default=2, help="of each")
    parser.add_argument("--passes", type=int, choices=(1, 2), default=2, help="of the backward")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the first (default: fresh)")
    parser.add_argument("--log", type=Path, default=None, help="keep what the processes print")
    args = parser.parse_args(arguments)
    first = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 20)
    checked = ["compute-sanitizer", "--tool", "racecheck", "--racecheck-report", "hazard", "--print-limit", "0"]

    def output(n: int) -> str:
        seed = (first + n) * args.cases  # a family each
        cases = (
            f"--every-lane --passes {args.passes} --cases {args.cases} --each {args.cases} --seed {seed} "
            f"--max-tokens {args.max_tokens} --minutes 60"
        )
        command = [*checked, sys.executable, "-m", "tests.attention.racecheck", "cases", *cases.split()]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        ).stdout

    status = 0
    with ThreadPoolExecutor(args.processes) as threads:  # each reads its process, whose pipe would fill
        texts = list(threads.map(output, range(args.processes)))
    for n, text in enumerate(texts):
        if args.log:
            args.log.mkdir(parents=True, exist_ok=True)
            (args.log / f"racecheck-{n}.log").write_text(text)
        cases = re.search(r"hopper: \d+ cases from seed \d+, (\d+) failed", text)
        others = elsewhere(text)
        total = sum(hazards(text).values())
        print(f"{cases[0] if cases else 'no result'}; {total} hazards reported, {sum(others.values())} elsewhere")
        for (kernel, address), count in others.most_common(5):
            print(f"  {kernel}, shared memory {address:#x}: {count}")
        if others or not cases or int(cases[1]):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(run_cases(sys.argv[2:]) if sys.argv[1:2] == ["cases"] else main())
