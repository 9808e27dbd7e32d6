"""From corpora to token shards: `python -m data.prepare --recipe recipes/demo/pretrain.yaml`.

`<output>/tokenizer.json`, `<output>/train/` and `<output>/heldout/` are written part by part, in parallel. A finished
output is left alone when the settings are the same, and is an error naming the differing key when they are not; an
interrupted one goes on with the parts that are missing. `<output>/work/` holds what that takes and is removed at the
end. The result does not depend on the number of workers or on interruptions.
"""

import argparse
import errno
import fcntl
import itertools
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.dedup import Deduplicator, load_scan
from data.pool import workers
from data.schema import differences
from data.shards import (
    MANIFEST,
    TokenShards,
    read_json,
    read_manifest,
    remove_unfinished,
    write_array,
    write_json,
    write_manifest,
)
from data.sources import PART_BYTES, Part
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
        parts, duplicates = _deduplicate(spec, parts)
    records = _encode(spec, parts)
    sources = []
    for source, planned, done, dropped in zip(spec.sources, plan["sources"], records, duplicates, strict=True):
        skipped = sum((Counter(record["skipped"]) for _, record in done), Counter()) + dropped
        totals = {key: sum(record[key] for _, record in done) for key in ("documents", "tokens", "bytes")}
        if not totals["documents"]:
            reasons = ", ".join(f"{n} {why}" for why, n in skipped.items()) or "it has no rows"
            raise ValueError(f"source {source.path!r}: no documents ({reasons})")
        files = len({path for part in planned["parts"] for path, _ in part["files"]})
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
        counts = np.zeros((2, tokenizer.vocab_size), dtype=np.int64)
        for done in records:
            for task, _ in done:
                counts += part_counts(task)[split]
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
    shutil.rmtree(work)


def _plan(spec: PrepareSpec, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Which parts there are. An interrupted run's plan is taken up where the settings and the local files are the same;
    otherwise its work is removed. A hub dataset stays at the revision at which it was begun."""
    file = work / "plan.json"
    if file.is_file():
        plan = read_json(file)
        if plan["settings"] == settings and plan["files"] == _local_files(plan):
            return plan
        tqdm.write(f"{spec.output}: settings or files changed since the interrupted run, so it starts again")
    shutil.rmtree(work, ignore_errors=True)
    for folder in spec.folders.values():
        remove_unfinished(folder)
    if spec.tokenizer.train is not None:
        (Path(spec.output) / "tokenizer.json").unlink(missing_ok=True)
    work.mkdir()
    plan = {"settings": settings, "sources": []}
    for source in spec.sources:
        parts, revision = source.parts(spec.part_bytes)
        plan["sources"].append({"revision": revision, "parts": [part.to_json() for part in parts]})
    plan = {**plan, "files": _local_files(plan)}
    write_json(file, plan)
    return read_json(file)


def _local_files(plan: dict[str, Any]) -> dict[str, list[int]]:
    """Size and modification time of the plan's local files; missing ones are left out."""
    stats = {}
    for source in plan["sources"]:
        for part in source["parts"]:
            for path, _ in part["files"]:
                if "://" not in path and Path(path).is_file():
                    stat = Path(path).stat()
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
        sample = _sample(spec, parts, settings.train["sample_bytes"])
        train_tokenizer(sample, settings.train["vocab_size"], file)
    return TextTokenizer(file, settings.bos, settings.eos)


def _sample(spec: PrepareSpec, parts: list[list[Part]], sample_bytes: int) -> Iterator[str]:
    """The first training documents of each source, an equal share of bytes from each."""
    for source, every in zip(spec.sources, parts, strict=True):
        left = sample_bytes / len(spec.sources)
        with tqdm(desc=f"tokenizer sample: {source.label}", unit="B", unit_scale=True, disable=None) as bar:
            for document in itertools.chain.from_iterable(map(source.read, every)):
                if spec.is_heldout(document.id):
                    continue
                yield document.text
                size = len(document.text.encode())
                bar.update(size)
                left -= size
                if left <= 0:
                    break


def _deduplicate(spec: PrepareSpec, parts: list[list[Part]]) -> tuple[list[list[Part]], list[Counter[str]]]:
    """Write which documents of each part stay.

    Returns the parts (of a source with a limit only as many as it takes) and what was dropped, by source and reason.
    """
    assert spec.deduplicate is not None
    judge = Deduplicator(spec.deduplicate)
    needed: list[list[Part]] = []
    dropped: list[Counter[str]] = []
    with workers("scanning for duplicates", sum(map(len, parts)), spec.workers) as pool:
        for number, every in enumerate(parts):
            source = spec.sources[number]
            left = Budget(source.max_bytes, source.max_documents)
            step = len(every) if left == Budget(None, None) else pool.size
            taken, reasons, exceeded = 0, Counter[str](), False
            while taken < len(every) and not left.spent and not exceeded:
                tasks = [Task(spec, number, i, part) for i, part in enumerate(every)][taken : taken + step]
                for task in tasks:
                    pool.submit(None, scan_part, task)
                while pool.busy:
                    pool.done()
                for task in tasks:
                    scanned = load_scan(task.file(".scan.npz"))
                    allowance = Allowance(left, first=task.index == 0)
                    keep, why = judge.keep(scanned, allowance.takes)
                    write_array(task.file(".keep.npy"), keep)
                    reasons.update(why)
                    left = left.after({"bytes": int(scanned["sizes"][keep].sum()), "documents": int(keep.sum())})
                    exceeded |= allowance.exceeded
                taken += len(tasks)
            needed.append(every[:taken])
            dropped.append(reasons)
    return needed, dropped


def _encode(spec: PrepareSpec, parts: list[list[Part]]) -> list[list[tuple[Task, dict[str, Any]]]]:
    """Encode all parts; the tasks and records of each source in order, up to its limit."""
    sources = [_Progress(spec, number, every) for number, every in enumerate(parts)]
    with workers("tokenizing", sum(map(len, parts)), spec.workers) as pool:
        while True:
            for source in sources:
                for task in source.ready(pool.size):
                    pool.submit((source, task), encode_part, task)
            if not pool.busy:
                return [source.confirmed for source in sources]
            for (source, task), record in pool.done():
                source.take(task, record)


class _Progress:
    """How far one source has come. Without a limit all its parts are ready at once. With one, parts are begun a little
    ahead of what is confirmed, and what turns out to lie beyond the limit is discarded."""

    def __init__(self, spec: PrepareSpec, number: int, parts: list[Part]):
        source = spec.sources[number]
        self.spec, self.number, self.parts = spec, number, parts
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
        return [Task(self.spec, self.number, i, self.parts[i], self.left) for i in indices]

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
    if args.recipe:
        specs = prepare_section(args.recipe)
    else:
        if not args.output:
            parser.error("--sources needs --output")
        trained = {"train": {"vocab_size": args.vocab_size, "sample_bytes": args.sample_bytes}}
        columns = {key: getattr(args, key) for key in ("text_column", "id_column", "url_column")}
        specs = parse_sections(
            {
                "output": args.output,
                "sources": [{"path": path, **columns} for path in args.sources],
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
