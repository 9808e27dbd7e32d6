"""What an experiment's arms have left, as figures with differences: the same questions one by one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import results_collect
import results_page
import results_speed
from results_collect import Figure, at_equal, difference

from s2.model.config import ModelConfig

MODEL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_layout": "L1V2", "block_size": 16,
}  # fmt: skip


def figure(value, samples=(), asked="q", **more):
    named = {f"{asked}{i}": float(score) for i, score in enumerate(samples)}
    return Figure("train", "needle", "single", 8192, "exact", value, samples=named, **more)


def test_the_same_questions_are_compared_one_by_one():
    ours, base = figure(0.75, [1, 1, 1, 0], whole=1.0), figure(0.5, [1, 1, 0, 0], whole=1.0)
    # Agresti and Min: one of 4 pairs differs and 2 are added; 1/6 -+ 1.959964 sqrt(1 + 1 - 1/6) / 6
    expected = {"difference": 0.25, "interval": [-0.2756, 0.609], "interval_kind": "95 %", "paired": True, "n": 4}
    assert difference(ours, base) == expected
    percent = [figure(100 * each.value, [*each.samples.values()], whole=100.0) for each in (ours, base)]
    assert difference(*percent) == expected | {"difference": 25.0, "interval": [-27.5634, 60.8967]}
    # losses: 0.1, 0.2 and 0.3 more: Student's t of 2 degrees of freedom, 4.3027 * 0.1 / sqrt(3)
    loss = difference(figure(2.2, [1.1, 2.2, 3.3]), figure(2.0, [1, 2, 3]))
    assert loss["paired"] and loss["interval"] == [round(0.2 - 0.24842, 4), round(0.2 + 0.24842, 4)]


def test_other_questions_are_compared_by_what_is_known_of_each():
    apart = difference(figure(0.8, [1] * 56 + [0] * 14, whole=1.0), figure(0.6, [1] * 48 + [0] * 32, "r", whole=1.0))
    assert apart["interval"] == [0.0524, 0.3339] and not apart["paired"] and apart["n"] is None  # Newcombe's example
    some = difference(figure(0.75, [1, 1, 1, 0], whole=1.0), figure(0.5, [1, 0], whole=1.0))
    assert not some["paired"]  # one has more of them
    known = figure(0.75, interval=[0.75 - 0.4 * 1.959964, 0.75 + 0.4 * 1.959964])
    errors = difference(known, figure(0.5, stderr=0.3))
    assert errors["interval"] == [round(0.25 - 0.5 * 1.959964, 4), round(0.25 + 0.5 * 1.959964, 4)]
    assert difference(figure(0.75), figure(0.5, stderr=0.3))["interval"] is None


def lm_results(rights, digest="d", groups=()):
    """lm-eval's results of tasks of ten documents, so many of which are right."""
    return {
        "s2": {},
        "results": {task: {"acc,none": right / 10, "acc_stderr,none": 0.1} for task, right in rights.items()},
        "documents": {
            task: {"digest": digest, "scores": {"acc,none": [int(i < right) for i in range(10)]}}
            for task, right in rights.items()
        },
        "group_subtasks": dict(groups),
    }


def test_tasks_and_their_mean_are_paired_by_document(tmp_path):
    def figures(name, content):
        file = tmp_path / name / "train" / "results" / "lm-x.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
        found = results_collect.evaluation_figures(file)
        return {each.task: each for each in [*found, *results_collect._mean_of_tasks(found)]}

    ours, base = figures("a", lm_results({"piqa": 8, "arc": 5})), figures("b", lm_results({"piqa": 5, "arc": 5}))
    one, other = (difference(ours[task], base[task]) for task in ("piqa", "arc"))
    assert one["paired"] and one["n"] == 10 and one["interval"] == [-0.0444, 0.5444]  # 3/12 -+ 1.96 sqrt(4 - 9/12) / 12
    mean = difference(ours["mean of 2"], base["mean of 2"])
    assert mean["difference"] == 0.15 and mean["paired"]
    ends = zip(*([abs(end - each["difference"]) for end in each["interval"]] for each in (one, other)), strict=True)
    low, high = (math.hypot(*pair) / 2 for pair in ends)
    assert mean["interval"] == pytest.approx([0.15 - low, 0.15 + high], abs=2e-4)
    apart = figures("c", lm_results({"piqa": 5, "arc": 5}, "e"))
    assert not difference(ours["piqa"], apart["piqa"])["paired"]
    assert not difference(ours["mean of 2"], apart["mean of 2"])["paired"]
    grouped = {"mmlu": 7, "mmlu_law": 8, "mmlu_art": 6, "arc": 5}
    found = figures("d", lm_results(grouped, groups={"mmlu": ["mmlu_law", "mmlu_art"]}))
    assert found["mean of 2"].value == 0.6  # a group counts once


def test_losses_are_compared_at_as_many_tokens_and_after_as_many_minutes():
    slow = [{"step": i, "tokens": 100 * i, "seconds": 60.0 * i, "train/loss": 10 - 0.01 * i} for i in range(1, 201)]
    fast = [row | {"seconds": row["seconds"] / 2} for row in slow]
    slow = slow[:90]  # stopped by time
    slow[49]["val/books/loss"] = fast[49]["val/books/loss"] = 3.5
    slow[-1]["val/books/loss"] = 3.1
    fast[99]["val/books/loss"], fast[-1]["val/books/loss"] = 3.0, 2.0  # after 50 and after 100 minutes
    found = {arm: {f.task: f.value for f in figures} for arm, figures in at_equal({"s": slow, "f": fast}, "t").items()}
    assert found["s"]["train loss at 0.0 M tokens"] == found["f"]["train loss at 0.0 M tokens"]
    assert found["s"]["held-out books at step 50"] == found["f"]["held-out books at step 50"] == 3.5
    assert found["s"]["held-out books at 90.0 minutes"] == 3.1
    assert found["f"]["held-out books at 90.0 minutes"] == pytest.approx(2.2)
    late = [{"step": 1, "tokens": 100, "seconds": 9000.0, "train/loss": 1.0, "val/books/loss": 1.0}]
    figures = at_equal({"s": slow, "late": late}, "t")["late"]  # of a first validation after all of another's
    assert [figure.task for figure in figures] == ["train loss at 0.0 M tokens"]


def test_what_evaluations_write_is_read(tmp_path):
    folder = tmp_path / "a" / "train" / "results"
    folder.mkdir(parents=True)
    common = {"settings": {}, "conditions": {"prompts": "0f"}}
    positions = common | {
        "kind": "positions",
        "samples": [
            {"id": f"64/{i}", "length": 64, "prompt": "ab"[i], "losses": [[0, 32, 32, 4.0 + i], [32, 64, 32, 2.0]]}
            for i in (0, 1)
        ],
        "summary": {"lengths": [{
            "length": 64, "documents": 2, "loss": 3.25, "interval": [3.0, 3.5],
            "buckets": [{"from": 0, "to": 32, "documents": 2, "loss": 4.5, "interval": None},
                        {"from": 32, "to": 64, "documents": 2, "loss": 2.0, "interval": None}],
        }]},
    }  # fmt: skip
    needle = common | {
        "kind": "needle",
        "samples": [{"id": f"64/0/{i}", "length": 64, "depth": 0, "scores": {"exact": i}} for i in (0.0, 1.0)],
        "summary": {"exact": {}},
    }
    ruler = common | {
        "kind": "ruler",
        "samples": [
            {"id": f"vt/64/{i}", "task": "vt", "length": 64, "prompt": "p", "scores": {"match": i / 2}} for i in (1, 2)
        ],
        "summary": {
            "tasks": [{"task": "vt", "length": 64, "metric": "all", "score": 75.0, "n": 2, "interval": [20, 95]}],
            "lengths": [{"length": 64, "score": 75.0, "n": 2, "interval": [20, 95]}],
        },
    }
    lm = {"s2": {}, "results": {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1}},
          "n-samples": {"piqa": {"effective": 30}}, "higher_is_better": {"piqa": {"acc": True}}}  # fmt: skip
    found = {}
    for name, content in (("positions", positions), ("needle", needle), ("ruler", ruler), ("lm-piqa", lm), ("x", [1])):
        (folder / f"{name}.json").write_text(json.dumps(content))
        for each in results_collect.evaluation_figures(folder / f"{name}.json"):
            found[each.key[1:]] = each
    assert found["positions", "loss", 64, "nats/token"].samples == {"64/0 a": 3.0, "64/1 b": 3.5}
    assert found["positions", "loss 0-32", 64, "nats/token"].samples == {"64/0 a": 4.0, "64/1 b": 5.0}
    assert found["needle", "single", 64, "exact"].value == 0.5
    assert found["needle", "single", 64, "exact"].interval == pytest.approx((0.0945, 0.9055), abs=1e-3)
    assert found["ruler", "vt", 64, "score"].samples == {"vt/64/1 p": 0.5, "vt/64/2 p": 1.0}
    assert found["tasks", "piqa", None, "acc"].n == 30
    assert found["ruler", "all tasks", 64, "score"].samples == found["ruler", "vt", 64, "score"].samples


def test_keys_and_values_are_counted_that_some_query_sees_or_will_see():
    config = ModelConfig(**MODEL | {"num_attention_heads": 2, "attention_layout": "L2V2+sink1", "num_hidden_layers": 1})
    # 8 blocks, two heads of 8 (hidden 32 / 2 heads = 16): residues 0 and 1; the last 2, and the first
    expected = (len({0, 2, 4, 6, 7}) + len({0, 1, 3, 5, 6, 7})) * 16 * 2 * 16 * 2 / 128
    assert results_speed.kv_bytes_per_token(config, 128) == expected
    dense = config.replace(attention_layout="dense")
    assert results_speed.kv_bytes_per_token(dense, 128) == 2 * 16 * 2 * 2


@pytest.mark.parametrize(("layout", "length", "tokens"), [
    ("dense", 1, {1}), ("dense", 128, {128}), ("L2V2+sink1", 1, {1}), ("L2V2+sink1", 128, {5 * 16, 6 * 16}),
])  # fmt: skip
def test_the_decode_step_that_is_timed_sees_what_a_cache_of_that_length_keeps(layout, length, tokens):
    config = ModelConfig(**MODEL | {"num_attention_heads": 2, "attention_layout": layout, "num_hidden_layers": 2})
    step = results_speed.DecodeStep(config.replace(max_position_embeddings=16), length, "cpu")
    step.new[0].zero_()  # all that is seen has the same weight, and only the new value is not zero
    for out in [*step(), *step()]:
        seen = (step.new[2] / out).float().mean(dim=-1).flatten()
        assert set(seen.round().int().tolist()) == tokens
    assert step.cache.lengths == (length - 1,)


def test_steps_on_another_stream_begin_when_the_first_has_ended(monkeypatch):
    """They share its workspace."""
    order = []
    monkeypatch.setattr(results_speed, "DecodeStep", lambda *_: lambda: order.append("step"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("ended"))
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", lambda step, **_: step() or 0.5)
    assert results_speed.decode_ms(ModelConfig(**MODEL), 128) == 0.5
    assert order == ["step", "ended", "step"]


def test_the_bytes_of_the_cache_are_those_of_its_rings_and_lists():
    config = ModelConfig(**MODEL | {"attention_layout": "L2V2+sink1", "num_hidden_layers": 1})
    for length in (128, 4096):
        row = results_speed.measure(config, length)
        assert row["kv_bytes_per_token"] <= row["cache_bytes_per_token"]
    assert row["cache_bytes_per_token"] == pytest.approx(row["kv_bytes_per_token"], rel=0.05)


@pytest.mark.parametrize(("lengths", "chosen"), [((64, 128, 256), 128), ((32, 64), 64), ((512, 256), 256)])
def test_quality_is_drawn_at_the_longest_length_that_was_trained_on(lengths, chosen):
    stages = {"short": {"recipe": {"model": {"config": {"max_position_embeddings": 64}}}},
              "long": {"recipe": {"model": {"config": {"max_position_embeddings": 128}}}}, "speed": {}}  # fmt: skip
    rows = [
        {"arm": arm, "stage": stage, "part": "needle", "task": "single", "metric": "exact", "length": length}
        for arm in ("a", "b", "untimed") for stage in ("short", "long") for length in lengths
    ]  # fmt: skip
    results = {"arms": {arm: {"stages": stages} for arm in ("a", "b", "untimed")}, "figures": rows}
    found = results_page._longest_trained(results, ("needle", "single", "exact"), ("a", "b"))
    assert {(row["arm"], row["length"]) for row in found} == {("a", chosen), ("b", chosen)}
    assert len({row["stage"] for row in found}) == 1
    assert results_page._longest_trained(results, ("needle", "multi", "exact"), ("a", "b")) == []


def test_the_share_of_synthetic_documents_is_what_training_recorded_whatever_folders_are_called():
    def said(*components, prepared=()):
        arm = {"summaries": {"train": {"data": list(components)}}, "stages": {"train": {"recipe": None}}}
        return results_page.retrieval_share({"arms": {"a": arm}}, prepared)

    web = {"component": "/data/retrieval-x/web/train", "asked": 75, "synthetic": 0.0}
    made = {"component": "/data/retrieval-x/facts/train", "asked": 25, "synthetic": 1.0}
    assert said(web, made).endswith("in the training tokens: train 25.0%.") and said(web) == ""
    old = [{key: each[key] for key in ("component", "asked")} for each in (web, made)]  # of an earlier version
    assert said(*old).endswith("train not recorded.")
    specs = [{"output": "/data/retrieval-x/facts", "sources": [{"path": "retrieval"}]}]
    assert said(*old, prepared=specs).endswith("train at least 25.0%; not recorded of /data/retrieval-x/web/train.")


def test_stages_that_began_past_a_gate_are_named_in_a_line_each():
    missed = {"state": "missed", "asked": "ignore", "said": "runs/a/train/hf has not passed its gate", "checks": []}
    befores = {"train": {"state": "none", "said": ""}, "extend": missed, "of an earlier version": None}
    data = [{"component": "a", "asked": 1, "available": 1, "passes": 1.0, "synthetic": 0.0}]
    summaries = {stage: {"gate_before": before, "data": data, "tokens": 0} for stage, before in befores.items()}
    record = {
        "recipe": None,
        "versions": {},
        "commit": "",
        "device": "",
        "seconds": 0.0,
        "command": ["python"],
        "data": {},
    }
    stages = dict.fromkeys(befores, record)
    results = {
        "plan": "plans/a.yaml",
        "arms": {"dense": {"summaries": summaries, "stages": stages, "model": None}},
        "figures": [],
        "missing": {},
    }
    plan: Any = SimpleNamespace(name="a", about="", specs={}, arms=[SimpleNamespace(name="dense", about="")])
    text = results_page.text(plan, results, {}, {}, "")
    assert '`python scripts/results.py plans/a.yaml --import "<this folder>/runs.tar.gz"`' in text
    line = "- dense extend: begun with run.gate=ignore although runs/a/train/hf has not passed its gate\n"
    assert line in text and text.count("begun with") == 1


def test_only_arms_that_trained_are_compared_by_their_data():
    part = {"component": "web", "asked": 50, "available": 100, "passes": 0.5}

    def trained(digest):
        evaluated = {"data": {"web": {"tokens": 90, "digest": "evaluated"}}}
        stages = {"train": {"data": {"web": {"tokens": 100, "digest": digest}}}, "evaluate": evaluated}
        return {"summaries": {"train": {"data": [part]}}, "stages": stages}

    imported = {"summaries": {}, "stages": {"evaluate": {"data": {"web": {"tokens": 90, "digest": "older"}}}}}
    said = results_page.data_table({"arms": {"import": imported, "dense": trained("d1"), "s2": trained("d1")}})
    assert "not trained on the same data" not in said and said.endswith("- dense, s2: web 100 tokens, digest d1")
    said = results_page.data_table({"arms": {"import": imported, "dense": trained("d1"), "s2": trained("d2")}})
    assert said.startswith("**The arms were not trained on the same data.**")
    assert said.endswith("- dense: web 100 tokens, digest d1\n- s2: web 100 tokens, digest d2")


def test_pictures_name_the_arms_that_are_in_them():
    """An imported checkpoint has no training log; a stage may be missing from an arm."""
    point = {"train/loss": 2.0, "tokens": 1e6, "seconds": 60.0}
    logs = {"import": {}, "dense": {"train": [point] * 3}, "s2": {"train": [point], "extend": [point]}}
    row = {
        "part": "positions",
        "task": "loss 0-64",
        "metric": "nats/token",
        "stage": "train",
        "length": 128,
        "value": 2.0,
    }
    results = {"arms": dict.fromkeys(logs), "baseline": "dense", "figures": [{**row, "arm": "dense"}]}
    for drawn, names in ((results_page._curves, ["dense", "s2"]), (results_page._positions, ["dense"])):
        axes = drawn(results, logs).axes[0]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == names


def test_losses_by_position_are_drawn_at_the_longest_length_of_each_stage():
    common = {"part": "positions", "metric": "nats/token", "arm": "dense", "value": 2.0}
    figures = [
        common | {"task": f"{loss} 0-64", "stage": stage, "length": length}
        for stage, lengths in (("train", (128, 256)), ("extend", (128, 256, 512)))
        for length in lengths
        for loss in ("loss", "loss of books")
    ]
    drawn = results_page._positions({"arms": {"dense": {}}, "baseline": "dense", "figures": figures}, {})
    assert [(axes.get_title(), axes.get_ylabel().split(" (")[0]) for axes in drawn.axes] == [
        ("train, 256", "held-out loss"), ("train, 256", "held-out loss of books"),
        ("extend, 512", "held-out loss"), ("extend, 512", "held-out loss of books"),
    ]  # fmt: skip


def test_arms_are_told_apart_by_colour():
    results = {"arms": dict.fromkeys(map(str, range(14)))}
    assert len({results_page._style(results, arm)["color"] for arm in results["arms"]}) == 14
