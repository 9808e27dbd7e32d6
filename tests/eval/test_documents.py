"""What is kept of each document: numbers whose mean is the table's figure, and nothing that fills a disk."""

import json
import math
import random

import pytest

from eval import documents
from eval.differences import mean_of, of_documents, paired, paired_means
from eval.sweep import wilson
from s2.files import write_json


def samples(scores, filtered="none", prompt="p", **metrics):
    """As lm-eval logs them; `metrics` by name, a value a document."""
    columns = {"acc": scores, **metrics}
    return [
        {
            **{
                "doc_id": i,
                "doc": {"text": "long " * 99},
                "doc_hash": str(i),
                "prompt_hash": prompt,
                "target_hash": "t",
            },
            **{"filter": filtered, "metrics": [name for name in columns if columns[name][i] is not None]},
            **{name: column[i] for name, column in columns.items() if column[i] is not None},
        }
        for i in range(len(scores))
    ]


def results(**tasks):
    """Results of tasks of (samples, figures)."""
    logged = {task: made for task, (made, _) in tasks.items()}
    return {
        "results": {task: figures for task, (_, figures) in tasks.items()},
        "documents": documents.kept({"samples": logged, "versions": dict.fromkeys(tasks, 1)}),
    }


def test_each_kind_of_figure_is_the_mean_of_its_documents():
    rng = random.Random(0)
    acc = [float(rng.random() < 0.7) for _ in range(50)]
    scores = [-rng.uniform(1, 9) for _ in range(50)]
    words = [(score, rng.randint(3, 30)) for score in scores]
    ratio = sum(score for score, _ in words) / sum(count for _, count in words)
    figures = {
        "acc,none": sum(acc) / 50,
        "perplexity,none": math.exp(-sum(scores) / 50),
        "word_perplexity,none": math.exp(-ratio),
        "bits_per_byte,none": -ratio / math.log(2),
        "first,none": sum(acc[:10]) / 10,
    }
    first = [value if i < 10 else None for i, value in enumerate(acc)]
    made = samples(acc, perplexity=scores, word_perplexity=words, bits_per_byte=words, first=first)
    content = results(task=(made, {**figures, "f1,none": 0.123, "alias": "task"}))
    for metric, figure in figures.items():
        numbers = documents.of(content, "task", metric)
        assert len(numbers) == (10 if metric == "first,none" else 50)
        assert math.fsum(numbers.values()) / len(numbers) == pytest.approx(figure, rel=1e-5)
    assert documents.of(content, "task", "f1,none") == documents.of(content, "task", "alias") == {}


def test_a_perplexity_moves_with_each_document_as_it_would_without_it():
    scores = [-float(i % 7) for i in range(400)]
    figure = math.exp(-sum(scores) / 400)
    numbers = documents.of(results(t=(samples([1] * 400, ll=scores), {"ll,none": figure})), "t", "ll,none")
    without = math.exp(-sum(scores[1:]) / 399)
    assert next(iter(numbers.values())) - figure == pytest.approx((figure - without) * 399, rel=0.02)


def test_filters_of_a_task_stand_apart():
    made = samples([1, 0, 1, 1], "strict") + samples([0, 0, 0, 1], "loose")
    content = results(t=(made, {"acc,strict": 0.75, "acc,loose": 0.25}))
    assert [*documents.of(content, "t", "acc,strict").values()] == [1, 0, 1, 1]
    assert [*documents.of(content, "t", "acc,loose").values()] == [0, 0, 0, 1]


def test_the_same_documents_after_another_prompt_have_other_names():
    same, other, more = (
        documents.of(results(t=(made, {"acc,none": 0.5})), "t", "acc,none").keys()
        for made in (samples([0, 1]), samples([1, 0], prompt="q"), samples([0, 1, 1, 0]))
    )
    assert same == documents.of(results(t=(samples([1, 0]), {"acc,none": 0.5})), "t", "acc,none").keys()
    assert len(same) == 2 and not same & other and not same & more


def test_a_group_has_the_documents_of_its_tasks_where_its_figure_is_their_mean():
    content = results(
        a=(samples([1, 0]), {"acc,none": 0.5}), b=(samples([1, 1, 1, 0, 1, 1]), {"acc,none": 5 / 6}), g=([], {})
    )
    del content["documents"]["g"]
    content["group_subtasks"] = {"g": ["b", "a"]}
    content["results"]["g"] = {"acc,none": 6 / 8}
    assert sorted(documents.of(content, "g", "acc,none").values()) == [0, 0, 1, 1, 1, 1, 1, 1]
    content["results"]["g"] = {"acc,none": (0.5 + 5 / 6) / 2}  # of the tasks, whatever their sizes
    assert documents.of(content, "g", "acc,none") == {}
    assert documents.whole_tasks(content) == ["g"]


def test_answers_that_are_all_right_are_not_certain():
    content = results(t=(samples([1] * 10), {"acc,none": 1.0, "acc_stderr,none": 0.0}))
    assert documents.interval(content, "t", "acc,none") == wilson(1.0, 10)
    content["results"]["t"] |= {"f1,none": 0.5, "f1_stderr,none": 0.1, "other,none": 0.5, "other_stderr,none": "N/A"}
    assert documents.interval(content, "t", "f1,none") == pytest.approx((0.5 - 0.1959964, 0.5 + 0.1959964))
    assert documents.interval(content, "t", "other,none") is None


def test_files_that_keep_samples_alone_are_read_too():
    logged = samples([1, 0, 0, 0])
    assert [*documents.of({"results": {"t": {"acc,none": 0.25}}, "samples": {"t": logged}}, "t", "acc,none").values()]
    assert documents.of({"results": {"t": {"acc,none": 0.25}}}, "t", "acc,none") == {}


def test_five_tasks_of_a_thousand_documents_take_little_room(tmp_path):
    acc = [float(i % 3 > 0) for i in range(1000)]
    made = samples(acc, acc_norm=acc, likelihood=[-i / 7 for i in range(1000)])
    write_json(tmp_path / "kept.json", documents.kept({"samples": {f"task{i}": made for i in range(5)}}))
    assert (tmp_path / "kept.json").stat().st_size < 300_000
    assert "long" not in (tmp_path / "kept.json").read_text()
    assert json.loads((tmp_path / "kept.json").read_text())["task0"]["scores"]["acc,none"][:3] == [0, 1, 1]


def test_documents_are_paired_where_they_are_the_same():
    ours, theirs = ({f"d{i}": float(i < right) for i in range(20)} for right in (5, 10))
    assert of_documents(ours, theirs) == paired(ours, theirs)
    moved = {name: value + 0.5 for name, value in ours.items()}
    assert of_documents(ours, moved) == paired_means(ours, moved)
    assert of_documents(ours, {f"e{i}": 1.0 for i in range(20)}) is None and of_documents({}, {}) is None
    assert of_documents(ours, dict([*theirs.items()][:19])) is None


def test_the_mean_of_differences_adds_distances_in_squares():
    each = [paired_means({"a": 0.0, "b": 0.0, "c": 0.0}, {"a": x, "b": 2 * x, "c": 3 * x}) for x in (3.0, 4.0)]
    found = mean_of(each)
    assert found.value == pytest.approx(7.0) and found.paired
    half = each[0].high - each[0].value  # the other one's is 4/3 of it, together 5/3, of two
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half * 5 / 6, half * 5 / 6))


def test_a_metric_counts_the_documents_it_says_something_of():
    scores = {"acc,none": [1, 0, 1], "acc_256,none": [1, None, None]}
    results = {
        "results": {"t": {}, "group": {}, "old": {}},
        "documents": {"t": {"digest": "d", "scores": scores}},
        "group_subtasks": {"group": ["t"]},
        "n-samples": {"t": {"effective": 1}, "old": {"effective": 7}},
    }
    assert [documents.count_of(results, "t", metric) for metric in scores] == [3, 1]
    assert documents.count_of(results, "group", "acc,none") == 3
    assert documents.count_of(results, "old", "acc,none") == 7  # of a file without documents
