"""Batches of sequences whose keys stand in pages, for the tests of attention to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2.attention import Pattern, s2_attention
from s2.attention.reference import token_mask
from tests.attention.checks import call_with


@dataclass(frozen=True)
class PagedCase:
    """`sequences`: (tokens, of which queries). `apart`: each KV head has pages and tables of its own."""

    pattern: Pattern
    sequences: tuple[tuple[int, int], ...]
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    rotation: int = 0
    head_offset: int = 0
    total_kv_heads: int | None = None
    apart: bool = False

    @property
    def how(self) -> dict[str, int | None]:
        return {"rotation": self.rotation, "head_offset": self.head_offset, "total_kv_heads": self.total_kv_heads}

    @property
    def limits(self) -> dict[str, int]:
        lengths, queries = zip(*self.sequences, strict=True)
        return {"max_query_len": max(queries), "max_seq_len": max(lengths)}

    def whole(self, dtype: torch.dtype, seed: int) -> list[Tensor]:
        """q, k, v `[1, N, H, D]` of all sequences, one after the other."""
        generator = torch.Generator().manual_seed(seed)
        tokens = sum(length for length, _ in self.sequences)
        shapes = [(1, tokens, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def seen(self, length: int, queries: int) -> Tensor:
        """Bool `[H, n]`: the blocks that some query sees."""
        block, num_blocks = self.pattern.block_size, -(-length // self.pattern.block_size)
        if not queries:
            return torch.zeros(self.kv_heads, num_blocks, dtype=torch.bool)
        call = call_with(
            self.pattern, self.kv_heads, self.rotation, head_offset=self.head_offset, total=self.total_kv_heads
        )
        tokens = token_mask(call, queries, length, self.kv_heads).any(dim=1)
        return torch.nn.functional.pad(tokens, (0, num_blocks * block - length)).unflatten(1, (-1, block)).any(2)

    def inputs(self, dtype: torch.dtype, device: str, seed: int, *, written: bool = True) -> list:
        """q, k_cache, v_cache, block_table, seq_lens and cu_seqlens_q. A page that no query sees is page 0, of NaN, as
        are tokens that are not there yet; without `written` nor are the new ones."""
        block = self.pattern.block_size
        q, k, v = self.whole(dtype, seed)
        num_blocks = [-(-length // block) for length, _ in self.sequences]
        tables = torch.zeros(self.kv_heads, len(self.sequences), max(num_blocks) + 1, dtype=torch.int32)
        order = torch.randperm(self.kv_heads * sum(num_blocks), generator=torch.Generator().manual_seed(seed)) + 1
        pages, free = torch.full((2, len(order) + 1, block, self.kv_heads, self.head_dim), torch.nan), iter(order)
        pages = pages.to(dtype)
        newest, begin = [], 0
        for b, (length, queries) in enumerate(self.sequences):
            shown = self.seen(length, queries)
            shown = shown if self.apart else shown.any(dim=0).expand_as(shown)
            for j in range(num_blocks[b]):
                shared = next(free)
                for h in range(self.kv_heads):
                    if not shown[h, j]:
                        continue
                    page = next(free) if self.apart and h else shared
                    tables[h, b, j] = page
                    last = min((j + 1) * block, length if written else length - queries)
                    tokens = slice(begin + j * block, begin + max(j * block, last))
                    count = tokens.stop - tokens.start
                    pages[0, page, :count, h], pages[1, page, :count, h] = k[0, tokens, h], v[0, tokens, h]
            newest.append(q[0, begin + length - queries : begin + length])
            begin += length
        lengths, queries = zip(*self.sequences, strict=True)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        cu_seqlens = torch.tensor((0, *queries), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        places: list = [*pages, tables[0]]
        if self.apart:
            places = [[x[:, :, h].contiguous().to(device) for h in range(self.kv_heads)] for x in pages]
            places.append(list(tables.to(device)))
        given = [x if isinstance(x, list) else x.to(device) for x in places]
        return [torch.cat(newest).to(device), *given, seq_lens.to(device), cu_seqlens.to(device)]

    def exact(self, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
        """`s2_attention`'s definition in float64 on values of `dtype`: out `[T, Hq, D]` and lse `[T, Hq]`."""
        q, k, v = (x.double() for x in self.whole(dtype, seed))
        outs, lses, begin = [], [], 0
        for length, queries in self.sequences:
            keys, end = slice(begin, begin + length), begin + length
            if queries:
                out, lse = s2_attention(
                    q[:, end - queries : end], k[:, keys], v[:, keys], self.pattern, return_lse=True,
                    backend="reference", **self.how,
                )  # fmt: skip
                outs.append(out[0])
                lses.append(lse[0].T)
            begin = end
        return torch.cat(outs), torch.cat(lses)
