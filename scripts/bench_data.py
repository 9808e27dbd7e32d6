"""Measure the data pipeline beside what bounds it, and write a report:

    python scripts/bench_data.py --name cpu-2-cores --work /tmp/bench-data [--sources python-env ...]

1. Preparation: text per second from corpus files to finished shards, against the `tokenizers` library encoding the same
   documents from memory in batches on all cores.
2. Packing: its time against the tokenization of the same tokens, and the places it leaves empty.
3. Reading: tokens per second of 8 x 8,192 batches in one process, and that process's memory over a pass of a corpus of
   --read-gb gigabytes of shards (synthetic tokens, web-like lengths).
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from bench_record import Record, new_parser, new_record, save, stem
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from data.prepare import prepare
from data.prepare.part import batches
from data.prepare.spec import PrepareSpec
from data.shards import ShardWriter, TokenShards, write_manifest
from data.shards.packing import pack
from s2 import ending, files
from s2.tables import markdown

SEQ_LEN, ROWS = 8192, 8
VOCAB_SIZE = 32768


def spec(output: Path, sources: list[str], tokenizer: dict[str, Any]) -> PrepareSpec:
    return PrepareSpec.parse({"output": str(output), "sources": sources, "tokenizer": tokenizer})


def free_folder(work: Path) -> Path:
    """A folder that is not there yet: what is prepared already would not be prepared again. They stay in `work`."""
    return next(folder for number in count(1) if not (folder := work / f"try-{number}").exists())


def preparation(work: Path, sources: list[str], repeats: int) -> dict[str, Any]:
    """Raw and whole rates, in turn."""
    tokenizer = work / "first" / "tokenizer.json"
    prepare(spec(work / "first", sources, {"train": {"vocab_size": VOCAB_SIZE, "sample_bytes": 50_000_000}}))
    asked = spec(free_folder(work), sources, {"path": str(tokenizer)})
    documents = [document for source in asked.sources for document in source.documents()]
    size = sum(len(document.text.encode()) for document in documents)
    raw, whole = [], []
    for _ in range(repeats):
        library = Tokenizer.from_file(str(tokenizer))
        started = time.perf_counter()
        for batch in batches(documents):
            library.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        raw.append(time.perf_counter() - started)
        asked = spec(free_folder(work), sources, {"path": str(tokenizer)})
        started = time.perf_counter()
        prepare(asked)
        whole.append(time.perf_counter() - started)
    lengths = np.diff(TokenShards(asked.folders["train"]).offsets)
    packing = {}
    for seq_len in (2048, 8192, 32768, 131072):
        started = time.perf_counter()
        packed = pack(lengths, seq_len)
        packing[seq_len] = {"seconds": time.perf_counter() - started, "empty": packed.waste}
    return {
        "sources": sources,
        "bytes": size,
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "raw_seconds": raw,
        "prepare_seconds": whole,
        # The machine's speed drifts by a fifth over minutes: only tries next to each other compare.
        "ratios": [r / w for r, w in zip(raw, whole, strict=True)],
        "packing": packing,
    }


def write_synthetic(folder: Path, gigabytes: float) -> TokenShards:
    """A shard folder of random tokens with log-normal document lengths, once."""
    if not (folder / "manifest.json").is_file():
        rng, dtype = np.random.default_rng(0), np.dtype(np.uint16)
        tokens = rng.integers(3, VOCAB_SIZE, size=1 << 24, dtype=np.uint16)
        left = int(gigabytes * 1e9 / 2)
        with ShardWriter(folder, "shard-0", "synthetic", dtype, VOCAB_SIZE, 1 << 27) as writer:
            while left > 0:
                lengths = np.minimum(rng.lognormal(6.3, 1.1, size=12_000).astype(np.int64) + 2, 200_000)
                begins = rng.integers(0, len(tokens) - 200_000, size=len(lengths))
                documents = [tokens[b : b + n] for b, n in zip(begins.tolist(), lengths.tolist(), strict=True)]
                writer.add(documents, (4 * lengths).tolist(), [""] * len(documents), [""] * len(documents))
                left -= int(lengths.sum())
        described = {"sha256": "synthetic", "vocab_size": VOCAB_SIZE, "bos_id": 0, "eos_id": 1, "file": "none"}
        write_manifest(folder, dtype, writer.shards, {"synthetic": writer.counts}, tokenizer=described, sources=[])
    return TokenShards(folder)


def reading(folder: Path, gigabytes: float) -> dict[str, Any]:
    from data.datamodule import PackedDataModule  # here: the workers of a preparation import this file too

    shards = write_synthetic(folder, gigabytes)
    for file in sorted(folder.glob("*.bin")):  # into the page cache
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    started = time.perf_counter()
    data = PackedDataModule(SEQ_LEN, ROWS, mixture=[{"path": str(folder)}], validation=[], num_workers=0)
    data.setup()
    opened = time.perf_counter() - started
    steps = data.rows.mixtures[0].streams[0].num_windows // ROWS  # one pass
    loader = iter(data.train_dataloader())
    samples = []
    began = last = time.perf_counter()
    for step in range(steps):
        next(loader)
        now = time.perf_counter()
        if now - last > 1 or step == steps - 1:
            samples.append({"seconds": now - began, "tokens": (step + 1) * SEQ_LEN * ROWS, **memory()})
            last = now
    return {
        "bytes": shards.manifest["tokens"] * 2,
        "documents": shards.manifest["documents"],
        "open_seconds": opened,
        "tokens_per_second": samples[-1]["tokens"] / samples[-1]["seconds"],
        "empty": data.rows.mixtures[0].streams[0].packing.waste,
        "samples": samples,
    }


def in_fresh_process(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def memory() -> dict[str, float]:
    """Resident memory of this process in MiB, all of it and what is its own."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon")}


def parts(record: Record) -> Iterator[str]:
    made, read = record["preparation"], record["reading"]
    size = made["bytes"] / 1e6
    yield f"## Preparation: {size:,.0f} MB of text, {made['documents']:,} documents, {made['tokens']:,} tokens"
    rows = []
    labels = {"raw_seconds": "`tokenizers` from memory, all cores", "prepare_seconds": "corpus files to shards"}
    for key, label in labels.items():
        best, tries = min(made[key]), ", ".join(f"{seconds:.1f}" for seconds in made[key])
        rows.append([label, tries, f"{size / best:.2f}", f"{made['tokens'] / best / 1e6:.2f}"])
    yield markdown(("", "seconds (each try)", "MB/s", "M tokens/s"), rows)
    ratios = ", ".join(f"{ratio:.3f}" for ratio in made["ratios"])
    yield f"Ratio of each pair of tries: {ratios}; median **{np.median(made['ratios']):.3f}**."
    best = min(made["prepare_seconds"])
    rows = [
        [f"{int(seq_len):,}", f"{row['seconds']:.3f}", f"{row['seconds'] / best:.2%}", f"{row['empty']:.3%}"]
        for seq_len, row in made["packing"].items()
    ]
    yield markdown(("window", "packing, seconds", "of the preparation", "empty"), rows)
    memory_of = [sample["VmRSS"] for sample in read["samples"]]
    yield f"## Reading {ROWS} x {SEQ_LEN:,} batches of {read['bytes'] / 1e9:.1f} GB in one process"
    opened = f"{read['open_seconds']:.1f} s for {read['documents']:,} documents"
    row = [f"**{read['tokens_per_second'] / 1e6:.1f} M**", f"{read['empty']:.3%}", opened]
    row += [f"{mib:,.0f} MiB" for mib in (memory_of[0], memory_of[-1], max(memory_of))]
    yield markdown(("tokens/s", "empty", "opening and packing", "memory at first", "at the end", "most"), [row])
    yield f"![memory over the pass]({stem(record)}.png)"


def plot(samples: list[dict[str, float]], file: Path) -> None:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    read = [sample["tokens"] * 2 / 1e9 for sample in samples]
    for key, label in (("VmRSS", "resident"), ("RssAnon", "its own")):
        axes.plot(read, [sample[key] for sample in samples], label=f"{label} ({key})")
    axes.set(xlabel="read so far (GB of shards)", ylabel="MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with files.whole(file) as stream:
        figure.savefig(stream, format="png", dpi=150)


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = new_parser(__doc__, name=f"{cores}-cores")  # the machine's
    parser.add_argument("--work", required=True, type=Path, help="folder for corpora and shards")
    parser.add_argument("--sources", nargs="+", default=["python-env"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read-gb", type=float, default=10)
    args = parser.parse_args()
    packages = ("tokenizers", "numpy", "torch", "pyarrow")
    record = new_record("bench_data", sys.argv[1:], args.name, packages, name="data") | {
        "method": [f"machine: {cores} cores, {platform.machine()}"],
        "preparation": preparation(args.work / "corpus", args.sources, args.repeats),
        "reading": in_fresh_process(reading, args.work / "synthetic", args.read_gb),
    }
    path = args.output / stem(record)
    print(save(record, path, "Data pipeline", parts(record)))
    plot(record["reading"]["samples"], Path(f"{path}.png"))


if __name__ == "__main__":
    ending.run(main)
