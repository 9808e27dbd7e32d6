"""Local files: which ones a folder or a pattern means, and the names that document ids begin with.

Hidden files and folders (`.git`) and `__pycache__` are passed over. Links are followed, to files and to folders; what
is there already under a name of its own, and a folder that holds the link, are not read again.
"""

import fnmatch
import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

NamedFile = tuple[str, str]  # path, name that ids begin with


def folder_files(root: Path) -> list[NamedFile]:
    """(path, path below `root`) of every file below `root`, in sorted order. Raises OSError for a folder that cannot
    be read."""
    real = os.path.realpath(root)
    plain: list[NamedFile] = []
    linked: list[NamedFile] = []
    for path, name, is_linked in _walk(str(root), "", (real,), False):
        (linked if is_linked else plain).append((path, name))
    if linked:
        seen = {os.path.join(real, name) for _, name in plain}
        for path, name in linked:
            target = os.path.realpath(path)
            if target not in seen:
                seen.add(target)
                plain.append((path, name))
    return sorted(plain, key=lambda file: file[1].split(os.sep))


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
