"""What may surround a call: dispatch modes, tracing and autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing watches the ops (compilation, dispatch modes such as selective checkpointing or FakeTensor,
    functorch, tensor subclasses): then a call may skip the dispatcher, which takes as long as the rest of its host
    side."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and _PLAIN.issuperset(map(type, tensors))
    )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Ops on the device of x compute in the types they are given."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
