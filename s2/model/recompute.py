"""What a block keeps for the backward pass and what it recomputes.

    none       keep everything autograd wants
    selective  keep attention outputs and the narrow projections (q, k, v, o), recompute norms, RoPE and MLP
    full       keep the block's input, recompute the block in two halves, the MLP some rows at a time

Selective keeps what costs most to recompute per byte: attention grows with the sequence while its output does
not, and the narrow projections are small beside the MLP's hidden layer, which is most of the memory.

Full is for long sequences, where even one block is large: of a 7B at 128k tokens the MLP's hidden layers and their
gradients are 19 GiB, beside 32 GiB for the inputs of all blocks. Attention needs the whole sequence, the MLP does not:
its rows are recomputed and differentiated a tile at a time, so that never more than a tile of them exists.

In neither is `down_proj` recomputed: nothing in the block needs its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

CheckpointMode = Literal["none", "selective", "full"]
CHECKPOINT_MODES: tuple[str, ...] = get_args(CheckpointMode)

TILE_ELEMENTS = 2**27  # of an MLP's hidden layer, rows times width, that exist at a time (256 MiB in bf16)
_TILE_ROWS = 128  # tiles of another length than the rest are a multiple of this, as GEMM kernels want it

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default)


def run_selectively(function: Callable[..., Any], narrow: int, *args: Any) -> Any:
    """Call `function(*args)`, keeping of it what "selective" keeps.

    Args:
        function: a block's computation; no random numbers are drawn in it.
        narrow: matrix products whose input and output are at most this wide are kept.
        args: its tensors (and constants).
    """
    if not torch.is_grad_enabled():
        return function(*args)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, narrow))
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(narrow: int, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if _is_attention(op):
        return CheckpointPolicy.MUST_SAVE
    if op in _MATMULS:
        left, right = args[-2:] if op is torch.ops.aten.addmm.default else args[:2]
        if max(*left.shape[-1:], *right.shape) <= narrow:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_attention(op: Any) -> bool:
    """The S2 op or torch's fused SDPA kernels."""
    namespace, _, name = str(op).partition(".")
    return (namespace == "s2" and name.startswith("attention_forward")) or (
        namespace == "aten" and name.startswith("_scaled_dot_product")
    )


@dataclass(frozen=True)
class Halves:
    """A block as `h = attend(x, ...)`, then `h + hidden(h) @ down.weight.T`, where rows of `h` do not depend on each
    other.

    Attributes:
        attend: `(x, *constants)` to a new tensor of `x`'s shape `[B, S, E]`.
        hidden: `[T, E]` to `[T, F]`.
        down: without a bias, weight `[E, F]`.
        attend_modules: that `attend` runs.
        hidden_modules: that `hidden` runs.
    """

    attend: Callable[..., Tensor]
    hidden: Callable[[Tensor], Tensor]
    down: nn.Linear
    attend_modules: tuple[nn.Module, ...]
    hidden_modules: tuple[nn.Module, ...]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Of `attend`, of `hidden` and of `down`, in this order."""
        return (*_parameters(self.attend_modules), *_parameters(self.hidden_modules), self.down.weight)

    @contextmanager
    def aliased(self) -> Iterator[None]:
        """Have the modules hold parameters of the same values that are no others' for as long as this is open.

        Gradients that are asked for run the hooks that were registered on a tensor. What is recomputed here is asked
        for gradients within the backward and often, while hooks are for whole gradients.
        """
        own = {parameter: nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in self.parameters}
        modules = {m: None for top in (*self.attend_modules, *self.hidden_modules, self.down) for m in top.modules()}
        held = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        try:
            for module, name, parameter in held:
                module._parameters[name] = own[parameter]
            yield
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter

    def tiles(self, rows: int) -> Iterator[slice]:
        """Of so many rows, which together are all of them."""
        size = tile_rows(rows, self.down.in_features)
        return (slice(start, start + size) for start in range(0, rows, size))


def tile_rows(rows: int, width: int) -> int:
    """Rows of a tile of `rows` rows whose hidden layer is `width` wide: tiles of one length where `rows` has a divisor
    that gives at most twice as many of them as needed, since each length is another compiled graph."""
    least = max(-(-rows * width // TILE_ELEMENTS), 1)
    for count in range(least, 2 * least + 1):
        if rows % count == 0:
            return rows // count
    return -(-rows // least // _TILE_ROWS) * _TILE_ROWS


def run_in_halves(halves: Halves, x: Tensor, *constants: Tensor | None) -> Tensor:
    """`halves` of `x` `[B, S, E]`, keeping for the backward `x` alone.

    Args:
        constants: what else `attend` takes; they get no gradient.
    """
    if not torch.is_grad_enabled():
        return _forward(halves, x, constants)
    return _Halves.apply(halves, x, len(constants), *constants, *halves.parameters)


def _forward(halves: Halves, x: Tensor, constants: tuple[Tensor | None, ...]) -> Tensor:
    h = halves.attend(x, *constants).contiguous()
    rows = h.view(-1, h.shape[-1])
    for tile in halves.tiles(len(rows)):
        rows[tile] += halves.down(halves.hidden(rows[tile]))
    return h


class _Halves(torch.autograd.Function):
    """Parameters are inputs, so that each gets its whole gradient once: hooks on gradients, by which DeepSpeed
    reduces them, run once a micro-batch, as they do without checkpointing."""

    @staticmethod
    def forward(ctx: Any, halves: Halves, x: Tensor, count: int, *rest: Tensor | None) -> Tensor:
        constants = rest[:count]
        ctx.halves, ctx.autocast = halves, _autocast(x.device.type)
        ctx.save_for_backward(x, *constants)  # not parameters: ZeRO-3 has released them until the backward
        return _forward(halves, x, constants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *constants = ctx.saved_tensors
        with ctx.halves.aliased():
            grad_x, grads = _backward(ctx.halves, x, constants, grad, ctx.autocast)
        return (None, grad_x if ctx.needs_input_grad[1] else None, *[None] * (1 + len(constants)), *grads)


def _backward(
    halves: Halves, x: Tensor, constants: list[Tensor | None], grad: Tensor, autocast: Callable[[], Any]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of `x` and of the parameters."""
    x = x.detach().requires_grad_()
    with torch.enable_grad(), autocast():
        h = halves.attend(x, *constants)
    rows, edge = h.detach().flatten(0, -2), torch.autograd.graph.get_gradient_edge(h)
    del h  # the edge needs no values, and `rows` is done with before attention is differentiated
    grad_rows, grads = _backward_of_rows(halves, rows, grad.reshape(rows.shape), autocast)
    del rows
    grad_x, *mine = _gradients(edge, (x, *_parameters(halves.attend_modules)), grad_rows.view_as(x))
    return grad_x, [*mine, *grads]


def _backward_of_rows(
    halves: Halves, rows: Tensor, grad: Tensor, autocast: Callable[[], Any]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of `h` `[T, E]`, of `hidden`'s parameters and of `down`'s, given that of the output; sums over tiles
    are in fp32."""
    parameters, weight = _parameters(halves.hidden_modules), halves.down.weight
    grad_rows = torch.empty_like(grad)
    total: list[Tensor | None] = []
    for tile in halves.tiles(len(rows)):
        h = rows[tile].detach().requires_grad_()
        with torch.enable_grad(), autocast():
            hidden = halves.hidden(h)
        grad_out = grad[tile].to(hidden.dtype)
        grad_h, *grads = _gradients(hidden, (h, *parameters), grad_out @ weight.to(hidden.dtype))
        assert grad_h is not None, "h requires a gradient"
        grads.append((hidden.detach().t() @ grad_out).t() if weight.requires_grad else None)
        torch.add(grad[tile], grad_h, out=grad_rows[tile])
        total = grads if len(h) == len(rows) else _sum(total, grads)
    return grad_rows, [
        None if grad is None else grad.to(parameter.dtype)
        for grad, parameter in zip(total, (*parameters, weight), strict=True)
    ]


def _sum(total: list[Tensor | None], grads: list[Tensor | None]) -> list[Tensor | None]:
    if not total:
        return [None if grad is None else grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    for mine, grad in zip(total, grads, strict=True):
        if mine is not None and grad is not None:
            mine += grad
    return total


def _gradients(output: Any, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor | None]:
    """Of `output`'s inputs; None for those that are frozen."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def _parameters(modules: tuple[nn.Module, ...]) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for module in modules for parameter in module.parameters())


def _autocast(device_type: str) -> Callable[[], Any]:
    """The autocast that is on here, for the backward, which runs outside of it."""
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )
