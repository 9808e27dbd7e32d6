"""The data report: where it lies, what it says about bad rows, and what the command takes."""

import json

import pytest
import yaml

from data.prepare import prepare
from data.report import folder_report, main
from s2.files import NotOursError
from tests.data.preparing import spec


@pytest.fixture
def prepared(corpus, tmp_path):
    corpus.write_text(corpus.read_text() + '{"text": 7}\n')
    prepare(spec(corpus, tmp_path / "out", on_bad_row="skip"))
    return tmp_path / "out"


def test_the_report_has_a_folder_of_its_own_and_counts_bad_rows(prepared):
    (prepared / "report.md").write_text("theirs")
    for _ in "12":
        file = folder_report(prepared)
    text = file.read_text()
    assert {p.name for p in file.parent.iterdir()} == {"report.md", "lengths.png", ".s2-folder.json"}
    assert "| 1 bad row |" in text and "| 100.00% |" in text  # of train and held-out together
    assert "Bad rows that were skipped" in text and "line 121" in text
    assert (prepared / "report.md").read_text() == "theirs"


def test_a_report_folder_of_somebody_else_is_refused(prepared):
    (prepared / "report").mkdir()
    (prepared / "report" / "report.md").write_text("theirs")
    with pytest.raises(NotOursError, match=r"report holds files that this program did not write \(report\.md\)"):
        folder_report(prepared)
    assert (prepared / "report" / "report.md").read_text() == "theirs"


def test_the_command_takes_overrides_of_a_recipe_and_names_wrong_keys(prepared, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    arguments = {"seq_len": 64, "micro_batch_size": 1, "mixture": [{"path": "nowhere"}]}
    recipe.write_text(json.dumps({"data": {"class_path": "data.datamodule.PackedDataModule", "init_args": arguments}}))
    main(["--recipe", str(recipe), f"data.mixture.0.path={prepared}/train", "data.mixture.0.weight=5e-1"])
    assert capsys.readouterr().out.strip() == str(prepared / "report" / "report.md")
    assert "mixture.png" in (prepared / "report" / "report.md").read_text()
    with pytest.raises(ValueError, match=r"unknown key data\.seqlen on the command line; did you mean data\.seq_len\?"):
        main(["--recipe", str(recipe), "data.seqlen=3"])
    recipe.write_text(yaml.safe_dump({"data": {"init_args": {"seq_len": 64}}}))
    with pytest.raises(ValueError, match=r"recipe\.yaml: data: missing key 'micro_batch_size'"):
        main(["--recipe", str(recipe)])


def test_a_wrong_value_is_refused_before_lightning_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("data.datamodule.PackedDataModule", lambda **arguments: pytest.fail("too late"))
    recipe = tmp_path / "recipe.yaml"
    arguments = {"seq_len": 64, "micro_batch_size": 1, "mixture": [{"path": "nowhere"}]}
    recipe.write_text(json.dumps({"data": {"class_path": "data.datamodule.PackedDataModule", "init_args": arguments}}))
    for wrong, message in (
        ("data.mixture.0.weight=-1", r"recipe\.yaml: data\.mixture\[0\]\.weight: expected a positive number, got -1"),
        ("data.num_workers=two", r"data\.num_workers: expected a whole number, got 'two'"),
        ("data.curriculum=[{seq_len: 8}]", r"data\.curriculum\[0\]: missing key 'tokens'"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["--recipe", str(recipe), wrong])


def test_a_seed_below_zero_is_refused(prepared, capsys):
    with pytest.raises(SystemExit):
        main(["--output", str(prepared), "--seed", "-5"])
    assert "--seed -5: expected at least 0" in capsys.readouterr().err
