"""A sweep holds the numbers of its files, each in its cell, whatever the files look like; broken rows are named."""

import gzip
import json
import random

import numpy as np
import pytest

from eval.grid import format_length, format_lengths
from eval.sweep import Sweep, describe, read_sweep, wilson
from tests.eval.sweeps import published_rows, write_results

CELLS = {(2000, 0.0): 1.0, (1000, 100.0): 0.25, (1000, 0.0): 0.5}


def test_cells_stand_where_their_length_and_depth_say(tmp_path):
    cells = {(2048, 100): 0.25, (512, 0): 1.0, (512, 100): 0.0, (1024, 0): 0.5}
    sweep = read_sweep([write_results(tmp_path / "needle.json", cells)])
    assert sweep.lengths == [512, 1024, 2048] and sweep.depths == [0, 100]
    np.testing.assert_equal(sweep.grid(), [[1.0, 0.5, np.nan], [0.0, np.nan, 0.25]])
    assert sweep.counts() == (2, 2) and sweep.train_length == 2048
    assert sweep.mean() == pytest.approx(0.4375)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json list", "bom", "lines named json", "one object a file"])
def test_published_sweeps_are_read_in_every_form(tmp_path, form):
    rows = published_rows(CELLS)
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    if form == "one object a file":
        for i, row in enumerate(rows):
            (tmp_path / f"cell-{i}.json").write_text(json.dumps(row | {"model": "m"}))
        sweep = read_sweep([tmp_path])
    else:
        name = {"jsonl": "s.jsonl", "jsonl.gz": "s.jsonl.gz", "bom": "s.jsonl"}.get(form, "s.json")
        data = json.dumps(rows).encode() if form == "json list" else lines.encode()
        data = gzip.compress(data) if form == "jsonl.gz" else b"\xef\xbb\xbf" + data if form == "bom" else data
        (tmp_path / name).write_bytes(data)
        sweep = read_sweep([tmp_path / name])
        assert sweep.checkpoint == "s"
    assert sweep.cells == {cell: [score] for cell, score in CELLS.items()}


def test_several_files_are_one_sweep_and_n_is_told(tmp_path):
    one = write_results(tmp_path / "a.json", {(512, 0): 1.0}, n=1)
    two = write_results(tmp_path / "b.json", {(512, 0): 0.0, (1024, 0): 1.0}, n=3)
    sweep = read_sweep([one, two])
    assert sweep.grid().tolist() == [[0.25, 1.0]]
    assert "n = 3 to 4 per cell" in describe(sweep)
    assert read_sweep([one], score="partial").grid().tolist() == [[0.5]]


def test_a_sample_in_two_files_counts_once_and_other_conditions_count_apart(tmp_path):
    one = write_results(tmp_path / "a.json", {(512, 0): 1.0}, n=5, fingerprint="f")
    quick = write_results(tmp_path / "b.json", {(512, 0): 1.0}, n=1, fingerprint="f")
    other = write_results(tmp_path / "c.json", {(512, 0): 0.0}, n=5, fingerprint="f", settings={"seed": 1})
    assert read_sweep([one, quick]).counts() == (5, 5)
    assert read_sweep([one, quick, other]).cells == {(512, 0): [1.0] * 5 + [0.0] * 5}


def test_a_file_that_is_named_twice_counts_once_and_a_pictures_numbers_not_at_all(tmp_path):
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, published_rows(CELLS))))
    (tmp_path / "s.cells.json").write_text(json.dumps(read_sweep([tmp_path / "s.jsonl"]).as_json()))
    assert read_sweep([tmp_path / "s.jsonl", tmp_path / "s.jsonl"]).counts() == (1, 1)
    assert read_sweep([tmp_path]).counts() == (1, 1)


def test_files_of_several_checkpoints_are_no_sweep(tmp_path):
    one = write_results(tmp_path / "a.json", CELLS, fingerprint="f")
    two = write_results(tmp_path / "b.json", CELLS, fingerprint="g")
    with pytest.raises(ValueError, match=r"b\.json: of several checkpoints .* drawn side by side"):
        read_sweep([one, two])
    (tmp_path / "s.jsonl").write_text('{"model": "a", "context_length": 1, "depth_percent": 0, "score": 1}\n' * 2)
    with (tmp_path / "s.jsonl").open("a") as stream:
        stream.write('{"model": "b", "context_length": 1, "depth_percent": 0, "score": 1}\n')
    with pytest.raises(ValueError, match=r"s\.jsonl: rows of several models \(a, b\)"):
        read_sweep([tmp_path / "s.jsonl"])


def test_a_needle_is_shown_at_the_depth_where_it_was_measured(tmp_path):
    file = write_results(tmp_path / "needle.json", {(256, 0): 1.0, (256, 10): 0.0, (256, 20): 1.0}, n=1)
    results = json.loads(file.read_text())
    for sample, depth in zip(results["samples"], (0.0, 18.0, 24.0), strict=True):
        sample["needles"] = [{"key": "red river", "number": "1234567", "position": 1, "depth": depth}]
    file.write_text(json.dumps(results))
    sweep = read_sweep([file])
    assert sweep.cells == {(256, 0): [1.0], (256, 20): [0.0, 1.0]}
    assert "1 of 3 needles lay nearer to another row than meant" in describe(sweep)


def test_results_without_what_later_versions_record_still_open(tmp_path):
    samples = [{"length": 512, "depth": 0, "scores": {"exact": 1}}, {"length": 512, "depth": 0, "scores": {"exact": 0}}]
    (tmp_path / "old.json").write_text(json.dumps({"kind": "needle", "samples": samples}))
    sweep = read_sweep([tmp_path / "old.json"])
    assert sweep.cells == {(512, 0): [1, 0]} and sweep.checkpoint == "old" and sweep.train_length is None


def test_numbers_written_beside_a_picture_are_read_again(tmp_path):
    sweep = read_sweep([write_results(tmp_path / "needle.json", CELLS, n=5)])
    (tmp_path / "x.cells.json").write_text(json.dumps(sweep.as_json()))
    assert read_sweep([tmp_path / "x.cells.json"]) == sweep


@pytest.mark.parametrize(
    "row,message",
    [
        ("{", r"s\.jsonl, line 2: not valid JSON"),
        ("7", r"s\.jsonl, line 2: expected an object with context_length, depth_percent, score, not 7"),
        ('{"context_length": 5, "depth_percent": 0}', r"line 2: no 'score'"),
        ('{"context_length": 5, "depth_percent": 0, "score": null}', "line 2: score is null, not a number"),
        ('{"context_length": 5, "depth_percent": 0, "score": NaN}', "line 2: score is NaN, not a number"),
        ('{"context_length": 5, "depth_percent": 0, "score": "1"}', 'line 2: score is "1", not a number'),
        ('{"context_length": 5, "depth_percent": 0, "score": true}', "line 2: score is true, not a number"),
        ('{"context_length": 5, "depth_percent": 101, "score": 1}', "line 2: depth 101; a depth is a percentage"),
        ('{"context_length": 0, "depth_percent": 0, "score": 1}', "line 2: a context of 0 tokens"),
        ('{"context_length": 5, "depth_percent": 0, "score": 7}', "line 2: score 7 is outside 0..1; name the scale"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(tmp_path, row, message):
    file = tmp_path / "s.jsonl"
    file.write_text('{"context_length": 5, "depth_percent": 0, "score": 1}\n' + row + "\n")
    with pytest.raises(ValueError, match=message):
        read_sweep([file])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "needle", "samples": null}', "samples is null, not a list"),
        ('{"kind": "needle", "samples": [1]}', "sample 1: expected an object with length, depth, not 1"),
        (
            '{"kind": "needle", "samples": [{"depth": 0, "length": 9, "scores": null}]}',
            "scores is null, not an object",
        ),
        (
            '{"kind": "needle", "samples": [{"depth": 0, "length": 9, "scores": {"exact": 1}, "needles": 5}]}',
            "sample 1: needles is 5, not a list",
        ),
        (
            '{"kind": "needle", "samples": [{"depth": 0, "length": 9, "scores": {"exact": 1}, "needles":'
            ' [{"depth": "x"}]}]}',
            'sample 1: depth is "x", not a number',
        ),
        ('{"kind": "needle", "settings": 5, "samples": []}', "settings is 5, not an object"),
        ('{"kind": "needle", "settings": {"needles": "2"}, "samples": []}', 'needles is "2", not a number'),
        ('{"kind": "needle", "train_length": "2k", "samples": []}', 'train_length is "2k", not a number'),
        ('{"kind": "needle-heatmap", "cells": 5}', "cells is 5, not a list"),
        ('{"kind": "needle-heatmap", "cells": [5]}', "cell 1: expected an object with length, depth, score, not 5"),
        ('{"kind": "needle-heatmap", "cells": [], "notes": 5}', "notes is 5, not a list"),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=str.split("null int scores needles depth settings count trained cells cell notes nested"),
)
def test_results_of_another_form_are_named(tmp_path, content, message):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(ValueError, match=rf"odd\.json.*{message}"):
        read_sweep([tmp_path / "odd.json"])


def test_unknown_broken_and_empty_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"needle\.json, sample 2000/0.0/0: no score 'generated'; it has exact, partial"
    ):
        read_sweep([write_results(tmp_path / "needle.json", CELLS)], score="generated")
    broken = write_results(tmp_path / "null.json", CELLS, n=1)
    broken.write_text(broken.read_text().replace('"exact": 0.25', '"exact": null'))
    with pytest.raises(ValueError, match=r"null\.json, sample 1000/100.0/0: exact is null, not a number"):
        read_sweep([broken])
    for name, data, message in (
        ("other.json", b"{}", "expected a result file of eval.needle"),
        ("broken.json", b'{"kind": ', "broken.json, line 1: not valid JSON"),
        ("list.json", b'[{"context_length": 5}]', "list.json, row 1: no 'depth_percent'"),
        ("empty.json", b"\n", "empty.json: the file is empty"),
        ("none.json", b"[]", "none.json: no samples"),
        ("latin.json", b"\xe9\x00", "latin.json: not UTF-8 text, or damaged"),
        ("cut.jsonl.gz", gzip.compress(b"x" * 1000)[:-12], "cut.jsonl.gz: not UTF-8 text, or damaged gzip data"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_sweep([tmp_path / name])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_sweep([tmp_path / "nowhere.json"])
    with pytest.raises(ValueError, match="--score-range 10,1: expected the lowest and the highest"):
        read_sweep([tmp_path / "other.json"], score_range=(10, 1))
    with pytest.raises(ValueError, match="--score-range nan,1"):
        read_sweep([tmp_path / "other.json"], score_range=(float("nan"), 1))


def test_the_range_of_published_scores_does_not_change_our_own(tmp_path):
    ours = write_results(tmp_path / "needle.json", CELLS, n=1)
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, published_rows({(5, 0): 5.5, (5, 9): 10}))))
    assert read_sweep([ours], score_range=(1, 10)).cells == {cell: [score] for cell, score in CELLS.items()}
    assert read_sweep([tmp_path / "s.jsonl"], score_range=(1, 10)).cells == {(5, 0): [0.5], (5, 9): [1.0]}


def test_intervals_are_wilsons():
    assert wilson(1.0, 5) == pytest.approx((0.5655, 1.0), abs=1e-4)  # as in Brown, Cai, DasGupta 2001
    assert wilson(0.0, 5) == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_intervals_of_a_mean_hold_what_they_promise():
    """Of sweeps whose cells have their own probabilities, at least 93 % have the true mean in their interval."""
    rng = random.Random(0)
    chances = {(length, depth): (length + depth) / 3000 for length in (500, 1000, 2000) for depth in range(0, 101, 10)}
    true = sum(chances.values()) / len(chances)
    hits = 0
    for _ in range(300):
        cells = {cell: [float(rng.random() < p) for _ in range(3 + (cell[1] > 50))] for cell, p in chances.items()}
        low, high = Sweep(cells, "c", "exact").interval()
        hits += low <= true <= high
    assert hits >= 279


def test_json_has_mean_interval_and_n_of_every_cell(tmp_path):
    sweep = read_sweep([write_results(tmp_path / "needle.json", {(512, 0): 1.0, (1024, 0): 0.0}, n=5)])
    numbers = sweep.as_json()
    assert numbers["cells"][0] == {"length": 512, "depth": 0, "score": 1.0, "n": 5, "interval": [0.5655, 1.0]}
    assert numbers["mean"] == 0.5 and numbers["interval"] == [0.2366, 0.7634]
    assert describe(sweep).startswith("mean 0.500 (95% 0.24 to 0.76) · n = 5 per cell (5 of 5 right: 95% 0.57 to 1)")


@pytest.mark.parametrize(
    "length,text",
    [
        (512, "512"),
        (1024, "1k"),
        (2560, "2.5k"),
        (131072, "128k"),
        (1 << 20, "1M"),
        (3 << 19, "1.5M"),
        (1000, "1k"),
        (6853, "6.85k"),
        (118059, "118k"),
        (200_000, "200k"),
        (999_999, "1M"),
        (1_000_000, "1M"),
        (1_250_000, "1.25M"),
        (10_000_000, "10M"),
    ],
)
def test_lengths_are_labelled_the_way_people_say_them(length, text):
    assert format_length(length) == text


def test_labels_that_would_be_the_same_are_written_in_full():
    assert format_lengths([1000, 1024]) == ["1,000", "1,024"]
    assert format_lengths([1000, 2000]) == ["1k", "2k"]


def test_a_cell_with_more_samples_does_not_count_more():
    sweep = Sweep({(512, 0.0): [1.0] * 9, (512, 100.0): [0.0]}, "c", "exact")
    assert sweep.mean() == 0.5
    assert sweep.interval() == wilson(0.5, 4 / (1 / 9 + 1))
