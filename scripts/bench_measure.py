"""How `bench_attention.py` measures one kernel: times, memory, host cost, and whether it computes the same result."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from bench_kernels import Entry, Skipped
from bench_report import HOST_FIGURES, LAYERS, Row, blank_row
from torch import Tensor

GRAPH_LENGTHS = 16384  # up to here host time counts, and the forward is timed in a CUDA graph too
SLOW_MS = 1000.0  # beyond this the median of three calls is enough
LEAST_CALLS = 5  # up to there
LARGEST_DIFFERENCE = 1e-2  # relative RMSE between two kernels of one pattern in 16 bits
HOST_CALLS = 200
COPIED_BYTES, MATRIX_SIZE = 1 << 30, 8192  # for the limits of the machine

Call = Callable[[], object]
Inputs = tuple[Tensor, Tensor, Tensor]  # q, k, v, each [B, S, H, D]; they want gradients
Known = dict[str, tuple[str, Tensor]]  # the first kernel of a pattern and its result, by the pattern's key


@dataclass(frozen=True)
class Timing:
    """Milliseconds of calls before a figure and for it."""

    warmup: int
    rep: int


# ---------------------------------------------------------------- single figures


def median_ms(function: Call, timing: Timing) -> float:
    function()  # compiles
    first = event_ms(function)
    if first < SLOW_MS:
        rep = max(timing.rep, math.ceil(LEAST_CALLS * first))
        return triton.testing.do_bench(function, warmup=timing.warmup, rep=rep, return_mode="median")
    return statistics.median([first, event_ms(function), event_ms(function)])


def event_ms(function: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@torch.no_grad()
def graph_ms(function: Call, timing: Timing) -> float:
    """In a CUDA graph, which is replayed ten times and holds a quarter of `rep` of calls."""
    torch.cuda.synchronize()  # the calls go on a stream that does not wait for what made their inputs
    return triton.testing.do_bench_cudagraph(function, rep=max(1, timing.rep // 4), return_mode="median")


def peak_gib(function: Call) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def issue_us(function: Call) -> float:
    """Host time of one call: calls are issued without waiting for the device; the median of five rounds."""
    rounds = []
    for count in (HOST_CALLS // 10, *[HOST_CALLS] * 5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            function()
        rounds.append((time.perf_counter() - begin) / count * 1e6)
    torch.cuda.synchronize()
    return statistics.median(rounds[1:])  # the first warms up


def machine_limits(device: str, timing: Timing) -> dict[str, float]:
    """What memory and tensor cores of this machine reach with nothing else to do: TB/s of a copy, read and written,
    and TFLOP/s of a product of square bfloat16 matrices."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    x, y = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy_ms = median_ms(lambda: target.copy_(source), timing)
    product_ms = median_ms(lambda: x @ y, timing)
    return {"copy_tb_s": 2 * source.numel() / copy_ms / 1e9, "product_tflop_s": 2 * MATRIX_SIZE**3 / product_ms / 1e9}


# ---------------------------------------------------------------- rows


def measure(entry: Entry, inputs: Inputs, dout: Tensor, flops: float, timing: Timing, known: Known) -> Row:
    """The row of one kernel; `flops` are its useful operations forward. It never raises: a kernel that cannot run
    gets the reason, one whose backward cannot keeps its forward figures."""
    seq_len, stage = inputs[0].shape[1], ["forward"]
    row = blank_row(entry.name, seq_len) | {"spec": entry.spec, "flops": flops}
    row["bytes"] = sum(x.numel() * x.element_size() for x in (*inputs, dout))
    with noted(row, "forward_ms", stage), entry.context():
        forward = entry.build(*inputs)
        out = forward()
        row["forward_ms"] = median_ms(forward, timing)
        row["forward_tflops"] = flops / row["forward_ms"] / 1e9
        stage[0] = "check"
        compare(entry, out.detach(), row, known)
        if entry.graph and seq_len <= GRAPH_LENGTHS:
            try:
                row["graph_ms"] = graph_ms(forward, timing)
            except Exception as error:
                add_note(row, f"no graph: {first_line(error)}")
        stage[0] = "backward"
        differentiable = out.requires_grad
        if differentiable:
            backward = partial(torch.autograd.grad, out, inputs, dout, retain_graph=True)
            row["backward_ms"] = median_ms(backward, timing)
            row["backward_tflops"] = 2.5 * flops / row["backward_ms"] / 1e9
            del backward
        else:
            add_note(row, entry.note or "no backward: the result has no gradient")
        stage[0] = "peak memory"
        del out
        row["peak_gib"] = peak_gib(
            (lambda: torch.autograd.grad(forward(), inputs, dout)) if differentiable else forward
        )
    return row


def measure_host(entry: Entry, inputs: Inputs, dout: Tensor) -> Row:
    """What issuing one call costs the host; the sizes must keep the device ahead of it. A backward alone wakes
    autograd's thread and is awaited; for a network's layers, here each the queries of the next, that happens once."""
    row = blank_row(entry.name, inputs[0].shape[1], HOST_FIGURES)
    with noted(row, "forward_us", ["host time"]), entry.context():
        forward = entry.build(*inputs)
        with torch.no_grad():
            row["forward_us"] = issue_us(forward)
        row["forward_grad_us"] = issue_us(forward)
        row["backward_us"] = issue_us(partial(torch.autograd.grad, forward(), inputs, dout, retain_graph=True))
        x, *keys_and_values = inputs
        for _ in range(LAYERS):
            x = entry.build(x, *keys_and_values)()
        layers = partial(torch.autograd.grad, x, inputs[0], dout, retain_graph=True)
        row["backward_layer_us"] = issue_us(layers) / LAYERS
    return row


@contextlib.contextmanager
def noted(row: Row, first: str, stage: Sequence[str] = ("",)) -> Iterator[None]:
    """Take what is raised into the row: one without its `first` figure has failed as a whole, later failures are notes
    to it that name the last stage."""
    try:
        yield
        return
    except Skipped as reason:
        status, said = "skipped", str(reason)
    except torch.cuda.OutOfMemoryError:
        status, said = "out of memory", ""
    except Exception as error:
        status, said = "failed", first_line(error)
    if row[first] is None:
        row["status"] = status
        add_note(row, said)
    else:
        add_note(row, ": ".join(filter(None, (stage[-1], status, said))))


def compare(entry: Entry, out: Tensor, row: Row, known: Known) -> None:
    """Note a result that differs from the first kernel's with this pattern: such a row times something else."""
    if entry.pattern is None:
        return
    name, reference = known.setdefault(entry.pattern.key, (entry.name, out))
    if name == entry.name:
        return
    if out.shape != reference.shape:
        raise ValueError(f"the result has shape {list(out.shape)}, not {list(reference.shape)}")
    row["difference"] = relative_rmse(out, reference)
    if not row["difference"] <= LARGEST_DIFFERENCE:
        add_note(row, f"WRONG? its result differs from that of {name}: relative RMSE {row['difference']:.2g}")


def relative_rmse(x: Tensor, reference: Tensor) -> float:
    error = size = 0.0
    for a, b in zip(x.split(8192, dim=1), reference.split(8192, dim=1), strict=True):
        error += float((a.float() - b.float()).square().sum())
        size += float(b.float().square().sum())
    return (error / size) ** 0.5


def add_note(row: Row, text: str) -> None:
    row["note"] = "; ".join(filter(None, (row["note"], text)))


def first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after a kernel's illegal access every call fails
            torch.cuda.empty_cache()
