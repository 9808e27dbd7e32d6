"""Measure generation with a recipe's model, random weights, under several layouts: time to first token, decode rates.

    python scripts/bench_generate.py                                 # 7B at 32k and 128k: dense, hybrid, all sparse
    python scripts/bench_generate.py --recipe recipes/1.3b/pretrain.yaml
    python scripts/bench_generate.py --recipe recipes/1.3b/pretrain.yaml --layouts L8V16+sink1 \
        --lengths 64k,128k,256k,512k,1m --chunk 32k --name million       # and a picture of memory over the length

bfloat16. First token: one prompt of random tokens until its next token is known, whole or in pieces of `--chunk`.
Decode: one token a step for each sequence from a cache that holds `length` tokens of each, at batch 1 and at the
largest batch whose cache fits (at most `--most`), in a CUDA graph. Ceilings: of decoding, weights and what is kept read
once a step at the rate of a copy; of the first token, the ratio of FLOPs. Dense layers prefill by the fastest kernel
that torch has and decode by ours (bench_decode.py has it beside torch's). Writes
docs/benchmarks/<date>-<machine>-<name>.{md,json}, for prompts in pieces also .png.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_measure import Timing, add_note, machine_limits, noted
from bench_record import Record, new_parser, new_record, require_gpu, save, stem
from bench_report import Row, blank_row

from eval.grid import format_length, parse_length, parse_lengths
from s2 import ending, files
from s2.inference import KVCache
from s2.inference.graph import WARM_UP, DecodeGraph, decode_step
from s2.model import ModelConfig, Transformer
from s2.model.flops import flops_per_token
from s2.model.layouts import kv_bytes_per_token
from s2.recipe import load_recipe
from s2.tables import markdown

DTYPE = torch.bfloat16
STEPS = 32  # decode steps that are timed
PROMPTS, ENOUGH_S = 3, 10.0  # prompts that are timed: so many, fewer where they take longer than this together
RESERVE = 0.06  # of the memory, for what decoding needs beside weights and cache
FIGURES = ("first_token_s", "prompts", "prefill_gib", "decode_ms", "largest_batch", "batch_ms", "cache_gib")
METHOD = (
    "random weights and tokens, bfloat16; torch.compile is not used",
    f"first token: median of {PROMPTS} runs after one that compiles (fewer where they take over {ENOUGH_S:g} s); "
    f"decode: median of {STEPS} steps in a CUDA graph, a token for each sequence, from keys and values drawn at random",
    "share of ceiling: of the rate at which weights and the keys and values that are still seen are read once a step "
    "as fast as a copy moves memory in the same process; times by FLOPs: the dense model's over the layout's, forward",
    "peak: of memory allocated while a prompt is read, weights and its cache included",
)


# ---------------------------------------------------------------- figures


def read_configs(recipe: Path, layouts: Sequence[str] | None, longest: int) -> list[ModelConfig]:
    """The recipe's model with each of these layouts, for so many tokens. None: dense, its own, and its sparse
    layers' in all layers."""
    said = load_recipe(recipe).get("model", {}).get("config", {})
    if layouts is None:
        own = ModelConfig.from_dict(said)
        sparse = (str(pattern) for pattern in own.layout if not pattern.is_dense)
        layouts = list(dict.fromkeys(("dense", own.attention_layout, *sparse)))
    return [
        ModelConfig.from_dict(said | {"attention_layout": layout, "max_position_embeddings": longest})
        for layout in layouts
    ]


def split_layouts(text: str) -> list[str]:
    """Of `dense,L1V15+dense0,1`: a comma before a number belongs to a layout's list of layers."""
    return [part.strip() for part in re.split(r",(?!\d)", text) if part.strip()]


@torch.inference_mode()
def prefill(model: Transformer, cache: KVCache, tokens: torch.Tensor, chunk: int) -> list[dict[str, float]]:
    """Feed a prompt; after each piece the length, and seconds since the beginning."""
    trace, begin = [], _now(tokens.device)
    for at in range(0, tokens.shape[1], chunk):
        piece = tokens[:, at : at + chunk]
        model(piece, cache=cache, logits_to_keep=1)[:, -1].argmax(dim=-1)
        trace.append({"length": at + piece.shape[1], "seconds": _now(tokens.device) - begin})
    return trace


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def filled(config: ModelConfig, batch: int, length: int, device: torch.device | str) -> KVCache:
    """A cache that holds `length` tokens of each sequence, drawn at random, with room for the steps to be timed."""
    cache = KVCache(config, batch, length + STEPS + WARM_UP + 1, device=device, dtype=DTYPE)
    cache._values.normal_()  # zeros would take less power
    cache.begin(batch, length)
    cache.advance()
    return cache


@torch.inference_mode()
def decode_ms(model: Transformer, cache: KVCache, row: Row) -> float:
    """Of a step; without a graph, which a GPU cannot always have, `row` gets a note."""
    device = model.model.embed_tokens.weight.device
    step = decode_step(model, cache, STEPS, None)
    if device.type == "cuda" and not isinstance(step, DecodeGraph):
        add_note(row, f"{len(cache.lengths)} sequences: eager steps")
    tokens = torch.randint(model.config.vocab_size, (len(cache.lengths), 1), device=device)
    times = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="memory ran out while the decode step")  # else it goes on eagerly
        for n in range(WARM_UP + 1 + STEPS):
            begin = _now(device)
            step(tokens)
            if n > WARM_UP:
                times.append(_now(device) - begin)
    return 1e3 * statistics.median(times)


def bytes_a_sequence(config: ModelConfig, length: int) -> int:
    return KVCache.bytes_for(config, 1, length + STEPS + WARM_UP + 1, DTYPE)


def largest_batch(config: ModelConfig, length: int, free: int, total: int, most: int) -> int:
    return max(0, min(most, int(free - RESERVE * total) // bytes_a_sequence(config, length)))


def measure(model: Transformer, row: Row, length: int, chunk: int, most: int) -> None:
    """Fill in the row of a layout and length; what goes wrong is a note in it."""
    config, device = model.config, model.model.embed_tokens.weight.device
    tokens = torch.randint(config.vocab_size, (1, length), device=device)
    room = length + STEPS + WARM_UP + 1
    cache = None
    with noted(row, "first_token_s"):
        times: list[float] = []
        for n in range(PROMPTS + 1):
            cache = None  # else the peak would hold two
            _empty(device)
            cache = KVCache(config, 1, room, device=device, dtype=DTYPE)
            trace = prefill(model, cache, tokens, chunk or length)
            times += [trace[-1]["seconds"]] if n else []  # the first one compiles
            if sum(times) > ENOUGH_S:
                break
        row["first_token_s"], row["prompts"] = statistics.median(times), len(times)
        row["trace"] = trace if len(trace) > 1 else []
        row["prefill_gib"] = _peak_gib(device)
        row["cache_gib"] = cache.num_bytes / 2**30
    cache = None
    stages = [""]
    with noted(row, "first_token_s", stages):
        stages.append("decode, batch 1")
        _empty(device)
        row["decode_ms"] = decode_ms(model, filled(config, 1, length, device), row)
        stages.append("decode, largest batch")
        _empty(device)
        free, total = torch.cuda.mem_get_info() if device.type == "cuda" else (1 << 62, 0)
        row["largest_batch"] = largest_batch(config, length, free, total, most)
        if row["largest_batch"]:
            row["batch_ms"] = decode_ms(model, filled(config, row["largest_batch"], length, device), row)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


# ---------------------------------------------------------------- the report


def ceilings(config: ModelConfig, length: int, batch: int, parameters: int, copy_tb_s: float) -> dict[str, float]:
    """Milliseconds of a decode step at the rate of a copy, and FLOPs of a prompt's forward."""
    weights = 2 * (parameters - config.vocab_size * config.hidden_size * (not config.tie_word_embeddings))
    moved = weights + batch * length * kv_bytes_per_token(config, length)
    return {"ms": moved / copy_tb_s / 1e9, "flops": length * flops_per_token(config, length, executed=True) / 3}


def table(record: Record, of: str) -> str:
    """`of` "first token", or decode at "batch 1" or "the largest batch"."""
    dense = {row["seq_len"]: row for row in record["rows"] if row["name"] == "dense"}
    first = of == "first token"
    header = ["length", "layout", *(["s", "tokens/s", "times dense", "times by FLOPs", "peak GiB"] if first else
              ["batch", "cache GiB", "ms a step", "tokens/s", "times dense", "share of ceiling"]), "note"]  # fmt: skip
    body = []
    for row in sorted(record["rows"], key=lambda row: row["seq_len"]):
        base = dense.get(row["seq_len"])
        line = [format_length(row["seq_len"]), row["name"]]
        if first:
            line += [_show(row["first_token_s"], ".2f"), _show(_over(row["seq_len"], row["first_token_s"]), ",.0f")]
            line += [_ratio(base, row, "first_token_s"), _ratio(base, row, "flops"), _show(row["prefill_gib"], ".1f")]
        else:
            alone = of == "batch 1"
            batch, ms = 1 if alone else row["largest_batch"], row["decode_ms" if alone else "batch_ms"]
            rate, floor = _over(1e3 * (batch or 0), ms), row["floor_ms" if alone else "batch_floor_ms"]
            base_rate = base and _over(
                1e3 * (1 if alone else base["largest_batch"] or 0), base["decode_ms" if alone else "batch_ms"]
            )
            line += [_show(batch, "d"), _show(_over(row["cache_gib"], 1 / (batch or 1)), ".1f"), _show(ms, ".2f")]
            line += [_show(rate, ",.0f"), _show(_over(rate, base_rate), ".2f"), _show(_over(floor, ms), ".2f")]
        body.append([*line, ": ".join(filter(None, (row["status"] * (row["status"] != "ok"), row["note"])))])
    return markdown(header, body, numbers=range(2, len(header) - 1))


def _over(value: float | None, by: float | None) -> float | None:
    return value / by if value and by else None


def _ratio(base: Row | None, row: Row, key: str) -> str:
    return _show(base and _over(base[key], row[key]), ".2f")


def _show(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def parts(record: Record) -> list[str]:
    titles = {
        "first token": "First token",
        "batch 1": "Decode, one sequence",
        "the largest batch": "Decode, as many as fit",
    }
    lines = [f"{record['model']}. A copy moves {_show(record['copy_tb_s'], '.2f')} TB/s."]
    for of, title in titles.items():
        lines += [f"## {title}", table(record, of)]
    if record["rows"] and any(row.get("trace") for row in record["rows"]):
        lines += ["## Over the length", f"![memory and time over the length]({stem(record)}.png)"]
    return lines


def draw(record: Record, path: Path) -> None:
    """Peak memory of prompts over their lengths, and time within those that are read in pieces."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=110)
    memory, seconds = figure.subplots(1, 2)
    for name in dict.fromkeys(row["name"] for row in record["rows"]):
        rows = sorted((row for row in record["rows"] if row["name"] == name), key=lambda row: row["seq_len"])
        for key, words in (("prefill_gib", "peak"), ("cache_gib", "its cache")):
            there = [(row["seq_len"] / 1024, row[key]) for row in rows if row[key] is not None]
            memory.plot(*zip(*there, strict=True), marker=".", label=f"{name}, {words}") if there else None
    for row in record["rows"]:
        if trace := row.get("trace"):
            lengths, label = [at["length"] / 1024 for at in trace], f"{row['name']}, {format_length(row['seq_len'])}"
            seconds.plot(lengths, [at["seconds"] for at in trace], marker=".", label=label)
    memory.set(xlabel="tokens of the prompt (k)", ylabel="memory (GiB)", ylim=(0, None))
    seconds.set(xlabel="tokens read (k)", ylabel="seconds since the beginning", ylim=(0, None))
    for panel in (memory, seconds):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    with files.whole(path) as stream:
        figure.savefig(stream, format="png")


# ---------------------------------------------------------------- the run


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, name="generate")
    add = parser.add_argument
    add("--recipe", type=Path, default=Path("recipes/7b/pretrain.yaml"), help="whose model (default: %(default)s)")
    add("--layouts", type=split_layouts, help="default: dense, the recipe's, and its sparse layers' in all")
    add("--lengths", type=parse_lengths, default=(32768, 131072), help="tokens of a prompt (default: 32k,128k)")
    add("--chunk", type=parse_length, default=0, help="prompts in pieces of so many tokens (default: whole)")
    add("--most", type=int, default=256, help="sequences decoded at once at most (default: %(default)s)")
    add(
        "--seconds",
        type=float,
        default=400.0,
        help="rows that do not begin within it are left out (default: %(default)s)",
    )
    add("--device", default="cuda", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(args: argparse.Namespace, argv: Sequence[str]) -> Record:
    device, begin = torch.device(args.device), time.perf_counter()
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    copy = machine_limits(args.device, Timing(20, 100))["copy_tb_s"] if on_gpu else None
    record = new_record(
        "bench_generate", argv, torch.cuda.get_device_name() if on_gpu else "CPU", ("torch", "triton"),
        commit=args.commit, name=args.name, method=[*METHOD], copy_tb_s=copy, rows=[],
    )  # fmt: skip
    path = args.output / stem(record)
    longest = max(args.lengths) + STEPS + WARM_UP + 1
    configs = read_configs(args.recipe, args.layouts, longest)  # before anything is computed
    for config in configs:
        with device:
            model = _random_model(config)
        parameters = sum(p.numel() for p in model.parameters())
        record["model"] = f"{parameters / 1e9:.2f}B parameters as in {args.recipe}"
        for length in args.lengths:
            row = blank_row(config.attention_layout, length, (*FIGURES, "flops", "floor_ms", "batch_floor_ms"))
            row["flops"] = ceilings(config, length, 1, parameters, 1.0)["flops"]
            if time.perf_counter() - begin > args.seconds:
                row |= {"status": "skipped", "note": "no time left"}
            else:
                measure(model, row, length, args.chunk, args.most)
            if copy:
                row["floor_ms"] = ceilings(config, length, 1, parameters, copy)["ms"]
                row["batch_floor_ms"] = ceilings(config, length, row["largest_batch"] or 1, parameters, copy)["ms"]
            record["rows"].append(row)
            print({key: value for key, value in row.items() if key != "trace"}, flush=True)
            if any(each.get("trace") for each in record["rows"]):
                draw(record, Path(f"{path}.png"))
            save(record, path, "Generation", parts(record))
        del model
        _empty(device)
    print(f"wrote {path}.md with its .json")
    return record


def _random_model(config: ModelConfig) -> Transformer:
    """In bfloat16 from the start: 7B parameters need not be there in float32 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        return Transformer(config).eval()
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    args = parse_arguments()
    if args.device == "cuda":
        require_gpu("bench_generate")
    run(args, sys.argv[1:])


if __name__ == "__main__":
    ending.run(main)
