"""Carry results of an experiment between machines: everything but checkpoints and weights, in one tar file."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from results_plan import Plan

from s2 import files

_HEAVY = ("checkpoints", "tensorboard")  # folders that stay
_WEIGHTS = (".safetensors", ".bin", ".npy", ".pt")
_TOKENIZER = ("tokenizer.json", "tokenizer.model")
_LOG_BYTES = 200_000  # of the end of a log
_NO_FIGURES = (".log", ".png")


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
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for path in packed:
            content = path.read_bytes()
            content = content[-_LOG_BYTES:] if path.suffix == ".log" else content
            entry = tarfile.TarInfo(str(path.relative_to(plan.root)))
            entry.size, entry.mtime = len(content), 0 if figures_only else int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    return len(packed)


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

    Raises ValueError, before anything is added, for a file that is no such tar, holds other arms than the plan or names
    outside of its folder, lacks one of `only`, or holds a stage that was finished with another recipe or command than
    the plan has.
    """
    arms, added = {arm.name for arm in plan.arms}, []
    jobs = [job for each in plan.jobs().values() for job in each]
    finished = {job.arm for job in jobs if job.is_done}
    records = {f"{job.arm}/{job.record_file.name}": job for job in jobs}

    def stays(parts: tuple[str, ...]) -> bool:
        has_begun = any(Path(plan.root, parts[0]).glob("*/checkpoints/step-*"))
        return Path(plan.root, *parts).exists() and (parts[0] in finished or has_begun)

    try:
        with tarfile.open(source) as tar:
            entries = [entry for entry in tar.getmembers() if not entry.isdir()]
            for entry in entries:  # ./a/b is a/b
                entry.name = str(PurePosixPath(entry.name))
            for entry in entries:
                parts = PurePosixPath(entry.name).parts
                if not entry.isfile() or entry.name.startswith("/") or ".." in parts or len(parts) < 2:
                    raise ValueError(f"{source}: {entry.name!r} is no file of an arm")
            held = {PurePosixPath(entry.name).parts[0] for entry in entries}
            if lacking := [name for name in only if name not in held]:
                raise ValueError(f"--only {lacking[0]}: {source} has the arms {', '.join(sorted(held))}")
            if others := (set(only) or held) - arms:
                known = f"{plan.name} ({', '.join(sorted(arms))})"
                raise ValueError(f"{source}: {min(others)!r} is no arm of {known}; --only leaves it out")
            entries = [entry for entry in entries if not only or PurePosixPath(entry.name).parts[0] in only]
            for entry in entries:
                parts = PurePosixPath(entry.name).parts
                if entry.name in records and not stays(parts):
                    content = tar.extractfile(entry)
                    record = json.loads(content.read() if content else b"{}")
                    records[entry.name].check_record(record, f"{source}: {entry.name}")
            for entry in entries:
                parts = PurePosixPath(entry.name).parts
                if stays(parts):
                    continue
                content = tar.extractfile(entry)
                with files.whole(Path(plan.root, *parts)) as stream:
                    stream.write(content.read() if content else b"")
                added.append(entry.name)
    except tarfile.TarError as error:
        raise ValueError(f"{source}: not a tar file of results ({error})") from None
    return added
