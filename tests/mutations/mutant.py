"""What a mutation says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in the files of the folder (or file) `where`, and `new` takes its place.

    tests: names of test files (`data/test_resume.py` where there are two), which may go on with `::test`. gpu: only a
    GPU shows it.
    """

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]
    gpu: bool = False
