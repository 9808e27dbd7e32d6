"""Parameters of the kernels in CUDA C++, declared once: for C++ as the header `params.cuh`, for the host as ctypes."""

from __future__ import annotations

import ctypes
import re
from typing import Any

from . import driver

_KINDS: dict[str, Any] = {"int": ctypes.c_int, "float": ctypes.c_float, "TensorMap": driver.MAP}
_MEMBERS = re.compile(r"^ *(?:const )?(\w+)(\*?) ([\w, \[\]]+);", re.MULTILINE)
_texts = ["#pragma once\nstruct alignas(64) TensorMap {\n    unsigned long long words[16];\n};"]


def _struct(name: str, members: str) -> type[ctypes.Structure]:
    """With these members, a pointer a line, tensor maps first: ctypes does not align them to 64 bytes. C++ checks that
    it comes to the same size, which `driver.allocate` rounds up."""
    fields = []
    for kind, pointer, names in _MEMBERS.findall(members):
        for member, _, count in (item.rstrip("]").partition("[") for item in names.split(", ")):
            one = ctypes.c_void_p if pointer else _KINDS[kind]
            fields.append((member, one * int(count) if count else one))
    structure = _KINDS[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    alignment = 64 if "TensorMap" in members else 1
    size = -(-ctypes.sizeof(structure) // alignment) * alignment
    _texts.append(f'struct {name} {{{members}}};\nstatic_assert(sizeof({name}) == {size}, "not as on the host");')
    return structure


Problem = _struct(
    "Problem",
    """
    const int* table;               // rules [heads, TABLE]
    const int* documents;           // packed: tiles of documents, see `varlen.attention_documents`, `late_documents`
    int* counter;                   // 0, and 0 again at the end
    int length, kv_heads, group;
    int offset, first_m_block;      // not packed: keys before the first query, and the m_block that it is in
    int tiles_per_head, num_tiles;  // of a KV head, and in all
    int together;                   // KV heads at the end whose tiles are done together, longest first
""",
)
Forward = _struct(
    "ForwardParams",
    """
    TensorMap q, k, v, out;  // over [B, H, S, D], boxes of one panel of 64 columns
    Problem problem;
    void* out_rows;          // out [B, S, H, D]
    float* lse;              // [B, H, S]
    float scale_log2;
""",
)
BackwardQ = _struct(
    "BackwardQParams",
    """
    TensorMap q, dout, k, v;  // over [B, H, S, D], boxes of one panel of 64 columns
    Problem problem;
    void* dq;                 // [B, S, H, D]
    const void* out;          // [B, S, H, D]
    const float* lse;         // [B, H, S]
    const float* dlse;        // [B, H, S], or null
    float* stats;             // lse2 and delta of the 64 rows of an m_block, over B, sets of heads, m_blocks
    float scale, scale_log2;
    int m_blocks;             // of a set of heads in `stats`
""",
)
Columns = _struct(
    "Columns",  # see `scheduler.Columns`
    """
    int tiles[4], segments[4], batches[4];
    int segment_rows, num_partials, wave;
""",
)
Backward = _struct(
    "BackwardParams",
    """
    TensorMap q, dout, k, v;  // over [B, H, S, D], boxes of one panel of 64 columns
    const float* stats;       // lse2 and delta of the 64 rows of an m_block, over B, sets of heads, m_blocks
    void* dk;                 // [B, S, Hkv, D]
    void* dv;
    float* dq_accum;          // dQ / scale, 64 x D of an m_block, over the same, see `stage_dq` of backward.cu
    float* partials;          // [segments, B Hkv, num_partials, dK and dV, 64, D]
    const int* table;         // rules [heads, TABLE]
    const int* documents;     // packed: items of documents, see `varlen.attention_documents`
    int* counter;             // 0, and 0 again at the end
    float scale, scale_log2;
    int length, kv_heads, group, groups;  // groups: B Hkv, each read by `group` query heads
    int num_items, m_blocks, most_tiles;  // m_blocks: of a set of heads in `stats`
    Columns columns;
""",
)
PrePost = _struct(
    "PrePostParams",
    """
    const void* out;       // [B, S, H, D]
    const void* dout;
    const float* lse;      // [B, H, S]
    const float* dlse;     // [B, H, S], or null
    float* stats;          // as in BackwardParams
    float* dq_accum;
    void* dq;              // [B, S, H, D]
    const int* documents;  // packed: tiles of documents, see `varlen.attention_documents`
    float scale;
    int length, heads;
    int m_blocks;          // of a set of heads, in `stats` and `dq_accum`
    int blocks;            // thread blocks of a set of heads
""",
)

HEADERS = {"params.cuh": "\n".join(_texts)}
