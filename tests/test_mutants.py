"""The mutations stand where they are said to, with tests that exist; `mutants.py` tries them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import mutants
from tests.mutations import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutation_is_tied_to_the_code(mutant: Mutant) -> None:
    mutants.place_of(mutant)
    assert mutants.tests_of(mutant)


def test_names_of_mutants_are_their_own() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 40


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "s2").mkdir()
    (tmp_path / "s2" / "__init__.py").write_text("")
    (tmp_path / "tests").mkdir()
    (tmp_path / "s2" / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef one():\n    return 1\n")
    (tmp_path / "tests" / "test_sums.py").write_text(
        "import time\n\nfrom s2.sums import add, one\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n"
        "def test_one():\n    while one() != 1:\n        time.sleep(1)\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "timeout", "caught", "by"),
    [
        ("a + b", "a - b", 100, True, "test_sums.py::test_add"),
        ("a + b", "b + a", 100, False, ""),
        ("return 1", "return 2", 3, True, "no end within 3 s"),
    ],
)
def test_a_mutant_is_caught_by_a_failure_or_a_hang(
    tree: Path, old: str, new: str, timeout: float, caught: bool, by: str
) -> None:
    text = (tree / "s2" / "sums.py").read_text()
    run = mutants.Runner(tree, timeout, gpu=True)  # a process of its own, which begins sooner than a warm one
    outcome = mutants.try_out(Mutant("a", "s2", old, new, ("test_sums.py",)), run)
    assert outcome.caught == caught and by in outcome.by, outcome
    assert (tree / "s2" / "sums.py").read_text() == text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"old": "a * b"}, "stands nowhere"),
        ({"old": "return"}, r"stands s2/sums.py \(2\)"),
        ({"tests": ("test_other.py",)}, "0 files test_other.py"),
        ({"tests": ("test_sums.py::test_two",)}, "has no test_two"),
    ],
)
def test_a_mutation_that_is_not_there_is_an_error(tree: Path, change: dict, said: str) -> None:
    values = {"name": "a", "where": "s2", "old": "a + b", "new": "a", "tests": ("test_sums.py",), **change}
    with pytest.raises(ValueError, match=said):
        mutants.place_of(Mutant(**values), tree)
        mutants.tests_of(Mutant(**values), tree)


def test_the_command_ends_with_what_survived(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    outcomes = [mutants.Outcome("one", "a.py", True, "test_a", 1.0), mutants.Outcome("two", "b.py", False, "", 1.0)]
    monkeypatch.setattr(mutants, "try_all", lambda *arguments: outcomes)
    name = MUTANTS[0].name
    assert mutants.main(["--only", name, "--json", str(tmp_path / "out.json")]) == 1
    assert "1 of 2 caught" in capsys.readouterr().out and '"two"' in (tmp_path / "out.json").read_text()
    monkeypatch.setattr(mutants, "try_all", lambda *arguments: outcomes[:1])
    assert mutants.main(["--only", name]) == 0
    with pytest.raises(ValueError, match="--only nothing"):
        mutants.main(["--only", "nothing"])
