"""A log file gets a line a minute; a terminal gets a bar."""

import io
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from s2 import progress


class Stream(io.StringIO):
    """Standard error that is a terminal or is not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_whole_lines_one_a_minute(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", log := Stream(False))
    with progress.progress("needle", 600, "sample") as bar:
        for _ in range(600):
            clock[0] += 0.5
            bar.update()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and len(lines) == 5
    assert lines[0].startswith("needle:  20%") and "120/600 [01:00<04:00" in lines[0] and "2.00sample/s" in lines[0]


def test_short_and_quiet_work_says_nothing_in_a_log(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", log := Stream(False))
    with progress.progress("short", None, "B", scaled=True) as bar:
        clock[0] += 59
        bar.update(1 << 20)
    with progress.progress("quiet", 10, "sample", quiet=True) as bar:
        clock[0] += 600
        bar.update(10)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Stream(True))
    with progress.progress("needle", 2, "sample") as bar:
        bar.update(2)
    assert "\rneedle: 100%|" in terminal.getvalue()


def test_bars_of_libraries_are_left_out_of_logs_alone(monkeypatch):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys, "stderr", stream := Stream(is_terminal))
        with progress.no_bars_in_logs():
            list(tqdm(range(3), file=stream))
        assert ("100%" in stream.getvalue()) == is_terminal
    stream = Stream(False)
    list(tqdm(range(3), file=stream))
    assert "100%" in stream.getvalue()


def test_work_outside_of_training_counts_in_this_one_way():
    """Training writes lines of its own."""
    root = Path(__file__).parents[1]
    files = [file for folder in ("data", "eval", "scripts") for file in (root / folder).rglob("*.py")]
    assert files and not [str(file) for file in files if "import tqdm" in file.read_text(encoding="utf-8")]
