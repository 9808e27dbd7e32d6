"""Differences have the sign, the interval and the pairing that they say."""

import itertools
import math

import pytest

from eval.differences import of_means, of_questions, of_sweeps, paired, paired_means, questions, unpaired
from eval.sweep import read_sweep
from tests.eval.sweeps import write_results


def answers(scores):
    return {str(i): float(score) for i, score in enumerate(scores)}


def test_a_paired_interval_is_agresti_and_mins():
    # 40 pairs, the second alone right in 9, the first alone in 2
    first, second = [0] * 9 + [1] * 2 + [1] * 20 + [0] * 9, [1] * 9 + [0] * 2 + [1] * 20 + [0] * 9
    found = paired(answers(first), answers(second))
    n = 42
    half = 1.959964 * math.sqrt((9 + 2 + 1 - 7**2 / n) / n**2)
    assert found.value == 7 / 40 and (found.low, found.high) == pytest.approx((7 / n - half, 7 / n + half))
    assert found.is_sure and found.paired


def test_runs_that_answer_alike_are_not_certainly_equal():
    found = paired(answers([1] * 5), answers([1] * 5))
    assert found.value == 0 and found.low < -0.2 and found.high > 0.2 and not found.is_sure


def test_an_unpaired_interval_is_newcombes():
    # Newcombe 1998, table II, (a) 56/70 less 48/80, method 10: 0.0524 to 0.3339
    found = unpaired(48 / 80, 80, 56 / 70, 70)
    assert found.value == pytest.approx(0.2) and not found.paired
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_means_are_compared_by_their_standard_errors():
    found = of_means(1.0, 0.03, 1.2, 0.04)
    assert (found.low, found.high) == pytest.approx((0.2 - 1.959964 * 0.05, 0.2 + 1.959964 * 0.05))
    each = paired_means({"a": 1.0, "b": 2.0, "c": 9.0}, {"a": 1.5, "b": 2.5})
    assert each is not None and each.value == each.low == each.high == 0.5 and each.paired
    assert paired_means({"a": 1.0}, {"a": 2.0}) is None


@pytest.mark.parametrize("change", ["prompt", "needles"])
def test_answers_to_other_prompts_are_not_paired(change):
    def content(prompt):
        samples = [{"id": str(i), "length": 512, "scores": {"exact": 1.0}, change: prompt} for i in range(4)]
        return {"settings": {"seed": 0}, "samples": samples}

    same, other = (questions(content(prompt), "exact", length=512) for prompt in ("one", "two"))
    assert of_questions(same, same).paired and not of_questions(same, other).paired
    assert not of_questions(same, dict(itertools.islice(same.items(), 3))).paired  # one has more samples
    assert questions(content("one"), "exact", length=1024) == {} and of_questions(same, {}) is None


def test_sweeps_of_other_haystacks_are_compared_over_the_cells_they_share(tmp_path):
    files = [
        write_results(tmp_path / "one.json", {(512, 0): 0.0, (1024, 0): 0.0}, n=10, settings={"haystack": "a"}),
        write_results(tmp_path / "two.json", {(512, 0): 1.0, (2048, 0): 0.0}, n=10, settings={"haystack": "b"}),
    ]
    found = of_sweeps([read_sweep([file]) for file in files], [{}, {}], "exact")
    assert found.value == 1.0 and not found.paired and found.low == unpaired(0, 10, 1, 10).low
