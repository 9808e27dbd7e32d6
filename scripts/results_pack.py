"""Carry results of an experiment between machines: everything but checkpoints and weights, in one tar file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from results_plan import Plan
from results_record import checked

from s2 import files

_HEAVY = ("checkpoints", "tensorboard")  # folders that stay
_WEIGHTS = (".safetensors", ".bin", ".npy", ".pt")
_TOKENIZER = ("tokenizer.json", "tokenizer.model")
_LOG_BYTES = 200_000  # of the end of a log
_NO_FIGURES = (".log", ".png")
_MARK = {"comment": "results, written by scripts/results.py, which replaces them"}  # opens the tar
_UNPACK = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}  # by how files begin


def pack(plan: Plan, target: Path, *, only: Sequence[str] = (), figures_only: bool = False) -> int:
    """Write the tar file and return how many files are in it. only: these arms. figures_only: what a page is made from,
    without logs and pictures; the same files give the same bytes.

    Raises ValueError where there is nothing to pack.
    """
    packed = [path for path in _light_files(plan, only) if not (figures_only and path.suffix in _NO_FIGURES)]
    if not packed:
        raise ValueError(f"{plan.root} holds no results of {', '.join(only) or plan.name} yet")
    with (
        files.whole(target) as stream,
        gzip.GzipFile(filename="", fileobj=stream, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT, pax_headers=_MARK) as tar,
    ):
        for path in packed:
            content = path.read_bytes()
            content = content[-_LOG_BYTES:] if path.suffix == ".log" else content
            entry = tarfile.TarInfo(str(path.relative_to(plan.root)))
            entry.size, entry.mtime = len(content), 0 if figures_only else int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    return len(packed)


def require_ours(target: Path) -> None:
    """Refuse a place for `pack` where another file stands than one that it has written. Raises NotOursError."""
    if not target.is_file():
        return
    try:
        with tarfile.open(target) as tar:
            comment = tar.pax_headers.get("comment")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError):
        comment = None
    if comment != _MARK["comment"]:
        raise files.NotOursError(f"{target} was not written by this program; name another file, or move it")


def _light_files(plan: Plan, only: Sequence[str]) -> Iterator[Path]:
    for arm in plan.arms:
        if only and arm.name not in only:
            continue
        for path in sorted(Path(plan.root, arm.name).rglob("*")):
            inside = path.relative_to(plan.root).parts
            heavy = path.suffix in _WEIGHTS or path.name in _TOKENIZER
            heavy |= any(part in _HEAVY or part.startswith(".") for part in inside)
            if path.is_file() and not path.is_symlink() and not heavy:
                yield path


def unpack(plan: Plan, source: Path, only: Sequence[str] = ()) -> list[str]:
    """Add the arms of a tar file, or `only` these of them, to what is there and return the new files. What is there of
    an arm that has a finished stage or a checkpoint here stays as it is.

    Raises ValueError, before anything is added, for a file that is no such tar, is damaged, holds other arms than the
    plan or names outside of its folder, lacks one of `only`, or holds what is no record of a stage, or one of a stage
    that was finished with another recipe or command than the plan has.
    """
    arms = {arm.name for arm in plan.arms}
    jobs = [job for each in plan.jobs().values() for job in each]
    finished = {job.arm for job in jobs if job.is_done}
    records = {f"{job.arm}/{job.record_file.name}": job for job in jobs}

    def stays(parts: tuple[str, ...]) -> bool:
        has_begun = any(Path(plan.root, parts[0]).glob("*/checkpoints/step-*"))
        return Path(plan.root, *parts).exists() and (parts[0] in finished or has_begun)

    held = _contents(source)
    arms_held = {PurePosixPath(name).parts[0] for name in held}
    if lacking := [name for name in only if name not in arms_held]:
        raise ValueError(f"--only {lacking[0]}: {source} has the arms {', '.join(sorted(arms_held))}")
    if others := (set(only) or arms_held) - arms:
        known = f"{plan.name} ({', '.join(sorted(arms))})"
        raise ValueError(f"{source}: {min(others)!r} is no arm of {known}; --only leaves it out")
    new = {name: content for name, content in held.items() if not only or PurePosixPath(name).parts[0] in only}
    new = {name: content for name, content in new.items() if not stays(PurePosixPath(name).parts)}
    for name in (name for name in new if name in records):
        place = f"{source}: {name}"
        record = files.parse_json(Path(place), new[name].decode("utf-8", "replace"))
        records[name].check_record(checked(record, place), place)
    for name, content in new.items():
        with files.whole(Path(plan.root, name)) as stream:
            stream.write(content)
    return list(new)


def _contents(source: Path) -> dict[str, bytes]:
    """The files of a tar of results, all of it read and checked: tarfile itself takes a header that it cannot read for
    the end, and leaves the checksum of what is packed unread. Raises ValueError for anything else."""
    packed, held = source.read_bytes(), dict[str, bytes]()
    try:
        unpacked = next((unpack(packed) for magic, unpack in _UNPACK.items() if packed.startswith(magic)), packed)
    except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        raise ValueError(f"{source}: damaged, or not all of it is here ({error}); nothing is taken from it") from None
    try:
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            for entry in (entry for entry in tar.getmembers() if not entry.isdir()):
                name = PurePosixPath(entry.name)  # ./a/b is a/b
                if not entry.isfile() or name.is_absolute() or ".." in name.parts or len(name.parts) < 2:
                    raise ValueError(f"{source}: {str(name)!r} is no file of an arm")
                content = tar.extractfile(entry)
                held[str(name)] = content.read() if content else b""
            rest = unpacked[tar.offset :]
    except tarfile.TarError as error:
        raise ValueError(f"{source}: not a tar file of results, or damaged ({error})") from None
    if not rest or rest.strip(b"\0"):
        raise ValueError(f"{source}: damaged, or not all of it is here: no entry, nor the end, at byte {tar.offset:,}")
    return held
