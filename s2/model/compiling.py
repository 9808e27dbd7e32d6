"""Compiled computations that are compiled whole, on whatever thread they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compile_whole(function: Callable[..., Any], graphs: int, *, backend: str) -> Callable[..., Any]:
    """`function` by torch.compile; what cannot be captured whole, or needs more than `graphs` graphs, is an error.

    Args:
        graphs: most that all functions of one code together need.
        backend: of torch.compile.
    """
    compiled = torch.compile(function, fullgraph=True, backend=backend)

    def call(*args: Any) -> Any:
        _allow(graphs)
        return compiled(*args)

    return call


def _allow(graphs: int) -> None:
    """Raise dynamo's limits. From torch 2.13 on they are of a thread, and autograd runs a GPU's backward in its own."""
    limits = torch._dynamo.config
    if limits.recompile_limit < graphs:
        limits.recompile_limit = graphs
    if limits.accumulated_recompile_limit < graphs:
        limits.accumulated_recompile_limit = graphs
