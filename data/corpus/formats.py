"""Which format a file has, by its name, and which of a folder's files are read."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from data.corpus.folders import NamedFile
from data.corpus.readers import PACKS

Format = Literal["auto", "hub", "parquet", "jsonl", "text", "folder", "python-env"]
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_SUFFIX_FORMAT = {
    ".parquet": "parquet",
    **{f".{stem}{pack}": "jsonl" for stem in ("jsonl", "json", "ndjson") for pack in ("", *PACKS)},
    **{f"{stem}{pack}": "text" for stem in TEXT_SUFFIXES for pack in ("", *PACKS)},
}
# What lies beside the rows of a corpus and is about it.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|changes|citation|contributing|authors)([._-].*)?\.(md|txt|rst)"
    r"|(dataset_infos?|dataset_dict|state|croissant)\.json",
    re.IGNORECASE,
)


class Found(NamedTuple):
    """What lies at a source's path: the format to read, the files in reading order (of a hub dataset none, it is asked
    later) and the names of those that are left out."""

    format: str
    files: list[NamedFile]
    left_out: list[str]


def known_format(file: str) -> str | None:
    """The format that a file's name tells, None where it tells none."""
    return next((kind for suffix, kind in _SUFFIX_FORMAT.items() if file.endswith(suffix)), None)


def format_of(file: str) -> str:
    """The format that a file's name tells. Raises ValueError where it tells none."""
    if (kind := known_format(file)) is None:
        raise ValueError(
            f"{file}: cannot tell the format from the name; set `format` to one of {', '.join(get_args(Format)[1:])}"
            f" or use one of the suffixes {', '.join(_SUFFIX_FORMAT)}"
        )
    return kind


def of_one_format(path: str, files: list[NamedFile], asked: str, suffixes: Sequence[str]) -> Found:
    """Those of the files of the folder `path` that are read.

    Args:
        asked: parquet, jsonl or text; auto for the one format of which there are files, README and the like aside.
        suffixes: of text files; others than TEXT_SUFFIXES ask for text.

    Raises ValueError where there are files of several formats, or none.
    """
    packed = tuple(suffix + pack for suffix in suffixes for pack in ("", *PACKS))
    kinds = {}
    for _, name in files:
        kind = "text" if name.endswith(packed) else known_format(name)
        kinds[name] = None if kind == "text" and not name.endswith(packed) else kind
    wanted = "text" if asked == "auto" and tuple(suffixes) != TEXT_SUFFIXES else asked
    if wanted == "auto":
        data = Counter(kind for name, kind in kinds.items() if kind and not _is_about(name))
        if len(data) > 1:
            several = ", ".join(f"{n:,} {kind}" for kind, n in sorted(data.items()))
            raise ValueError(
                f"source path {path!r} is a folder with files of several formats ({several}): say which one with"
                f" `format`, or name files by a pattern such as {path.rstrip('/')}/**/*.parquet"
            )
        wanted = next(iter(data), "text")  # of a README alone, that is the text
    chosen = [file for file in files if kinds[file[1]] == wanted and (wanted == "text" or not _is_about(file[1]))]
    if not chosen:
        there = f"it holds {listed([name for _, name in files])}" if files else "it is empty"
        what = "files of a known format" if asked == "auto" else f"{wanted} files"
        raise ValueError(
            f"source path {path!r}: no {what} in the folder, {there}; known suffixes are"
            f" {', '.join(dict.fromkeys((*_SUFFIX_FORMAT, *suffixes)))}"
        )
    names = {name for _, name in chosen}
    return Found(wanted, chosen, [name for _, name in files if name not in names])


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _is_about(name: str) -> bool:
    return _ABOUT.fullmatch(os.path.basename(name)) is not None
