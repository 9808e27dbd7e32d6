"""What the CUDA C++ kernel is given, laid out as C++ does: parameters, and shared memory."""

import ctypes

_Map = ctypes.c_uint64 * 16  # TensorMap of hopper.cuh
_ROWS = 64  # of a box (plan.cuh)
_PLANNED = 2  # tiles whose plans are in shared memory (rows.cuh)
_ROW_SLOTS = 2  # tiles whose rows are


class Problem(ctypes.Structure):
    """Problem of rows.cuh."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("documents", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("length", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("group", ctypes.c_int),
        ("tiles_per_head", ctypes.c_int),
        ("num_tiles", ctypes.c_int),
        ("together", ctypes.c_int),
    )


class Forward(ctypes.Structure):
    """Params of forward.cu."""

    _fields_ = (
        ("q", _Map),
        ("k", _Map),
        ("v", _Map),
        ("out", _Map),
        ("problem", Problem),
        ("out_rows", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("scale_log2", ctypes.c_float),
    )


def shared_bytes(head_dim: int, consumers: int, stages: int) -> int:
    """Size of Shared in rows.cuh."""
    box = _ROWS * head_dim * 2
    tile = 4 * (8 + 3 * consumers + 32 + 4 * 4)
    barriers = 2 * consumers * _ROW_SLOTS + 4 * stages + 2 * _PLANNED
    return (consumers * _ROW_SLOTS + 2 * stages) * box + _PLANNED * tile + 8 * barriers
