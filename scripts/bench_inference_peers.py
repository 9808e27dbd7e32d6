"""Time inference beside FlashInfer, MInference and Quest on this GPU, and say how near each comes to full attention.

    python scripts/bench_inference_peers.py [--layouts L8V16+sink1,L1V15] [--tensors layer.safetensors] ...

A layer alone in bfloat16, heads of 128. Prefill: a sequence, by our kernels and by FlashInfer's block-sparse ones under
the same pattern, and by MInference's vertical-slash attention with as many query-key pairs. Decode: a new token of each
sequence, by ours from the keys that a layout keeps, by FlashInfer from all and from the same keys, by Quest from as
many. All are compared with full attention on the same inputs. A peer that is not installed is a row with the reason.
Writes docs/benchmarks/<date>-<machine>-inference-peers.{md,json}.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import peer_calls as peers
import torch
import torch.nn.functional as F
from bench_decode import head_counts, in_turn, layouts, sizes
from bench_measure import (
    LEAST_CALLS,
    Timing,
    add_note,
    first_line,
    free_memory,
    graph_ms,
    median_ms,
    noted,
    relative_rmse,
)
from bench_record import names, new_parser, new_record, require_gpu, save, stem
from bench_report import Row
from peer_decode import Keys, decode_rows
from peer_inputs import Inputs, draw, full_attention, load, relative_error
from peer_report import FIGURES, Shape, parts
from peer_selection import block_lists, line_scores, lines
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2 import ending
from s2.attention import Pattern, s2_attention

BLOCK, DTYPE = 64, torch.bfloat16
SAMPLED = 256  # queries whose result is compared with full attention

METHOD = (
    f"prefill: median of at least {LEAST_CALLS} calls outside a graph (of three from a second on); decode: one "
    "call among many in a CUDA graph, which go around 256 MB of keys or all that are there, so that they come from "
    "memory (Quest's own kernels cannot be captured: median of calls, the L2 cache flushed between them, which may "
    "hold host time of their launches)",
    "error: relative L2 error to full attention in float32 on the same inputs, of prefill for "
    f"{SAMPLED} queries spread over the sequence, of decode for the first {Keys.compared} sequences; it says how near "
    "a method comes to a model trained densely, while a model is trained with our layouts",
    "difference: relative RMSE to our kernels under the same pattern, which compute the same function",
    "of it attention: without choosing keys, of methods that choose them; FlashInfer's plans and the layouts that its "
    "block lists need are made before and not timed",
    "FlashInfer's block-sparse rows: all KV heads below each other as one matrix of 64 x 64 blocks, causal; its "
    "backend 'cake' for such blocks on Hopper takes neither a causal mask nor more than 64 blocks a row, so not ours",
    "MInference: lines chosen by the last 64 queries, columns to diagonals as 1,000 to 6,096, as many as give no more "
    "query-key pairs than the layout",
    "Quest: pages of 16 keys, as many as the layout shows keys; 'by FlashInfer' is its selection written with torch "
    "operations (one choice a KV head) before FlashInfer's paged decode, not its own kernels",
)
DRAWN = (
    "inputs drawn with a sink, topics that come back and keys that all queries like (peer_inputs.py): heavy-tailed "
    "scores, but not a model's"
)


# ---------------------------------------------------------------- prefill


Built = tuple[peers.Call, peers.Call]  # the call to time, and one that returns [S, Hq, D]


def prefill_rows(shape: Shape, inputs: Inputs, specs: list[str], timing: Timing) -> Iterator[Row]:
    q, k, v = (x.contiguous() for x in (inputs.q, inputs.k, inputs.v))
    at = torch.linspace(0, shape.length - 1, min(SAMPLED, shape.length), device=q.device).long()
    wanted, all_pairs = full_attention(q[at], k, v, at), shape.length * (shape.length + 1) / 2

    def row(name: str, build: Callable[[Row], Built], share: float = 1.0, ours: Tensor | None = None) -> Row:
        """`build` gets the row, to say more in it; `ours` is the result to be the same as."""
        made = shape.row(name) | {"share": share}
        with noted(made, "time"), torch.no_grad():
            call, result = build(made)
            out = result()
            made["error"] = relative_error(out[at], wanted)
            made["time"] = median_ms(call, timing)
            if ours is not None:
                made["difference"] = relative_rmse(out[None], ours[None])
        free_memory()
        return made

    yield row("dense, cuDNN", lambda _: _twice(partial(_cudnn, q, k, v)))
    yield row("FlashInfer, dense", lambda _: _twice(peers.flashinfer_dense(q, k, v)))
    for spec in specs:
        pattern = Pattern.parse(spec, BLOCK)
        pairs = sum(pattern.visible_pairs(shape.length, shape.kv_heads)) / shape.kv_heads
        share, ours = pairs / all_pairs, _ours(q, k, v, pattern)
        yield row(f"ours, {spec}", lambda _, call=ours: _twice(call), share)
        result = None
        with contextlib.suppress(Exception), torch.no_grad():  # the row says why
            result = ours()
        lists = block_lists(pattern, shape.kv_heads, -(-shape.length // BLOCK))
        for backend in ("fa2", "fa3"):
            build = partial(peers.flashinfer_sparse, q, k, v, lists, BLOCK, backend)
            yield row(f"FlashInfer, {spec}, {backend}", lambda _, build=build: build(), share, result)
        yield row(f"MInference, pairs of {spec}", partial(_minference, q, k, v, pairs, timing))


def _ours(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> peers.Call:
    inputs = [x[None] for x in (q, k, v)]
    return lambda: s2_attention(*inputs, pattern)[0]


def _minference(q: Tensor, k: Tensor, v: Tensor, pairs: float, timing: Timing, made: Row) -> Built:
    """Choosing lines and attending to them; what it is to attend alone goes into the row."""
    attend, note = peers.minference(q, k, v)
    scores = line_scores(q, k)
    found = peers.minference_lines(scores, len(q), pairs)
    counts = found.vertical, found.slash
    made["share"] = found.pairs / (len(q) * (len(q) + 1) / 2)
    add_note(made, f"{note}; {found.vertical:,} columns, {found.slash:,} diagonals")
    made["alone"] = median_ms(partial(attend, *lines(scores, *counts)), timing)
    del scores
    return _twice(lambda: attend(*lines(line_scores(q, k), *counts)))


def _twice(call: peers.Call) -> Built:
    return call, call


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


# ---------------------------------------------------------------- decode


def decode_time(calls: list[peers.Call], timing: Timing) -> float:
    """Microseconds of one of the calls, which take turns."""
    return 1e3 * graph_ms(in_turn(calls), timing)


# ---------------------------------------------------------------- the run


def shapes(args: argparse.Namespace, given: Inputs | None, source: str) -> Iterator[Shape]:
    """Those of the file first."""
    if given is not None:
        (tokens, heads), kv_heads = given.q.shape[:2], given.k.shape[1]
        tokens -= tokens % BLOCK
        yield Shape(heads, kv_heads, tokens, 0, source)
        for part in range(4, 1, -1):
            yield Shape(heads, kv_heads, tokens * part // 4 // BLOCK * BLOCK, 1, source)
    for heads, kv_heads in args.heads:
        for length in args.lengths:
            for batch in [0] * ("prefill" in args.parts) + args.batches * ("decode" in args.parts):
                yield Shape(heads, kv_heads, length, batch)


def rows_of(shape: Shape, given: Inputs | None, args: argparse.Namespace, timing: Timing) -> Iterator[Row]:
    """Also of a shape that cannot be made: one row that says why."""
    try:
        if shape.batch:
            keys = Keys.make(shape, given, args.layouts, args.device)
            yield from decode_rows(shape, keys, args.layouts, partial(decode_time, timing=timing), timing)
        else:
            inputs = given.first(shape.length) if shape.source and given else draw(
                shape.length, shape.heads, shape.kv_heads, 0, args.device, DTYPE)  # fmt: skip
            yield from prefill_rows(shape, inputs, args.layouts, timing)
    except Exception as error:
        yield shape.row("all") | {"status": "failed", "note": first_line(error)}


def lengths(text: str) -> list[int]:
    found = sizes(text)
    if odd := [n for n in found if n % BLOCK]:
        raise argparse.ArgumentTypeError(f"{text!r}: {odd[0]} is not a multiple of {BLOCK}")
    return found


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, name="inference-peers")
    add = parser.add_argument
    add("--parts", type=names(("prefill", "decode")), default=["prefill", "decode"], help="default prefill,decode")
    add("--heads", type=head_counts, default=[(32, 8), (32, 32)], help="default 32/8,32/32")
    add("--lengths", type=lengths, default=[32768, 131072], help="tokens (default 32768,131072)")
    add("--batches", type=sizes, default=[1, 16, 32], help="sequences of decode (default 1,16,32)")
    add("--layouts", type=layouts, default=["L8V16+sink1", "L1V15"], help="default L8V16+sink1,L1V15")
    add("--tensors", type=Path, help="safetensors with q [S, Hq, D], k and v [S, H, D] of a layer, to measure first")
    add("--seconds", type=float, default=480.0, help="shapes that do not begin within it are left out (default 480)")
    return parser.parse_args(argv, argparse.Namespace(device="cuda"))


def main() -> None:
    args = parse_arguments()
    require_gpu("bench_inference_peers")
    begin = perf_counter()
    given, source = load(args.tensors, args.device, DTYPE) if args.tensors else (None, "")
    record = new_record(
        "bench_inference_peers", sys.argv[1:], torch.cuda.get_device_name(), ("torch", "triton"), commit=args.commit,
        name=args.name, method=[*METHOD, DRAWN], rows=[],
    )  # fmt: skip
    record["versions"] |= peers.versions()
    path = args.output / stem(record)
    for shape in shapes(args, given, source):
        free_memory()
        if perf_counter() - begin > args.seconds:
            rows = iter([shape.row("all") | {"status": "skipped", "note": "no time left"}])
        else:
            rows = rows_of(shape, given, args, Timing(20, 60))
        for row in rows:
            record["rows"].append(row)
            figures = {key: row[key] for key in FIGURES}
            print(shape, row["name"], row["status"], figures, row["note"], flush=True)
        save(record, path, "Inference beside peers", parts(record))
    print(f"wrote {path}.md with its .json, {perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    ending.run(main)
