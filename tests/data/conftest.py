"""Corpora of a few files, for the tests of preparation."""

import json
import os

import pytest

from tests.data.preparing import ROWS


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Hundreds of small files are written; no test loses power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def corpora(tmp_path):
    """Two sources in several files with duplicates inside and between them."""
    for name, begin in (("a", 0), ("b", 70)):
        (tmp_path / name).mkdir()
        for number in range(4):
            rows = [f"Text of row {i % 150}: " + "lorem ipsum ✓ " * (i * 7 % 23) for i in range(begin, begin + 40)]
            begin += 40
            file = tmp_path / name / f"{number}.jsonl"
            file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path
