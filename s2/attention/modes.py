"""What may surround a call: dispatch modes, tracing and autocast. The only module that asks torch for private names;
in a torch without one of them calls are slower, not wrong."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def private(name: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.<name>`, or `fallback` where this torch has none."""
    try:
        return operator.attrgetter(name)(torch)
    except AttributeError:
        return fallback


_dispatch_modes = private("_C._len_torch_dispatch_stack", lambda: 1)  # as if something watched
_functorch_level = private("_C._functorch.peek_interpreter_stack", lambda: 1)
sdp_order = private("_C._get_sdp_priority_order", lambda: None)  # of torch's dense kernels; None: not known


def apply_function(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without a look for functorch's wrappers, a tenth of a call: where `is_plain` there are none."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing watches the ops (compilation, dispatch modes such as selective checkpointing or FakeTensor,
    functorch, tensor subclasses): then a call may skip the dispatcher, which takes as long as the rest of its host
    side."""
    return (
        not torch.compiler.is_compiling()
        and _dispatch_modes() == 0
        and _functorch_level() is None
        and _PLAIN.issuperset(map(type, tensors))
    )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Ops on the device of x compute in the types they are given."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
