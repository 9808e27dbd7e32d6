"""`scripts/bench_training.py`: the command line of a case, and a report that further cases are added to."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_training
from bench_record import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Cases that take no time; those of 2 GPUs fail."""
    ran = []

    def measure(name, data, steps, changes):
        ran.append(" ".join([name, *changes]))
        rate = 100.0 * len(ran) if name.endswith(":1") else None
        figures = {"tokens_per_second_per_device": rate, "tokens_per_second_per_device_all": [rate] * 3}
        memory = {"mfu_executed": 0.5, "mfu_dense_equivalent": 0.75, "memory_gib": 40.0, "estimate_gib": 39.5}
        ends = {"exit_code": 0, "said": ""} if rate else {"exit_code": 5, "said": "error: out of memory"}
        return {"case": name, **figures, **memory, **ends}

    def run(cases, commit, *more):
        words = ["x", "--cases", cases, "--data", "d", "--output", str(tmp_path / "rates"), "--commit", commit, *more]
        monkeypatch.setattr(sys, "argv", words)
        return bench_training.main()

    monkeypatch.setattr(bench_training, "measure", measure)
    monkeypatch.chdir(tmp_path)
    Path("d/train").mkdir(parents=True)
    Path("d/train/manifest.json").write_text("{}")
    run.ran, run.page = ran, tmp_path / "rates.md"
    return run


def test_cases_are_added_to_what_is_there_and_those_that_ran_are_not_run_again(run):
    assert run("7b-8k-dense:1,7b-8k:2", "abc") == 1
    assert run("7b-8k-dense:1,7b-8k:2,7b-8k:1", "def") == 1
    assert run.ran == ["7b-8k-dense:1", "7b-8k:2", "7b-8k:2", "7b-8k:1"]
    page = run.page.read_text()
    assert "- at abc: 7b-8k-dense:1\n- at def: 7b-8k:2, 7b-8k:1\n" in page
    assert "| 7b-8k | 1 | 400 | 4.00x | 0.500 / 0.750 | 40.0 | 39.5 | 3 |" in page
    assert "| 7b-8k | 2 | exit code 5: error: out of memory |" in page
    record = json.loads(run.page.with_suffix(".json").read_text())
    assert record["command"] == (
        "python scripts/bench_training.py --cases 7b-8k-dense:1,7b-8k:2,7b-8k:1 --data d --commit def"
    )


def test_cases_with_settings_of_their_own_are_rows_beside_those_without(run):
    assert run("7b-8k-dense:1,7b-8k:1", "abc") == 0
    assert run("7b-8k:1,7b-8k-dense:1", "abc", "--set", "trainer.strategy=zero_3", "--set", "a.b=[1, 2]") == 0
    settings = "trainer.strategy=zero_3 a.b=[1, 2]"
    assert run.ran == ["7b-8k-dense:1", "7b-8k:1", f"7b-8k:1 {settings}", f"7b-8k-dense:1 {settings}"]
    page = run.page.read_text()
    assert "| 7b-8k | 1 | 200 | 2.00x |" in page
    assert f"| 7b-8k {settings} | 1 | 300 | 0.75x |" in page


def test_data_is_the_folder_with_all_of_a_preparation(run, monkeypatch):
    words = ["x", "--cases", "7b-8k:1", "--data", "d/train", "--output", "r"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(FileNotFoundError, match="--data d/train: expected the folder that data"):
        bench_training.main()


def test_a_case_is_the_recipe_as_it_ships_on_other_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    case = bench_training._CASE.fullmatch("7b-128k-dense:2")
    path = bench_training.recipe_file(case["recipe"], int(case["length"]))
    words = bench_training.overrides(case, path, Path("shards"), 5, "out")
    assert path == Path("recipes/7b/extend-128k.yaml")
    for wanted in ("trainer.devices=2", "model.config.attention_layout=dense", "model.config.hidden_size=4096",
                   "data.mixture=[{path: shards/train, weight: 1.0}]", "run.tokens_per_step=262144"):  # fmt: skip
        assert wanted in words
    with pytest.raises(ValueError, match=r"7b-3k: recipes/7b trains at \['128k', '32k', '8k'\]"):
        bench_training.recipe_file("7b", 3)
