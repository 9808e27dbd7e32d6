"""Which key blocks the heads of a model see, and attention to them in plain torch.

The file (Apache-2.0) goes with `modeling_s2_llama.py` into every exported folder.

`attention_layout` says which key blocks (of `block_size` tokens) the heads of a layer see: `dense`; `W16`, the last 16;
`L8V16`, the last 8 and every 16th before; `L8V4<64V16`, every 4th up to block distance 64 and every 16th beyond; behind
any of these `+sink2`, the first 2 as well; `2*dense|6*L8V16`, one rule a head. Then, for the layers, `-inter` makes
every second one dense and `+dense0,10-22` those.

Shapes: B batch, Sq queries, Skv keys (the queries are the last of them), H heads, Hq and Hkv of queries and of keys and
values, D head dimension.
"""

import functools
import itertools
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_SIZES = (16, 32, 64, 128, 256)  # as with the package
MOST_SCORES = 1 << 26  # scores that `plain_attention` computes at once
_FAR = 1 << 30  # a block distance that no context reaches


class Rule(NamedTuple):
    """A head's: the last `local` blocks; `(stride, residue, begin, end)`, of the blocks at distances from `begin` up to
    `end` those whose index leaves `residue`; the first `sinks` blocks."""

    local: int
    levels: tuple[tuple[int, int, int, int], ...]
    sinks: int


DENSE = Rule(_FAR, (), 0)
_LAYOUT = re.compile(r"(.+?)(-inter)?(?:\+dense((?:\d+(?:-\d+)?,)*\d+(?:-\d+)?))?")
_HEADS = re.compile(r"(?:(\d+)\*)?(?:dense|W(\d+)|L(\d+)((?:V\d+(?:<\d+)?)+))(?:\+sink(\d+))?")


@functools.lru_cache(maxsize=64)
def layout_rules(spec: str, num_layers: int, num_heads: int, num_kv_heads: int) -> tuple[tuple[Rule, ...], ...]:
    """The rules of each layer's KV heads, or of its query heads where `spec` has one for each.

    Raises:
        ValueError: `spec` is no layout, or not one of a model of these sizes.
    """
    match = _LAYOUT.fullmatch(spec)
    if match is None:
        raise ValueError(f"attention_layout={spec!r} is not a layout")
    dense = set(range(1, num_layers, 2)) if match[2] else set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", match[3] or ""):
        layers = range(int(first), int(last or first) + 1)
        if not layers or layers[-1] >= num_layers:
            raise ValueError(f"attention_layout={spec!r}: layers {first}-{last or first} are not among {num_layers}")
        dense |= set(layers)
    heads: list[Rule] = []
    for part in match[1].split("|"):
        found = _HEADS.fullmatch(part)
        if found is None or int(found[1] or 1) < 1:
            raise ValueError(f"attention_layout={spec!r} is not a layout: {part!r} is no rule")
        heads += [_read(spec, found)] * int(found[1] or 1)
    one_a_head = ("|" in match[1] or "*" in match[1]) and set(heads) != {DENSE}
    if one_a_head and len(heads) not in (num_heads, num_kv_heads):
        raise ValueError(
            f"attention_layout={spec!r} has rules for {len(heads)} heads, but the model has {num_kv_heads} KV heads "
            f"and {num_heads} query heads"
        )
    heads = heads if one_a_head else heads[:1] * num_kv_heads
    sparse = [layer for layer in range(num_layers) if layer not in dense]
    turns = {layer: turn for turn, layer in enumerate(sparse)}  # residues turn from one sparse layer to the next
    return tuple(
        tuple(_turned(rule, head, len(heads), turns[layer]) for head, rule in enumerate(heads))
        if layer in turns
        else (DENSE,) * num_kv_heads
        for layer in range(num_layers)
    )


def _read(spec: str, found: re.Match[str]) -> Rule:
    local = begin = int(found[2] or found[3] or _FAR)
    levels: list[tuple[int, int, int, int]] = []
    for number, bound in re.findall(r"V(\d+)(?:<(\d+))?", found[4] or ""):
        stride, end = int(number), int(bound or _FAR)
        if stride < 1 or end <= begin or (stride == 1 and levels):
            raise ValueError(f"attention_layout={spec!r}: V{number} to distance {end} cannot follow distance {begin}")
        if stride == 1:
            local = end
        else:
            levels.append((stride, 0, begin, end))
        begin = end
    if local < 1:
        raise ValueError(f"attention_layout={spec!r}: a window must have at least 1 block")
    return DENSE if local >= _FAR else Rule(local, tuple(levels), int(found[5] or 0))


def _turned(rule: Rule, head: int, num_heads: int, turn: int) -> Rule:
    """With the residues of one head: all of them among the heads where there are enough, else over several layers."""
    if not rule.levels:
        return rule
    widest = rule.levels[-1][0]
    residue = head * widest // num_heads if num_heads >= widest else (head + turn * num_heads) % widest
    levels = tuple((stride, residue % stride, begin, end) for stride, _, begin, end in rule.levels)
    return rule._replace(levels=levels)


def block_mask(rules: tuple[Rule, ...], query: Tensor, key: Tensor) -> Tensor:
    """Bool `[H, nq, nk]`: which of the key blocks `key` `[nk]` the query blocks `query` `[nq]` see."""
    distance = query[:, None] - key
    seen = {}
    for rule in set(rules):
        keep = (distance < rule.local) | (key < rule.sinks)
        for stride, residue, begin, end in rule.levels:
            keep = keep | ((distance >= begin) & (distance < end) & (key % stride == residue))
        seen[rule] = keep & (distance >= 0)
    return torch.stack([seen[rule] for rule in rules])


def plain_attention(q: Tensor, k: Tensor, v: Tensor, rules: tuple[Rule, ...], block_size: int, scale: float) -> Tensor:
    """q `[B, Sq, Hq, D]`, k and v `[B, Skv, Hkv, D]` -> `[B, Sq, Hq, D]`; some queries at a time, also backward."""
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(len(rules) // x.shape[2], 1) for x in (k, v))
    length, keys, group = q.shape[2], k.shape[2], q.shape[1] // len(rules)
    if set(rules) == {DENSE} and length in (1, keys):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, scale=scale).transpose(1, 2)
    k, v = (F.pad(x, (0, 0, 0, -keys % block_size)).unflatten(2, (-1, block_size)) for x in (k, v))
    step = max(1, MOST_SCORES // (q.shape[0] * q.shape[1] * keys))
    pieces = []
    for begin in range(0, length, step):
        inputs = q[:, :, begin : begin + step], k, v, rules, keys - length + begin, scale
        if torch.is_grad_enabled() and length > step:
            pieces.append(checkpoint(_attend_piece, *inputs, use_reentrant=False))
        else:
            pieces.append(_attend_piece(*inputs))
    return torch.cat(pieces, dim=2).transpose(1, 2)


def plain_documents(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, rules: tuple[Rule, ...], block_size: int, scale: float
) -> Tensor:
    """Documents beside each other, `[T, H, D]`, from one of the `borders` `[n + 1]` to the next; zeros behind the last.

    Raises:
        ValueError: borders that do not grow from 0, or leave the tokens.
    """
    ends = borders.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > len(q):
        raise ValueError(f"the borders of documents must grow from 0 to at most {len(q)} tokens, got {ends!s:.80}")
    how = rules, block_size, scale
    documents = [slice(*pair) for pair in itertools.pairwise(ends) if pair[0] < pair[1]]
    pieces = [plain_attention(q[None, own], k[None, own], v[None, own], *how)[0] for own in documents]
    return torch.cat([*pieces, torch.zeros_like(q[ends[-1] :])])


def as_autocast_has_it(x: Tensor) -> Tensor:
    """As torch's own attention casts it. RoPE leaves queries and keys in the dtype of the weights."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _attend_piece(q: Tensor, k: Tensor, v: Tensor, rules: tuple[Rule, ...], first: int, scale: float) -> Tensor:
    """Queries `[B, Hq, n, D]` from position `first` on, and of blocks of keys `[B, H, blocks, size, D]` those that any
    of them sees; H heads have a rule."""
    size, group = k.shape[3], q.shape[1] // len(rules)
    query = torch.arange(first, first + q.shape[2], device=q.device)
    block = torch.arange((first + q.shape[2] - 1) // size + 1, device=q.device)
    seen = block_mask(rules, block[first // size :], block)  # [H, nq, nk]
    used = seen.any(dim=1)
    chosen = used.int().sort(dim=1, descending=True, stable=True).indices[:, : int(used.sum(dim=1).max())]
    k, v = (x[:, torch.arange(len(rules))[:, None], chosen].flatten(2, 3) for x in (k, v))
    key = (chosen[..., None] * size + torch.arange(size, device=q.device)).flatten(1)
    seen = seen.gather(2, chosen[:, None].expand(-1, seen.shape[1], -1)).repeat_interleave(size, dim=2)
    mask = seen[:, query // size - first // size] & (key[:, None] <= query[:, None])
    k, v, mask = (x.repeat_interleave(group, dim=-3) for x in (k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=scale)
