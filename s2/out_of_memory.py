"""Running out of memory, by whatever name a library reports that."""

from __future__ import annotations

import re

# What the allocator, cuDNN, cuBLAS, NCCL, the driver and the CPU's allocator say when there is no memory left. cuDNN
# and cuBLAS report a failed allocation of their workspaces as an internal or an execution error; these count only with
# little memory free (`device_is_full`).
_SURE = re.compile(
    r"out of memory|OutOfMemory|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED|CUSPARSE_STATUS_ALLOC_FAILED"
    r"|CUSOLVER_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|can't allocate memory|Cannot allocate memory"
    r"|DefaultCPUAllocator|std::bad_alloc",
    re.IGNORECASE,
)
_PERHAPS = re.compile(
    r"CUDNN_STATUS_(INTERNAL_ERROR|EXECUTION_FAILED|NOT_INITIALIZED)|CUBLAS_STATUS_(INTERNAL_ERROR|NOT_INITIALIZED"
    r"|EXECUTION_FAILED)|ncclUnhandledCudaError|ncclSystemError|unhandled cuda error",
    re.IGNORECASE,
)


def is_out_of_memory(
    error: BaseException, *, handled: BaseException | None = None, device_is_full: bool = False
) -> bool:
    """Whether an exception, or one that it came from, means that memory ran out.

    Args:
        handled: what was being handled when the work began (`sys.exception()`): it and what it came from do not count.
        device_is_full: next to nothing was free when it was raised, so that errors that have other causes too count.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause is not handled and cause not in seen:
        text = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, MemoryError) or _SURE.search(text) or (device_is_full and _PERHAPS.search(text)):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False
