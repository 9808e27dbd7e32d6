"""Uniform registers that a kernel may read before anything wrote them, found in its disassembly.

ptxas 12.8 moves computations of matrix descriptors that a loop shares with the code after it into the loop's
preheader. A branch skips the preheader when the loop has no steps, and the code after it then reads uniform registers
that nothing wrote. Neither ptxas nor Triton says a word, and the results are wrong only for shapes with such loops.

So this works on what ptxas made: it parses a listing of `nvdisasm -c`, follows every path from the entry, and reports
each read of a uniform register that some path reaches without a write (definite assignment, as compilers check it for
local variables). `nvdisasm` rather than `cuobjdump -sass`, which leaves out the targets of indirect branches: through
those the warps of a specialised kernel reach their code, most of the kernel.

A write under a predicate counts as a write: whether the predicate held where the register is read cannot be told here.
Nor can it be told what a write was for: a register that held something else before is not found unwritten.
Registers that an operand implies without naming them are counted for the instructions of our kernels (`_width`); of
others only the named one, so that an instruction unknown here can hide a fault but not make one up.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ADDRESS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/")
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"\s*([.$\w]+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_TARGETS = re.compile(r"\(\*\"BRANCH_TARGETS ([^\"]+)\"\*\)")
_PREDICATE = re.compile(r"!?U?P(T|R|\d)$")
_REGISTER = re.compile(r"UR(\d+)")

_ALWAYS = ("PT", "UPT")
_LEAVES = ("EXIT", "RET", "KILL")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")
# instructions outside the uniform datapath that write a uniform register, and those in it that write none
_WRITERS = ("R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX", "ELECT", "SYNCS")
_NO_WRITERS = ("UISETP", "UPLOP3", "UR2UP", "USETMAXREG", "UTMA", "UBLK")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    guarded: bool  # runs under a predicate
    opcode: str
    operands: tuple[str, ...]
    targets: tuple[str, ...]  # labels that it may jump to

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass(frozen=True)
class Offender:
    """A read of uniform registers that some path reaches without a write of them."""

    instruction: Instruction
    registers: tuple[int, ...]
    missed: tuple[Instruction, ...]  # of each register the closest write above, if there is one

    def __str__(self) -> str:
        names = ", ".join(f"UR{register}" for register in self.registers)
        writes = ", ".join(f"{write.address:#x} {write.text}" for write in self.missed) or "none"
        read = self.instruction
        return f"{read.address:#x} {read.text}: {names} may be unwritten (writes above: {writes})"


def disassemble(nvdisasm: str | Path, cubin: str | Path) -> str:
    result = subprocess.run([str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"nvdisasm failed: {result.stderr}")
    return result.stdout


def unwritten_reads(listing: str) -> list[Offender]:
    """Offenders in a listing, in the order of their addresses."""
    instructions, labels = parse(listing)
    successors = [_successors(index, instructions, labels) for index in range(len(instructions))]
    reads, writes = zip(*(accesses(instruction) for instruction in instructions), strict=True)
    # of each instruction the registers written on all paths to it, as bits; None: no path found yet
    written: list[int | None] = [0 if instruction.address == 0 else None for instruction in instructions]
    work = [index for index, known in enumerate(written) if known is not None]
    if not work:
        raise ValueError("the listing has no instruction at address 0, where a function starts")
    while work:
        index = work.pop()
        after = written[index] | _bits(writes[index])
        for successor in successors[index]:
            before = written[successor]
            met = after if before is None else before & after
            if met != before:
                written[successor] = met
                work.append(successor)
    offenders = []
    last: dict[int, Instruction] = {}
    for instruction, known, read, write in zip(instructions, written, reads, writes, strict=True):
        missing = tuple(sorted(register for register in read if known is not None and not known >> register & 1))
        if missing:
            offenders.append(Offender(instruction, missing, tuple(last[r] for r in missing if r in last)))
        last.update(dict.fromkeys(write, instruction))
    return offenders


def unreached(listing: str) -> list[Instruction]:
    """Instructions that no path from an entry reaches: the padding after a function's end, unless the flow of control
    was misread."""
    instructions, labels = parse(listing)
    work = [index for index, instruction in enumerate(instructions) if instruction.address == 0]
    seen = set(work)
    while work:
        for successor in _successors(work.pop(), instructions, labels):
            if successor not in seen:
                seen.add(successor)
                work.append(successor)
    return [instruction for index, instruction in enumerate(instructions) if index not in seen]


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of a listing, and of every label the index of the instruction after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            address, guard, opcode, rest = found.groups()
            table = _TARGETS.search(rest)
            targets = table[1].split(",") if table else _TARGET.findall(rest)
            rest = _TARGETS.sub("", rest).strip()
            text = " ".join(line.split("*/", 1)[1].split(";")[0].split())
            operands = tuple(part.strip() for part in rest.split(",") if part.strip())
            guarded = guard is not None and guard not in _ALWAYS
            names = tuple(target.strip() for target in targets)
            instructions.append(Instruction(int(address, 16), text, guarded, opcode, operands, names))
        elif _ADDRESS.match(line):
            raise ValueError(f"not understood: {line}")
    if not instructions:
        raise ValueError("no instructions in the listing")
    return instructions, labels


def _successors(index: int, instructions: list[Instruction], labels: dict[str, int]) -> list[int]:
    """Indices of the instructions that may follow."""
    instruction = instructions[index]
    base, targets = instruction.base, [labels[name] for name in instruction.targets]
    following = [index + 1] if index + 1 < len(instructions) else []
    if base in _LEAVES:
        return following if instruction.guarded else []
    if base in ("BRA", "JMP", *_INDIRECT):
        if not targets:
            raise ValueError(f"{instruction.address:#x}: {instruction.text}: a jump without targets")
        # besides the guard a branch may have a condition as its operand: `BRA P1, target`, `BRA.DIV UR8, target`
        conditional = instruction.guarded or (base not in _INDIRECT and len(instruction.operands) > 1)
        return targets + (following if conditional else [])
    if base == "CALL":
        return targets + following
    return following  # BSSY only notes its target; BSYNC stands right before it


def accesses(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Uniform registers that an instruction reads and writes."""
    reads: set[int] = set()
    writes: set[int] = set()
    base = instruction.base
    writer = base in _WRITERS or (base.startswith("U") and not base.startswith(_NO_WRITERS))
    operands = [operand for operand in instruction.operands if not _PREDICATE.match(operand)]
    for position, operand in enumerate(operands):
        into = writes if writer and position == 0 and operand.startswith("UR") else reads
        for first, count in _registers(instruction, operands, position):
            into.update(range(first, first + count))
    return reads, writes


def _registers(instruction: Instruction, operands: list[str], position: int) -> Iterator[tuple[int, int]]:
    """First uniform register and number of registers of each group that an operand stands for."""
    operand = operands[position]
    for match in _REGISTER.finditer(operand):
        first = int(match[1])
        if operand.startswith("gdesc"):
            # four registers, the descriptors of A and B; only B's are read where A, the operand before, is in registers
            yield (first + 2, 2) if position == 2 else (first, 4)
        else:
            yield first, _width(instruction, operands, position, match.end())


def _width(instruction: Instruction, operands: list[str], position: int, end: int) -> int:
    """How many registers in a row an operand names by its first."""
    operand, base, modifiers = operands[position], instruction.base, instruction.modifiers
    if operand.startswith(("desc", "cx")) or operand.startswith(".64", end):
        return 2
    if base == "UTMACCTL":  # the address of the descriptor
        return 2
    if base in ("UTMALDG", "UTMASTG", "UTMAREDG"):
        # shared address, barrier (of loads), and a coordinate each dimension; then the address of the descriptor
        if position > 0:
            return 2
        dimensions = next(int(modifier[0]) for modifier in modifiers if re.fullmatch(r"\dD", modifier))
        return dimensions + (2 if base == "UTMALDG" else 1)
    if "[" in operand:  # an address in shared memory, or an offset into constants
        return 1
    if "64" in modifiers and (base.startswith("U") or base in _WRITERS):
        return 2
    if "WIDE" in modifiers and position in (0, 3):  # the product and what is added to it
        return 2
    return 1


def _bits(registers: set[int]) -> int:
    return sum(1 << register for register in registers)
