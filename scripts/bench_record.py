"""What every benchmark here writes: a record of its figures, and a page of it for people.

A record says in `machine`, `date`, `commit`, `command` and `versions` where its figures come from, in `method` (lines
of text) how they were taken, and `name` is the last part of its file's name. The rest is each benchmark's own.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from s2 import files
from s2.arguments import without
from s2.versions import version_of

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("--output", "--work")  # options that a record does not repeat

Record = dict[str, Any]


def new_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """With the options that say where a report goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="commit to name in the report (default: git)")
    parser.add_argument("--name", help="in the name of the report's file (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the report (default: docs/benchmarks)")
    parser.set_defaults(output=ROOT / "docs" / "benchmarks", **defaults)
    return parser


def names(known: Collection[str] = ()) -> Callable[[str], list[str]]:
    """Of an option: names with commas between them, of those that are `known`."""

    def parse(text: str) -> list[str]:
        found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        unknown = [repr(name) for name in found if known and name not in known]
        if unknown or not found:
            choice = f"; choose from {', '.join(known)}" if known else ""
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown) or 'name'} in {text!r}{choice}")
        return found

    return parse


def require_gpu(what: str) -> None:
    """Raises ValueError where there is no GPU to measure."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"{what} needs a CUDA device, and there is none here")


def new_record(
    script: str, argv: Sequence[str], machine: str, packages: Iterable[str], *, commit: str | None = None, **more: Any
) -> Record:
    """A record with nothing measured yet: the command without the places that it writes to, versions of `packages`, the
    working tree's commit where none is given, and `more`."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    here = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "commit": commit or here or "unknown",
        "command": shlex.join(["python", f"scripts/{script}.py", *without(argv, *PLACES)]),
        "versions": {name: version_of(name) or "unknown" for name in packages},
        **more,
    }


def stem(record: Record) -> str:
    """Of the record's files: `<date>-<machine>-<name>`."""
    return f"{record['date']}-{re.sub('[^a-z0-9]+', '-', record['machine'].lower())}-{record['name']}"


def save(record: Record, path: Path, title: str, parts: Iterable[str]) -> str:
    """Write a record to `path`.json and its page to `path`.md: the title, where the figures come from and how, and the
    parts that are not empty. Returns the page."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [f"command: `{record['command']}`", f"commit: {record['commit']}", f"versions: {versions}"]
    about = "\n".join(f"- {line}" for line in [*lines, *record["method"]])
    page = "\n\n".join(filter(None, [f"# {title} on {record['machine']}", about, *parts])) + "\n"
    files.write_json(Path(f"{path}.json"), record)
    files.write_text(Path(f"{path}.md"), page)
    return page
