"""Check the attention of recipes on this machine's GPU, as training calls it.

    make verify                                every recipe of the repository
    make verify RECIPE=7b                      the stages of one
    make verify RECIPE=my/own.yaml             a file of your own
    python scripts/verify.py --device cpu --max-length 512 --backend sdpa demo

Every distinct call of the recipes' models (pattern and its rotations, heads, head dimension, block size, precision,
length) goes through `s2_attention` with the default backend: as whole rows, and as packed documents of two kinds, few
and many, with empty ones, one of one token and padding. Of each call

- output and gradients are right: rows and columns are drawn, computed exactly in float64 (`exact_rows`), and compared
  within twice the error of plain torch in the same precision;
- forward and backward give the same bits again; where the documentation says that a gradient does not, they do so under
  `torch.use_deterministic_algorithms`, and those are right too;
- NaN stays where it is: around the tensors, behind the last border, in every second document (row of a batch);
- it is said which backend has answered and, if it is not the fastest, why.

Prints a table and what is wrong. Exit code 0: all is right; 1: something is wrong; 5: a call did not fit into memory.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from attention_calls import Call, calls_of_all
from exact_rows import Segment, exact_samples, judge
from torch import Tensor

from s2 import ending
from s2.attention import s2_attention
from s2.attention.kernels.hopper.support import objection

NAMES = ("out", "dq", "dk", "dv")
SAMPLES = 64  # rows, and as many columns
MOST_PAIRS = {"cuda": 1 << 34, "cpu": 1 << 24}  # for the columns of dK and dV; heads are drawn to stay within
GUARD = 64  # tokens of NaN before and behind a tensor

Attend = Callable[..., Tensor]


@dataclass
class Result:
    """What a call has shown. `ratios`: the worst error over its bound."""

    call: Call
    backend: str = "?"
    why: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    repeats: str = "?"
    wrong: list[str] = field(default_factory=list)
    out_of_memory: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Settings:
    device: str
    seed: int
    backend: str | None = None
    attend: Attend = s2_attention


# ---------------------------------------------------------------- one call


@dataclass(frozen=True)
class Inputs:
    """Tensors `[T, heads, D]` amid NaN; T counts the rows of a batch one after the other, and padding. `segments` are
    the documents, or the rows of a batch."""

    call: Call
    tensors: tuple[Tensor, ...]  # q, k, v, dout
    segments: list[Segment]
    cu_seqlens: Tensor | None

    @classmethod
    def draw(cls, call: Call, settings: Settings) -> Inputs:
        choice = random.Random(settings.seed)
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        tokens, borders = call.batch * call.length, None
        if call.kind == "whole":
            cuts = list(range(0, tokens + 1, call.length))
        else:
            cuts = _borders(tokens - min(97, tokens // 8), call.kind, choice)
            borders = torch.tensor([0, *cuts, *[cuts[-1]] * 3], dtype=torch.int32, device=settings.device)
        tensors = []
        for heads in (call.heads, call.kv_heads, call.kv_heads, call.heads):
            shape = (tokens + 2 * GUARD, heads, call.head_dim)
            room = torch.full(shape, torch.nan, dtype=call.dtype, device=settings.device)
            filled = room[GUARD : GUARD + cuts[-1]]
            filled.copy_(torch.randn(filled.shape, generator=generator, device=settings.device))
            tensors.append(room[GUARD : GUARD + tokens])
        segments = [(begin, end) for begin, end in itertools.pairwise(cuts) if end > begin]
        return cls(call, tuple(tensors), segments, borders)

    def with_nan_next_door(self) -> Inputs:
        """The same with NaN in every second segment."""
        tensors = tuple(x.clone() for x in self.tensors)
        for x, (begin, end) in itertools.product(tensors, self.segments[1::2]):
            x[begin:end] = torch.nan
        return replace(self, tensors=tensors)

    def as_called(self) -> tuple[list[Tensor], dict[str, Any]]:
        """q, k, v, dout in the shape of the call, and its options."""
        call = self.call
        shape = (-1,) if self.cu_seqlens is not None else (call.batch, call.length)
        tensors = [x.view(*shape, *x.shape[1:]) for x in self.tensors]
        return tensors, {"rotation": call.rotation, "cu_seqlens": self.cu_seqlens}

    def run(self, attend: Attend) -> dict[str, Tensor]:
        """Output and gradients, `[T, heads, D]`."""
        (*inputs, dout), options = self.as_called()
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = attend(*inputs, self.call.pattern, **options)
        found = (out.detach(), *torch.autograd.grad(out, inputs, dout))
        return {name: x.reshape(-1, *x.shape[-2:]) for name, x in zip(NAMES, found, strict=True)}

    def sampled_tokens(self, choice: random.Random) -> Tensor:
        """Some from the edges of documents and of blocks, the others from anywhere."""
        size = self.call.pattern.block_size
        lengths = [end - begin for begin, end in self.segments]
        longest = self.segments[lengths.index(max(lengths))]
        tokens: set[int] = set()
        for begin, end in [longest, self.segments[-1], *choice.sample(self.segments, min(4, len(self.segments)))]:
            block = begin + choice.randrange(0, end - begin, size)
            tokens |= {t for t in (begin, begin + 1, block - 1, block, end - 1) if begin <= t < end}
        while len(tokens) < min(SAMPLES, sum(lengths)):
            begin, end = choice.choices(self.segments, lengths)[0]
            tokens.add(choice.randrange(begin, end))
        return torch.tensor(sorted(tokens), device=self.tensors[0].device)

    def sampled_heads(self, choice: random.Random) -> Tensor:
        """KV heads whose columns are checked: as many as take some seconds."""
        call = self.call
        pairs = sum((end - begin) ** 2 for begin, end in self.segments) // 2 * (call.heads // call.kv_heads)
        count = max(1, min(call.kv_heads, MOST_PAIRS[self.tensors[0].device.type] // pairs))
        return torch.tensor(sorted(choice.sample(range(call.kv_heads), count)), device=self.tensors[0].device)


def _borders(tokens: int, kind: str, choice: random.Random) -> list[int]:
    """Of few documents of like lengths, or many of all lengths; the second is empty, the third one token long."""
    cuts = [0, int(tokens * choice.uniform(0.3, 0.6))]
    cuts += [cuts[-1], cuts[-1] + 1]
    while kind.startswith("many") and len(cuts) < 40 and cuts[-1] < tokens - 1:
        cuts.append(min(tokens - 1, cuts[-1] + int(math.exp(choice.uniform(0, math.log(max(2, tokens // 8)))))))
    return [*cuts, tokens]


def check(call: Call, settings: Settings) -> Result:
    """All there is to check about a call. What goes wrong is in the result, whatever it is."""
    result, begin = Result(call), time.perf_counter()
    try:
        _check(call, settings, result)
    except torch.OutOfMemoryError:
        result.out_of_memory = True
    except Exception as error:  # a kernel that does not compile or crashes is one row of the table
        result.wrong.append(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    if settings.device == "cuda":
        with contextlib.suppress(RuntimeError):  # a crash has broken the context
            torch.cuda.empty_cache()
    result.seconds = time.perf_counter() - begin
    return result


def _check(call: Call, settings: Settings, result: Result) -> None:
    inputs, choice = Inputs.draw(call, settings), random.Random(settings.seed + 1)
    attend = partial(settings.attend, backend=settings.backend)
    sums = [_bits(x) for x in inputs.tensors]
    first = inputs.run(attend)
    result.backend, result.why = who_answered(inputs, first["out"], settings)
    loose = may_differ(result.backend, call)
    samples = exact_samples(
        *inputs.tensors, call.pattern, call.rotation, inputs.segments, inputs.sampled_tokens(choice),
        inputs.sampled_tokens(choice), inputs.sampled_heads(choice),
    )  # fmt: skip

    def compare(found: dict[str, Tensor], how: str = "") -> None:
        for name, sample in samples.items():
            verdict = judge(sample, found[name], call.dtype)
            result.ratios[name] = max(verdict.ratio, result.ratios.get(name, 0.0))
            if not verdict.is_right:
                result.wrong.append(
                    f"{name}{how} is off by {verdict.error:.2e} {verdict.kind} at {_place(inputs, verdict.token)} "
                    f"of head {verdict.head}, where {verdict.bound:.2e} is allowed; relative RMSE {verdict.rms:.1e}"
                )

    compare(first)
    for name in NAMES:
        if inputs.cu_seqlens is not None and first[name][inputs.segments[-1][1] :].any():
            result.wrong.append(f"{name} is not 0 behind the last border")
    differ = _differing(first, inputs.run(attend))
    result.repeats = f"but {', '.join(sorted(differ))}" if differ else "yes"
    result.wrong += [f"{name} is not the same bits in a second run" for name in sorted(differ - loose)]
    if differ & loose:
        with deterministic():
            one = inputs.run(attend)
            differ = _differing(one, inputs.run(attend))
        how = " under deterministic algorithms"
        compare(one, how)
        result.wrong += [f"{name} is not the same bits in a second run{how}" for name in sorted(differ)]
        del one
    if any(_bits(x) != before for x, before in zip(inputs.tensors, sums, strict=True)):
        result.wrong.append("an input was written to")
    if len(inputs.segments) > 1:
        beside = inputs.with_nan_next_door().run(attend)
        for name, (begin, end) in itertools.product(NAMES, inputs.segments[::2]):
            mine, same = first[name][begin:end], beside[name][begin:end]
            if not (torch.allclose(mine, same, 2**-6, 2e-3) if name in loose else torch.equal(mine, same)):
                result.wrong.append(f"{name} of tokens {begin} to {end - 1} changes when its neighbours are NaN")


def _differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    return {name for name in NAMES if not torch.equal(first[name], second[name])}


def _place(inputs: Inputs, token: int) -> str:
    at = next(n for n, (begin, end) in enumerate(inputs.segments) if begin <= token < end)
    begin, end = inputs.segments[at]
    what = "row" if inputs.cu_seqlens is None else "document"
    return f"token {token - begin} of {end - begin} of {what} {at} (counted from 0, none of them empty)"


def _bits(x: Tensor) -> int:
    """A sum over what is stored, NaN included."""
    integers = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return int(x.view(integers).sum(dtype=torch.int64))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def who_answered(inputs: Inputs, out: Tensor, settings: Settings) -> tuple[str, str]:
    """The backend whose output has the same bits, and why it is no faster one."""
    if settings.backend is not None:
        return settings.backend, "it was asked for"
    (q, k, v, _), options = inputs.as_called()
    pattern = inputs.call.pattern
    why = objection(q, k, v, pattern, packed=inputs.cu_seqlens is not None)
    why = why and f"the hopper backend does not take such calls: {why}"
    for backend in ([] if why else ["hopper"]) + ["triton" if settings.device == "cuda" else "sdpa"]:
        own = s2_attention(q, k, v, pattern, **options, backend=backend)
        if torch.equal(own.reshape(out.shape), out):
            return backend, why
    return "torch", "dense rows of one length go to torch's own kernels" if pattern.is_dense else why


def may_differ(backend: str, call: Call) -> set[str]:
    """What need not be the same bits twice, by the documentation of `s2_attention`: dQ where the Hopper backward adds
    it up in any order, and gradients of torch's dense kernels."""
    if backend == "hopper":
        return {"dq"} if call.head_dim == 128 else set()
    return {"dq", "dk", "dv"} if backend == "torch" else set()


# ---------------------------------------------------------------- all calls


def check_all(calls: Sequence[Call], settings: Settings, workers: int) -> list[Result]:
    """Calls whose kernels are compiled once go to one process, one after the other; what does not fit into memory
    beside others is tried again alone."""
    if workers == 1:
        return _check_group(calls, settings)
    groups: dict[tuple[Any, ...], list[Call]] = {}
    for call in calls:
        groups.setdefault(call.kernels, []).append(call)
    longest_first = sorted(groups.values(), key=lambda group: -max(call.length for call in group))
    found = _in_pool(longest_first, settings, workers)
    if again := [call for call in calls if found[call].out_of_memory]:
        found |= _in_pool([again], settings, 1)
    return [found[call] for call in calls]


def _in_pool(groups: Sequence[Sequence[Call]], settings: Settings, workers: int) -> dict[Call, Result]:
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        parts = pool.map(partial(_check_group, settings=settings), groups)
        return {result.call: result for result in itertools.chain.from_iterable(parts)}


def _check_group(group: Sequence[Call], settings: Settings) -> list[Result]:
    return [check(call, settings) for call in group]


def table(results: Sequence[Result]) -> str:
    header = ("recipe", "attention", "heads", "D", "tokens", "documents", "backend", *NAMES, "repeats", "s", "")
    rows = []
    for result in results:
        call, verdict = result.call, "out of memory" if result.out_of_memory else "WRONG" if result.wrong else "right"
        sizes = (f"{call.heads}/{call.kv_heads}", str(call.head_dim), f"{call.batch} x {call.length}")
        ratios = (f"{result.ratios[name]:.2f}" if name in result.ratios else "" for name in NAMES)
        seen = (result.repeats, f"{result.seconds:.1f}", verdict)
        rows.append((call.recipe, call.attention, *sizes, call.kind, result.backend, *ratios, *seen))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="folders of recipes/ or YAML files; default: all of recipes/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--backend", help="default: what s2_attention picks. On a CPU triton needs TRITON_INTERPRET=1")
    parser.add_argument("--max-length", type=int, help="cut longer sequences down to so many tokens")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31), help="default: a new one")
    parser.add_argument("--workers", type=int, help="processes; default: as many as there are kernels, 8 at most")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and args.max_length is None:
        raise ValueError(
            'on a CPU long sequences take too long: say --max-length 512 (from make: ARGS="--max-length 512")'
        )

    calls = calls_of_all(args.recipes, args.max_length)
    workers = args.workers or (8 if args.device == "cuda" else 1)
    settings = Settings(args.device, args.seed, args.backend)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{len(calls)} calls on {machine}, torch {torch.__version__}, --seed {args.seed}", flush=True)
    results = check_all(calls, settings, workers)
    print(table(results))
    print("out, dq, dk, dv: the largest error over what is allowed")
    for backend, why in sorted({(result.backend, result.why) for result in results if result.why}):
        where = sorted({result.call.recipe for result in results if (result.backend, result.why) == (backend, why)})
        print(f"{backend} has answered in {', '.join(where)}: {why}")
    for result in results:
        for sentence in result.wrong:
            print(f"WRONG: {result.call}: {sentence}")
    if any(result.wrong for result in results):
        return ending.CRASH
    return ending.OUT_OF_MEMORY if any(result.out_of_memory for result in results) else ending.DONE


if __name__ == "__main__":
    ending.run(main)
