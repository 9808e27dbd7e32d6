"""The kernels over pages build for sm_90 as they are launched there, within shared memory and without spills to speak
of, checked without a GPU on what ptxas says."""

import os
import subprocess
import sys

import pytest

from tests.attention.building import build, nightly

SHARED_MEMORY = 227 * 1024  # of a multiprocessor on sm_90
SPILLS = 64  # bytes

# Compiling needs Triton outside interpreter mode, which is fixed at import: so it happens in a child process.
CHILD = """
import json
import sys

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s2.attention.kernels.triton import paged
from s2.attention.kernels.triton.paged_launch import Grid

knobs.nvidia.dump_ptxas_log = True
case = json.loads(sys.argv[1])
dtype, dim, block = getattr(torch, case["dtype"]), case["head_dim"], case["block"]
if case["kernel"] == "attention_paged":
    q = torch.empty(max(case["queries"], 8), 8 * case["group"], dim, dtype=dtype, device="meta")
    grid = Grid.of(q, 8, 8, block, case["queries"], 131072, case["splits"])
    levels = {"LEVELS": case["levels"], "SINKS": True}
    constants, num_warps = grid.constants | {"UNIT": 8} | levels, grid.num_warps
else:
    constants = {"UNIT": 8, "D": dim, "WIDTH": triton.next_power_of_2(dim), "BLOCK": block, "TOKENS": 16}
    num_warps = 4
element = {"bfloat16": "*bf16", "float32": "*fp32"}[case["dtype"]]
kernel = getattr(paged, case["kernel"])
types, names = {}, kernel.arg_names
for name in names:
    if name in constants:
        types[name] = "constexpr"
    elif name in ("tables", "rules", "seq_lens", "cu_seqlens", "arrivals"):
        types[name] = "*i32"
    elif name == "offsets":
        types[name] = "*i64"
    elif name in ("lse", "partials", "logs"):
        types[name] = "*fp32"
    elif name in ("q", "k", "v", "out", "new_k", "new_v"):
        types[name] = element
    else:
        types[name] = "fp32" if name.startswith("scale") else "i32"
aligned = {
    (n,): [["tt.divisibility", 16]]
    for n, (name, parameter) in enumerate(zip(names, kernel.params, strict=True))
    if types[name][0] == "*" and not parameter.do_not_specialize_on_alignment
    or "stride" in name and not parameter.do_not_specialize
}
used = {(n,): constants[name] for n, name in enumerate(names) if name in constants}
built = triton.compile(
    ASTSource(kernel, types, used, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}
)
ptx = built.asm["ptx"]
print(json.dumps({"shared": built.metadata.shared, "asynchronous": ptx.count("cp.async.cg")}))
"""


@pytest.mark.parametrize(
    ("head_dim", "block", "group", "queries", "splits", "levels"),
    [
        nightly(128, 64, 4, 1, 4, 1),
        nightly(128, 64, 4, 1, 1, 1),
        nightly(128, 64, 1, 1, 4, 2),
        nightly(128, 16, 4, 1, 4, 1),
        nightly(64, 64, 4, 8, 4, 1),
        nightly(256, 64, 4, 1, 4, 1),
        nightly(128, 64, 4, 2048, 1, 1),
        nightly(128, 16, 4, 2048, 1, 1),
        nightly(128, 64, 1, 2048, 1, 2),
        nightly(128, 64, 4, 200, 4, 1),
        nightly(64, 64, 4, 2048, 1, 1),
        nightly(256, 64, 4, 2048, 1, 1),
    ],
)
def test_attention_to_pages_is_built(tmp_path, head_dim, block, group, queries, splits, levels):
    case = {"head_dim": head_dim, "block": block, "group": group, "queries": queries, "splits": splits}
    facts = build(CHILD, tmp_path, kernel="attention_paged", dtype="bfloat16", levels=levels, **case)
    print(case, facts)
    assert facts["spills"] <= SPILLS, facts
    assert facts["shared"] <= SHARED_MEMORY, facts
    assert facts["asynchronous"] > 0, "pages are loaded ahead, 16 bytes at a time"


@pytest.mark.nightly
@pytest.mark.parametrize("queries", [1, 300])
def test_attention_to_pages_in_float32_is_built(tmp_path, queries):
    case = {"head_dim": 128, "block": 64, "group": 4, "queries": queries, "splits": 1, "levels": 1}
    facts = build(CHILD, tmp_path, kernel="attention_paged", dtype="float32", **case)
    assert facts["shared"] <= SHARED_MEMORY, facts


@pytest.mark.nightly
def test_writing_into_pages_is_built(tmp_path):
    facts = build(CHILD, tmp_path, kernel="write_pages", dtype="bfloat16", head_dim=80, block=16)
    assert facts["spills"] == 0, facts


PARTS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from s2.attention.kernels.triton import paged

backend, seen = make_backend(GPUTarget("cuda", 90, 32)), set()
for kernel in (paged.attention_paged, paged.write_pages):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    for first, width in ((0, 64), (1, 64), (3, 63), (0, 1)):
        values = {}
        for parameter in kernel.params:
            if parameter.name in ("tables", "seq_lens", "cu_seqlens"):
                values[parameter.name] = torch.zeros(99, dtype=torch.int32)[first:]
            else:
                values[parameter.name] = width if parameter.name == "stride_table" else 64
        seen.add((kernel.__name__, str(bind(**values)[1])))
assert len(seen) == 2, seen
"""


def test_parts_of_a_batch_and_tables_of_any_width_take_the_same_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", PARTS], env=environment, check=True)
