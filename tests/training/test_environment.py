"""A run says on what it was trained, and a resumed one on what before that."""

import sys

import pytest

from s2.files import read_json
from s2.training import environment


def test_a_resumed_run_keeps_what_earlier_processes_recorded(tmp_path, monkeypatch):
    for commit in ("one", "two", "three"):
        monkeypatch.setenv("S2_COMMIT", commit)
        environment.record_environment(tmp_path)
    found = read_json(tmp_path / "environment.json")
    assert found["commit"] == "three" and [each["commit"] for each in found["earlier"]] == ["one", "two"]
    assert found["versions"]["torch"] and found["device"] and all("earlier" not in each for each in found["earlier"])


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "s2.training.cli", "a.yaml", "run.stage=x y"])
    assert environment.environment()["command"] == "python -m s2.training.cli a.yaml 'run.stage=x y'"


@pytest.mark.parametrize("path", ["", "/nowhere"])
def test_without_git_there_is_no_commit(path, monkeypatch):
    monkeypatch.delenv("S2_COMMIT", raising=False)
    monkeypatch.setenv("PATH", path)
    assert environment.environment()["commit"] is None


@pytest.mark.parametrize("text", ["", "[1]", '{"earlier": 5}'])
def test_a_record_that_cannot_be_read_moves_aside_and_stops_nothing(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    environment.record_environment(tmp_path)
    assert read_json(tmp_path / "environment.json")["earlier"] == []
    assert (tmp_path / "environment.json.1").read_text() == text
