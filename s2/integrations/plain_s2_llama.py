"""Which key blocks the heads of a model see, attention to them in plain torch, and how layers turn by their kind.

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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MOST_LAYERS, MOST_HEADS = 10_000, 1 << 16  # as with the package; a layout is written out for as many
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
    if not 1 <= num_layers <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={num_layers} must be a whole number from 1 to {MOST_LAYERS}")
    dense = set(range(1, num_layers, 2)) if match[2] else set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", match[3] or ""):
        layers = range(int(first), int(last or first) + 1)
        if not layers or layers[-1] >= num_layers:
            raise ValueError(f"attention_layout={spec!r}: layers {first}-{last or first} are not among {num_layers}")
        dense |= set(layers)
    heads: list[Rule] = []
    for part in match[1].split("|"):
        found = _HEADS.fullmatch(part)
        if found is None or not 1 <= int(found[1] or 1) <= MOST_HEADS:
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


# ---------------------------------------------------------------- rotation

KINDS = ("dense", "sparse")
MOST = 1e15  # of a number in a rope, as with the package
_LENGTH = "original_max_position_embeddings"  # where it is left out, transformers takes max_position_embeddings
ROPES: dict[str, tuple[set[str], set[str]]] = {  # by rope_type the keys that it needs, and those that it may have
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_LENGTH}),
    "yarn": (
        {"factor"},
        {_LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def ropes_by_kind(said: dict[str, Any], theta: float | None) -> dict[str, dict[str, Any]]:
    """The complete ropes of dense and of sparse layers; empty where all layers turn alike.

    Args:
        said: of config.json the `rope_by_kind`, `rope_scaling` and `rope_parameters`, as far as they are there.
        theta: the `rope_theta` beside them.

    Raises:
        ValueError: they are no mappings, lack a kind, or do not say the same.
    """
    said = {key: rope for key, rope in said.items() if rope}
    for key, rope in said.items():
        if not isinstance(rope, dict):
            raise ValueError(f"{key}={rope!r} must be null or a mapping with a rope_type")
        for kind, each in rope.items():
            if isinstance(each, dict) and kind not in KINDS:  # transformers may look for kinds of its own beside it
                raise ValueError(f"{key}.{kind}={each!r} is not supported; kinds of layers are dense and sparse")
    own = [key for key, rope in said.items() if key == "rope_by_kind" or not rope.keys().isdisjoint(KINDS)]
    for key in own:
        if said[key].keys() != set(KINDS):
            raise ValueError(f"{key} by kind of layer has the keys {sorted(said[key])}, must have dense and sparse")
        for kind, rope in said[key].items():
            if not isinstance(rope, dict | None):
                raise ValueError(f"{key}.{kind}={rope!r} must be null or a mapping with a rope_type")
    if "rope_parameters" in own and "rope_by_kind" not in own:
        own = list(said)  # a `rope_scaling` of all layers counts, too
    ropes = {kind: _rope_of(kind, {key: said[key] for key in own}, theta) for kind in KINDS} if own else {}
    alike = {} if "rope_parameters" in own else said.get("rope_parameters", {})  # as the dense layers' is saved, too
    if "rope_by_kind" in own and alike and {**alike, **ropes["dense"]} != alike:
        raise ValueError(
            f"rope_parameters={alike} is not rope_by_kind.dense, {ropes['dense']}; change both or remove one"
        )
    return ropes


def _rope_of(kind: str, said: dict[str, Any], theta: float | None) -> dict[str, Any]:
    """The rope of a kind of layer, which all mappings have to say alike."""
    first, *_, last = [*said, *said]
    ropes = {key: {"rope_type": "default", **(rope.get(kind, rope) or {})} for key, rope in said.items()}
    ropes[first].setdefault("rope_theta", ropes[last].get("rope_theta", 10000.0) if theta is None else theta)
    for key, rope in ropes.items():
        rope.setdefault("rope_theta", ropes[first]["rope_theta"])
        if rope != ropes[first]:
            raise ValueError(
                f"rope_theta and {first} say {ropes[first]} of the {kind} layers, {key}.{kind} {rope}; change both or "
                f"remove one"
            )
    return ropes[last]


def check_rope(rope: Any, key: str) -> None:
    """Raises ValueError, naming the key and its value, for a rope of which something would be ignored or fail late."""
    if not isinstance(rope, dict):
        raise ValueError(f"{key}={rope!r} must be a mapping with a rope_type")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        raise ValueError(f"{key}.rope_type={kind!r} is not supported; use one of {list(ROPES)}")
    needed, more = ROPES[kind]
    if lacking := sorted(name for name in needed if rope.get(name) is None):
        raise ValueError(f"{key} of type {kind!r} lacks {lacking}")
    for name, value in rope.items():
        if name in ("rope_type", "type") or value is None:
            continue
        if name not in {*needed, *more, "rope_theta", "partial_rotary_factor"}:
            raise ValueError(f"{key}.{name}={value!r} is not supported in a rope of type {kind!r}")
        if name == "partial_rotary_factor" and value != 1:
            raise ValueError(f"{key}.{name}={value!r} must be 1.0: all dimensions of a head are rotated")
        if name == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"{key}.{name}={value!r} must be true or false")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
            raise ValueError(f"{key}.{name}={value!r} must be a positive number of at most {MOST:.0e}")
