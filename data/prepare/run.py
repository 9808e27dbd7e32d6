"""From corpora to token shards: `python -m data.prepare --recipe recipes/demo/pretrain.yaml [key=value ...]`.

A finished output is left alone when the settings are the same, and is an error naming the differing key when they are
not; an interrupted one goes on with the parts that are missing, and makes those again whose files have changed. The
result does not depend on the number of workers or on interruptions.
"""

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.corpus.folders import NamedFile
from data.corpus.parts import File, plain
from data.corpus.retrieval import Retrieval
from data.corpus.sample import sample_texts
from data.corpus.tokenizer import TextTokenizer, save_tokenizer_json, train_tokenizer
from data.prepare.output import TOKENIZER, begin_anew, check_output, is_finished, put_tokenizer, remove_work, writing
from data.prepare.part import BAD, WORK
from data.prepare.plan import PLAN, Plan, make_plan
from data.prepare.spec import PrepareSpec
from data.prepare.stages import deduplicate, encode, finish, heldout_below
from data.shards.reader import TokenShards, read_manifest
from s2 import files, locks
from s2.files import checksum


def is_prepared(spec: PrepareSpec) -> bool:
    """Whether the output is finished; raises ValueError where it, or a part of it, was made with other settings."""
    return not missing_splits(spec)


def missing_splits(spec: PrepareSpec) -> dict[str, Path]:
    """The splits whose folders are not finished. Raises ValueError where one was made with other settings."""
    missing = {}
    for split, folder in spec.folders.items():
        if not is_finished(folder):
            missing[split] = folder
            continue
        manifest = read_manifest(folder)
        if lines := spec.changes(manifest["settings"]):
            raise ValueError(
                f"{folder} was prepared with other settings ({'; '.join(lines[:3])}; there != asked)."
                " Choose another `output`, or delete that folder to prepare it again"
            )
        for source, made in zip(spec.sources, manifest["sources"], strict=True):
            if made["skipped"].get(BAD) and not spec.skips_bad_rows(source):
                raise ValueError(
                    f"{folder} was prepared with on_bad_row: skip, and {made['skipped'][BAD]:,} rows of"
                    f" {source.path!r} were left out. Ask for that again, or choose another `output`"
                )
    return missing


def changed_sources(spec: PrepareSpec, *, content: bool = True) -> list[str]:
    """What has become of the local files of a finished output's sources since it was prepared, one line a file.

    content: of files of which only the time is another (they were copied, checked out again, touched) the content
        decides; otherwise they count as the same.

    Nothing is said of sources that are not there any more (as on a machine that has the shards alone), of `python-env`
    and hub datasets, which are taken as they were, or of outputs of versions that did not record files.
    """
    finished = [folder for folder in spec.folders.values() if is_finished(folder)]
    shards = TokenShards(finished[0]) if finished else None
    if shards is None or shards.source_files is None:
        return []
    lines = []
    for number, source in enumerate(spec.sources):
        mine = [file for file in shards.source_files if file["source"] == number]
        if source.path == "python-env":
            continue
        if source.retrieval is not None:
            lines += _changed_filler(source.retrieval, shards.manifest["sources"][number].get("filler"))
            continue
        try:
            found = source.resolve().files
        except (FileNotFoundError, ValueError) as error:
            if any(os.path.exists(file["path"]) for file in mine):
                lines.append(str(error))
            continue
        lines += _changes(mine, found, all_read=shards.manifest["sources"][number]["all_read"], content=content)
    return lines


def _changed_filler(retrieval: Retrieval, recorded: str | None) -> list[str]:
    """A line where the filler is not the text that the documents were made with: what is held out of it may be in
    them. Nothing is said where it is not there, or an earlier version has not recorded it."""
    try:
        is_same = recorded is None or retrieval.text == recorded
    except FileNotFoundError:
        return []
    return [] if is_same else [f"the filler {retrieval.filler} was prepared anew"]


def _changes(
    recorded: Sequence[Mapping[str, Any]], found: Sequence[NamedFile], *, all_read: bool, content: bool
) -> list[str]:
    """What has become of a source's files since they were recorded, one line a file.

    found: those that are there now, in reading order. all_read: whether the source was read to its end; with a limit,
        what lies behind the last file that was read does not matter.
    """
    there = {plain(name): path for path, name in found}
    known = {was["name"] for was in recorded}
    lines = []
    for was in recorded:
        if (path := there.get(was["name"])) is None:
            lines.append(f"{was['name']} is gone")
            continue
        now = File.found(path, was["name"])
        if now.size != was["size"] or (content and not now.matches(was) and checksum(Path(path)) != was["xxh3_128"]):
            lines.append(f"{path} has changed")
    last = max((i for i, name in enumerate(there) if name in known), default=-1)
    end = len(there) if all_read else last
    return lines + [f"{path} is new" for name, path in list(there.items())[:end] if name not in known]


def prepare(spec: PrepareSpec, *, only_tokenizer: bool = False) -> None:
    """Make the shard folders of `spec` unless they are there.

    only_tokenizer: stop after `<output>/tokenizer.json`; the next preparation goes on from there.

    Where a finished output's sources have changed since, says so on stderr: training goes on with the same shards.

    Raises FileNotFoundError / ValueError for anything wrong with the sources (all are looked up before work begins) or
    with what lies in the output already, OSError for a full disk or a remote file that cannot be read any more,
    `s2.ending.FailureError` for a worker that was killed. The next attempt goes on with what was finished by then.
    """
    if is_prepared(spec):
        if files.kind_of(Path(spec.output) / WORK) is not None:  # a run was killed at its very end
            with suppress(locks.LockedError, OSError), locks.lock(Path(spec.output)):
                remove_work(spec)
        if changed := changed_sources(spec, content=False):
            print(f"{changed_note(spec, changed)}; going on with the shards as they are", file=sys.stderr, flush=True)
        return
    if (brought := spec.tokenizer).path is not None:
        TextTokenizer(brought.path, brought.bos, brought.eos)  # a wrong one shows before the corpus is read
    check_output(spec)
    try:
        with writing(spec) as work:
            if is_prepared(spec):  # another process was faster
                remove_work(spec)
            else:
                _prepare(spec, work, only_tokenizer)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{spec.output}: the disk is full ({error}); make room and run again, finished parts are kept",
        ) from error


def prepare_all(specs: Sequence[PrepareSpec]) -> None:
    """`prepare` one after another, unless `check` finds something wrong with one of them. Raises as they do."""
    check(specs)
    for spec in specs:
        prepare(spec)


def check(specs: Sequence[PrepareSpec]) -> None:
    """What would stop a later one of several preparations, looked up before the first begins: its tokenizer, its
    sources on disk and what lies in its output. What an earlier one writes is taken to be there.

    Raises FileNotFoundError, ValueError, `s2.files.NotOursError` as `prepare`.
    """
    outputs = [Path(spec.output).absolute() for spec in specs]
    for number, spec in enumerate(specs[1:], 1):
        if is_prepared(spec):
            continue
        brought, before = spec.tokenizer, outputs[:number]
        reads = [(source.retrieval and source.retrieval.filler) or source.path for source in spec.sources]
        if brought.path is not None and not _is_below(brought.path, before):
            TextTokenizer(brought.path, brought.bos, brought.eos)
        for source, path in zip(spec.sources, reads, strict=True):
            if not _is_below(path, before):
                source.resolve()
        if not any(_is_below(path, before) for path in (*reads, brought.path or "")):
            check_output(spec)


def _is_below(path: str, folders: Sequence[Path]) -> bool:
    return any(Path(path).expanduser().absolute().is_relative_to(folder) for folder in folders)


def changed_note(spec: PrepareSpec, lines: Sequence[str]) -> str:
    more = f" (and {len(lines) - 3:,} more)" if len(lines) > 3 else ""
    return f"{spec.output}: the sources are not what was prepared: {'; '.join(lines[:3])}{more}"


def _prepare(spec: PrepareSpec, work: Path, only_tokenizer: bool) -> None:
    missing = missing_splits(spec)
    if len(missing) < len(spec.folders) and (changed := changed_sources(spec)):
        raise ValueError(
            f"{changed_note(spec, changed)}, so {' and '.join(missing)} cannot be made to go with what is there;"
            " choose another `output`, or undo that"
        )
    plan, goes_on = make_plan(spec, work)
    if not goes_on:
        begin_anew(spec, work)
    files.write_json(work / PLAN, plan.to_json())
    parts, duplicates = (plan.sources, []) if only_tokenizer else deduplicate(spec, plan, work)
    below = heldout_below(spec, parts, only_tokenizer=only_tokenizer)
    tokenizer = _make_tokenizer(spec, plan, below, work)
    if only_tokenizer:
        return
    records = encode(spec, parts, tokenizer.sha256, below, tuple(missing))
    finish(spec, plan, records, duplicates, missing, tokenizer, below)


def _make_tokenizer(spec: PrepareSpec, plan: Plan, below: int, work: Path) -> TextTokenizer:
    """`<output>/tokenizer.json`, made unless it is there.

    Raises ValueError where a split that is finished has another one.
    """
    settings, output, made = spec.tokenizer, Path(spec.output), work / TOKENIZER
    finished = [read_manifest(folder) for folder in spec.folders.values() if is_finished(folder)]
    if settings.path is not None:
        if Path(settings.path).resolve() != (output / TOKENIZER).resolve():
            save_tokenizer_json(Path(settings.path), made)
    elif settings.train and not made.is_file() and not (finished and (output / TOKENIZER).is_file()):
        sample = sample_texts(
            spec.sources,
            plan.sources,
            settings.train.sample_bytes,
            spec.seed,
            is_heldout=lambda document_id: spec.place(document_id) < below,
            on_bad=lambda error: None,  # what becomes of a bad row, encoding says
        )
        train_tokenizer(sample, settings.train.vocab_size, made)
    if made.is_file():
        put_tokenizer(made, output)
    tokenizer = TextTokenizer(output / TOKENIZER, settings.bos, settings.eos)
    if any(manifest["tokenizer"]["sha256"] != tokenizer.sha256 for manifest in finished):
        raise ValueError(
            f"{output / TOKENIZER} is not the tokenizer that the finished split in {output} was made with; put that one"
            " there (the manifest has its SHA-256), or choose another `output`"
        )
    return tokenizer
