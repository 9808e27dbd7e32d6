"""Running out of memory is recognised under its many names, and where something else went wrong after it."""

from __future__ import annotations

import pytest
import torch

from s2.inference.folder import memory_for
from s2.out_of_memory import is_out_of_memory

CUDNN = "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"


@pytest.mark.parametrize(
    ("error", "full", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False, True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), False, True),
        (MemoryError(), False, True),
        (RuntimeError(CUDNN), True, True),
        (RuntimeError(CUDNN), False, False),
        (RuntimeError("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"), True, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True, False),
    ],
)
def test_names_of_running_out_of_memory(error: Exception, full: bool, expected: bool) -> None:
    assert is_out_of_memory(error, device_is_full=full) is expected
    outer = RuntimeError("while running compiled code")
    outer.__cause__ = error
    assert is_out_of_memory(outer, device_is_full=full) is expected


def test_memory_that_ran_out_before_is_not_what_went_wrong_now() -> None:
    """Who tries a smaller batch after one that found no memory."""

    def fails(error: Exception) -> None:
        with memory_for("it", torch.device("cpu"), "lower it"):
            raise error

    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError as before:
        assert not is_out_of_memory(before, handled=before)
        with pytest.raises(RuntimeError, match="another") as seen:
            fails(RuntimeError("another"))
        assert seen.value.__context__ is before
        assert is_out_of_memory(seen.value) and not is_out_of_memory(seen.value, handled=before)
        with pytest.raises(MemoryError, match="it does not fit into the memory of cpu; lower it"):
            fails(torch.OutOfMemoryError("CUDA out of memory"))
