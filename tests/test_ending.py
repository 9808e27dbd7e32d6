"""Every command ends with one sentence and a code."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from s2 import ending


class Stop(Exception):  # noqa: N818
    exit_code = ending.STOPPED


def _raising(error: BaseException) -> Any:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("key x in f.yaml:\n  is wrong"), 2, "error: key x in f.yaml: is wrong\n"),
        (FileNotFoundError(2, "gone", "f"), 2, "error: gone: 'f'\n"),
        (ending.DamagedError("d"), 4, "error: d\n"),
        (ending.FailureError("a worker died"), 1, "error: a worker died\n"),
        (Stop("saved"), 75, "stopped: saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 5, "error: MemoryError\n"),
    ],
)
def test_an_error_is_one_sentence(error: BaseException, code: int, text: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("S2_DEBUG", raising=False)
    assert ending.call(_raising(error)) == code
    assert capsys.readouterr().err == text


def test_a_crash_says_where_and_keeps_its_traceback(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("S2_DEBUG", raising=False)
    monkeypatch.setattr(ending, "_crash_folder", tmp_path)
    assert ending.call(_raising(KeyError("k"))) == ending.CRASH
    said = capsys.readouterr().err
    (kept,) = tmp_path.glob("s2-crash-*.txt")
    assert said.startswith("crashed: KeyError: 'k' (") and "test_ending.py:" in said and str(kept) in said
    assert "Traceback" not in said and "Traceback" in kept.read_text()


def test_debug_shows_the_traceback(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("S2_DEBUG", "1")
    ending.call(_raising(ValueError("x")))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "prefix"), [("RANK", "[rank 3] "), ("SLURM_PROCID", "[rank 3] "), (None, "")])
def test_lines_of_other_ranks_carry_the_rank(key: str | None, prefix: str) -> None:
    assert ending.rank_prefix({key: "3"} if key else {}) == prefix


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "from s2 import ending\ndef main():\n    for i in range(100000): print(i)\nending.run(main)"
    command = f"{sys.executable} -c '{code}' | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "0\n" and done.stderr == ""
