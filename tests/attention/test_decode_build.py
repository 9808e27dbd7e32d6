"""The decode kernels build for sm_90 as they are launched there, within shared memory and without spills to speak of,
checked without a GPU on what ptxas says."""

import pytest

from tests.attention.building import build, nightly

SHARED_MEMORY = 227 * 1024  # of a multiprocessor on sm_90
REGISTERS = 64 * 1024
SPILLS = 8  # bytes: rather than fit a program less on a multiprocessor, ptxas of Triton 3.6 spills a register or two
SPILLED_ADDRESSES = 80  # of two warps, each of which loads half a tile: faster than four all the same

# Compiling needs Triton outside interpreter mode, which is fixed at import: so it happens in a child process.
CHILD = """
import json
import sys

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s2.attention.kernels.triton.config import decode_config
from s2.attention.kernels.triton.decode import attention_decode
from s2.attention.kernels.triton.decode_launch import Grid
from s2.attention.kernels.triton.decode_plan import plan_decode, share_words

case = json.loads(sys.argv[1])
dtype, dim, batch = getattr(torch, case["dtype"]), case["head_dim"], case["batch"]
q = torch.empty(batch, case["tokens"], 8 * case["group"], dim, dtype=dtype, device="meta")
k = torch.empty(batch, 8, 131072, dim, dtype=dtype, device="meta")
grid = Grid.of(q, k, case["block"], 4)
words = {"REGIONS": case["regions"], "WORDS": share_words(case["regions"])}
element = {"bfloat16": "*bf16", "float32": "*fp32"}[case["dtype"]]


def compiled(function, constants, num_warps):
    types, names = {}, function.arg_names
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("table", "lengths", "arrivals", "shares"):
            types[name] = "*i32"
        elif name in ("lse", "partials", "logs"):
            types[name] = "*fp32"
        elif name in ("q", "k", "v", "out"):
            types[name] = element
        else:
            types[name] = "fp32" if name.startswith("scale") else "i32"
    is_aligned = [types[name][0] == "*" or "stride" in name for name in names]
    aligned = {(n,): [["tt.divisibility", 16]] for n, whole in enumerate(is_aligned) if whole}
    used = {(n,): constants[name] for n, name in enumerate(names) if name in constants}
    source = ASTSource(function, types, used, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


compiled(plan_decode, grid.planned | words, 1)
knobs.nvidia.dump_ptxas_log = True
kernel = compiled(attention_decode, grid.constants | words, grid.num_warps)
per_processor = decode_config(dim, dtype.itemsize, (9, 0)).per_processor
print(json.dumps({"shared": kernel.metadata.shared, "threads": 32 * grid.num_warps, "programs": per_processor}))
"""


@pytest.mark.parametrize(
    ("head_dim", "block", "group", "tokens", "batch", "regions"),
    [
        nightly(128, 64, 4, 2, 1, 4),
        nightly(128, 64, 4, 1, 1, 3),
        nightly(128, 64, 4, 1, 16, 3),
        nightly(128, 16, 4, 1, 1, 4),
        nightly(128, 64, 1, 1, 16, 1),
        nightly(128, 64, 4, 8, 1, 3),
        nightly(128, 64, 8, 8, 4, 3),
        nightly(64, 64, 4, 1, 1, 3),
        nightly(64, 64, 1, 1, 16, 1),
        nightly(64, 16, 4, 8, 1, 3),
        nightly(256, 64, 4, 1, 1, 3),
        nightly(256, 64, 4, 8, 1, 3),
    ],
)
def test_decoding_is_built_without_spills(tmp_path, head_dim, block, group, tokens, batch, regions):
    case = {"head_dim": head_dim, "block": block, "group": group, "tokens": tokens, "batch": batch, "regions": regions}
    facts = build(CHILD, tmp_path, dtype="bfloat16", **case)
    print(case, facts)
    assert facts["spills"] <= (SPILLED_ADDRESSES if facts["threads"] == 64 else SPILLS), facts
    # as many programs fit a multiprocessor as the grid counts on; a tall tile may have it for itself
    programs = 1 if group * tokens > 16 else facts["programs"]
    assert programs * facts["shared"] <= SHARED_MEMORY, facts
    assert programs * facts["threads"] * facts["registers"] <= REGISTERS, facts


@pytest.mark.nightly
def test_decoding_in_float32_is_built(tmp_path):
    case = {"head_dim": 256, "block": 64, "group": 4, "tokens": 1, "batch": 2, "regions": 3}
    facts = build(CHILD, tmp_path, dtype="float32", **case)
    print(facts)
    assert facts["shared"] <= SHARED_MEMORY
