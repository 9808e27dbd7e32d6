"""What the command lines of the evaluations have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def new_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m eval.<name>`, described by the first paragraph of its module."""
    return argparse.ArgumentParser(prog=f"python -m eval.{name}", description=(doc or "").split("\n\n")[0])


def path(text: str) -> Path:
    """A file or folder that is named; an empty name, as of an unset variable, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)
