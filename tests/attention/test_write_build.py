"""The kernel that writes new keys and values builds for sm_90 as it is launched there, checked without a GPU."""

import pytest

from tests.attention.building import build, nightly

# Compiling needs Triton outside interpreter mode, which is fixed at import: so it happens in a child process.
CHILD = """
import json
import re
import sys

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s2.attention.kernels.triton.write import Grid, write_slots

knobs.nvidia.dump_ptxas_log = True
case = json.loads(sys.argv[1])
dtype = getattr(torch, case["dtype"])
grid = Grid.of(case["tokens"], case["head_dim"], dtype.itemsize, case["block"])
constants = grid.constants | {"REGIONS": case["regions"]}
element = {"bfloat16": "*bf16", "float32": "*fp32"}[case["dtype"]]
types, names = {}, write_slots.arg_names
for name in names:
    if name in constants:
        types[name] = "constexpr"
    elif name in ("table", "before", "after"):
        types[name] = "*i32"
    else:
        types[name] = element if name in ("new_k", "new_v", "k", "v") else "i32"
aligned = {
    (n,): [["tt.divisibility", 16]]
    for n, (name, parameter) in enumerate(zip(names, write_slots.params, strict=True))
    if types[name][0] == "*" and not parameter.do_not_specialize_on_alignment or "stride" in name
}
used = {(n,): constants[name] for n, name in enumerate(names) if name in constants}
built = triton.compile(
    ASTSource(write_slots, types, used, aligned), target=GPUTarget("cuda", 90, 32),
    options={"num_warps": grid.num_warps},
)
wide = built.asm["ptx"].count("st.global.v4.b32")
offsets = [line for line in built.asm["ttir"].splitlines() if re.search("%(from|to)_.*arith.muli", line)]
print(json.dumps({"shared": built.metadata.shared, "wide": wide, "offsets": offsets}))
"""


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype", "block", "regions"),
    [
        nightly(32768, 128, "bfloat16", 64, 3),
        nightly(1, 128, "bfloat16", 64, 3),
        nightly(8, 80, "bfloat16", 16, 4),
        nightly(3000, 256, "float32", 256, 1),
    ],
)
def test_writing_is_built(tmp_path, tokens, head_dim, dtype, block, regions):
    case = {"tokens": tokens, "head_dim": head_dim, "block": block, "regions": regions}
    facts = build(CHILD, tmp_path, dtype=dtype, **case)
    print(case, {name: facts[name] for name in ("spills", "registers", "wide")})
    assert facts["spills"] == facts["shared"] == 0
    assert (facts["wide"] > 0) == (tokens > 1), "rows of a prompt are copied 16 bytes at a time"
    assert len(facts["offsets"]) == 12 and all("i64" in line for line in facts["offsets"]), (
        "stores may have more than 2^31 elements"
    )
