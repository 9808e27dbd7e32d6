"""Out of memory, by whatever name a library reports it, said in one sentence that helps."""

from __future__ import annotations

import re
from collections.abc import Iterator

from s2 import ending

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
_ALMOST_NONE = 0.03  # share of the device's memory that is free when a library finds none for its workspace


class OutOfMemoryError(MemoryError):
    """Training needs more memory than there is."""

    exit_code = ending.OUT_OF_MEMORY


def is_out_of_memory(error: BaseException, *, device_is_full: bool) -> bool:
    """Whether an exception, or one that it came from, means that memory ran out.

    Args:
        device_is_full: whether next to nothing was free when it was raised, which decides about errors that have other
            causes too.
    """
    for cause in _causes(error):
        text = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, MemoryError) or _SURE.search(text) or (device_is_full and _PERHAPS.search(text)):
            return True
    return False


def device_is_full() -> bool:
    """Whether next to no memory of this process's GPU is free outside of torch's cache; False without one."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < _ALMOST_NONE * total


def usage() -> str:
    """What this process's GPU held at most, to stand beside the estimate; empty without one."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    free, total = torch.cuda.mem_get_info()
    ours, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    others = max(total - free - torch.cuda.memory_reserved(), 0)
    return (
        f"; of {total / 2**30:.1f} GiB torch held at most {ours / 2**30:.1f} in tensors, {reserved / 2**30:.1f} with "
        f"its cache, libraries and other processes {others / 2**30:.1f}"
    )


def advice(phase: str, estimate: str, checkpointing: str, stage: int, micro_batch_size: int, ranks: int) -> str:
    """The sentence that a run ends with.

    Args:
        phase: what was being done (`step 3`).
        estimate: what the launch said that it would take.
        checkpointing, stage, micro_batch_size, ranks: as the run has them; what can still be turned is named.
    """
    turns = []
    if micro_batch_size > 1:
        turns.append(f"data.micro_batch_size below {micro_batch_size}")
    if checkpointing != "full":
        turns.append(f"model.activation_checkpointing={'selective or full' if checkpointing == 'none' else 'full'}")
    if stage < 3 and ranks > 1:
        turns.append(f"trainer.strategy=zero_{stage + 1}")
    if ranks == 1 or stage == 3:
        turns.append("more GPUs with trainer.strategy=zero_3")
    turns.append(f"trainer.strategy={'zero_3_offload' if stage == 3 else 'zero_2_offload'}")
    return f"out of memory in {phase}; the estimate was {estimate}. In this order: {'; '.join(turns)}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
