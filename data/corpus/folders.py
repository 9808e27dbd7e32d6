"""Files: which ones a folder or a pattern means, the names that document ids begin with, and the format of each.

Hidden files and folders (`.git`) and `__pycache__` are passed over. Links are followed, to files and to folders; what
is there already under a name of its own, and a folder that holds the link, are not read again.
"""

import fnmatch
import glob
import hashlib
import itertools
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from data.corpus.readers import PACKS

NamedFile = tuple[str, str]  # path, name that ids begin with
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


def folder_files(root: Path) -> list[NamedFile]:
    """(path, path below `root`) of every file below `root`, in sorted order. Raises OSError for a folder that cannot
    be read."""
    real = os.path.realpath(root)
    found: dict[str, NamedFile] = {}
    for path, name, is_linked in sorted(_walk(str(root), "", (real,), False), key=lambda each: each[2]):
        found.setdefault(os.path.realpath(path) if is_linked else os.path.join(real, name), (path, name))
    return sorted(found.values(), key=lambda file: file[1].split(os.sep))


def _walk(folder: str, below: str, inside: tuple[str, ...], is_linked: bool) -> Iterator[tuple[str, str, bool]]:
    """Path, name below the root, and whether a link leads there. inside: real paths of the folders on the way."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = os.path.join(below, entry.name)
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            through_link = is_linked or entry.is_symlink()
            if entry.is_dir():
                real = os.path.realpath(entry.path) if through_link else os.path.join(inside[-1], entry.name)
                if real not in inside:
                    yield from _walk(entry.path, name, (*inside, real), through_link)
            elif entry.is_file():  # not a pipe, nor a link to nothing
                yield entry.path, name, through_link


def matching_files(pattern: str) -> list[NamedFile]:
    """The file at `pattern`, or those that it matches, each once, in sorted order.

    A name is the path below the part of the pattern without wildcards, so that files of one name in many folders stay
    apart.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [(str(path), path.name)]
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    root, wild = Path(*fixed), path.parts[len(fixed) :]
    if "**" in wild:  # the library's search never ends where links make a loop
        files = folder_files(root) if root.is_dir() else []
        return [(file, name) for file, name in files if matches(name.split(os.sep), wild)]
    found: dict[str, Path] = {}
    for match in sorted(map(Path, glob.glob(str(path)))):
        if match.is_file():
            found.setdefault(os.path.realpath(match), match)
    return [(str(match), match.relative_to(root).as_posix()) for match in found.values()]


def matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether `glob` with `recursive` would find a file, given the parts of its path and those of a pattern."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        rest = pattern[1:] or ("*",)
        return any(matches(names[i:], rest) for i in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and matches(names[1:], pattern[1:])


def python_env_files(suffixes: Iterable[str]) -> list[NamedFile]:
    """(path, name) of sources and documentation of the standard library and of the installed packages.

    The order is by hash of the name, so that a size limit takes a fair sample of all packages and not the first ones
    of the alphabet.
    """
    paths = sysconfig.get_paths()
    files = [
        (path, f"stdlib/{name}")
        for path, name in folder_files(Path(paths["stdlib"]))
        if "site-packages" not in name and not path.startswith(paths["purelib"] + os.sep)
    ]
    files += [(path, f"site-packages/{name}") for path, name in folder_files(Path(paths["purelib"]))]
    files = [file for file in files if file[1].endswith(tuple(suffixes))]
    return sorted(files, key=lambda file: hashlib.blake2b(file[1].encode()).digest())


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
