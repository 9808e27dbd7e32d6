"""The heatmap shows the numbers it was given, on a fixed scale, at any size."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from eval import heatmap
from eval.heatmap import draw, format_length, main, read_sweep

GREEN, RED = (0.184, 0.659, 0.400), (0.843, 0.227, 0.286)


def write_results(file, cells, n=2, **extra):
    samples = [
        {
            "id": f"{length}/{depth}/{i}",
            "length": length,
            "depth": depth,
            "scores": {"exact": score, "partial": 0.5},
        }
        for (length, depth), score in cells.items()
        for i in range(n)
    ]
    settings = {"haystack": "prose", "needles": 1, "distractors": 0}
    about = {"kind": "needle", "checkpoint": "demo/extend-2k", "train_length": 2048, "settings": settings}
    file.write_text(json.dumps({**about, **extra, "samples": samples}))
    return file


def share_of(png, colour):
    pixels = imread(png)[..., :3]
    return float((np.abs(pixels - np.array(colour)).max(-1) < 0.02).mean())


@pytest.mark.parametrize("columns,rows", [(1, 1), (3, 11), (12, 11), (35, 35)])
def test_all_right_is_green_and_all_wrong_is_red_at_any_size(tmp_path, columns, rows):
    for name, score, shown, other in (("good", 1.0, GREEN, RED), ("bad", 0.0, RED, GREEN)):
        cells = {(512 * (c + 1), 100 * r / max(1, rows - 1)): score for c in range(columns) for r in range(rows)}
        sweep = read_sweep([write_results(tmp_path / f"{name}.json", cells)])
        draw(sweep, tmp_path / f"{name}.png")
        assert share_of(tmp_path / f"{name}.png", shown) > 0.3
        assert share_of(tmp_path / f"{name}.png", other) < 0.02  # the colour bar's end


def test_cells_stand_where_their_length_and_depth_say(tmp_path):
    cells = {(512, 0): 1.0, (512, 100): 0.0, (1024, 0): 0.5, (2048, 100): 0.25}
    sweep = read_sweep([write_results(tmp_path / "needle.json", cells)])
    assert sweep.lengths == [512, 1024, 2048] and sweep.depths == [0, 100]
    np.testing.assert_equal(sweep.grid(), [[1.0, 0.5, np.nan], [0.0, np.nan, 0.25]])
    assert sweep.counts() == (2, 2) and sweep.train_length == 2048
    assert sweep.mean() == pytest.approx(0.4375)
    draw(sweep, tmp_path / "needle.png")


def test_several_files_are_one_sweep_and_n_is_told(tmp_path):
    one = write_results(tmp_path / "a.json", {(512, 0): 1.0}, n=1)
    two = write_results(tmp_path / "b.json", {(512, 0): 0.0, (1024, 0): 1.0}, n=3)
    sweep = read_sweep([one, two])
    assert sweep.grid().tolist() == [[0.25, 1.0]]
    assert "n = 3 to 4 per cell" in heatmap.describe(sweep)
    assert read_sweep([one], score="partial").grid().tolist() == [[0.5]]


def test_published_rows_are_brought_to_the_common_scale(tmp_path):
    rows = [
        {"model": "other", "context_length": length, "depth_percent": depth, "score": score}
        for length, depth, score in [(1000, 0, 10), (1000, 50, 1), (2000, 0, 5.5), (2000, 0, 5.5)]
    ]
    file = tmp_path / "published.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    main([str(file), str(tmp_path / "out.png"), "--score-range", "1,10", "--train-length", "1500"])
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["cells"] == [
        {"length": 1000, "depth": 0.0, "score": 1.0, "n": 1},
        {"length": 1000, "depth": 50.0, "score": 0.0, "n": 1},
        {"length": 2000, "depth": 0.0, "score": 0.5, "n": 2},
    ]
    assert numbers["train_length"] == 1500 and numbers["checkpoint"] == "other"


def test_raw_results_beside_the_picture_are_not_overwritten(tmp_path):
    file = write_results(tmp_path / "needle.json", {(512, 0): 1.0})
    before = file.read_text()
    main([str(file), str(tmp_path / "needle.png")])
    assert file.read_text() == before


def test_scores_off_the_scale_and_unknown_files_are_named(tmp_path):
    published = tmp_path / "published.jsonl"
    published.write_text('{"context_length": 1000, "depth_percent": 0, "score": 10}')
    with pytest.raises(
        ValueError, match=r"published.jsonl: score 10 is outside 0..1; name the scale with --score-range"
    ):
        read_sweep([published])
    published.write_text('{"context_length": 1000, "score": 1}')
    with pytest.raises(ValueError, match="row 1: no 'depth_percent'"):
        read_sweep([published])
    with pytest.raises(ValueError, match="--score-range 10,1"):
        read_sweep([published], score_range=(10, 1))
    with pytest.raises(ValueError, match="has no score 'generated'; it has exact, partial"):
        read_sweep([write_results(tmp_path / "needle.json", {(512, 0): 1.0})], score="generated")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json: expected a result file of eval.needle"):
        read_sweep([tmp_path / "other.json"])
    (tmp_path / "broken.json").write_text('{"kind": ')
    with pytest.raises(ValueError, match=r"broken.json, line 1: not valid JSON"):
        read_sweep([tmp_path / "broken.json"])


@pytest.mark.parametrize(
    "length,text",
    [(512, "512"), (1024, "1k"), (2560, "2.5k"), (131072, "128k"), (1000, "1k"), (118059, "118k")],
)
def test_lengths_are_labelled_the_way_people_say_them(length, text):
    assert format_length(length) == text


@pytest.mark.skipif(
    "S2_SHARED_DATA" not in os.environ, reason="S2_SHARED_DATA names no folder with the published sweep"
)
def test_a_published_sweep_of_35_lengths_and_depths_is_drawn(tmp_path):
    file = Path(os.environ["S2_SHARED_DATA"]) / "needle" / "claude_2_1_results.jsonl"
    main([str(file), str(tmp_path / "sweep.png"), "--score-range", "1,10"])
    sweep = read_sweep([file], score_range=(1, 10))
    assert sweep.grid().shape == (35, 35) and not np.isnan(sweep.grid()).any()
    assert share_of(tmp_path / "sweep.png", GREEN) > 0.2 and share_of(tmp_path / "sweep.png", RED) > 0.2
