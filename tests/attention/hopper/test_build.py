"""The Hopper kernels build as they are launched, checked without a GPU on what ptxas made of them: shared memory,
registers, spills, warnings, and no uniform register read that nothing wrote (see `sass`)."""

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from s2.attention.kernels.hopper import driver, forward, one_pass, support, two_pass
from s2.attention.kernels.hopper.problem import Problem
from s2.attention.schedule import RuleSchedule
from tests.attention.hopper import sass

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = 227 * 1024  # what a thread block may have on sm_90

# Gluon needs Triton outside interpreter mode, which is fixed at import: so it compiles in a child process. Types follow
# the kernels' argument names, descriptors and stages the host side of the kernels.
CHILD = r"""
import json
import re
import sys
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from s2.attention import schedule
from s2.attention.kernels.hopper import triton_launcher, two_pass
from s2.attention.kernels.hopper.gluon import backward_kv
from s2.attention.kernels.hopper.problem import TILE, Problem

knobs.nvidia.dump_ptxas_log = True
case, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
function, head_dim, registers = backward_kv.attention_backward_kv, case["head_dim"], two_pass.KV_REGISTERS
launched_with = {"TABLE": schedule.TABLE_COLUMNS, "STAGES": two_pass.KV_STAGES[head_dim], "REGISTERS": registers}
constants = case["constants"] | launched_with

element = {"bf16": torch.bfloat16, "fp16": torch.float16}[case["element"]]
block = min(case["constants"]["BLOCK"], TILE)
tensor = torch.empty(1, TILE, TILE // block, head_dim, dtype=element)
problem = Problem(None, block, 1.0, *tensor.shape[:3], 1, head_dim, element, tensor.device, False)
rows, keys = (two_pass.describe_tiles(tensor, problem, heads)(tensor) for heads in (problem.heads_per_tile, 1))
statistics = two_pass.describe_statistics(1)(torch.empty(1, 2 * TILE))


def box_of(name):
    if name == "stats_desc":
        return statistics
    return keys if name in ("k_desc", "v_desc", "dk_desc", "dv_desc") else rows


def type_of(parameter):
    name = parameter.name
    if parameter.is_constexpr:
        return "constexpr"
    if name.endswith("_desc"):
        item = "fp32" if name == "stats_desc" else case["element"]
        return f"tensordesc<{item}{box_of(name).block_shape},{box_of(name).layout!r}>"
    if parameter.do_not_specialize:  # sizes and counts
        return "i32"
    if name.startswith("scale"):
        return "fp32"
    if name in ("table", "counter", "documents"):
        return "*i32"
    return "*" + case["element"] if name in ("dk", "dv") else "*fp32"


types = {parameter.name: type_of(parameter) for parameter in function.params}
used = {(parameter.num,): constants[parameter.name] for parameter in function.params if parameter.is_constexpr}
aligned = {(p.num,): [["tt.divisibility", 16]] for p in function.params if types[p.name].startswith("*")}
source = GluonASTSource(function, types, used, aligned)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
(folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
(folder / "kernel.ptx").write_text(kernel.asm["ptx"])
samples = {"i32": 1, "fp32": 1.0}
arguments = [
    box_of(name) if name.endswith("_desc") else samples.get(kind, tensor)
    for name, kind in types.items()
    if kind != "constexpr"
]
boxes = [triton_launcher.box_of(x) for x in arguments if hasattr(x, "base")]
launched = {  # what `triton_launcher` says beside what Triton says
    "known": [triton_launcher.Direct.knows(kernel, arguments), True],
    "boxes": [boxes, [list(meta["block_size"]) for meta in kernel.metadata.tensordesc_meta]],
    "threads": [32 * kernel.metadata.num_warps, int(re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])[1])],
}
facts = {"shared": kernel.metadata.shared, "registers": registers, "launched": launched}
(folder / "facts.json").write_text(json.dumps(facts))
"""


@dataclass(frozen=True)
class Build:
    kernel: str
    head_dim: int
    constants: dict[str, int]
    spills: int = 0  # the most bytes of spill stores: a little above what they are now
    element: str = "bf16"

    def __str__(self) -> str:
        constants = "-".join(f"{name}{int(value)}" for name, value in self.constants.items())
        return f"{self.kernel}-d{self.head_dim}-{self.element}-{constants}"


def _constants(
    levels: int, sinks: bool, block: int = 64, packed: bool = False, late: bool = False, **others: bool
) -> dict[str, int]:
    own = {"LEVELS": levels, "SINKS": sinks, "BLOCK": block, "PACKED": packed, **others}
    return own | {"LATE": True} if late else own


FORWARD = [
    Build("forward", 128, _constants(1, False)),
    Build("forward", 128, _constants(0, True, block=128, packed=True), element="fp16"),
    Build("forward", 128, _constants(1, False, block=16)),
    Build("forward", 128, _constants(2, True, block=16, packed=True)),
    Build("forward", 128, _constants(2, False, block=32), element="fp16"),
    Build("forward", 128, _constants(1, True, packed=True)),
    Build("forward", 128, _constants(0, False, block=256)),
    Build("forward", 64, _constants(2, True)),
    Build("forward", 64, _constants(1, False, block=256)),
    Build("forward", 64, _constants(1, True, block=32, packed=True), element="fp16"),
    Build("forward", 64, _constants(2, True, block=16, packed=True)),
    Build("forward", 64, _constants(0, False, block=128), element="fp16"),
    Build("forward", 64, _constants(2, False, packed=True)),
    Build("forward", 128, _constants(1, True, late=True)),
    Build("forward", 128, _constants(2, True, block=16, late=True), element="fp16"),
    Build("forward", 64, _constants(0, False, block=256, late=True)),
    Build("forward", 128, _constants(1, True, packed=True, late=True)),
    Build("forward", 128, _constants(2, True, block=16, packed=True, late=True), element="fp16"),
    Build("forward", 64, _constants(2, False, block=32, packed=True, late=True)),
    Build("forward", 64, _constants(0, True, block=256, packed=True, late=True), element="fp16"),
]
QUERY = [
    Build("backward_q", 128, _constants(1, False), spills=48),
    Build("backward_q", 128, _constants(1, True, block=16, packed=True), spills=80),
    Build("backward_q", 128, _constants(2, True, packed=True), spills=48),
    Build("backward_q", 128, _constants(0, False, block=256), spills=48, element="fp16"),
    Build("backward_q", 64, _constants(0, False, block=128)),
    Build("backward_q", 64, _constants(1, False)),
    Build("backward_q", 64, _constants(2, True, block=32, packed=True), element="fp16"),
]
# The warp that plans spills, outside of all loops over rows: it has 24 registers
ONE_PASS = [
    Build("backward", 128, _constants(1, False), spills=130),
    Build("backward", 128, _constants(2, True, packed=True), spills=130),
    Build("backward", 128, _constants(0, False, block=256), spills=80),
    Build("backward", 128, _constants(2, True, block=16, packed=True), spills=450),
    Build("backward", 128, _constants(1, False, block=32), spills=400, element="fp16"),
    Build("preprocess", 128, _constants(0, False)),
    Build("preprocess", 128, _constants(0, False, block=16, packed=True), element="fp16"),
    Build("postprocess", 128, _constants(0, False)),
    Build("postprocess", 128, _constants(0, False, block=16, packed=True), element="fp16"),
]
# With two levels and sinks it is mostly the producer that spills, which plans tiles with 32 registers
GLUON = [
    Build("backward_kv", 128, _constants(1, False, GROUPED=False), spills=300),
    Build("backward_kv", 128, _constants(2, True, packed=True, GROUPED=True), spills=450),
    Build("backward_kv", 64, _constants(0, True, packed=True, GROUPED=False), spills=128),
    Build("backward_kv", 64, _constants(1, False, block=128, GROUPED=True), spills=128),
    Build("backward_kv", 128, _constants(1, False, block=16, GROUPED=True), spills=350),
    Build("backward_kv", 64, _constants(1, True, block=32, packed=True, GROUPED=True), spills=128),
]


@functools.cache
def _nvdisasm() -> str:
    """Triton's disassembler; skips where Triton cannot compile and disassemble for NVIDIA."""
    from triton import knobs

    try:
        return [getattr(knobs.nvidia, name).path for name in ("ptxas", "nvdisasm")][1]
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"Triton's ptxas and nvdisasm are needed: {error}")


def _cuda(build: Build, folder: Path) -> tuple[str, dict[str, int]]:
    """Compiles into a folder. Returns the log, and bytes of shared memory and registers of a consumer's thread."""
    if not support._finds_nvrtc():
        pytest.skip("NVRTC is needed")
    constants, element = build.constants, {"bf16": torch.bfloat16, "fp16": torch.float16}[build.element]
    rules = RuleSchedule(torch.empty(0), [], constants["LEVELS"], constants["SINKS"])
    problem = Problem(
        rules, constants["BLOCK"], 1.0, 1, 64, 4, 1, build.head_dim, element, torch.device("cpu"), constants["PACKED"],
        late=constants.get("LATE", False),
    )  # fmt: skip
    if build.kernel == "forward":
        kernel = forward.kernel_of(problem)
    elif build.kernel == "backward_q":
        kernel = two_pass.query_kernel(problem)
    elif build.kernel == "backward":
        kernel = one_pass.backward_kernel(problem)
    else:
        kernel = one_pass.prepost_kernel(build.kernel, problem)
    cubin, log = driver.build(kernel.source, kernel.constants, kernel.headers)
    (folder / "kernel.cubin").write_bytes(cubin)
    return log, {"shared": driver.shared_bytes_of(cubin), "registers": kernel.constants.get("CONSUMER_REGISTERS", 0)}


def _gluon(build: Build, folder: Path) -> tuple[str, dict[str, int]]:
    """The same."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")  # an empty one: ptxas has to run, for its messages
    case = json.dumps({name: getattr(build, name) for name in ("kernel", "head_dim", "element", "constants")})
    arguments = [sys.executable, "-c", CHILD, case, str(folder)]
    result = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    log = result.stdout + result.stderr
    if result.returncode:
        pytest.fail(f"{build} does not compile: {log[-3000:]}", pytrace=False)
    facts = json.loads((folder / "facts.json").read_text())
    if not re.search(
        rf"setmaxnreg\.inc\.sync\.aligned\.u32\s+{facts['registers']};", (folder / "kernel.ptx").read_text()
    ):
        pytest.fail(f"{build}: no setmaxnreg for {facts['registers']} registers in the PTX", pytrace=False)
    for what, (own, wanted) in facts["launched"].items():
        if own != wanted:
            pytest.fail(f"{build} would be launched with {what} {own}, Triton says {wanted}", pytrace=False)
    return log, facts


def _faults(build: Build, log: str, facts: dict[str, int], listing: str) -> list[str]:
    """What is wrong with the result of a compilation."""
    shared, registers = facts["shared"], facts["registers"]
    faults = []
    if shared > SHARED_MEMORY:
        faults.append(f"{shared} bytes of shared memory, the chip has {SHARED_MEMORY}")
    spills = re.search(r"(\d+) bytes spill stores", log)
    if spills is None or int(spills[1]) > build.spills:
        faults.append(f"{spills[0]}, {build.spills} allowed" if spills else f"ptxas does not report spills: {log}")
    print(f"{build}: {shared} bytes of shared memory, {spills and spills[0]}, {registers} registers")
    # ptxas keeps the number asked for
    if registers and not re.search(rf"USETMAXREG\.TRY_ALLOC\S* UP\d, {registers:#x} ;", listing):
        faults.append(f"ptxas dropped setmaxnreg for {registers} registers")
    # C75xx: it serialises wgmma, or ignores setmaxnreg
    faults += [line.strip() for line in log.splitlines() if re.search(r"\bC75\d\d\b", line)]
    # the padding aside all the code must have been followed, or unwritten reads could be overlooked
    missed = [str(x.text) for x in sass.unreached(listing) if x.base not in ("NOP", "BRA")]
    faults += [f"no path found to {len(missed)} instructions, first: {missed[0]}"] if missed else []
    unwritten = [str(offender) for offender in sass.unwritten_reads(listing)]
    faults += unwritten[:10]
    faults += [f"and {len(unwritten) - 10} more such reads"] if len(unwritten) > 10 else []
    return faults


BUILDS = [*FORWARD, *QUERY, *ONE_PASS, *GLUON]
FIRST = {build.kernel: build for build in reversed(BUILDS)}  # of each kernel; the others at night


@pytest.mark.skipif(torch.cuda.is_available(), reason="checked on machines without a GPU, which have the time")
@pytest.mark.parametrize(
    "build", [pytest.param(b, marks=[] if b is FIRST[b.kernel] else pytest.mark.nightly, id=str(b)) for b in BUILDS]
)
def test_kernel_builds(build: Build, tmp_path: Path) -> None:
    nvdisasm = _nvdisasm()
    log, facts = (_gluon if build in GLUON else _cuda)(build, tmp_path)
    faults = _faults(build, log, facts, sass.disassemble(nvdisasm, tmp_path / "kernel.cubin"))
    if faults:
        pytest.fail("\n".join([f"{build}:", *faults]), pytrace=False)


# ---------------------------------------------------------------- the check of uniform registers itself

_DESCRIPTOR = """
        /*0040*/                   UIADD3 UR30, UR4, 0x2000, URZ ;
        /*0050*/                   UMOV UR31, 0x40000040 ;
"""
_SKIP = """
        /*0060*/              @!P0 BRA `(.L_x_1) ;
"""
_LISTING = """
.text.kernel:
        /*0000*/                   UMOV UR4, 0x400 ;
        /*0010*/                   ULDC UR5, c[0x0][0x210] ;
        /*0020*/                   UISETP.GE.AND UP0, UPT, UR5, 0x1, UPT ;
        /*0030*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0 ;
{before_loop}
.L_x_0:
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR28].tnspB, R24, gsb0 ;
        /*0080*/                   UIADD3 UR5, UR5, -0x1, URZ ;
        /*0090*/                   UISETP.NE.AND UP0, UPT, UR5, URZ, UPT ;
        /*00a0*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0 ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR28].tnspB, R24, gsb0 ;
        /*00d0*/                   EXIT ;
.L_x_2:
        /*00e0*/                   BRA `(.L_x_2);
"""


def test_a_preheader_that_a_branch_skips_is_found() -> None:
    (offender,) = sass.unwritten_reads(_LISTING.format(before_loop=_SKIP + _DESCRIPTOR))
    assert (offender.instruction.address, offender.registers) == (0xC0, (30, 31))
    assert [write.address for write in offender.missed] == [0x40, 0x50]
    assert str(offender).startswith("0xc0 HGMMA.64x128x16") and "UR30, UR31 may be unwritten" in str(offender)


def test_descriptors_made_before_the_branch_are_fine() -> None:
    listing = _LISTING.format(before_loop=_DESCRIPTOR + _SKIP)
    assert sass.unwritten_reads(listing) == []
    assert [instruction.address for instruction in sass.unreached(listing)] == [0xE0]


def test_indirect_branches_are_followed() -> None:
    listing = """
        /*0000*/                   BRX R6 -0x10             (*"BRANCH_TARGETS .L_x_0,.L_x_1"*);
.L_x_0:
        /*0010*/                   UMOV UR4, URZ ;
.L_x_1:
        /*0020*/                   MOV R2, UR4 ;
        /*0030*/                   EXIT ;
"""
    assert [offender.instruction.address for offender in sass.unwritten_reads(listing)] == [0x20]
    with pytest.raises(ValueError, match="without targets"):
        sass.unwritten_reads(re.sub(r"\(\*.*\*\)", "", listing))


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("UIADD3 UR40, UP0, UR36, 0x2, URZ", {36}, {40}),
        ("UIADD3.X UR41, UR7, 0x40000040, URZ, UP0, !UPT", {7}, {41}),
        ("UIADD3.64 UR44, UR40, 0x2, URZ", {40, 41}, {44, 45}),
        ("UIMAD.WIDE.U32 UR10, UR11, UR18, UR12", {11, 18, 12, 13}, {10, 11}),
        ("USHF.L.U64.HI UR5, UR4, 0x2, UR6", {4, 6}, {5}),
        ("UISETP.GE.AND UP2, UPT, UR50, UR51, UPT", {50, 51}, set()),
        ("ULOP3.LUT UP0, UR15, UR16, 0xff, URZ, 0xc0, !UPT", {16}, {15}),
        ("ULDC.64 UR48, c[0x0][0x208]", set(), {48, 49}),
        ("@P2 R2UR P0, UR6, R0", set(), {6}),
        ("S2UR UR4, SR_CgaCtaId", set(), {4}),
        ("VOTEU.ANY UR5, UPT, PT", set(), {5}),
        ("REDUX.SUM.S32 UR9, R7", set(), {9}),
        ("ELECT P0, URZ, PT", set(), set()),
        ("MOV R3, UR5", {5}, set()),
        ("IMAD.WIDE.U32 R4, R4, R33, UR8", {8, 9}, set()),
        ("IMAD.WIDE.U32 R2, R8, UR9, R2", {9}, set()),
        ("LDS.64 R120, [UR18+0x38180]", {18}, set()),
        ("@P4 STG.E.64 desc[UR48][R24.64+0x20], R62", {48, 49}, set()),
        ("SYNCS.EXCH.64 URZ, [UR8+0x1c7a0], UR6", {6, 7, 8}, set()),
        ("@UP0 UTMALDG.4D [UR8], [UR16]", {8, 9, 10, 11, 12, 13, 16, 17}, set()),
        ("@UP0 UTMASTG.4D [UR8], [UR22]", {8, 9, 10, 11, 12, 22, 23}, set()),
        ("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR40], RZ, !UPT", {40, 41, 42, 43}, set()),
        ("HGMMA.64x128x16.F32.BF16 R24, R132, gdesc[UR16].tnspB, R24, gsb0", {18, 19}, set()),
        ("BRA.DIV UR8, `(.L_x_0)", {8}, set()),
        ("UTMACCTL.PF [UR14]", {14, 15}, set()),
        ("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xa0", set(), set()),
        ("VOTEU.ALL UP0, P0", set(), set()),
        ("UFLO.U32.SH UR13, UR12", {12}, {13}),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12+0x38270], R3", {12}, set()),
        ("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16].tnspB, R24, !UP0", {18, 19}, set()),
    ],
)
def test_registers_of_an_instruction(text: str, reads: set[int], writes: set[int]) -> None:
    (instruction,), _ = sass.parse(f"        /*0000*/  {text} ;")
    assert sass.accesses(instruction) == (reads, writes)
