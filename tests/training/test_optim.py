"""Schedules are pure functions of the step with the right landmarks; only matrices decay."""

from __future__ import annotations

import itertools
import math

import pytest
from torch import nn

from s2.training.optim import OptimizerConfig, ScheduleConfig, build_adamw

STEPS = 100


def rates(schedule: ScheduleConfig) -> list[float]:
    return [schedule.factor(step, STEPS) for step in range(STEPS)]


def test_cosine_warms_up_peaks_and_ends_at_the_minimum() -> None:
    curve = rates(ScheduleConfig("cosine", warmup_steps=10, min_ratio=0.1))
    assert curve[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert curve[10] == 1.0 and curve[-1] == pytest.approx(0.1)
    middle = 10 + 89 * 0.5
    expected = (curve[int(middle)] + curve[int(middle) + 1]) / 2
    assert expected == pytest.approx(0.55, abs=1e-3)
    assert all(a > b for a, b in itertools.pairwise(curve[10:]))


@pytest.mark.parametrize("shape", ["sqrt", "linear"])
def test_wsd_is_flat_until_its_decay(shape: str) -> None:
    curve = rates(ScheduleConfig("wsd", warmup_steps=5, min_ratio=0.2, decay_ratio=0.2, decay_shape=shape))
    assert set(curve[5:81]) == {1.0}
    assert curve[81] < 1.0 and curve[-1] == pytest.approx(0.2)
    progress = (90 - 80) / 19
    expected = 1 - math.sqrt(progress) if shape == "sqrt" else 1 - progress
    assert curve[90] == pytest.approx(0.2 + 0.8 * expected)


def test_linear_and_constant() -> None:
    linear = rates(ScheduleConfig("linear", warmup_steps=0, min_ratio=0.0))
    assert linear[0] == 1.0 and linear[-1] == 0.0 and linear[33] == pytest.approx(1 - 33 / 99)
    assert set(rates(ScheduleConfig("constant"))) == {1.0}


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear"])
def test_a_step_beyond_the_run_stays_at_the_minimum(name: str) -> None:
    assert ScheduleConfig(name, min_ratio=0.3).factor(10 * STEPS, STEPS) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"warmup_steps": -1}, "warmup_steps: expected a whole number >= 0, got -1"),
        ({"min_ratio": 1.5}, r"min_ratio: expected a number from 0 to 1, got 1\.5"),
        ({"decay_ratio": 0.0}, r"decay_ratio: expected a number above 0 and up to 1, got 0\.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ScheduleConfig(**settings)


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=100 must be below trainer.max_steps=100"):
        ScheduleConfig(warmup_steps=100).factor(0, STEPS)


def test_only_matrices_decay_and_every_parameter_is_optimised_once() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    optimizer = build_adamw(model, OptimizerConfig(weight_decay=0.3), fused=False)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay.pop(id(p)) for name, p in model.named_parameters()} == {
        "0.weight": 0.3, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.3, "2.bias": 0.0,
    }  # fmt: skip
    assert not decay
