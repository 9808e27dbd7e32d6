"""The program's own files: what it wrote, it may replace and remove; what it did not write, it never touches.

This is the only module that deletes, renames or replaces anything (`s2.locks` keeps two processes from doing it at
once). Three ideas:

- **Whole files.** `whole`, `write_text` and `write_json` leave the old file or the new one, on disk, never a part.
- **Marked folders.** `make_folder` puts a mark (`.s2-folder.json`) into a folder that it makes or finds empty. Only in
  marked folders is anything removed, and there only what a call names. A folder that is to be there whole or not at all
  is written as `begin` returns it; `publish` writes a list of the files into the mark and gives it its name, and
  `remove_folder` then removes just these files, so that a note that somebody put beside them stays.
- **Inventories.** `inventory` records sizes and checksums; `damage` says in a few words what is no longer as recorded.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

MARK = ".s2-folder.json"
_TEMPORARY = re.compile(r"\..+\.(\d+)\.s2-tmp")
_OF_A_STREAM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_ABANDONED = 3600.0  # seconds after which the temporary file of a process that this host does not have is litter


class NotOursError(ValueError):
    """What would be removed or replaced was not made by this program."""


# --- whole files ------------------------------------------------------------------------------------------------------


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream whose content becomes `path` when the block ends without an error, and not otherwise.

    The file is on disk then, and keeps the permissions of the one that it replaces. Folders on the way are made. A link
    at `path` is followed.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder, and a file is to be written there")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.s2-tmp")
    try:
        with naming(path), temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of a stream (a full disk, a quota) name the file: the system knows the stream's number alone."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in _OF_A_STREAM:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def sweep(path: Path, *, is_alone: bool = False) -> None:
    """Remove temporary files for `path` that killed processes have left.

    Args:
        is_alone: no other process writes to the folder (the caller holds its lock); otherwise only files that are old
            and of no process of this host are removed.
    """
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.s2-tmp"):
        match = _TEMPORARY.fullmatch(other.name)
        with contextlib.suppress(OSError):
            is_old = time.time() - other.stat().st_mtime > _ABANDONED
            if match and (is_alone or (is_old and not os.path.exists(f"/proc/{match[1]}"))):
                other.unlink()


def write_text(path: Path, text: str) -> None:
    """`whole` of UTF-8 text. Lone surrogates are written as their escapes, so that nothing is lost to one of them."""
    with whole(path) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any, *, default: Callable[[Any], Any] | None = None) -> None:
    """`whole` of indented JSON that any reader takes: NaN and infinities become null.

    Args:
        default: what becomes of values that JSON cannot say, as of `json.dumps`.
    """
    write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False, default=default) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises FileNotFoundError, or ValueError that names file and line of what is no JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    return parse_json(path, text)


def parse_json(path: Path, text: str, line: int | None = None) -> Any:
    """The value of JSON that stands in a file, or in this line of it. Raises ValueError as `read_json`."""
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line or error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def read_record(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def require_writable(folder: Path) -> None:
    """Refuse a folder that results cannot be written to, before they are worked out; it is made if it is missing.
    Raises OSError that names the folder and what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{folder}: cannot write there ({error.strerror})") from None


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder outside of everybody's way that is gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="s2-") as folder:
        yield Path(folder)


# --- marked folders ---------------------------------------------------------------------------------------------------


def make_folder(folder: Path, kind: str) -> Path:
    """Make a folder and mark it as the program's, or take one that is marked with the same kind.

    Args:
        kind: what the folder holds, in a word or two (`token shards`).

    Raises:
        NotOursError: it is there, not empty, and has no mark or another kind's.
    """
    check_folder(folder, kind)
    if kind_of(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        _mark(folder, kind)
    return folder


def check_folder(folder: Path, kind: str) -> None:
    """Refuse what `make_folder` refuses, without making or marking anything. Raises as that does."""
    # Listed before the mark is read: of a folder that another process is just making, only what it marks is seen.
    names = os.listdir(folder) if folder.is_dir() else []
    others = sorted(name for name in names if not _TEMPORARY.fullmatch(name))
    marked = kind_of(folder)
    if marked not in (None, kind):
        raise NotOursError(f"{folder} holds {marked}, not {kind}; choose another folder")
    if marked is None and others:
        raise NotOursError(
            f"{folder} holds files that this program did not write ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); choose another folder, or move them"
        )
    if marked is None and os.path.lexists(folder) and not folder.is_dir():
        raise NotOursError(f"{folder} is a file, and a folder for {kind} is to stand there; move it")


def adopt(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Mark a folder that the caller knows as the program's by its content, as earlier versions left it; `names` are
    those of the files in it that the program wrote."""
    if kind_of(folder) != kind:
        _mark(folder, kind, files={name: (folder / name).stat().st_size for name in names})


def kind_of(folder: Path) -> str | None:
    """What a marked folder holds; None where there is no mark that can be read."""
    return (read_record(folder / MARK) or {}).get("kind")


def require_marked(folder: Path) -> str:
    """The kind of a marked folder. Raises NotOursError for one that is not marked."""
    if (kind := kind_of(folder)) is None:
        raise NotOursError(f"{folder} has no mark of this program ({MARK}); it is left as it is")
    return kind


def remove_files(folder: Path, *patterns: str) -> None:
    """Remove the files of a marked folder whose names match one of `patterns` (as in a shell); others stay. Raises
    NotOursError for a folder that is there and is not marked."""
    if not folder.is_dir():
        return
    require_marked(folder)
    for name in os.listdir(folder):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)


def remove_folder(folder: Path, *patterns: str) -> bool:
    """Remove a marked folder with what the program wrote into it; True if nothing is left.

    That is: of a folder that `publish` listed, the files in the list; of others the files whose names match one of
    `patterns`, or everything where there are none. What else somebody put there stays, and the folder with it. A folder
    that is not there is no error. Of a link, what it leads to is emptied and loses its mark; link and folder stay.

    Raises:
        NotOursError: it is there, holds something and is not marked.
    """
    if not os.path.lexists(folder):
        return True
    is_link = folder.is_symlink()
    if folder.is_dir() and not is_link and all(map(_TEMPORARY.fullmatch, os.listdir(folder))):
        shutil.rmtree(folder)  # `make_folder` was killed between making and marking it
        return True
    require_marked(folder)
    listed = (read_record(folder / MARK) or {}).get("files")
    if listed is None and not patterns and not is_link:
        doomed = folder.with_name(f".{folder.name}.{os.getpid()}.s2-tmp")
        os.replace(folder, doomed)  # gone at once: what a kill leaves half-removed has no name that anybody looks for
        shutil.rmtree(doomed)
        return True
    for mark in list(folder.rglob(MARK)):  # folders of their own, made later (converted checkpoints)
        if mark.parent != folder:
            remove_folder(mark.parent)
    names = listed
    if names is None:
        found = (path for path in (folder.iterdir() if patterns else folder.rglob("*")) if not path.is_dir())
        wanted = (path for path in found if any(fnmatch.fnmatchcase(path.name, p) for p in patterns or ("*",)))
        names = [path.relative_to(folder) for path in wanted if path != folder / MARK]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):  # the deepest first
        with contextlib.suppress(OSError):
            path.rmdir()
    left = [name for name in os.listdir(folder) if name != MARK]
    if not left and is_link:
        (folder / MARK).unlink()
    elif not left:
        shutil.rmtree(folder)
    return not left


def partial_of(final: Path) -> Path:
    """Where the folder `final` is written, before it gets that name."""
    return final.with_name(f"{final.name}.partial")


def begin(final: Path, kind: str) -> Path:
    """The empty marked folder that `publish` makes `final` of; what a killed process left in its place is removed, and
    what somebody else put there moves aside, which is said."""
    partial = partial_of(final)
    try:
        is_gone = remove_folder(partial)
    except NotOursError:
        is_gone = False
    if not is_gone:
        _make_way(partial)
    return make_folder(partial, kind)


def publish(partial: Path, final: Path) -> None:
    """Give a finished marked folder its name, with its files on disk and listed in its mark.

    The rename is the commit: a process killed before it leaves only the partial name. A folder of the same kind at
    `final` is removed, unless somebody has put files into it; that, and anything else there, moves aside.
    """
    kind = require_marked(partial)
    found = sorted(path for path in partial.rglob("*") if not path.is_dir() and path != partial / MARK)
    _mark(partial, kind, files={str(path.relative_to(partial)): path.lstat().st_size for path in found})
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if os.path.lexists(final) and kind_of(final) != kind:
        _make_way(final)
    elif final.is_symlink() or not remove_folder(final):
        move_aside(final)
    os.replace(partial, final)
    _sync_folder(final.parent)


def move_aside(path: Path) -> Path:
    """Rename a file or folder to the first free of `<name>.1`, `<name>.2`, ... and return that."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{number}")):
        number += 1
    os.rename(path, aside)
    return aside


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, in place of an earlier link; anything else there moves aside."""
    if os.path.lexists(link) and not link.is_symlink():  # a copy that followed links has made a folder of it
        _make_way(link)
    temporary = link.with_name(f".{link.name}.{os.getpid()}.s2-tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


# --- inventories ------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file: finds damage at the speed of the disk; it is no defence against forgery."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def inventory(folder: Path, share: tuple[int, int] = (0, 1)) -> dict[str, dict[str, Any]]:
    """Size in bytes and checksum of each file below `folder`, by its path relative to it; marks and temporary files are
    left out.

    Args:
        share: (rank, ranks) that divide the files among them.
    """
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    names = sorted(str(path.relative_to(folder)) for path in found if not _TEMPORARY.fullmatch(path.name))
    paths = {name: folder / name for name in names[share[0] :: share[1]]}
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(paths, pool.map(checksum, paths.values()), strict=True))
    return {name: {"size": path.stat().st_size, "xxh3_128": sums[name]} for name, path in paths.items()}


def damage(folder: Path, recorded: Mapping[str, Mapping[str, Any]], *, checksums: bool = True) -> str | None:
    """What is no longer as `inventory` recorded it, of the first file that is not; None where all is well.

    Args:
        checksums: read every byte where a checksum is recorded; without, only sizes are compared.
    """

    def wrong(name: str) -> str | None:
        path, was = folder / name, recorded[name]
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != was["size"]:
            return f"{path} has {size:,} bytes, not the {was['size']:,} that were written"
        if checksums and "xxh3_128" in was and checksum(path) != was["xxh3_128"]:
            return f"{path} has other content than was written"
        return None

    with ThreadPoolExecutor() as pool:
        return next((words for words in pool.map(wrong, recorded) if words), None)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _make_way(path: Path) -> None:
    print(f"{path} is not this program's, or others have written to it; it is now {move_aside(path)}")


def _mark(folder: Path, kind: str, **more: Any) -> None:
    note = "made by s2-recipes, which may remove from this folder what it wrote there"
    write_json(folder / MARK, {"kind": kind, "note": note, **more})


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _sync(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        _sync(folder)
