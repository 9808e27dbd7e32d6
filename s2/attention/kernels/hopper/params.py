"""What the CUDA C++ kernels are given, laid out as C++ does: parameters, and shared memory."""

import ctypes

from . import driver

_Map = driver.MAP  # TensorMap of hopper.cuh
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


class Columns(ctypes.Structure):
    """Columns of n_blocks.cuh."""

    _fields_ = (
        ("tiles", ctypes.c_int * 4),
        ("segments", ctypes.c_int * 4),
        ("batches", ctypes.c_int * 4),
        ("segment_rows", ctypes.c_int),
        ("num_parts", ctypes.c_int),
        ("wave", ctypes.c_int),
    )


class Backward(ctypes.Structure):
    """Params of backward.cu."""

    _fields_ = (
        ("q", _Map),
        ("dout", _Map),
        ("k", _Map),
        ("v", _Map),
        ("stats", ctypes.c_void_p),
        ("dk", ctypes.c_void_p),
        ("dv", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("documents", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("length", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("group", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("num_items", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("most_tiles", ctypes.c_int),
        ("columns", Columns),
    )


class Passes(ctypes.Structure):
    """Params of passes.cu."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("dout", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("dlse", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("dq", ctypes.c_void_p),
        ("documents", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("length", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("blocks", ctypes.c_int),
    )


def shared_bytes(head_dim: int, consumers: int, stages: int) -> int:
    """Size of Shared in rows.cuh."""
    box = _ROWS * head_dim * 2
    tile = 4 * (8 + 3 * consumers + 32 + 4 * 4)
    barriers = 2 * consumers * _ROW_SLOTS + 4 * stages + 2 * _PLANNED + 1
    return (consumers * _ROW_SLOTS + 2 * stages) * box + _PLANNED * tile + 8 * barriers


def backward_shared_bytes(head_dim: int) -> int:
    """Size of Shared in backward.cu."""
    panel = _ROWS * 128
    box = _ROWS * head_dim * 2
    items, consumers, ranks, stages = 2, 2, 2, 2
    item = 4 * (9 + 2 * consumers + 8 * consumers + 16 * consumers)
    barriers = 6 * stages + 2 + 2 + 2 * items + 2 + 2
    rows = stages * (2 * box + 8 * _ROWS)
    dscores = stages * ranks * consumers * panel
    return (2 * consumers + 1) * box + consumers * panel + rows + dscores + items * item + 8 * barriers + 8
