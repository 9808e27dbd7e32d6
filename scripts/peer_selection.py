"""What peers attend to: a pattern as lists of blocks, pages of kept keys, Quest's pages, MInference's lines.

Nothing here needs a GPU or a peer. Shapes: B sequences, S tokens, H KV heads, G query heads on each, D head dimension,
P pages of a sequence, n blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2.attention import Pattern
from s2.attention.grammar import UNBOUNDED
from s2.attention.regions import HeadGroup, held_blocks

LAST_QUERIES = 64  # by whose scores MInference chooses
FIRST_COLUMNS, NEAREST_DIAGONALS = 30, 30  # which it always takes
VERTICAL_OVER_SLASH = 1000 / 6096  # its most frequent setting
TILE = 64  # queries and keys of its kernel's blocks


class Lists(NamedTuple):
    """Rows of numbers one after the other, int32: row i is `indices[indptr[i] : indptr[i + 1]]`."""

    indptr: Tensor
    indices: Tensor


class Pages(NamedTuple):
    """Of each row the pages that it attends to, and how much of the last is filled; all int32."""

    indptr: Tensor
    indices: Tensor
    last_length: Tensor


def block_lists(pattern: Pattern, kv_heads: int, num_blocks: int) -> Lists:
    """The pattern with its heads one below the other: row `h * n + i` lists `h * n + j` for the key blocks j that query
    block i of KV head h sees, ascending, so that the diagonal block comes last and a causal mask that ends where the
    keys end is the pattern's."""
    block = torch.arange(num_blocks)
    counts, indices = [], []
    for head, rule in enumerate(pattern.rules(kv_heads)):
        seen = rule.visible(block[:, None] - block, block)
        counts.append(seen.sum(1))
        indices.append(seen.nonzero()[:, 1] + head * num_blocks)
    return Lists(_ends(torch.cat(counts)), torch.cat(indices).int())


def _ends(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


# ---------------------------------------------------------------- kept keys


def keep(pages: Tensor, group: HeadGroup, length: int, block: int) -> Tensor:
    """The keys `[B, P, H, page, D]` that a cache keeps of sequences of `length` tokens, in its layout
    `[B, H, slots, D]`; zeros where it has none."""
    batch, _, kv_heads, page, head_dim = pages.shape
    held = _held(group, length, block)  # [H, n]
    token = (held[..., None] * block + torch.arange(block)).flatten(1)
    there = (token < length).to(pages.device)
    token = torch.where(token < length, token, 0).to(pages.device)
    kept = pages.new_empty(batch, kv_heads, token.shape[1], head_dim)
    for head, (at, is_there) in enumerate(zip(token, there, strict=True)):
        kept[:, head] = pages[:, at // page, head, at % page] * is_there[:, None]
    return kept


def kept_pages(group: HeadGroup, batch: int, length: int, block: int) -> Pages:
    """For the last of `length` tokens, what each KV head of each sequence sees of such a cache as pages of `block`
    tokens, `[B * H * n, block, D]`; a row for each head of each sequence. The newest block comes last."""
    held, newest = _held(group, length, block), (length - 1) // block
    _, near, far = held_blocks(group.table, torch.tensor([length], dtype=torch.int32), group.num_blocks, block)
    seen = (held <= newest) & (newest - held >= near) & (newest - held < far)
    order = torch.where(seen, held, UNBOUNDED).argsort(dim=1)
    rows = [places[: int(count)] for places, count in zip(order, seen.sum(1), strict=True)]
    heads = len(rows)
    indices = torch.cat([rows[r % heads] + r * group.num_blocks for r in range(batch * heads)]).int()
    last = torch.full((batch * heads,), length - newest * block, dtype=torch.int32)
    return Pages(_ends(seen.sum(1).repeat(batch)), indices, last)


def _held(group: HeadGroup, length: int, block: int) -> Tensor:
    held, _, _ = held_blocks(group.table, torch.tensor([length], dtype=torch.int32), group.num_blocks, block)
    return held[0].long()


def all_pages(rows: int, pages: int, page: int) -> Pages:
    """Every page of every row, in order."""
    indices = torch.arange(rows * pages, dtype=torch.int32)
    return Pages(_ends(torch.full((rows,), pages)), indices, torch.full((rows,), page, dtype=torch.int32))


# ---------------------------------------------------------------- Quest


def page_bounds(pages: Tensor) -> Tensor:
    """Of keys `[B, P, H, page, D]` the largest and the smallest of each channel and page: `[B * H, P, 2 D]`."""
    bounds = torch.cat([pages.amax(dim=3), pages.amin(dim=3)], dim=-1)  # [B, P, H, 2 D]
    return bounds.transpose(1, 2).flatten(0, 1).contiguous()


def quest_pages(q: Tensor, bounds: Tensor, count: int) -> Tensor:
    """The `count` pages of each sequence and KV head with the highest bound on a score (Quest, arXiv 2406.10774), of
    query heads that share one the highest, the newest page among them. q `[B * H, G, D]`; int64 `[B * H, count]`."""
    signs = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)
    scores = torch.bmm(signs, bounds.transpose(1, 2)).amax(dim=1)
    scores[:, -1] = float("inf")
    return scores.topk(count, dim=-1, sorted=False).indices


def first_places(batch: int, heads: int, pages: int, device: torch.device) -> Tensor:
    """Where the first page of each sequence and KV head stands in `[B, P, H, page, D]` seen as pages of single heads:
    `[B * H, 1]`. The next ones follow at a distance of H."""
    row = torch.arange(batch * heads, device=device)[:, None]
    return row // heads * pages * heads + row % heads


# ---------------------------------------------------------------- MInference


def line_scores(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """What the last queries give to each column and to each diagonal (by distance), as MInference (arXiv 2407.02490)
    estimates them: `[H * G, S]` each, float32. q `[S, H * G, D]`, k `[S, H, D]`."""
    rows, tokens = min(LAST_QUERIES, len(q)), len(k)
    group = q.shape[1] // k.shape[1]
    grouped = q[-rows:].unflatten(1, (-1, group))
    scores = torch.einsum("mhgd,shd->hgms", grouped, k).flatten(0, 1).float() * q.shape[-1] ** -0.5
    query = torch.arange(tokens - rows, tokens, device=q.device)[:, None]
    probs = scores.masked_fill_(torch.arange(tokens, device=q.device) > query, float("-inf")).softmax(dim=-1)
    columns = probs.sum(dim=1)
    # row m moved by m to the left: then a diagonal is a column, distance o the one at tokens - o
    shifted = F.pad(probs, (rows, 0)).flatten(1)
    shifted = F.pad(shifted, (0, rows)).view(len(probs), rows, tokens + rows + 1)
    diagonals = shifted.sum(dim=1)[:, 1 : tokens + 1].flip(-1)
    return columns, diagonals


def lines(scores: tuple[Tensor, Tensor], vertical: int, slash: int) -> tuple[Tensor, Tensor]:
    """The columns and the distances of the diagonals with the highest scores, `[H * G, vertical]` and `[.., slash]`."""
    columns, diagonals = (x.clone() for x in scores)
    columns[:, :FIRST_COLUMNS] = float("inf")
    diagonals[:, :NEAREST_DIAGONALS] = float("inf")
    return columns.topk(vertical, dim=-1).indices, diagonals.topk(slash, dim=-1).indices


def line_pairs(block_count: Tensor, column_count: Tensor) -> float:
    """Query-key pairs a head that its kernel computes and causality leaves: tiles of each row of tiles, of which one is
    on the diagonal, and single columns. Both `[.., H * G, rows]`."""
    rows = block_count.shape[-1]
    heads = block_count.numel() // rows
    tiles, columns = int(block_count.sum()) / heads, int(column_count.sum()) / heads
    return tiles * TILE**2 - rows * TILE * (TILE - 1) / 2 + columns * TILE


def lines_for(pairs: float, count: Callable[[int, int], float], tokens: int) -> tuple[int, int]:
    """How many columns and diagonals, in MInference's proportion, come nearest to `pairs` by `count`, which is never
    asked for twice as many: its buffer grows with them, and beyond 2^31 entries it writes outside."""
    low, high = NEAREST_DIAGONALS, min(2 * NEAREST_DIAGONALS, tokens)
    while high < tokens and count(_vertical(high), high) <= pairs:
        low, high = high, min(2 * high, tokens)
    while high - low > 1:
        slash = (low + high) // 2
        low, high = (slash, high) if count(_vertical(slash), slash) <= pairs else (low, slash)
    return _vertical(low), low


def _vertical(slash: int) -> int:
    return max(FIRST_COLUMNS, round(slash * VERTICAL_OVER_SLASH))
