"""lm-eval's tasks side by side: paired by document, whole or by their first documents, and their mean."""

import json
import math

import pytest

from eval.report import tasks
from eval.report.run import read_runs
from s2.files import write_json
from tests.eval.runs import lm_results, make_run


def pair(tmp_path, **second):
    return make_run(tmp_path / "demo" / "a", acc=0.2), make_run(tmp_path / "demo" / "b", **second)


def test_tasks_stand_side_by_side_with_the_error_of_their_difference(tmp_path):
    text = "\n".join(tasks.downstream(read_runs(pair(tmp_path, acc=0.3))))
    error = 1.959964 * 0.0123 * 2**0.5
    assert f"| piqa | 5 | acc ↑ | 0.2000 ± 0.0123 | 0.3000 ± 0.0123<br>**+0.100 (+{0.1 - error:.2f} to" in text
    assert "demo/a, piqa: max_length 1024, BOS yes (<|bos|>), limit none, cut inputs: none" in text


def with_documents(rights: dict[str, int], **about):
    """Results of tasks of twenty documents, so many of which are right."""
    content = lm_results(**about)
    for key in ("results", "versions", "n-shot", "higher_is_better"):
        content[key] = dict.fromkeys(rights, content[key]["piqa"])
    for task, right in rights.items():
        content["results"][task] = {"acc,none": right / 20, "acc_stderr,none": 0.05}
    scores = {task: {"acc,none": [int(i < right) for i in range(20)]} for task, right in rights.items()}
    return content | {"documents": {task: {"digest": "d", "scores": own} for task, own in scores.items()}}


def test_tasks_are_paired_by_document(tmp_path):
    runs = pair(tmp_path)
    for run, right in zip(runs, (5, 10), strict=True):
        write_json(run / "results" / "lm-piqa.json", with_documents({"piqa": right}))
    text = "\n".join(tasks.downstream(read_runs(runs)))
    # of twenty documents five differ, all in one direction: Agresti and Min
    middle, half = 5 / 22, 1.959964 * (5 + 1 - 25 / 22) ** 0.5 / 22
    assert f"<br>**+0.250 (+{middle - half:.2f} to +{middle + half:.2f})**" in text
    assert "(demo/b paired by document)" in text
    other = with_documents({"piqa": 10}) | {"documents": {"piqa": {"digest": "e", "scores": {"acc,none": [1, 0] * 10}}}}
    write_json(runs[1] / "results" / "lm-piqa.json", other)
    assert "(demo/b unpaired)" in "\n".join(tasks.downstream(read_runs(runs)))


@pytest.mark.parametrize("limit", [None, 20])
def test_the_mean_over_tasks_is_paired_whatever_the_limit(tmp_path, limit):
    runs = pair(tmp_path)
    for run, rights in zip(runs, ({"piqa": 5, "arc": 8}, {"piqa": 10, "arc": 9}), strict=True):
        write_json(run / "results" / "lm-piqa.json", with_documents(rights, limit=limit))
    text = "\n".join(tasks.downstream(read_runs(runs)))
    ends = []
    for moved in (5, 1):
        middle, half = moved / 22, 1.959964 * (moved + 1 - moved**2 / 22) ** 0.5 / 22
        ends.append((moved / 20 - (middle - half), middle + half - moved / 20))
    low, high = (0.15 - math.hypot(*(each[0] for each in ends)) / 2, 0.15 + math.hypot(*(e[1] for e in ends)) / 2)
    (row,) = (line for line in text.splitlines() if line.startswith("| mean of 2 |"))
    assert f"| 0.3250 ± 0.0354 | 0.4750 ± 0.0354<br>**+0.150 (+{low:.2f} to +{high:.2f})** |" in row
    assert ("| limit 20 |" in row) == (limit is not None)
    label, means = tasks.mean_accuracy(read_runs(runs))
    assert label == f"mean of 2 tasks{' (limit 20)' if limit else ''}" and means == [
        "0.3250 ± 0.0354",
        "0.4750 ± 0.0354",
    ]


def test_the_mean_is_over_what_all_runs_have_alike_and_counts_a_group_once(tmp_path):
    runs = pair(tmp_path)
    for run, shots in zip(runs, (0, 5), strict=True):
        content = with_documents({"mmlu": 10, "mmlu_law": 5, "mmlu_art": 15, "arc": 8})
        content |= {"group_subtasks": {"mmlu": ["mmlu_law", "mmlu_art"]}}
        content["n-shot"]["arc"] = shots
        write_json(run / "results" / "lm-piqa.json", content)
        write_json(run / "results" / "lm-first.json", with_documents({"mmlu": 20}, limit=20))
    read = read_runs(runs)
    assert list(tasks.accuracies(read)) == [("mmlu", "5", None)]
    assert [metric.value for metric in tasks.accuracies(read)["mmlu", "5", None]] == [0.5, 0.5]


@pytest.mark.parametrize("about,said", [({"limit": 5}, "limit 5"), ({"max_length": 2048}, "max_length 2048")])
def test_results_under_several_conditions_say_what_differs(tmp_path, about, said):
    one, two = pair(tmp_path, acc=0.3)
    (one / "results" / "lm-piqa-2.json").write_text(json.dumps(lm_results(0.8, **about)))
    text = tasks.downstream(read_runs([one, two]))[0]
    usual = {"limit 5": "no limit", "max_length 2048": "max_length 1024"}[said]
    assert f"| piqa | 5 | acc ↑ | {usual} | 0.2000 ± 0.0123 | 0.3000 ± 0.0123<br>" in text
    assert f"| piqa | 5 | acc ↑ | {said} | 0.8000 ± 0.0123 | - |" in text


def test_runs_of_different_lengths_stand_in_one_row(tmp_path):
    one, two = pair(tmp_path)
    (two / "results" / "lm-piqa.json").write_text(json.dumps(lm_results(0.4, max_length=2048)))
    assert "| piqa | 5 | acc ↑ | 0.2000 ± 0.0123 | 0.4000 ± 0.0123<br>" in tasks.downstream(read_runs([one, two]))[0]
