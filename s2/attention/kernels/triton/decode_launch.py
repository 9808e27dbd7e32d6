"""Host side of the decode kernels: grid, workspace and launches, all from shapes: a captured CUDA graph may be replayed
with other lengths."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .config import (
    FEWEST_DECODE_ROWS,
    LEAST_DECODE_TILES,
    decode_config,
    decode_splits,
    max_decode_rows,
    merge_chunk,
    split_head_dim,
)
from .decode import attention_decode
from .decode_plan import plan_decode, share_words
from .forward import LOG2E

_FEWEST_SEQUENCES = 32  # that a kernel for several is compiled for: smaller batches share it


@dataclass(frozen=True)
class Workspace:
    """What programs of a launch hand over to each other. It serves launches on one stream, one after the other, of any
    shapes that need no more of it.

    Attributes:
        partials: float32, outputs of the programs' rows.
        logs: float32, their log-sum-exps.
        arrivals: int32, zero between launches.
    """

    partials: Tensor
    logs: Tensor
    arrivals: Tensor


@dataclass(frozen=True)
class Grid:
    """Of calls with one shape. `programs` times `stored` rows go through the workspace, if `splits` is above 1.
    `planned` and `constants` are those of the two kernels."""

    programs: int
    splits: int
    stored: int
    pairs: int
    planned: dict[str, int]
    constants: dict[str, int]
    num_warps: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, block: int, splits: int | None = None) -> Grid:
        """`splits`: programs a sequence and KV head, if not the best for the device."""
        return _grid(tuple(q.shape), tuple(k.shape), q.dtype, q.device, block, splits)

    def shares(self, table: Tensor) -> tuple[int, int, int]:
        """Shape of what `run_plan` gives for tables `[H, R, 8]` of this shape."""
        kv_heads, regions = table.shape[:2]
        return self.programs // (kv_heads * self.constants["ROW_TILES"]), kv_heads, share_words(regions)

    def workspace(self, device: torch.device) -> Workspace:
        programs = self.programs if self.splits > 1 else 0
        rows = programs * self.stored
        return Workspace(
            torch.empty(rows * self.constants["D"], dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.zeros(self.pairs if programs else 0, dtype=torch.int32, device=device),
        )


@functools.lru_cache(maxsize=512)
def _grid(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, block: int,
    splits: int | None,
) -> Grid:  # fmt: skip
    batch, tokens, num_heads, head_dim = q_shape
    kv_heads, slots = k_shape[1:3]
    group = num_heads // kv_heads
    capability, processors = (9, 0), 4  # of the interpreter
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability, processors = (properties.major, properties.minor), properties.multi_processor_count
    config = decode_config(head_dim, dtype.itemsize, capability)
    stored = triton.next_power_of_2(group * tokens)
    rows = max(FEWEST_DECODE_ROWS, min(stored, max_decode_rows(head_dim, dtype.itemsize)))
    row_tiles, stored = -(-group * tokens // rows), min(stored, rows)
    pairs = batch * kv_heads * row_tiles
    if splits is None:
        row_bytes = stored * head_dim * 4
        splits = decode_splits(kv_heads * row_tiles, batch, slots, row_bytes, config, processors) if batch else 1
    d0, d1 = split_head_dim(head_dim, dtype.itemsize, capability)
    width = triton.next_power_of_2(head_dim)
    sequences = 0 if splits == 1 else 1 if batch == 1 else max(_FEWEST_SEQUENCES, triton.next_power_of_2(batch))
    shared = {"TOKENS": tokens, "BLOCK": block, "TILE": config.block_n}
    constants = shared | {
        "GROUP": group,
        "D": head_dim,
        "D0": d0,
        "D1": d1,
        "WIDTH": width,
        "ROWS": rows,
        "STORED": stored,
        "ROW_TILES": row_tiles,
        "CHUNK": merge_chunk(stored, width),
        "STAGES": config.num_stages,
        "SEQUENCES": min(sequences, 2),
    }
    planned = shared | {"BATCH": sequences, "LEAST": LEAST_DECODE_TILES}
    return Grid(pairs * splits, splits, stored, pairs, planned, constants, config.warps(rows))


def run_plan(q: Tensor, k: Tensor, table: Tensor, lengths: Tensor, block: int, splits: int | None = None) -> Tensor:
    """What each program of `run_decode` does, int32 `[n, H, words]` for n programs a KV head: of calls with these
    shapes, this table `[H, R, 8]` and these lengths."""
    grid = Grid.of(q, k, block, splits)
    shares = torch.empty(grid.shares(table), dtype=torch.int32, device=q.device)
    if shares.numel():
        plan_decode[shares.shape[:2]](
            shares, table, lengths, q.shape[0], grid.splits, REGIONS=table.shape[1], WORDS=shares.shape[2],
            **grid.planned, num_warps=1 if grid.planned["BATCH"] <= _FEWEST_SEQUENCES else 4,
        )  # fmt: skip
    return shares


def run_decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, block: int, scale: float,
    workspace: Workspace | None = None, splits: int | None = None, shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q `[B, S, Hq, D]`, k/v `[B, H, C, D]`, table `[H, R, 8]` -> out `[B, S, Hq, D]`, lse `[B, S, Hq]`.

    Raises:
        ValueError: the workspace is too small, the shares are of another call, or the head dimension is not supported.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grid = Grid.of(q, k, block, splits)
    if workspace is None:
        workspace = grid.workspace(q.device)
    elif grid.splits > 1 and (
        len(workspace.logs) < grid.programs * grid.stored
        or len(workspace.partials) < grid.programs * grid.stored * q.shape[3]
        or len(workspace.arrivals) < grid.pairs
    ):
        raise ValueError(
            f"the workspace holds {len(workspace.logs)} rows, but q {list(q.shape)} and k {list(k.shape)} need "
            f"{grid.programs * grid.stored} of {q.shape[3]}: make it with decode_workspace for these shapes"
        )
    if shares is None:
        shares = run_plan(q, k, table, lengths, block, splits)
    elif shares.shape != grid.shares(table) or not shares.is_contiguous() or shares.device != q.device:
        raise ValueError(
            f"shares {list(shares.shape)} on {shares.device} must be {list(grid.shares(table))} on {q.device} and "
            "contiguous: make them with decode_shares for these shapes and this table"
        )
    attention_decode[(len(shares), shares.shape[1] * grid.constants["ROW_TILES"])](
        q, k, v, out, lse, shares, workspace.partials, workspace.logs, workspace.arrivals, scale * LOG2E.value,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        REGIONS=table.shape[1], WORDS=shares.shape[2], **grid.constants, num_warps=grid.num_warps,
    )  # fmt: skip
    return out, lse
