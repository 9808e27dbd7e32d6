"""What is wrong in a plan is said in one sentence, with its place and value, before anything runs."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402

from s2 import ending  # noqa: E402
from tests.scripts.test_experiments import RECIPE  # noqa: E402

PLAN = {
    "name": "test",
    "root": "runs",
    "stages": [
        {"name": "train", "recipe": RECIPE},
        {
            "name": "evaluate",
            "command": ["python", "-m", "eval.suite", "--ckpt", "{arm}/train/hf"],
            "leaves": ["{arm}/train/results/suite*.json"],
        },
    ],
    "arms": [{"name": "a"}],
}
SUITE = PLAN["stages"][1]["command"]


def dry_run(monkeypatch: pytest.MonkeyPatch, folder: Path, place: tuple, value: Any, *words: str) -> int:
    """The plan with another value at a place in it."""
    monkeypatch.chdir(folder)
    plan: Any = copy.deepcopy(PLAN)
    *most, last = place
    part = plan
    for key in most:
        part = part[key]
    part[last] = value
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    return ending.call(lambda: results.main(["plan.yaml", "--dry-run", *words]))


INIT = ("stages", 0, "recipe", "data", "init_args")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("root",), "", "plan.yaml: root: expected a folder, got ''"),
        (("arms", 0, "minutes"), {"train": "ten"}, "plan.yaml: arms[0].minutes.train: expected a number, got 'ten'"),
        (("arms", 0, "minutes"), {"train": None}, "plan.yaml: arms[0].minutes.train: expected a number, got null"),
        (("arms", 0, "minutes"), {"train": [1]}, "plan.yaml: arms[0].minutes.train: expected a number, got [1]"),
        (("arms", 0, "minutes"), {"train": -5}, "plan.yaml: arms[0].minutes.train: expected a positive number, got -5"),
        (("stages", 0, "recipe"), [1], "plan.yaml: stages[0].recipe: expected a mapping of keys, or the path of a"),
        (("stages", 0, "recipe"), 5, "plan.yaml: stages[0].recipe: expected a mapping of keys, or the path of a"),
        (
            ("stages", 0, "recipe", "run"), "x",
            "plan.yaml: arm a, stage train: recipe.run: expected a mapping of keys, got 'x'",
        ),
        ((*INIT, "mixture"), "x", "arm a, stage train: data.mixture: expected a list"),
        ((*INIT, "mixture"), ["x"], "arm a, stage train: data.mixture[0]: expected a mapping of settings, got 'x'"),
        ((*INIT, "validation"), [{"name": "v"}], "arm a, stage train: data.validation[0]: missing key 'path'"),
        ((*INIT, "seq_len"), "x", "arm a, stage train: data.seq_len: expected a whole number, got 'x'"),
        (("stages", 1, "command"), [*SUITE, "--lengths", "64x"], "arm a, stage evaluate: --lengths 64x: '64x' is no"),
        (("stages", 1, "command"), [*SUITE, "--kinds", "foo"], "arm a, stage evaluate: --kinds foo: expected some of"),
        (("stages", 1, "command"), [*SUITE, "--depths", "0,101x"], "arm a, stage evaluate: "),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_place(tmp_path, monkeypatch, capsys, place, value, said):
    assert dry_run(monkeypatch, tmp_path, place, value) == ending.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
    assert not Path("runs").exists()


def test_without_a_gpu_arms_that_train_on_one_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "gpus_at_hand", lambda asked: [None])
    monkeypatch.setattr(results, "prepare_data", lambda specs: pytest.fail("prepares"))
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN))
    assert ending.call(lambda: results.main(["plan.yaml"])) == ending.BAD_INPUT
    assert capsys.readouterr().err.startswith("error: there is no GPU here, and a would train on one (train: 10 min")
    assert not Path("runs").exists()
    for more in (["--data-only"], ["stages.0.recipe.trainer.accelerator=cpu"]):
        with pytest.raises(pytest.fail.Exception, match="prepares"):
            results.main(["plan.yaml", *more])
    for option in ("--dry-run", "--status", "--page"):
        assert results.main(["plan.yaml", option]) == ending.DONE


def test_a_text_that_no_chosen_part_reads_may_be_missing(tmp_path, monkeypatch, capsys):
    words = [*SUITE, "--parts", "needle", "--documents", "nowhere", "--haystack"]
    Path(tmp_path / "essays.txt").write_text("text")
    assert dry_run(monkeypatch, tmp_path, ("stages", 1, "command"), [*words, "essays.txt"]) == ending.DONE
    assert dry_run(monkeypatch, tmp_path, ("stages", 1, "command"), [*words, "missing.txt"]) == ending.BAD_INPUT
    assert "--haystack missing.txt: no such file or folder" in capsys.readouterr().err
