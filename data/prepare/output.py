"""The folder that a preparation writes: what in it is the preparation's, and what is somebody else's.

`tokenizer.json`, `train/`, `heldout/` and `work/` are written, and nothing else. The folders are marked (`s2.files`);
the tokenizer is known by its checksum, which manifests and `work/written.json` hold. What has these names and came from
elsewhere is refused before anything is touched, and so are sources inside the output or that would read from it.
"""

import glob
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.corpus.folders import matches
from data.prepare.part import WORK, WORK_FILES, WRITTEN
from data.prepare.spec import PrepareSpec
from data.shards.reader import KIND, MANIFEST, read_manifest, sha256
from data.shards.writer import remove_unlisted
from s2 import files, locks

WORK_KIND = "unfinished preparation"
TOKENIZER = "tokenizer.json"
# Of each kind of file that lies in an output, one: no pattern of a source may take them in.
_OWN = (
    TOKENIZER,
    "train/manifest.json",
    "train/shard-000-00000-000.parquet",
    "heldout/manifest.json",
    "heldout/shard-000-00000-000.parquet",
    "work/plan.json",
    "report/report.md",
)


def check_output(spec: PrepareSpec) -> None:
    """Refuse an output that holds what the preparation did not write, or whose sources lie inside of it.

    Raises `s2.files.NotOursError` or ValueError, naming what is in the way.
    """
    output = Path(spec.output)
    if os.path.lexists(output) and not output.is_dir():
        raise files.NotOursError(f"output {output} is not a folder; choose another, or move it")
    _refuse_sources_inside(spec)
    for folder, kind in ((output / WORK, WORK_KIND), *((folder, KIND) for folder in spec.folders.values())):
        if not is_finished(folder):
            files.check_folder(folder, kind)
    file = output / TOKENIZER
    if os.path.lexists(file):
        found = sha256(file) if file.is_file() else None
        is_ours = not file.is_symlink() and found in _known_tokenizers(output)
        brought = spec.tokenizer.path
        if not is_ours and (brought is None or sha256(Path(brought)) != found):
            raise files.NotOursError(
                f"{file} is not what a preparation wrote here; move it, choose another `output`, or make it the"
                f" tokenizer (`tokenizer: {{path: {file}}}`, TOKENIZER={file})"
            )


def is_finished(folder: Path) -> bool:
    """Whether a shard folder has a manifest; raises what `read_manifest` raises for one that is not ours or damaged."""
    if not (folder / MANIFEST).is_file():
        return False
    read_manifest(folder)
    return True


def _known_tokenizers(output: Path) -> set[str]:
    """Checksums of the tokenizers that preparations have written into the output, or were about to write."""
    known = {read_manifest(f)["tokenizer"]["sha256"] for f in (output / "train", output / "heldout") if is_finished(f)}
    if files.kind_of(output / WORK) == WORK_KIND and (output / WORK / WRITTEN).is_file():
        known.update(files.read_json(output / WORK / WRITTEN))
    return known


def put_tokenizer(made: Path, output: Path) -> None:
    """Make `<output>/tokenizer.json` a copy of `made`, unless it is one. `check_output` has been passed."""
    file, written = output / TOKENIZER, output / WORK / WRITTEN
    content = made.read_bytes()
    if file.is_file() and file.read_bytes() == content:
        return
    known = files.read_json(written) if written.is_file() else []
    files.write_json(written, [*known, hashlib.sha256(content).hexdigest()])  # first, so that it is known to be ours
    with files.whole(file) as stream:
        stream.write(content)


@contextmanager
def writing(spec: PrepareSpec) -> Iterator[Path]:
    """Hold the output, which is made if need be, for this process; yields `<output>/work`, marked.

    Where another process is at it, waits. What killed processes and workers have left half-written goes.
    """
    output = Path(spec.output)
    files.require_writable(output)
    with locks.lock(output, wait=True):
        check_output(spec)
        work = files.make_folder(output / WORK, WORK_KIND)
        files.sweep(output / TOKENIZER, is_alone=True)
        for folder in (work, *spec.folders.values()):
            if files.kind_of(folder) is not None:
                files.remove_files(folder, ".*.s2-tmp")
        yield work


def remove_work(spec: PrepareSpec) -> None:
    """Remove what a preparation that is finished has left in `work/`."""
    files.remove_folder(Path(spec.output) / WORK, *WORK_FILES)


def begin_anew(spec: PrepareSpec, work: Path) -> None:
    """Remove what an interrupted preparation has left, but the scans, which know what they were made for, and the list
    of tokenizers."""
    files.remove_files(work, *(name for name in WORK_FILES if not name.endswith(".scan.npz") and name != WRITTEN))
    for folder in spec.folders.values():
        if not is_finished(folder) and files.kind_of(folder) is not None:  # else it is missing or empty
            remove_unlisted(folder)


def _refuse_sources_inside(spec: PrepareSpec) -> None:
    output = os.path.realpath(spec.output)
    for source in spec.sources:
        if source.path == "python-env" or "://" in source.path:
            continue
        path = os.path.expanduser(source.path)
        pattern = Path(os.path.abspath(path)).parts if glob.has_magic(path) else ()
        outputs = (output, os.path.abspath(spec.output))
        own = (name for name in _OWN if any(matches(Path(folder, name).parts, pattern) for folder in outputs))
        if os.path.isdir(path) and Path(output).is_relative_to(os.path.realpath(path)):
            why = f"the output {spec.output} lies inside of this folder, so shards would become documents"
        elif file := next((f for f in _real_paths(source.resolve().files) if Path(f).is_relative_to(output)), None):
            why = f"{file} lies inside of the output {spec.output}"
        elif name := next(own, None):
            why = f"it would also read {spec.output}/{name}, which is written here"
        else:
            continue
        raise ValueError(f"source path {source.path!r}: {why}; choose an `output` elsewhere")


def _real_paths(found: Iterable[tuple[str, str]]) -> Iterator[str]:
    for folder, paths in itertools.groupby((path for path, _ in found), os.path.dirname):
        real = os.path.realpath(folder)
        for path in paths:
            yield os.path.realpath(path) if os.path.islink(path) else os.path.join(real, os.path.basename(path))
