"""What command lines of the project have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def new_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m <name>`, described by the first paragraph of its module."""
    return argparse.ArgumentParser(prog=f"python -m {name}", description=(doc or "").split("\n\n")[0])


def path(text: str) -> Path:
    """A file or folder that is named; an empty name, as of an unset variable, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


@contextmanager
def options_named(names: Mapping[str, str]) -> Iterator[None]:
    """Have what a command says of its options name them as the one that runs it does: {"--n": "--ruler-n"}."""
    try:
        yield
    except Exception as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (re.sub(r"(?<![\w-])--[\w-]+", lambda found: names.get(found[0], found[0]), error.args[0]),)
        raise


def without(argv: Sequence[str], *options: str) -> list[str]:
    """The arguments but for some options and their values, which stand behind them or after a `=`."""
    kept, skip = [], False
    for argument in argv:
        is_named = argument.split("=")[0] in options
        kept += [] if skip or is_named else [argument]
        skip = is_named and "=" not in argument
    return kept
