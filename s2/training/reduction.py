"""Gradients of ZeRO-1 and ZeRO-2 enter DeepSpeed's reduction buckets in one order on all ranks.

DeepSpeed flattens gradients into buckets in the order in which autograd finishes them, and reduces a bucket as soon as
it is full. That order belongs to the graph that a rank ran: where one rank's micro-batch has document borders and
another's has none they may run graphs compiled differently, and gradients of different weights would be averaged, or
the ranks would wait for each other in collectives of different sizes. Here a gradient waits until those before it have
been handed over, in the reverse order of the model's parameters, which is nearly the order of any backward: overlap of
reduction and backward stays, and out of turn are the gradients of one block at most.

ZeRO-3 needs none of this: gradients of a block are handed over at its end, in the order of its parameters. Nor does
ZeRO-1 in bf16, which reduces all gradients of a step at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class OrderedReduction:
    """Between the gradient hooks of DeepSpeed's ZeRO-1/2 optimizer and its buckets.

    Args:
        optimizer: `DeepSpeedZeroOptimizer`; its two methods are wrapped.
        parameters: the model's, in the order of the model.
    """

    def __init__(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
        self._place = {id(parameter): place for place, parameter in enumerate(reversed(list(parameters)))}
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self._next = 0
        self._reduce = optimizer.reduce_ready_partitions_and_remove_grads
        self._end_backward = optimizer.independent_gradient_partition_epilogue
        optimizer.reduce_ready_partitions_and_remove_grads = self._take
        optimizer.independent_gradient_partition_epilogue = self._finish

    def _take(self, parameter: nn.Parameter, group: int) -> None:
        self._waiting[self._place[id(parameter)]] = (parameter, group)
        while self._next in self._waiting:
            self._reduce(*self._waiting.pop(self._next))
            self._next += 1

    def _finish(self) -> None:
        for place in sorted(self._waiting):  # behind parameters that took no part in this backward, on no rank
            self._reduce(*self._waiting.pop(place))
        self._next = 0
        self._end_backward()
