"""What the checks of index arithmetic share: units of tokens, and C++ sources compiled for the host."""

import shutil
import subprocess
from pathlib import Path

import torch

from s2.attention import Pattern
from s2.attention.kernels.hopper import params
from s2.attention.kernels.hopper.driver import SOURCES
from s2.attention.kernels.hopper.problem import TILE

CPU = torch.device("cpu")
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def unit_of(block: int) -> int:
    """Tokens by which runs are counted: those of an m_block."""
    return min(block, TILE)


def unit_mask(pattern: Pattern, length: int, heads: int, layer: int = 0) -> torch.Tensor:
    """bool `[H, key unit, query unit]`: which units of keys which units of queries see."""
    unit = unit_of(pattern.block_size)
    per_block, units = pattern.block_size // unit, -(-length // unit)
    mask = pattern.block_mask(-(-length // pattern.block_size), heads, layer=layer)
    mask = mask.repeat_interleave(per_block, 1).repeat_interleave(per_block, 2)[:, :units, :units]
    return (mask & torch.ones(units, units, dtype=torch.bool).tril()).transpose(1, 2)


def compile_for_host(source: Path, folder: Path, constants: dict[str, int]) -> Path:
    """A program with the constants of a kernel, in a folder. It aborts where C++ does not define a result."""
    program = folder / "-".join([source.stem, *map(str, constants.values())])
    for name, text in params.HEADERS.items():
        (folder / name).write_text(text)
    checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", *checks, *(f"-D{name}={value}" for name, value in constants.items()),
         f"-I{SOURCES}", f"-I{folder}", str(source), "-o", str(program)],
        check=True,
    )  # fmt: skip
    return program
