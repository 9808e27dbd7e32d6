"""The heatmap shows the numbers it was given, on a fixed scale, at any size."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from eval.heatmap import draw, main
from eval.sweep import read_sweep
from tests.eval.sweeps import published_rows, write_results

GREEN, RED = (0.184, 0.659, 0.400), (0.843, 0.227, 0.286)
INK = (0.122, 0.161, 0.200)


def like(png, colour):
    """Where the picture has this colour, [rows, columns]."""
    return np.abs(imread(png)[..., :3] - np.array(colour)).max(-1) < 0.02


def share_of(png, colour):
    return float(like(png, colour).mean())


def training_lines(png):
    """Columns of pixels that are a dashed line over the map's whole height."""
    tall = like(png, INK).sum(0) > 0.3 * imread(png).shape[0]
    return int(np.diff(np.concatenate([[0], tall])).clip(0).sum())


@pytest.mark.parametrize("columns,rows", [(1, 1), (3, 11), (35, 35)])
def test_all_right_is_green_and_all_wrong_is_red_at_any_size(tmp_path, columns, rows):
    for name, score, shown, other in (("good", 1.0, GREEN, RED), ("bad", 0.0, RED, GREEN)):
        cells = {(512 * (c + 1), 100 * r / max(1, rows - 1)): score for c in range(columns) for r in range(rows)}
        sweep = read_sweep([write_results(tmp_path / f"{name}.json", cells)])
        draw([sweep], tmp_path / f"{name}.png")
        assert share_of(tmp_path / f"{name}.png", shown) > 0.3
        assert share_of(tmp_path / f"{name}.png", other) < 0.02  # the colour bar's end


def test_panels_share_one_scale_and_stand_side_by_side(tmp_path):
    cells = [(length, depth) for length in (512, 1024) for depth in (0, 50, 100)]
    before = write_results(tmp_path / "before.json", dict.fromkeys(cells, 0.0), checkpoint="demo/pretrain")
    after = write_results(tmp_path / "after.json", dict.fromkeys(cells, 1.0))
    png = tmp_path / "both.png"
    main([str(before), str(after), "--output", str(png), "--titles", "before", "after"])
    red, green = like(png, RED), like(png, GREEN)
    middle = red.shape[1] // 2
    assert red[:, :middle].mean() > 0.2 and green[:, :middle].mean() < 0.001
    assert green[:, middle:].mean() > 0.2 and red[:, middle:].mean() < 0.01  # the colour bar's end
    panels = json.loads((tmp_path / "both.cells.json").read_text())["panels"]
    assert [(panel["checkpoint"], panel["mean"]) for panel in panels] == [("demo/pretrain", 0), ("demo/extend-2k", 1)]


def test_a_cell_has_the_same_place_in_every_panel_and_is_grey_where_it_was_not_run(tmp_path):
    short = read_sweep([write_results(tmp_path / "short.json", {(512, 0): 1.0})])
    long = read_sweep([write_results(tmp_path / "long.json", dict.fromkeys([(512, 0), (1024, 0), (2048, 0)], 1.0))])
    draw([short, long], tmp_path / "both.png")
    green = like(tmp_path / "both.png", GREEN)
    middle = green.shape[1] // 2
    assert 2.5 < green[:, middle:].sum() / green[:, :middle].sum() < 3.5


def test_sweeps_of_other_depths_keep_their_own_rows_and_columns(tmp_path):
    coarse = dict.fromkeys([(length, depth) for length in (512, 1024) for depth in (0, 100)], 1.0)
    fine = dict.fromkeys([(length, depth) for length in (1000, 9000, 80000) for depth in range(1, 99, 7)], 1.0)
    sweeps = [read_sweep([write_results(tmp_path / f"{len(cells)}.json", cells)]) for cells in (coarse, fine)]
    draw(sweeps, tmp_path / "both.png")
    assert share_of(tmp_path / "both.png", (0.925, 0.933, 0.945)) < 0.001  # nothing grey
    assert share_of(tmp_path / "both.png", GREEN) > 0.35


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_cell_of_few_samples_says_how_many(tmp_path, n):
    sweep = read_sweep([write_results(tmp_path / "n.json", {(512, 0): 1.0, (1024, 50): 0.5}, n=n)])
    draw([sweep], tmp_path / "n.svg")
    assert (f"n={n}" in (tmp_path / "n.svg").read_text()) is (n < 3)


@pytest.mark.parametrize("trained,lines", [(256, 1), (512, 1), (2048, 1), (2049, 0), (8192, 0)])
def test_the_line_of_the_training_length_is_only_drawn_where_a_sweep_reaches_it(tmp_path, trained, lines):
    cells = dict.fromkeys([(length, depth) for length in (512, 1024, 2048) for depth in (0, 100)], 0.5)
    draw([read_sweep([write_results(tmp_path / "n.json", cells, train_length=trained)])], tmp_path / "n.png")
    assert training_lines(tmp_path / "n.png") == lines


def test_each_panel_has_the_line_of_its_own_training_length(tmp_path):
    cells = dict.fromkeys([(length, depth) for length in (512, 1024, 2048) for depth in (0, 100)], 0.5)
    sweeps = [
        read_sweep([write_results(tmp_path / f"{trained}.json", cells, train_length=trained)])
        for trained in (512, 1024, 8192)
    ]
    draw(sweeps, tmp_path / "three.png")
    assert training_lines(tmp_path / "three.png") == 2


@pytest.mark.parametrize(
    "name",
    ["costs $5 and $x^2 \\frac{", "/a/very/long/path" * 20, "word " * 100 + "two\nlines"],
)
def test_no_name_crashes_or_leaves_the_picture(tmp_path, name):
    file = write_results(tmp_path / "n.json", {(512, 0): 1.0}, checkpoint=name, settings={"haystack": name})
    sweep = read_sweep([file])
    draw([sweep], tmp_path / "n.png")
    draw([sweep, sweep], tmp_path / "two.png")
    for png in ("n.png", "two.png"):
        pixels = imread(tmp_path / png)[..., :3]
        assert pixels.shape[0] < 1200  # inches of height do not follow the name
        edge = 5
        for strip in (pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:]):
            assert strip.min() > 0.99  # nothing is cut off at the border


def test_published_rows_are_brought_to_the_common_scale(tmp_path):
    rows = published_rows({(1000, 0): 10, (1000, 50): 1, (2000, 0): 5.5}, model="other") * 2
    file = tmp_path / "published.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    main([str(file), str(tmp_path / "out.png"), "--score-range", "1,10", "--train-length", "1500"])
    numbers = json.loads((tmp_path / "out.cells.json").read_text())
    assert [(cell["length"], cell["depth"], cell["score"], cell["n"]) for cell in numbers["cells"]] == [
        (1000, 0, 1.0, 2),
        (1000, 50, 0.0, 2),
        (2000, 0, 0.5, 2),
    ]
    assert numbers["train_length"] == 1500 and numbers["checkpoint"] == "other"


@pytest.mark.parametrize("cell", ["word " * 40, "m" * 150, "iii " * 30 + "W" * 60])
def test_a_long_cell_of_the_table_below_stays_in_its_column(tmp_path, cell):
    sweep = read_sweep([write_results(tmp_path / "n.json", {(512, 0): 1.0})])
    draw([sweep, sweep], tmp_path / "n.png", table=[["of both", cell, ""]])
    begins = np.flatnonzero(np.diff(like(tmp_path / "n.png", GREEN).any(0).astype(int)) > 0)
    second = int(begins[1])  # of two maps and the colour bar
    below = imread(tmp_path / "n.png")[-90:, ..., :3].min(-1)  # four lines
    assert (below < 0.5).any() and not (below[:, second:] < 0.9).any()


BLUE, ORANGE = (0.129, 0.400, 0.675), (0.702, 0.345, 0.024)


@pytest.mark.parametrize("first,second,shown,other", [(0.0, 1.0, BLUE, ORANGE), (1.0, 0.0, ORANGE, BLUE)])
def test_the_difference_is_the_second_less_the_first_in_colours_of_its_own(tmp_path, first, second, shown, other):
    cells = [(length, depth) for length in (512, 1024) for depth in (0, 50, 100)]
    files = [
        str(write_results(tmp_path / f"{i}.json", dict.fromkeys(cells, score), checkpoint=f"run {i}"))
        for i, score in enumerate((first, second))
    ]
    main([*files, "--output", str(tmp_path / "pair.png"), "--difference"])
    assert share_of(tmp_path / "pair.png", shown) > 0.1 and share_of(tmp_path / "pair.png", other) < 0.01
    found = json.loads((tmp_path / "pair.cells.json").read_text())["difference"]
    assert found["difference"] == second - first and found["paired"]
    assert found["interval"][0] * found["interval"][1] > 0  # twelve of twelve


def test_a_difference_of_sweeps_without_a_common_cell_is_refused(tmp_path):
    one = str(write_results(tmp_path / "one.json", {(512, 0): 1.0}))
    two = str(write_results(tmp_path / "two.json", {(1024, 0): 1.0}))
    with pytest.raises(ValueError, match=r"one\.json and .*two\.json have no length and depth in common"):
        main([one, two, "--output", str(tmp_path / "x.png"), "--difference"])
    with pytest.raises(ValueError, match="--difference is that of two results, and 1 are named"):
        main([one, "--output", str(tmp_path / "x.png"), "--difference"])


def test_raw_results_beside_the_picture_are_not_overwritten(tmp_path):
    file = write_results(tmp_path / "needle.json", {(512, 0): 1.0})
    other = write_results(tmp_path / "needle-n1.json", {(512, 0): 0.0})
    before = file.read_text()
    main([str(other), str(tmp_path / "needle.png")])
    assert file.read_text() == before


@pytest.mark.parametrize("named", ["results", "foreign"])
def test_a_file_that_has_the_name_of_the_pictures_numbers_is_not_overwritten(tmp_path, named):
    file = write_results(tmp_path / "one.cells.json", {(512, 0): 1.0})
    if named == "foreign":
        file.write_text("[1, 2]")
    before = file.read_text()
    results = file if named == "results" else write_results(tmp_path / "one.json", {(512, 0): 1.0})
    with pytest.raises(ValueError, match=r"one\.cells\.json is where the picture's numbers go, and another file"):
        main([str(results), "--output", str(tmp_path / "one.png")])
    assert file.read_text() == before and not (tmp_path / "one.png").exists()


def test_wrong_use_is_told_before_anything_is_written(tmp_path):
    one = str(write_results(tmp_path / "one.json", {(512, 0): 1.0}))
    two = str(write_results(tmp_path / "two.json", {(512, 0): 1.0}))
    before = sorted(file.name for file in tmp_path.iterdir())
    for arguments, message in (
        ([one, two], "no picture to write is named; add --output"),
        ([one, "--output", str(tmp_path / "two.json")], r"two\.json: a picture ends in \.png"),
        ([one, two, "--output", str(tmp_path / "x.png"), "--titles", "a"], "--titles: 1 for 2 panels"),
        (
            [one] * 7 + ["--output", str(tmp_path / "x.png")],
            "7 files would be 7 panels, and 6 have room; a folder is one",
        ),
        ([one, "--score-range", "1", str(tmp_path / "x.png")], "--score-range 1: expected two numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


@pytest.mark.skipif(
    "S2_SHARED_DATA" not in os.environ, reason="S2_SHARED_DATA names no folder with the published sweep"
)
def test_a_published_sweep_of_35_lengths_and_depths_is_drawn(tmp_path):
    file = Path(os.environ["S2_SHARED_DATA"]) / "needle" / "claude_2_1_results.jsonl"
    main([str(file), str(tmp_path / "sweep.png"), "--score-range", "1,10"])
    sweep = read_sweep([file], score_range=(1, 10))
    assert sweep.grid().shape == (35, 35) and not np.isnan(sweep.grid()).any()
    assert share_of(tmp_path / "sweep.png", GREEN) > 0.2 and share_of(tmp_path / "sweep.png", RED) > 0.2
