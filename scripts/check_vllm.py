"""Check S2-Attention in vLLM's engine beside our own model, on this GPU: greedy tokens of long prompts, and memory.

    python scripts/check_vllm.py [--layers 6] [--layout L8V16+sink1+dense0] [--lengths 2k,4k,...] [--new 64] ...

A model of random weights, whose attention is sharp enough that tokens depend on far keys, is served by vLLM with
chunked prefill and prefix caching: all prompts together, then once more. Its tokens are compared with those of
`s2.inference.generate`, prompt by prompt. Where vLLM chose another token than the likeliest of our model in float32,
our logits of the two must be as close as rounding to bfloat16 makes them; beside it how far below it the tokens are
that our own model chose. As a control the same weights with dense layers say how much of the text depends on the
layout: of every prompt they must choose some token that is farther below, or the limit would let another layout pass.
Beside it: how many sequences of the longest length vLLM counts
on in the same memory, with pages freed, with all pages kept, and for the dense model, a plain Llama. The last two
start beside the first, eagerly, for that number alone; one that fails is in the report with what it said.

Writes docs/benchmarks/<date>-<machine>-vllm.{md,json}. Exit code 0 if all agree, 1 if not. Needs vLLM 0.24.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from bench_record import Record, new_parser, new_record, save, stem
from check_model import add_model_options, config_of, machine_of, sizes_of
from torch import Tensor

from eval.grid import format_length, parse_lengths
from s2 import ending, files
from s2.inference import generate
from s2.model import Transformer
from s2.model.hf import load_pretrained, save_pretrained
from s2.tables import markdown

ROUNDS = 2  # the second finds the prompts of the first
NOISES = 2  # both of two logits may be off
LEAST_LIMIT = 1e-3  # where both are computed in float32, in another order
FREED, KEPT, DENSE = "pages freed", "all pages kept", "dense layers"

METHOD = (
    "greedy, random weights and tokens; every second prompt begins one text, the others their own",
    "noise: of our model's logits of a prompt's new tokens, the largest difference between bfloat16 and float32",
    f"margin: how far below the best logit, in float32, a token is; vLLM's may be {NOISES} noises below it (at least "
    f"{LEAST_LIMIT:g}), one of those that the same weights choose with dense layers must be farther",
    "sequences: of the longest prompt and its new tokens, by vLLM's own count, in the same memory for pages",
    "s: both rounds of all prompts; start: weights, kernels, graphs; engines without prompts start beside it, eagerly",
)

Row = dict[str, Any]


# ---------------------------------------------------------------- vLLM


def serve(folder: str, prompts: Sequence[list[int]], new_tokens: int, engine: dict[str, Any]) -> Row:
    """Tokens that vLLM chooses, by round and prompt, tokens found in its cache, and what it says of its memory. Runs in
    a process of its own, whose end gives all memory back."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler can be asked
    from vllm import LLM, SamplingParams
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    begin = perf_counter()
    llm = LLM(folder, skip_tokenizer_init=True, seed=0, enable_prefix_caching=True, **engine)
    row: Row = {"start_s": perf_counter() - begin, "tokens": [], "found": [], "seconds": []}
    parameters = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False, ignore_eos=True)
    for _ in range(ROUNDS if prompts else 0):
        begin = perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        row["seconds"].append(perf_counter() - begin)
        row["tokens"].append([list(output.outputs[0].token_ids) for output in outputs])
        row["found"].append([output.num_cached_tokens for output in outputs])
    pages = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    tokens, sequences = get_kv_cache_capacity(llm.llm_engine.vllm_config, pages)
    return row | {"sequences": sequences, "capacity": tokens, "groups": len(pages.kv_cache_groups)}


def in_child(*arguments: Any) -> Row:
    """`serve` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(serve, *arguments).result()


# ---------------------------------------------------------------- model and prompts


def prompts_of(lengths: Sequence[int], vocab: int) -> list[list[int]]:
    """Random tokens; every second prompt is a beginning of the same text."""
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(vocab, (max(lengths),), generator=draw).tolist()
    own = [torch.randint(vocab, (length,), generator=draw).tolist() for length in lengths]
    return [own[i] if i % 2 else text[:length] for i, length in enumerate(lengths)]


def new_logits(model: Transformer, prompt: list[int], new: list[int], device: str) -> Tensor:
    """float32 logits `[n, V]` that the new tokens are chosen by."""
    tokens = torch.tensor([prompt + new[:-1]], device=device)
    with torch.inference_mode():
        return model(tokens, logits_to_keep=len(new))[0].float()


# ---------------------------------------------------------------- comparison


def compare(
    folder: Path, dense: Path, prompts: Sequence[list[int]], rounds: Sequence[Sequence[list[int]]], device: str,
    dtype: torch.dtype, chunk: int,
) -> list[Row]:  # fmt: skip
    """A row for each round and prompt."""
    narrow = load_pretrained(folder, device=device, dtype=dtype)

    def margins_of(logits: Tensor, chosen: Tensor) -> Tensor:
        return logits.amax(1) - logits.gather(1, chosen[:, None])[:, 0]

    @functools.cache
    def figures(nth: int, new: tuple[int, ...]) -> Row:
        """Of a prompt, and tokens that rounds often have in common."""
        prompt, chosen = prompts[nth], torch.tensor(new, device=device)
        logits = new_logits(wide, prompt, list(new), device)
        margins = margins_of(logits, chosen)
        other = new_logits(control, prompt, list(new), device).argmax(1)
        own = logits if list(new) == ours[nth] else new_logits(wide, prompt, ours[nth], device)
        return {
            "best": int((margins == 0).sum()),
            "margin": float(margins.max()),
            "noise": float((new_logits(narrow, prompt, list(new), device) - logits).abs().max()),
            "spread": float(logits.std(1).mean()),
            "own_margin": float(margins_of(own, torch.tensor(ours[nth], device=device)).max()),
            "control": float((other == chosen).float().mean()),
            "control_margin": float(margins_of(logits, other).max()),
        }

    ours = [
        generate(narrow, [torch.tensor(prompt, device=device)], len(new), prefill_chunk=chunk)[0].tolist()
        for prompt, new in zip(prompts, rounds[0], strict=True)
    ]
    wide, control = (load_pretrained(path, device=device, dtype=torch.float32) for path in (folder, dense))
    return [
        {
            "round": nth + 1,
            "prompt": len(prompts[i]),
            "equal": next((n for n, (a, b) in enumerate(zip(new, own, strict=True)) if a != b), len(new)),
            "new": len(new),
            **figures(i, tuple(new)),
        }
        for nth, served in enumerate(rounds)
        for i, (new, own) in enumerate(zip(served, ours, strict=True))
    ]


def limit_of(row: Row) -> float:
    return max(NOISES * row["noise"], LEAST_LIMIT)


def is_close(row: Row) -> bool:
    return row["margin"] <= limit_of(row) < row["control_margin"]


# ---------------------------------------------------------------- the report


def parts(record: Record) -> Iterator[str]:
    sizes = record["sizes"]
    yield "## Tokens\n\n" + ", ".join(f"{key} {value}" for key, value in sizes.items())
    header = (
        "round", "prompt", "found", "equal to ours until", "the likeliest", "largest margin", "of our own tokens",
        "with dense layers", "noise", "spread of logits", "dense layers agree", "",
    )  # fmt: skip
    body = []
    found = [n for per_round in record["engines"][FREED]["found"] for n in per_round]
    for row, cached in zip(record["rows"], found, strict=True):
        counts = (f"{row['equal']} of {row['new']}", f"{row['best']} of {row['new']}")
        figures = (f"{row[key]:.3g}" for key in ("margin", "own_margin", "control_margin", "noise", "spread"))
        differs = "" if row["margin"] <= limit_of(row) else "**differs**"
        verdict = differs or ("" if is_close(row) else "**shows nothing**: so would dense layers be close")
        places = (str(row["round"]), format_length(row["prompt"]), f"{cached:,}")
        body.append((*places, *counts, *figures, f"{row['control']:.0%}", verdict))
    yield markdown(header, body, range(11))
    header = ("", "sequences", "tokens", "groups of tables", "start s", "s")
    body = []
    for name, row in record["engines"].items():
        if "error" in row:
            body.append((name, "**failed**", *["-"] * 4))
            continue
        seconds = " + ".join(f"{x:.1f}" for x in row["seconds"])
        counts = (f"{row['sequences']:.2f}", f"{row['capacity']:,}", str(row["groups"]))
        body.append((name, *counts, f"{row['start_s']:.0f}", seconds))
    longest = sizes["longest"]
    yield f"## Memory\n\n{record['cache_gib']:g} GiB of pages, sequences of {longest:,} tokens."
    yield markdown(header, body, range(1, 6))
    for name, row in record["engines"].items():
        if "error" in row:
            yield f"{name}: `{row['error']}`"


def main() -> int:
    parser = new_parser(__doc__, name="vllm")
    parser.add_argument("--lengths", type=parse_lengths, default=parse_lengths("2k,3000,4k,6k,9000,12k,16k,32k"))
    parser.add_argument("--new", type=int, default=64, help="tokens after each prompt (default: %(default)s)")
    add_model_options(parser, "L8V16+sink1+dense0", layers=6, hidden=1024, ffn=2816, vocab=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--cache-gib", type=float, default=4.0, help="memory for pages (default: %(default)s)")
    parser.add_argument("--step", type=int, default=4096, help="tokens of a step, at most (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--dense-backend", help="vLLM's attention for the dense model (default: its own choice)")
    parser.add_argument("--work", type=Path, help="folder for the models (default: a temporary one)")
    args = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed; pip install 'vllm==0.24.*' brings it")
    with files.temporary_folder() as place:
        return check(args, args.work or place, "cuda" if torch.cuda.is_available() else "cpu")


def check(args: argparse.Namespace, work: Path, device: str) -> int:
    """Run all and write the report; the exit code."""
    # with this initializer_range scores of queries and keys spread by 2.56 before softmax
    config = config_of(args, max(args.lengths) + args.new, initializer_range=1.6 / math.sqrt(args.hidden))
    dense = dataclasses.replace(config, attention_layout="dense")
    torch.manual_seed(0)
    model = Transformer(config)
    folders = {"sparse": work / "sparse", "dense": work / "dense"}
    save_pretrained(model, config, folders["sparse"])
    save_pretrained(model, dense, folders["dense"])
    del model
    gc.collect()
    prompts = prompts_of(args.lengths, config.vocab_size)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    engine = {
        "dtype": str(dtype).removeprefix("torch."), "kv_cache_memory_bytes": int(args.cache_gib * (1 << 30)),
        "gpu_memory_utilization": 0.1,  # of it nothing is taken, but so much must be free as each engine starts
        "max_num_batched_tokens": args.step, "max_num_seqs": len(prompts), "enforce_eager": args.eager,
    }  # fmt: skip
    backend = {"attention_backend": args.dense_backend} if args.dense_backend else {}
    counted = engine | {"enforce_eager": True}
    with ThreadPoolExecutor(3) as together:
        freed = together.submit(in_child, str(folders["sparse"]), prompts, args.new, engine)
        kept = counted | {"disable_hybrid_kv_cache_manager": True}
        others = {
            KEPT: together.submit(in_child, str(folders["sparse"]), [], args.new, kept),
            DENSE: together.submit(in_child, str(folders["dense"]), [], args.new, counted | backend),
        }
        engines = {FREED: freed.result()} | {name: _row(other) for name, other in others.items()}
    rounds = engines[FREED].pop("tokens")
    rows = compare(folders["sparse"], folders["dense"], prompts, rounds, device, dtype, args.step)
    sizes = sizes_of(args) | {"new": args.new, "step": args.step, "dtype": engine["dtype"]}
    record = new_record(
        "check_vllm",
        sys.argv[1:],
        machine_of(device),
        ("torch", "triton", "vllm"),
        commit=args.commit,
        name=args.name,
        method=METHOD,
        sizes={**sizes, "longest": config.max_position_embeddings, "eager": args.eager},
        cache_gib=args.cache_gib,
        engines=engines,
        rows=rows,
    )
    print(save(record, args.output / stem(record), "vLLM", parts(record)))
    return int(not all(map(is_close, rows)) or any("error" in row for row in engines.values()))


def _row(engine: Future[Row]) -> Row:
    """What an engine came to, or why it failed: what the first one chose is to be compared nevertheless."""
    try:
        return engine.result()
    except Exception as error:  # anything vLLM raises
        return {"error": (str(error).splitlines() or [type(error).__name__])[0]}


if __name__ == "__main__":
    ending.run(main)
