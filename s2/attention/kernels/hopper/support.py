"""Which calls the Hopper kernels take, and why not."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from ... import schedule
from ...pattern import UNBOUNDED, Pattern, pattern_from_key
from . import forward
from .problem import TILE, heads_per_tile

_SMALLEST_BLOCK = 16
_FEWEST_QUERIES = 256  # a tile has 192 or 256 rows
_TOO_FEW = f"it takes as many queries as keys, or at least {_FEWEST_QUERIES}"
_NVRTC = (
    13  # the version that kernels are built and checked with; ptxas 12.8 has made wrong code (`gluon.common.opaque`)
)


def objection(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: bool, late: bool = False) -> str:
    """Why the kernels do not take this call; empty if they do. `late`: packed queries at the end of longer keys. Warns
    once where NVRTC is missing."""
    # texts are constant, since torch.compile goes through here
    if not on_hopper(q):
        return "it runs on devices of compute capability 9.0 (sm_90)"
    if not _can_compile():
        return "it needs NVRTC 13 (packages cuda-bindings and nvidia-cuda-nvrtc)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return "it takes float16 and bfloat16"
    if q.shape[-1] not in forward.STAGES:
        return "it takes head dimensions 64 and 128"
    if q.numel() == 0:
        return "there are no queries"
    if late and (q.shape[0] < _FEWEST_QUERIES or k.numel() == 0):
        return _TOO_FEW
    if not packed and q.shape[1] != k.shape[1] and q.shape[1] < _FEWEST_QUERIES:
        return _TOO_FEW
    if pattern.block_size < _SMALLEST_BLOCK or q.shape[-2] // k.shape[-2] % heads_per_tile(pattern.block_size):
        return "blocks of 32 and 16 need a multiple of 2 and 4 query heads to a KV head"
    if not _has_closed_form(pattern.key):
        return "the pattern has no closed form (a mask, more than two strides, or one that does not divide the next)"
    if not is_deadlock_free(pattern.key, q.shape[-1]):
        return "large blocks (of 256, or of 128 with two of them) cannot have levels that end"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _has_readable_strides(x):
            return _UNREADABLE[name]
    return ""


def supports(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: bool, late: bool = False) -> bool:
    """Whether there is no `objection`."""
    return not objection(q, k, v, pattern, packed, late)


def on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


@torch.compiler.assume_constant_result
def _can_compile() -> bool:
    return _finds_nvrtc()


@functools.cache
def _finds_nvrtc() -> bool:
    """Whether there is what `driver` compiles with; warns if not."""
    package = "cuda-bindings"
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        package = "nvidia-cuda-nvrtc"
        code, major, minor = nvrtc.nvrtcVersion()
        if not code and major >= _NVRTC:
            return True
        reason = f"found is NVRTC {major}.{minor}"
    except Exception as error:  # its types differ between versions of cuda-bindings
        reason = str(error)
    warnings.warn(
        f"the Hopper kernels need the package {package} of version {_NVRTC}; Triton's, which are slower, run in their "
        f"place ({reason})",
        stacklevel=6,  # the call of s2_attention
    )
    return False


_UNREADABLE = {
    name: f"the strides of {name} (expanded or padded?) are not what TMA reads, 1 for the last dimension and positive "
    f"multiples of 8 elements for the others; {name}.contiguous() has such strides"
    for name in "qkv"
}
AVOIDABLE = frozenset(_UNREADABLE.values())  # by copying the caller's tensors


@torch.compiler.assume_constant_result
def warn_once(objection: str) -> None:
    if objection not in _said:
        _said.add(objection)
        warnings.warn(
            f"Triton's kernels, which are slower, run in place of the Hopper kernels: {objection}", stacklevel=4
        )


_said: set[str] = set()


@torch.compiler.assume_constant_result
def _has_closed_form(key: str) -> bool:
    return schedule.has_closed_form(pattern_from_key(key))


@torch.compiler.assume_constant_result
def is_deadlock_free(key: str, head_dim: int) -> bool:
    """Whether the pipeline of the forward cannot deadlock for this pattern. A consumer holds the values of its last key
    tile until it has skipped to the next one that it sees; the others get a pipeline of stages further meanwhile, and
    their keys another one: the next tile must be within two pipelines. Between two tiles that it sees may lie

    - the partial tiles of the other consumers: `consumers - 1`,
    - those of levels that end within the tile's rows, and of the window, which moves on with each block of rows."""
    pattern, consumers = pattern_from_key(key), forward.CONSUMERS[head_dim]
    block = pattern.block_size
    row_blocks = -(-(consumers - 1) * min(block, TILE) // block)  # of the tile's rows, after the first one's
    ends = max(
        sum(-(-row_blocks // stride) for stride, end in rule.ranges if end < UNBOUNDED)
        for rule in pattern.heads or (pattern,)
    )
    skipped = consumers - 1 + (ends + row_blocks) * max(block // TILE, 1)
    return skipped + 1 < 2 * forward.STAGES[head_dim]


def _has_readable_strides(x: Tensor) -> bool:
    """TMA reads rows with unit stride that start at multiples of 16 bytes."""
    return x.stride(-1) == 1 and all(stride % 8 == 0 and stride > 0 for stride in x.stride()[:-1])
