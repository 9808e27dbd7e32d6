"""Gradients enter DeepSpeed's buckets in one order, whichever order a rank's graph produces them in."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from s2.training.gaps.deepspeed import OrderedReduction


class Optimizer:
    """The two methods of DeepSpeed's that are wrapped."""

    def __init__(self) -> None:
        self.bucket: list[nn.Parameter] = []

    def reduce_ready_partitions_and_remove_grads(self, parameter: nn.Parameter, group: int) -> None:
        assert group == 0
        self.bucket.append(parameter)

    def independent_gradient_partition_epilogue(self) -> None:
        self.bucket.append(None)  # type: ignore[arg-type]


def test_any_order_of_hooks_fills_the_buckets_in_the_order_of_the_model() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    expected = [*map(id, reversed(parameters)), id(None)]
    for order in itertools.permutations(parameters):
        optimizer = Optimizer()
        OrderedReduction(optimizer, parameters)
        for _ in range(2):  # the second micro-batch begins afresh
            optimizer.bucket.clear()
            for parameter in order:
                optimizer.reduce_ready_partitions_and_remove_grads(parameter, 0)
            assert len(optimizer.bucket) == 4
            optimizer.independent_gradient_partition_epilogue()
            assert [*map(id, optimizer.bucket)] == expected


def test_a_gradient_is_handed_over_as_soon_as_those_before_it_are() -> None:
    optimizer, parameters = Optimizer(), [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    OrderedReduction(optimizer, parameters)
    optimizer.reduce_ready_partitions_and_remove_grads(parameters[2], 0)
    assert optimizer.bucket[0] is parameters[2]
    optimizer.reduce_ready_partitions_and_remove_grads(parameters[0], 0)
    assert len(optimizer.bucket) == 1


def test_a_parameter_without_a_gradient_holds_back_nothing() -> None:
    optimizer, parameters = Optimizer(), [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    OrderedReduction(optimizer, parameters)
    for place in (0, 1, 3):
        optimizer.reduce_ready_partitions_and_remove_grads(parameters[place], 0)
    optimizer.independent_gradient_partition_epilogue()
    assert [*map(id, optimizer.bucket)] == [id(parameters[3]), id(parameters[1]), id(parameters[0]), id(None)]
