"""Every tile configuration compiles for its chip within that chip's shared memory, checked without a GPU."""

import os
import subprocess
import sys

import pytest

# Compiling needs Triton outside interpreter mode, which is fixed at import: so it happens in a child process.
CHILD = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from s2.attention.kernels.triton import backward, config, documents, forward

LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
INT32 = ("table", "key_offsets", "key_blocks", "query_offsets", "query_blocks", "documents", "cu_seqlens", "others",
         "tiles")


def compile_for(chip, function, constants, tile, element):
    types = {}
    for name in function.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "rows0", "rows1", "rows2"):
            types[name] = "*" + element
        elif name in ("lse", "delta", "dlse"):
            types[name] = "*fp32"
        elif name in INT32:
            types[name] = "*i32"
        else:
            types[name] = "fp32" if name.startswith("scale") else "i32"
    aligned = [n for n, t in types.items() if t[0] == "*" or n.startswith("stride")]
    attributes = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(function, types, {(function.arg_names.index(n),): c for n, c in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": tile.num_warps})


chip, element, head_dim, block = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
late = sys.argv[5] == "True"
capability, itemsize = divmod(chip, 10), 4 if element == "fp32" else 2
d0, d1 = config.split_head_dim(head_dim, itemsize, capability)
common = dict(TABLE=8, D=head_dim, D0=d0, D1=d1, BLOCK=block, LEVELS=1, SINKS=True, LISTS=False, PACKED=True,
              LATE=late)
for kind, function in (
    ("forward", forward.attention_forward),
    ("backward_q", backward.attention_backward_q),
    ("backward_kv", backward.attention_backward_kv),
):
    tile = getattr(config, kind + "_config")(head_dim, itemsize, capability)
    constants = dict(common, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages)
    if kind != "backward_kv":
        constants["PACK"] = 1
    shared = compile_for(chip, function, constants, tile, element).metadata.shared
    print(kind, tile, shared)
    assert shared <= LIMIT[chip], f"{kind} {tile}: {shared} bytes of shared memory, the chip has {LIMIT[chip]}"
for side in ("queries", "keys") if late else ("both",):
    constants = dict(TILE=64, BLOCK=block, EXTRA=2, SIDE=side, SCANNED=256)
    compile_for(chip, documents.attention_tiles, constants, tile, element)
"""


@pytest.mark.parametrize(
    ("chip", "element", "head_dim", "block", "late"),
    [
        (80, "bf16", 128, 64, True),
        pytest.param(80, "bf16", 128, 64, False, marks=pytest.mark.nightly),
        pytest.param(89, "fp32", 64, 16, False, marks=pytest.mark.nightly),
        pytest.param(86, "bf16", 128, 64, False, marks=pytest.mark.nightly),
        pytest.param(86, "bf16", 256, 64, False, marks=pytest.mark.nightly),
        pytest.param(90, "bf16", 96, 16, True, marks=pytest.mark.nightly),
        pytest.param(90, "bf16", 256, 128, False, marks=pytest.mark.nightly),
    ],
)
def test_configuration_fits_the_chip(chip, element, head_dim, block, late):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-c", CHILD, str(chip), element, str(head_dim), str(block), str(late)]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
