"""From corpora to token shards: `python -m data.prepare --recipe recipes/demo/pretrain.yaml`.

`<output>/tokenizer.json`, `<output>/train/` and `<output>/heldout/` are written part by part, in parallel. A finished
output is left alone when the settings are the same, and is an error naming the differing key when they are not; an
interrupted one goes on with the parts that are missing. `<output>/work/` holds what that takes and is removed at the
end. The result does not depend on the number of workers or on interruptions.
"""

import argparse
import errno
import fcntl
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.dedup import Deduplicator
from data.pool import Workers, workers
from data.sample import sample_texts
from data.schema import differences
from data.shards import (
    MANIFEST,
    TokenShards,
    read_arrays,
    read_json,
    read_manifest,
    remove_unfinished,
    write_array,
    write_json,
    write_manifest,
)
from data.sources import PART_BYTES, Part, Source
from data.spec import PrepareSpec, parse_sections, prepare_section
from data.tokenizer import TextTokenizer, save_tokenizer_json, train_tokenizer
from data.work import Allowance, Budget, Task, discard_part, encode_part, part_counts, scan_part


def is_prepared(spec: PrepareSpec) -> bool:
    """Whether the output is finished; raises ValueError where it was made with other settings."""
    for folder in spec.folders.values():
        if not (folder / MANIFEST).is_file():
            return False
        if lines := differences(read_manifest(folder)["settings"], spec.settings()):
            raise ValueError(
                f"{folder} was prepared with other settings ({'; '.join(lines[:3])}; there != asked)."
                " Choose another `output`, or delete that folder to prepare it again"
            )
    return True


def prepare(spec: PrepareSpec, *, only_tokenizer: bool = False) -> None:
    """Make the shard folders of `spec` unless they are there.

    only_tokenizer: stop after `<output>/tokenizer.json`; the next preparation goes on from there.
    Raises FileNotFoundError / ValueError for anything wrong with the sources (all are looked up before work
    begins), ValueError where no document fell into a split, OSError for a full disk or a remote file that cannot be
    read any more. Whatever was finished by then is used by the next attempt.
    """
    if is_prepared(spec):
        shutil.rmtree(Path(spec.output) / "work", ignore_errors=True)  # of a run that was killed at its very end
        return
    settings = spec.settings()  # looks the tokenizer up
    for source in spec.sources:
        source.resolve()
    output = Path(spec.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with _exclusive(output):
            if is_prepared(spec):  # another process was faster
                return
            _prepare(spec, settings, only_tokenizer)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"{output}: the disk is full ({error}); make room and run again, finished parts are kept",
        ) from error


def _prepare(spec: PrepareSpec, settings: dict[str, Any], only_tokenizer: bool) -> None:
    work = Path(spec.output) / "work"
    plan = _plan(spec, settings, work)
    parts = [[Part.from_json(part) for part in source["parts"]] for source in plan["sources"]]
    tokenizer = _make_tokenizer(spec, parts, Path(spec.output) / "tokenizer.json")
    if only_tokenizer:
        return
    duplicates: list[Counter[str]] = [Counter() for _ in parts]
    if spec.deduplicate is not None:
        parts, duplicates = _deduplicate(spec, parts, work / "kept.json")
    records = _encode(spec, parts, tokenizer.sha256)
    sources = []
    for source, planned, done, dropped in zip(spec.sources, plan["sources"], records, duplicates, strict=True):
        skipped = sum((Counter(record["skipped"]) for _, record in done), Counter()) + dropped
        totals = {key: sum(record[key] for _, record in done) for key in ("documents", "tokens", "bytes")}
        if not totals["documents"]:
            reasons = ", ".join(f"{n} {why}" for why, n in skipped.items()) or "it has no rows"
            raise ValueError(f"source {source.path!r}: no documents ({reasons})")
        files = len({path for task, _ in done for path, _ in task.part.files})
        sources.append(
            {
                "name": source.label,
                "path": source.path,
                "revision": planned["revision"],
                "files": files,
                **totals,
                "skipped": dict(skipped),
            }
        )
    # Training data last: whoever finds its manifest finds everything.
    for split, folder in reversed(spec.folders.items()):
        shards = [shard for done in records for _, record in done for shard in record["shards"][split]]
        if not shards:
            raise ValueError(
                f"{spec.output}: no document fell into the {split} split"
                f" with heldout_fraction {spec.heldout_fraction}; change the fraction or the seed"
            )
        counts = {source.label: np.zeros((2, tokenizer.vocab_size), dtype=np.int64) for source in spec.sources}
        for source, done in zip(spec.sources, records, strict=True):
            for task, _ in done:
                counts[source.label] += part_counts(task)[split]
        write_manifest(
            folder,
            tokenizer.dtype,
            shards,
            counts,
            tokenizer={**tokenizer.describe(), "file": "../tokenizer.json"},
            split={"name": split, "heldout_fraction": spec.heldout_fraction, "seed": spec.seed},
            sources=sources,
            settings=settings,
        )
    shutil.rmtree(work, ignore_errors=True)  # another process that finds everything finished may be at it too


def _plan(spec: PrepareSpec, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Which parts there are. The plan of an interrupted run is taken up; a hub dataset stays at the revision at which
    it was begun.

    Raises ValueError where parts are done but the settings or the local files are not those of that run, and for a
    source whose first row cannot be read. Before any part is done, a changed plan is made anew.
    """
    file = work / "plan.json"
    begun = read_json(file) if file.is_file() else None
    if begun is not None:
        changes = differences(begun["settings"], settings) or _changed_files(spec, begun)
        if not changes:
            return begun
        if list(work.glob("[0-9]*.json")):
            raise ValueError(
                f"{spec.output}: an interrupted preparation is here, and since then {'; '.join(changes[:3])}"
                f" (then != now). Undo that to go on with it, or delete {work} to start again"
            )
    shutil.rmtree(work, ignore_errors=True)
    for folder in spec.folders.values():
        remove_unfinished(folder)
    if spec.tokenizer.train is not None:
        (Path(spec.output) / "tokenizer.json").unlink(missing_ok=True)
    work.mkdir()
    sources = []
    for source in spec.sources:
        parts, revision = source.parts(spec.part_bytes)
        source.probe(parts)  # a wrong column or format shows before any work is done
        sources.append({"revision": revision, "parts": [part.to_json() for part in parts]})
    write_json(file, {"settings": settings, "sources": sources, "files": _local_files(sources)})
    return read_json(file)


def _changed_files(spec: PrepareSpec, plan: dict[str, Any]) -> list[str]:
    """What differs between the local files of a plan and those that are there, one line a file."""
    now = []
    for source, planned in zip(spec.sources, plan["sources"], strict=True):
        if source.resolve()[0] == "hub":
            now.append(planned)
        else:
            now.append({"parts": [part.to_json() for part in source.parts(spec.part_bytes)[0]]})
    return differences(plan["files"], _local_files(now))


def _local_files(sources: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Size and modification time of the local files of all parts; missing ones are left out."""
    stats = {}
    for source in sources:
        for part in source["parts"]:
            for path, _ in part["files"]:
                if "://" not in path and os.path.isfile(path):
                    stat = os.stat(path)
                    stats[path] = [stat.st_size, stat.st_mtime_ns]
    return stats


def _make_tokenizer(spec: PrepareSpec, parts: list[list[Part]], file: Path) -> TextTokenizer:
    settings = spec.tokenizer
    if settings.path is not None:
        source = Path(settings.path)
        if source.resolve() != file.resolve():
            TextTokenizer(source, settings.bos, settings.eos)  # reject it before it takes the place
            save_tokenizer_json(source, file)
    elif settings.train is not None and not file.is_file():
        sample = sample_texts(spec.sources, parts, settings.train["sample_bytes"], spec.seed, spec.is_heldout)
        train_tokenizer(sample, settings.train["vocab_size"], file)
    return TextTokenizer(file, settings.bos, settings.eos)


def _deduplicate(spec: PrepareSpec, parts: list[list[Part]], file: Path) -> tuple[list[list[Part]], list[Counter[str]]]:
    """Write which documents of each part stay, once: `file` says that it is done.

    Returns the parts (of a source with a limit only as many as it takes) and what was dropped, by source and reason.
    """
    assert spec.deduplicate is not None
    if not file.is_file():
        judge = Deduplicator(spec.deduplicate)
        with workers("scanning for duplicates", sum(map(len, parts)), spec.workers) as pool:
            write_json(file, [_judge(spec, number, every, judge, pool) for number, every in enumerate(parts)])
    results = read_json(file)
    return (
        [every[:taken] for every, (taken, _) in zip(parts, results, strict=True)],
        [Counter(reasons) for _, reasons in results],
    )


def _judge(
    spec: PrepareSpec, number: int, parts: list[Part], judge: Deduplicator, pool: Workers
) -> tuple[int, dict[str, int]]:
    """Scan a source's parts and decide about them in order; returns how many it takes and what was dropped."""
    source = spec.sources[number]
    left = Budget(source.max_bytes, source.max_documents)
    ahead = len(parts) if left == Budget(None, None) else 2 * pool.size
    tasks = [Task(spec, number, i, part) for i, part in enumerate(parts)]
    reasons: Counter[str] = Counter()
    scanned: set[int] = set()
    submitted = taken = 0
    while taken < len(tasks):
        for task in tasks[submitted : taken + ahead]:
            pool.submit(task.index, scan_part, task)
            submitted += 1
        while taken not in scanned:
            scanned.update(index for index, _ in pool.done())
        scan = read_arrays(tasks[taken].file(".scan.npz"))
        allowance = Allowance(left, first=taken == 0)
        keep, why = judge.keep(scan, allowance.takes)
        write_array(tasks[taken].file(".keep.npy"), keep)
        reasons.update(why)
        left = left.after({"bytes": int(scan["sizes"][keep].sum()), "documents": int(keep.sum())})
        taken += 1
        if allowance.exceeded or left.spent:
            break
    while pool.busy:
        pool.done()
    return taken, dict(reasons)


def _encode(spec: PrepareSpec, parts: list[list[Part]], tokenizer: str) -> list[list[tuple[Task, dict[str, Any]]]]:
    """Encode all parts; the tasks and records of each source in order, up to its limit."""
    sources = [_Progress(spec, number, every, tokenizer) for number, every in enumerate(parts)]
    with workers("tokenizing", sum(map(len, parts)), spec.workers) as pool:
        while True:
            for source in sources:
                for task in source.ready(1 if pool.size == 1 else 2 * pool.size):
                    pool.submit((source, task), encode_part, task)
            if not pool.busy:
                return [source.confirmed for source in sources]
            for (source, task), record in pool.done():
                source.take(task, record)


class _Progress:
    """How far one source has come. Without a limit all its parts are ready at once. With one, parts are begun a little
    ahead of what is confirmed, and what turns out to lie beyond the limit is discarded."""

    def __init__(self, spec: PrepareSpec, number: int, parts: list[Part], tokenizer: str):
        source = spec.sources[number]
        self.spec, self.number, self.parts, self.tokenizer = spec, number, parts, tokenizer
        self.left = Budget(source.max_bytes, source.max_documents)
        self.unlimited = self.left == Budget(None, None)
        self.confirmed: list[tuple[Task, dict[str, Any]]] = []
        self._begun: set[int] = set()
        self._waiting: dict[int, tuple[Task, dict[str, Any]]] = {}
        self._ended = False

    def ready(self, ahead: int) -> list[Task]:
        """Tasks to begin now."""
        if self._ended:
            return []
        first = len(self.confirmed)
        stop = len(self.parts) if self.unlimited else min(len(self.parts), first + ahead)
        indices = [i for i in range(first, stop) if i not in self._begun]
        self._begun.update(indices)
        return [Task(self.spec, self.number, i, self.parts[i], self.tokenizer, self.left) for i in indices]

    def take(self, task: Task, record: dict[str, Any]) -> None:
        """Note a part that is done."""
        self._waiting[task.index] = (task, record)
        while not self._ended and (entry := self._waiting.pop(len(self.confirmed), None)):
            if not self.left.allows(entry[1]):
                self._begun.discard(entry[0].index)  # it was begun before the limit was known exactly
                break
            self.confirmed.append(entry)
            self.left = self.left.after(entry[1])
            self._ended = entry[1]["limited"] or self.left.spent
        if self._ended:
            for task, _ in self._waiting.values():
                discard_part(task)
            self._waiting.clear()


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Hold the output folder's lock, so that two runs of one recipe do not write into each other's files."""
    with (output / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{output}: another process is preparing it; waiting", file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                error.errno, f"{output}: its file system has no locks ({error}); prepare elsewhere"
            ) from error
        yield


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
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="recipe YAML with a data.init_args.prepare section")
    what.add_argument("--sources", nargs="+", metavar="PATH", help="files, globs, folders, hf://..., python-env")
    what.add_argument("--verify", metavar="FOLDER", help="compare a shard folder with its checksums")
    parser.add_argument("--only-tokenizer", action="store_true", help="stop after <output>/tokenizer.json")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    plain = parser.add_argument_group("with --sources")
    plain.add_argument("--output", help="folder to write")
    plain.add_argument("--tokenizer", help="an existing tokenizer.json or SentencePiece model; else one is trained")
    plain.add_argument("--vocab-size", type=int, default=32768, help="of the trained tokenizer")
    plain.add_argument("--sample-bytes", type=int, default=100_000_000, help="of text that the tokenizer is trained on")
    plain.add_argument("--text-column", default="text")
    plain.add_argument("--id-column")
    plain.add_argument("--url-column")
    plain.add_argument("--deduplicate", choices=["exact", "near"])
    plain.add_argument("--heldout-fraction", type=float, default=0.01)
    plain.add_argument(
        "--part-bytes", type=int, default=PART_BYTES, help="of the sources that a worker reads in one go"
    )
    plain.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
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
        specs = prepare_section(args.recipe)
    else:
        if not args.output:
            parser.error("--sources needs --output")
        trained = {"train": {"vocab_size": args.vocab_size, "sample_bytes": args.sample_bytes}}
        columns = {key: getattr(args, key) for key in ("text_column", "id_column", "url_column")}
        specs = parse_sections(
            {
                "output": args.output,
                "sources": [{"path": path, "name": _name(path, args.sources), **columns} for path in args.sources],
                "tokenizer": {"path": args.tokenizer} if args.tokenizer else trained,
                **{key: getattr(args, key) for key in ("deduplicate", "heldout_fraction", "part_bytes", "seed")},
            },
            "command line",
        )
    for spec in specs:
        prepare(replace(spec, workers=args.workers or spec.workers), only_tokenizer=args.only_tokenizer)
        if args.only_tokenizer:
            print(Path(spec.output) / "tokenizer.json")
            continue
        for folder in spec.folders.values():
            print(describe(folder))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
