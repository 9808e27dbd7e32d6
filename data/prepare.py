"""From corpora to token shards: `python -m data.prepare --recipe recipes/demo/pretrain.yaml [key=value ...]`.

`<output>/tokenizer.json`, `<output>/train/` and `<output>/heldout/` are written part by part, in parallel. A finished
output is left alone when the settings are the same, and is an error naming the differing key when they are not, or
naming the files that were added or have changed since; an interrupted one goes on with the parts that are missing, and
makes those again whose files have changed. `<output>/work/` holds what that takes and is removed at the end. The result
does not depend on the number of workers or on interruptions.
"""

import argparse
import errno
import itertools
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.output import TOKENIZER, begin_anew, check_output, is_finished, put_tokenizer, remove_work, writing
from data.plan import PLAN, Plan, make_plan
from data.sample import sample_texts
from data.shards import TokenShards, read_manifest, write_manifest
from data.sources import PART_BYTES, Source
from data.spec import PrepareSpec, is_override, parse_sections, prepare_section
from data.stages import deduplicate, encode, split_bound
from data.stamps import changes
from data.tokenizer import TextTokenizer, save_tokenizer_json, train_tokenizer
from data.work import BAD, EXAMPLES, WORK, Task, part_counts
from s2 import ending, files, locks


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

    Files of which only the time is another are read, and have changed if their content has; without `content` they are
    not read and count as the same. Nothing is said of sources that are not there any more (as
    on a machine that has the shards alone), of `python-env`, which is taken as it was, or of outputs of versions of
    this program that did not record files. Hub datasets are pinned to the revision in the manifest.
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
        try:
            found = source.resolve().files
        except (FileNotFoundError, ValueError) as error:
            if any(os.path.exists(file["path"]) for file in mine):
                lines.append(str(error))
            continue
        lines += changes(mine, found, all_read=shards.manifest["sources"][number]["all_read"], content=content)
    return lines


def prepare(spec: PrepareSpec, *, only_tokenizer: bool = False) -> None:
    """Make the shard folders of `spec` unless they are there.

    only_tokenizer: stop after `<output>/tokenizer.json`; the next preparation goes on from there.

    Where a finished output's sources have changed since, says so on stderr and leaves it as it is: training goes on
    with the shards it began with.

    Raises FileNotFoundError / ValueError for anything wrong with the sources (all are looked up before work
    begins) or with what lies in the output already, OSError for a full disk or a remote file that cannot be
    read any more, `s2.ending.FailureError` for a worker that was killed. Whatever was finished by then is used by the
    next attempt.
    """
    if is_prepared(spec):
        _look_after(spec)
        if changed := changed_sources(spec, content=False):
            print(f"{_changed(spec, changed)}; going on with the shards as they are", file=sys.stderr, flush=True)
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


def _look_after(spec: PrepareSpec) -> None:
    """Remove what a run that was killed at its very end has left."""
    if files.kind_of(Path(spec.output) / WORK) is None:
        return
    try:
        with locks.lock(Path(spec.output)):
            remove_work(spec)
    except (locks.LockedError, OSError):  # it is about to do so itself; or nothing can be written here
        return


def _changed(spec: PrepareSpec, lines: Sequence[str]) -> str:
    more = f" (and {len(lines) - 3:,} more)" if len(lines) > 3 else ""
    return f"{spec.output}: the sources are not what was prepared: {'; '.join(lines[:3])}{more}"


def _prepare(spec: PrepareSpec, work: Path, only_tokenizer: bool) -> None:
    missing = missing_splits(spec)
    if len(missing) < len(spec.folders) and (changed := changed_sources(spec)):
        raise ValueError(
            f"{_changed(spec, changed)}, so {' and '.join(missing)} cannot be made to go with what is there;"
            " choose another `output`, or undo that"
        )
    plan, goes_on = make_plan(spec, work)
    if not goes_on:
        begin_anew(spec, work)
    plan.write(work / PLAN)
    parts = plan.sources
    duplicates: list[Counter[str]] = [Counter() for _ in parts]
    if spec.deduplicate is not None and not only_tokenizer:
        parts, duplicates = deduplicate(spec, plan, work)
    below = split_bound(spec, plan, parts, work, only_tokenizer=only_tokenizer)
    tokenizer = _make_tokenizer(spec, plan, below, work)
    if only_tokenizer:
        return
    records = encode(spec, parts, tokenizer.sha256, below, tuple(missing))
    sources = _summaries(spec, plan, records, duplicates)
    # Of the manifests that of the training data comes last: whoever finds it finds everything.
    for split, folder in reversed(missing.items()):
        shards = [shard for done in records for _, record in done for shard in record["shards"][split]]
        if not shards:
            raise ValueError(f"{spec.output}: no document fell into the {split} split; run again to decide anew")
        counts = {source.label: np.zeros((2, tokenizer.vocab_size), dtype=np.int64) for source in spec.sources}
        for source, done in zip(spec.sources, records, strict=True):
            for task, _ in done:
                counts[source.label] += part_counts(task)[split]
        write_manifest(
            folder,
            tokenizer.dtype,
            shards,
            counts,
            _files_read(records),
            tokenizer={**tokenizer.describe(), "file": f"../{TOKENIZER}"},
            split={"name": split, "heldout_fraction": spec.heldout_fraction, "seed": spec.seed, "below": below},
            sources=sources,
            settings=plan.settings,
        )
    remove_work(spec)


Records = list[list[tuple[Task, dict[str, Any]]]]


def _summaries(
    spec: PrepareSpec, plan: Plan, records: Records, duplicates: Sequence[Counter[str]]
) -> list[dict[str, Any]]:
    """What the manifest says about each source. Raises ValueError for one without documents."""
    sources = []
    for number, (source, done, dropped) in enumerate(zip(spec.sources, records, duplicates, strict=True)):
        skipped = sum((Counter(record["skipped"]) for _, record in done), Counter()) + dropped
        totals = {key: sum(record[key] for _, record in done) for key in ("documents", "tokens", "bytes")}
        if not totals["documents"]:
            reasons = ", ".join(f"{n} {why}" for why, n in skipped.items()) or "it has no rows"
            raise ValueError(f"source {source.path!r}: no documents ({reasons})")
        is_cut = len(done) < len(plan.sources[number]) or any(record["limited"] for _, record in done)
        sources.append(
            {
                "name": source.label,
                "path": source.path,
                "revision": plan.revisions[number],
                "files": len({path for task, _ in done for path, _ in task.planned.part.files}),
                "all_read": not is_cut,
                **totals,
                "skipped": dict(skipped),
                "bad_rows": list(itertools.chain.from_iterable(record["bad_rows"] for _, record in done))[:EXAMPLES],
            }
        )
    return sources


def _files_read(records: Records) -> list[dict[str, Any]]:
    """Of each source the local files, as `TokenShards.source_files` returns them."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for number, done in enumerate(records):
        for _, record in done:
            for file in record["files"]:
                before = found.setdefault((number, file["name"]), {"source": number, **file})
                before["xxh3_128"] = before["xxh3_128"] or file["xxh3_128"]
    return list(found.values())


def _make_tokenizer(spec: PrepareSpec, plan: Plan, below: int, work: Path) -> TextTokenizer:
    """`<output>/tokenizer.json`, made unless it is there.

    Raises ValueError where a split that is finished has another one.
    """
    settings, output, made = spec.tokenizer, Path(spec.output), work / TOKENIZER
    if settings.path is not None:
        source = Path(settings.path)
        if source.resolve() != (output / TOKENIZER).resolve():
            save_tokenizer_json(source, made)
            put_tokenizer(made, output)
    elif settings.train is not None and not made.is_file():
        finished = [read_manifest(folder) for folder in spec.folders.values() if is_finished(folder)]
        if not finished or not (output / TOKENIZER).is_file():
            sample = sample_texts(
                spec.sources,
                [[planned.part for planned in every] for every in plan.sources],
                settings.train["sample_bytes"],
                spec.seed,
                is_heldout=lambda document_id: spec.place(document_id) < below,
                on_bad=lambda error: None,  # what becomes of a bad row, encoding says
            )
            train_tokenizer(sample, settings.train["vocab_size"], made)
            put_tokenizer(made, output)
    else:
        put_tokenizer(made, output)
    tokenizer = TextTokenizer(output / TOKENIZER, settings.bos, settings.eos)
    for folder in spec.folders.values():
        if is_finished(folder) and read_manifest(folder)["tokenizer"]["sha256"] != tokenizer.sha256:
            raise ValueError(
                f"{output / TOKENIZER} is not the tokenizer that {folder} was made with; put that one there (the"
                " manifest has its SHA-256), or choose another `output`"
            )
    return tokenizer


def describe(folder: str | Path) -> str:
    """One line about a shard folder."""
    manifest = read_manifest(folder)
    skipped = sum((Counter(source["skipped"]) for source in manifest["sources"]), Counter())
    note = f"; skipped {', '.join(f'{n:,} {why}' for why, n in skipped.items())}" if skipped else ""
    return (
        f"{folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens,"
        f" {manifest['bytes']:,} bytes of text, vocabulary {manifest['tokenizer']['vocab_size']:,}{note}"
    )


def _name(path: str, every: list[str]) -> str:
    """A source's name on the command line: its usual one where that is its alone, else its path."""
    names = [Source(path=other).label for other in every]
    label = Source(path=path).label
    return label if names.count(label) == 1 else path


def main(argv: list[str] | None = None) -> None:
    """The command; raises what `prepare` raises, and ValueError where a finished output's sources have changed."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__.split("\n")[0],
        usage="%(prog)s [options] (--recipe RECIPE [key=value ...] | --sources PATH ... | --verify FOLDER)",
        epilog="With --recipe, key=value arguments override keys of the recipe: data.prepare.heldout_fraction=0.02",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="recipe YAML with a data.init_args.prepare section")
    what.add_argument("--sources", nargs="+", metavar="PATH", help="files, globs, folders, hf://..., python-env")
    what.add_argument("--verify", metavar="FOLDER", help="compare a shard folder with its checksums")
    parser.add_argument("--only-tokenizer", action="store_true", help="stop after <output>/tokenizer.json")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    plain = parser.add_argument_group("with --sources")
    plain.add_argument("--output", help="folder to write")
    plain.add_argument(
        "--tokenizer", help="a tokenizer.json, a SentencePiece model or a folder with one of them; else one is trained"
    )
    plain.add_argument("--vocab-size", type=int, default=32768, help="of the trained tokenizer")
    plain.add_argument("--sample-bytes", type=int, default=100_000_000, help="of text that the tokenizer is trained on")
    plain.add_argument("--bos", default="auto", metavar="TOKEN", help="that opens each document, or none")
    plain.add_argument("--eos", default="auto", metavar="TOKEN", help="that ends each document")
    plain.add_argument("--text-column", default="text")
    plain.add_argument("--id-column")
    plain.add_argument("--url-column")
    plain.add_argument("--deduplicate", choices=["exact", "near"])
    plain.add_argument("--heldout-fraction", type=float, default=0.01, help="of the documents; 0 holds out none")
    plain.add_argument("--on-bad-row", choices=["stop", "skip"], default="stop")
    plain.add_argument(
        "--part-bytes", type=int, default=PART_BYTES, help="of the sources that a worker reads in one go"
    )
    plain.add_argument("--seed", type=int, default=0)
    args, overrides = parser.parse_known_args(argv)
    if strange := [text for text in overrides if not is_override(text)]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if overrides and not args.recipe:
        parser.error(f"{overrides[0]}: key=value arguments override keys of a --recipe")
    if args.verify:
        TokenShards(args.verify).verify()
        print(f"{describe(args.verify)}: checksums match")
        return
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    if args.recipe:
        for action in plain._group_actions:
            if getattr(args, action.dest) != action.default:
                parser.error(f"{action.option_strings[0]} goes with --sources; a recipe says it in its prepare section")
        specs = prepare_section(args.recipe, overrides)
    else:
        if not args.output:
            parser.error("--sources needs --output")
        given = Counter(path if "://" in path else os.path.realpath(os.path.expanduser(path)) for path in args.sources)
        if twice := [path for path, count in given.items() if count > 1]:
            raise ValueError(
                f"--sources: {twice[0]} is named {given[twice[0]]} times, and so its documents would be there"
            )
        trained = {"train": {"vocab_size": args.vocab_size, "sample_bytes": args.sample_bytes}}
        columns = {key: getattr(args, key) for key in ("text_column", "id_column", "url_column")}
        specs = parse_sections(
            {
                "output": args.output,
                "sources": [{"path": path, "name": _name(path, args.sources), **columns} for path in args.sources],
                "tokenizer": {
                    **({"path": args.tokenizer} if args.tokenizer else trained),
                    **{"bos": args.bos, "eos": args.eos},
                },
                **{key: getattr(args, key) for key in _PLAIN_KEYS},
            },
            "command line",
        )
    for spec in specs:
        if is_prepared(spec) and (changed := changed_sources(spec)):
            folders = " and ".join(map(str, spec.folders.values()))
            raise ValueError(
                f"{_changed(spec, changed)}. To prepare them as they are now, choose another `output` or delete"
                f" {folders}; training goes on with the shards that are there"
            )
        prepare(replace(spec, workers=args.workers or spec.workers), only_tokenizer=args.only_tokenizer)
        if args.only_tokenizer:
            TextTokenizer(Path(spec.output) / TOKENIZER, spec.tokenizer.bos, spec.tokenizer.eos)  # it may be gone
            print(Path(spec.output) / TOKENIZER)
            continue
        for folder in spec.folders.values():
            print(describe(folder))


_PLAIN_KEYS = ("deduplicate", "heldout_fraction", "on_bad_row", "part_bytes", "seed")


if __name__ == "__main__":
    ending.run(main)
