"""The decode half of `bench_inference_peers.py`: one new token of each sequence, on all keys, on those that a layout
keeps, and on the pages that Quest chooses.

All keys lie in pages of 16 tokens, `[2, B, P, H, 16, D]` (keys, values), which FlashInfer reads as pages of all heads
and, for choices that heads make for themselves, as pages of single heads. Calls go around several copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import decode_calls
import peer_calls as peers
import torch
from bench_measure import Timing, add_note, first_line, free_memory, median_ms, noted
from bench_report import Row
from decode_calls import copies_of, kept, visible_tokens
from peer_inputs import Inputs, draw, full_attention, relative_error
from peer_report import Shape
from peer_selection import Pages, all_pages, first_places, keep, kept_pages, page_bounds, quest_pages
from torch import Tensor

from s2.attention.decode import decode_attention, decode_shares, decode_workspace
from s2.attention.regions import HeadGroup

BLOCK, PAGE, DTYPE = 64, peers.QUEST_PAGE, torch.bfloat16

Time = Callable[[list[peers.Call]], float]  # of one of the calls, in microseconds


@dataclass(frozen=True)
class Keys:
    """q `[B, Hq, D]` of the newest tokens, copies of all keys and values, and what full attention gives the first
    `compared` sequences."""

    compared: ClassVar[int] = 4
    q: Tensor
    full: list[Tensor]
    wanted: Tensor

    @classmethod
    def make(cls, shape: Shape, given: Inputs | None, layouts: list[str], device: str) -> Keys:
        """Drawn, or for a shape of a file its first tokens."""
        pages = shape.length // PAGE
        full = torch.empty(2, shape.batch, pages, shape.kv_heads, PAGE, _head_dim(given), dtype=DTYPE, device=device)
        queries, wanted = [], []
        for n in range(shape.batch):
            if shape.source and given is not None:
                inputs = given.first(shape.length)
            else:
                inputs = draw(shape.length, shape.heads, shape.kv_heads, n, device, DTYPE, queries=1)
            for into, x in zip(full[:, n], (inputs.k, inputs.v), strict=True):
                into.copy_(x.unflatten(0, (pages, PAGE)).transpose(1, 2))
            queries.append(inputs.q[-1])
            if n < cls.compared:
                last = torch.tensor([shape.length - 1], device=device)
                wanted.append(full_attention(inputs.q[-1:], inputs.k, inputs.v, last)[0])
        room = int(0.6 * torch.cuda.mem_get_info()[0]) // DTYPE.itemsize if full.is_cuda else 0
        least = min(layouts, key=lambda layout: decode_calls.bytes_of(_shape(shape, layout)))
        copies = copies_of(_shape(shape, least), full.numel(), room)
        return cls(torch.stack(queries), [full, *(full.clone() for _ in range(copies - 1))], torch.stack(wanted))

    def error(self, out: Tensor) -> float:
        return relative_error(out.reshape(self.q.shape)[: len(self.wanted)], self.wanted)


def _head_dim(given: Inputs | None) -> int:
    return decode_calls.Shape.head_dim if given is None else given.q.shape[-1]


def _shape(shape: Shape, layout: str) -> decode_calls.Shape:
    return decode_calls.Shape(shape.heads, shape.kv_heads, shape.batch, shape.length, layout, block=BLOCK)


# ---------------------------------------------------------------- rows


def decode_rows(shape: Shape, keys: Keys, layouts: list[str], time: Time, timing: Timing) -> Iterator[Row]:
    """Of each method a row. Where FlashInfer has two kernels, the faster one's."""

    def row(name: str, share: float, build: Callable[[Row], Tensor]) -> Row:
        """`build` sets the row's time and returns the result."""
        made = shape.row(name) | {"share": share}
        with noted(made, "error"), torch.inference_mode():
            made["error"] = keys.error(build(made))
        free_memory()
        return made

    dense = partial(peers.flashinfer_decode_all, keys.q, keys.full)
    yield row("FlashInfer, all keys", 1.0, lambda made: _faster(made, dense, time)[0])
    for layout in layouts:
        group = kept(layout, shape.kv_heads, shape.length, BLOCK)
        visible = visible_tokens(group, shape.length, BLOCK) / shape.kv_heads
        count = round(visible / PAGE)
        chosen = count * PAGE / shape.length
        caches = [_cache(keys.full[0], group, shape.length)]
        copies = min(len(keys.full), -(-decode_calls.COLD_BYTES // decode_calls.bytes_of(_shape(shape, layout))))
        caches += [caches[0].clone() for _ in range(copies - 1)]
        ours, theirs = (
            partial(each, shape=shape, q=keys.q, caches=caches, group=group, time=time) for each in (_ours, _theirs)
        )
        yield row(f"ours, {layout}", visible / shape.length, ours)
        yield row(f"FlashInfer, keys of {layout}", visible / shape.length, theirs)
        del caches, ours, theirs
        through = partial(_quest, shape=shape, keys=keys, count=count, time=time)
        yield row(f"Quest by FlashInfer, keys as {layout}", chosen, through)
        itself = partial(_quest_itself, shape=shape, keys=keys, count=count, timing=timing)
        yield row(f"Quest, keys as {layout}", chosen, itself)


def _faster(made: Row, build: Callable[..., list[peers.Call]], time: Time) -> tuple[Tensor, bool]:
    """Of FlashInfer's decode kernels the one that takes less time: its result, and whether it is the one on tensor
    cores."""
    found = []
    for tensor_cores in (True, False):
        try:
            calls = build(tensor_cores=tensor_cores)
            found.append((time(calls), tensor_cores, calls))
        except peers.Skipped:
            raise
        except Exception as error:
            add_note(made, f"{_kernel(tensor_cores)}: {first_line(error)}")
    if not found:
        raise RuntimeError("neither of its kernels ran")
    made["time"], tensor_cores, calls = min(found, key=lambda each: each[0])
    add_note(made, _kernel(tensor_cores))
    return calls[0](), tensor_cores


def _kernel(tensor_cores: bool) -> str:
    return "tensor cores" if tensor_cores else "CUDA cores"


# ---------------------------------------------------------------- kept keys


def _cache(full: Tensor, group: HeadGroup, length: int) -> Tensor:
    """`[2, B, H, slots, D]`."""
    return torch.stack([keep(pages, group, length, BLOCK) for pages in full])


def _ours(made: Row, shape: Shape, q: Tensor, caches: list[Tensor], group: HeadGroup, time: Time) -> Tensor:
    query, table = q[:, None], group.table.to(q.device)
    lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=q.device)
    settings = {"block": BLOCK, "scale": q.shape[-1] ** -0.5}
    if q.is_cuda:
        settings["workspace"] = decode_workspace(query, caches[0][0], block=BLOCK)
        settings["shares"] = decode_shares(query, caches[0][0], table, lengths, block=BLOCK)
    calls = [partial(decode_attention, query, *cache.unbind(), table, lengths, **settings) for cache in caches]
    made["time"] = time(calls)
    return calls[0]()


def _theirs(made: Row, shape: Shape, q: Tensor, caches: list[Tensor], group: HeadGroup, time: Time) -> Tensor:
    pages = kept_pages(group, shape.batch, shape.length, BLOCK)
    single = [cache.reshape(2, -1, 1, BLOCK, q.shape[-1]) for cache in caches]
    rows = _rows(shape, q)
    out, _ = _faster(made, partial(peers.flashinfer_decode, rows, single, pages, BLOCK, 1), time)
    made["difference"] = relative_error(
        out, _ours(dict(made), shape, q, caches[:1], group, lambda _: 0.0).reshape(out.shape)
    )
    return out


def _rows(shape: Shape, q: Tensor) -> Tensor:
    """`[B * H, G, D]`."""
    return q.unflatten(1, (shape.kv_heads, -1)).flatten(0, 1).contiguous()


# ---------------------------------------------------------------- Quest


def _quest(made: Row, shape: Shape, keys: Keys, count: int, time: Time) -> Tensor:
    """Its selection before FlashInfer's attention to the pages, and that alone."""
    rows, pages, kv_heads = _rows(shape, keys.q), shape.length // PAGE, shape.kv_heads
    bounds = [page_bounds(full[0]) for full in keys.full]
    first = first_places(shape.batch, kv_heads, pages, keys.q.device)
    indices = torch.empty(len(rows) * count, dtype=torch.int32, device=keys.q.device)
    single = [full.flatten(1, 3)[:, :, None] for full in keys.full]
    plan: Pages = all_pages(len(rows), count, PAGE)

    def choose(n: int) -> None:
        indices.copy_((first + kv_heads * quest_pages(rows, bounds[n], count)).flatten())

    def build(tensor_cores: bool) -> list[peers.Call]:
        calls = peers.flashinfer_decode(rows, single, plan, PAGE, 1, tensor_cores=tensor_cores, indices=indices)
        choose(0)
        return calls

    alone = dict(made)
    _, tensor_cores = _faster(alone, build, time)
    calls = build(tensor_cores)

    def step(n: int) -> Tensor:
        choose(n)
        return calls[n]()

    made["alone"], made["note"] = alone["time"], alone["note"]
    made["time"] = time([partial(step, n) for n in range(len(calls))])
    return step(0)


def _quest_itself(made: Row, shape: Shape, keys: Keys, count: int, timing: Timing) -> Tensor:
    if shape.batch > 1:
        raise peers.Skipped("its kernels take one sequence")
    k, v = (x[0].transpose(1, 2).flatten(0, 1) for x in keys.full[0])
    call = peers.quest(keys.q[0], k, v, count)
    out = call()
    made["time"] = 1e3 * median_ms(call, timing)
    add_note(made, "float16, outside a graph")
    return out
