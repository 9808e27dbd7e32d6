"""Samples of an evaluation in one JSON file: kept while they are computed, found again, split over processes.

A file has a `kind`, what is recorded of the checkpoint, `settings`, and `samples` with an `id`, the digest of the
`prompt` and `scores` or `losses`. Files of one kind, checkpoint, precision and settings share their samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.checkpoint import Checkpoint, results_folder
from s2 import files
from s2.arguments import DTYPES, path, without
from s2.ending import FailureError
from s2.inference.folder import check_folder
from s2.inference.prefill import PREFILL_CHUNK
from s2.model.hf import load_config
from s2.progress import progress

_WRITE_EVERY_SECONDS = 5.0
_FORMER = {"kind": "single", "shared_haystack": False}  # settings that files of earlier versions do not name
_CPU_TOKENS = 16384  # of a batch
_GPU_BYTES = 1 << 35  # that keys, values and activations of a batch may take, roughly
_MOST_MAKERS = 4  # processes: a prompt takes less time to make than to read
_UNFINISHED = "answers of unfinished evaluations"

Sample = dict[str, Any]
Batch = Sequence[Sample]


@dataclass(frozen=True)
class Part:
    """The batches of a plan with index, index + count, index + 2 count, ... of one of `count` processes."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`1/2` is the first of two."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise argparse.ArgumentTypeError(f"{text!r}: expected the number of a part and of all, like 1/2")
        return cls(int(index) - 1, int(count))

    def __str__(self) -> str:
        return f"{self.index + 1}of{self.count}"


def digest(value: Any) -> str:
    """16 hex digits of what JSON says of the value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def conditions(checkpoint: Checkpoint, bos_id: int | None, scoring: str, cuts: bool = True) -> dict[str, Any]:
    """What every result file says of how its prompts were read and answered. cuts: whether a prompt that is not read
    whole is worth counting."""
    bos = "none (the tokenizer adds none)"
    if bos_id is not None:
        bos = f"exactly one ({checkpoint.tokenizer.id_to_token(bos_id)})"
    return {"bos": bos, "sampling": False, "scoring": scoring, **({"cut": 0} if cuts else {})}


def collect(
    file: Path,
    header: dict[str, Any],
    batches: Sequence[Batch],
    compute: Callable[[Sequence[Batch]], Iterable[Sample]],
    *,
    part: Part | None = None,
    wanted: Sequence[str] = (),
) -> dict[str, Any]:
    """Compute the samples of `batches` that are not known yet; return the content of `file`, which is written every few
    seconds and at the end, whatever ends it.

    Known are the samples of `file`, of its parts and of other files in its folder that are of the same evaluation.
    Batches are never divided differently for another part, so that each is computed with the same neighbours.

    Args:
        file: as `place_in` gives it. Samples that it holds already stay in it.
        header: `kind`, the checkpoint, `settings` and `conditions`.
        batches: samples with an `id`, and what `compute` needs of them.
        compute: records of the samples of batches, in order.
        part: compute only this part, into a file of its own.
        wanted: scores that a known sample must have.
    """
    _checked(file, header)
    unfinished, own_file = part_file(file, part).parent, part_file(file, part) if part else file
    if part:
        files.make_folder(unfinished, _UNFINISHED)
        batches = batches[part.index :: part.count]
    plan = [sample["id"] for batch in batches for sample in batch]
    own, seconds = _read(own_file, header)
    pieces = [] if part else sorted(unfinished.glob(f"{file.stem}.part*of*.json"))
    pieces = [piece for piece in pieces if _read(piece, header)[0]]
    complete: dict[str, Sample] = {}
    for other in (*sorted(file.parent.glob(f"{header['kind']}*.json")), *pieces, own_file):
        samples, took = _read(other, header)
        seconds = max(seconds, took if other in pieces else 0.0)
        complete |= {name: sample for name, sample in samples.items() if _has(sample, wanted)}
    kept = own | {name: complete[name] for name in plan if name in complete}
    todo = [left for batch in batches if (left := [sample for sample in batch if sample["id"] not in complete])]
    missing = sum(map(len, todo))
    if missing < len(plan):
        print(f"{own_file}: {len(plan) - missing} samples are there already, {missing} to go", flush=True)
    results = dict(header)
    started = written = time.monotonic()

    def write() -> None:
        results["samples"] = [kept[name] for name in sorted(kept, key=_natural)]
        results["seconds"] = round(seconds + time.monotonic() - started, 2)
        files.write_json(own_file, results)

    try:
        with progress(header["kind"], missing, "sample", quiet=part is not None and part.index > 0) as bar:
            for record in compute(todo):
                kept[record["id"]] = record
                bar.update()
                if time.monotonic() - written > _WRITE_EVERY_SECONDS:
                    write()
                    written = time.monotonic()
    finally:
        write()
    rows = results["samples"]
    found = {"n": len(rows), "prompts": digest([[sample["id"], sample.get("prompt")] for sample in rows])}
    if "cut" in header["conditions"]:
        found["cut"] = sum(bool(sample.get("cut")) for sample in rows)
    results["conditions"] = header["conditions"] | found
    if not part:
        files.remove_files(unfinished, *(piece.name for piece in pieces))
    return results


@dataclass(frozen=True)
class Evaluation:
    """What a command evaluates.

    kind: first part of the file's name. settings: what tells two of one checkpoint apart. plan: the samples. key: what
    samples of a batch have in common; they have a `length`. compute: see `collect`. summarise: figures of the records.
    describe: figures for people. cuts: see `conditions`.
    """

    kind: str
    scoring: str
    settings: dict[str, Any]
    plan: Sequence[Sample]
    key: Callable[[Sample], Any]
    compute: Callable[[Sequence[Batch]], Iterable[Sample]]
    summarise: Callable[[Sequence[Sample]], dict[str, Any]]
    describe: Callable[[dict[str, Any]], str]
    cuts: bool = True

    def run(self, argv: Sequence[str], args: argparse.Namespace, checkpoint: Checkpoint, stem: str) -> Path:
        """Compute what is missing, in as many processes as `args` say; write and return the file of the results."""
        output = args.output or results_folder(args.ckpt)
        files.require_writable(output.parent if output.suffix == ".json" else output)
        header = {
            "kind": self.kind,
            **checkpoint.describe(),
            "train_length": load_config(args.ckpt).max_position_embeddings,
            "settings": self.settings,
            "conditions": conditions(checkpoint, self.settings["bos_id"], self.scoring, self.cuts),
        }
        file = place_in(output, stem, header)
        if args.processes > 1:
            split(self.kind, argv, args)
        tokens = batch_tokens(args, checkpoint)
        batches = batches_of(self.plan, self.key, lambda sample: tokens // sample["length"])
        results = collect(file, header, list(batches), self.compute, part=args.part)
        if args.part is None:
            wanted = {sample["id"] for sample in self.plan}
            results["summary"] = self.summarise([row for row in results["samples"] if row["id"] in wanted])
            files.write_json(file, results)
            print(f"{self.describe(results['summary'])}\n{file}")
        return file


def batches_of(
    samples: Iterable[Sample], key: Callable[[Sample], Any], rows: Callable[[Sample], int]
) -> Iterator[list]:
    """Samples of equal `key`, at most `rows` of them together, in the order in which keys first come."""
    groups: dict[Any, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    for group in groups.values():
        size = max(1, rows(group[0]))
        yield from (group[first : first + size] for first in range(0, len(group), size))


def place_in(output: Path, stem: str, header: dict[str, Any]) -> Path:
    """The file of the results, `<output>/<stem>.json` or `output` itself, where nothing of another evaluation stands.

    Results of the checkpoint's earlier weights move to `<stem>.json.1`, with their picture; where another checkpoint's
    are, or this one's on other data or in another precision, the new file gets a suffix of its own.

    Raises:
        ValueError: the file is there and is no such results, or of another evaluation where `output` names the file.
    """
    if output.suffix == ".json":
        return _checked(output, header)
    file = output / f"{stem}.json"
    if not file.exists() or _identity(old := files.read_json(file)) == _identity(header):
        return file
    if not isinstance(old, dict) or old.get("kind") != header["kind"]:
        return _checked(file, header)
    if old.get("checkpoint") == header.get("checkpoint") and old.get("fingerprint") != header.get("fingerprint"):
        for outdated in (file, *file.parent.glob(f"{stem}.png"), *file.parent.glob(f"{stem}.*.png")):
            print(f"{outdated} is of an earlier checkpoint; kept as {files.move_aside(outdated).name}")
        return file
    other = file.with_stem(f"{stem}-{hashlib.sha256(_identity(header).encode()).hexdigest()[:6]}")
    print(f"{file} is of another checkpoint, haystack or precision; this one goes to {other.name}")
    return other


def _checked(file: Path, header: dict[str, Any]) -> Path:
    """The file, if nothing of another evaluation stands there."""
    old = files.read_json(file) if file.exists() else header
    if not isinstance(old, dict) or old.get("kind") != header["kind"]:
        raise ValueError(f"{file} is no {header['kind']} result file; choose another --output")
    if _identity(old) != _identity(header):
        raise ValueError(f"{file} is of another checkpoint, haystack or kind of prompt; choose another --output")
    return file


def part_file(file: Path, part: Part | None) -> Path:
    """Where a part's samples wait to be merged."""
    return file.parent / ".unfinished" / f"{file.stem}.part{part}.json"


def _identity(results: Any) -> str:
    """What two files must have in common to share samples."""
    if not isinstance(results, dict):
        return ""
    values = [results.get(key) for key in ("kind", "checkpoint", "fingerprint", "dtype")]
    settings = results.get("settings")
    former = _FORMER if results.get("kind") == "needle" and isinstance(settings, dict) else {}
    return json.dumps([*values, former | settings if isinstance(settings, dict) else settings], sort_keys=True)


def _read(file: Path, header: dict[str, Any]) -> tuple[dict[str, Sample], float]:
    """Samples by id of a file of the same evaluation, and the seconds they took; else none."""
    try:
        found = files.read_json(file)
        if _identity(found) == _identity(header):
            return {sample["id"]: sample for sample in found["samples"]}, float(found.get("seconds", 0))
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        pass  # another program's, or a broken one: no samples
    return {}, 0.0


def _has(sample: Sample, scores: Iterable[str]) -> bool:
    return "prompt" in sample and set(scores) <= set(sample.get("scores", ()))


def _natural(name: str) -> list[tuple[float, str]]:
    """Ids in the order of the numbers in them."""
    parts = name.split("/")
    return [(float(part), "") if part.replace(".", "", 1).isdecimal() else (-1.0, part) for part in parts]


# --- the command line -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands that compute samples have in common."""
    add = parser.add_argument
    # fmt: off
    add("--ckpt", type=path, required=True, help="Hugging Face folder, e.g. runs/demo/extend-2k/hf")
    add("--output", type=path, help="folder, or .json file, for the results (default: the run's results folder)")
    add("--device", help="default: the GPU if there is one")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--batch-tokens", type=int, help="tokens of a batch (default: what some 32 GiB hold on a GPU, 16384 on a CPU)")
    add("--processes", type=int, default=1, help="split over so many processes, each on a GPU of its own")
    add("--part", type=Part.parse, help="only part 1/2, ...: the same command without --part merges them")
    # fmt: on


def check_arguments(args: argparse.Namespace) -> Path:
    """The folder or file of the results. Raises ValueError or FileNotFoundError before anything is computed."""
    check_folder(args.ckpt)
    for name in ("processes", "batch_tokens", "prefill_chunk"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.part and args.processes > 1:
        raise ValueError(f"--processes {args.processes} with --part: a part is one process's")
    if args.processes > 1 and args.device not in (None, "cpu"):
        raise ValueError(f"--processes {args.processes} --device {args.device}: each takes a GPU of its own")
    return args.output or results_folder(args.ckpt)


def open_checkpoint(args: argparse.Namespace, max_length: int = 0, prefill_chunk: int = PREFILL_CHUNK) -> Checkpoint:
    return Checkpoint.open(args.ckpt, args.device, dtype_of(args.dtype), max_length, prefill_chunk)


def batch_tokens(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    if args.batch_tokens or checkpoint.device.type == "cpu":
        return args.batch_tokens or _CPU_TOKENS
    config = checkpoint.config
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    activations = 8 * (config.hidden_size + config.intermediate_size)
    return max(1, _GPU_BYTES // (checkpoint.dtype.itemsize * (keys + activations)))


def makers(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    """Processes that make prompts while a GPU computes, beside the process of each GPU. A CPU computes by itself."""
    if checkpoint.device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) // (args.part.count if args.part else 1)
    return min(_MOST_MAKERS, max(1, cores - 1))


def dtype_of(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def split(name: str, argv: Sequence[str], args: argparse.Namespace) -> None:
    """Run `python -m eval.<name>` with the same arguments in `--processes` processes, each a part of the samples.

    Raises FailureError, with the others stopped, when one fails; what is computed is kept.
    """
    count = args.processes
    gpus = torch.cuda.device_count() if args.device is None else 0
    if 0 < gpus < count:
        raise ValueError(f"--processes {count}: there are {gpus} GPUs here")
    command = [sys.executable, "-m", f"eval.{name}", *without(argv, "--processes")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    running = []
    for i in range(count):
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES=visible[i]) if gpus else dict(os.environ)
        if not gpus:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        running.append(subprocess.Popen([*command, "--part", f"{i + 1}/{count}"], env=environment))
    try:
        while any(process.poll() is None for process in running):
            time.sleep(0.1)
            if any(process.poll() for process in running):
                break
        if failed := [i + 1 for i, process in enumerate(running) if process.poll()]:
            raise FailureError(
                f"part {failed[0]}/{count} of eval.{name} failed, as it says above; the same command goes on"
            )
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            process.wait()
