"""A hybrid (sparse and dense layers) Llama for transformers: its config, its attention, its model.

The file (Apache-2.0) goes into every exported folder, so that it opens without the package it comes from:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Where the package `s2` is installed its kernels attend. Elsewhere `plain_attention` does: the same numbers in plain
torch, slower, in memory that grows with the context, not with its square. All but the attention is transformers' own.

`attention_layout` says which key blocks (of `block_size` tokens) the heads of a layer see: `dense`; `W16`, the last 16;
`L8V16`, the last 8 and every 16th before; `L8V4<64V16`, every 4th up to block distance 64 and every 16th beyond; behind
any of these `+sink2`, the first 2 as well; `2*dense|6*L8V16`, one rule a head. Then, for the layers, `-inter` makes
every second one dense and `+dense0,10-22` those.

Shapes: B batch, S tokens, Sq queries, Skv keys (the queries are the last of them), H heads, Hq and Hkv of queries and
of keys and values, D head dimension.
"""

import copy
import functools
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import logging

try:
    from s2.attention import LayerLayout, s2_attention
except ImportError:
    s2_attention = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

NAME = "s2"  # of the attention among transformers' own ("sdpa", "eager")
# What config.json says. Nobody registers it: where a dense class opens the folder by its own name, it stops.
MARK = "s2_attention"
MOST_SCORES = 1 << 26  # scores that `plain_attention` computes at once
_FAR = 1 << 30  # a block distance that no context reaches


class S2LlamaConfig(LlamaConfig):
    """Llama's keys and ours.

    Attributes:
        attention_layout, block_size: which layer attends how (see above).
        qkv_bias: q, k and v projections have biases, as Qwen2's.
        qk_norm: queries and keys pass an RMSNorm over the head dimension, as Qwen3's.
        rope_by_kind: `rope_parameters` of the layers that are dense and of those that are sparse, by these names, where
            they differ. Read from `rope_parameters` or `rope_scaling` with these two keys, too.
    """

    model_type = "s2_llama"

    attention_layout: str | None = None
    block_size: int = 64
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_by_kind: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        theta = kwargs.get("rope_theta") or (self.rope_parameters or {}).get("rope_theta") or 10000.0
        ropes: list[Any] = [kwargs.get("rope_scaling"), self.rope_parameters]
        for rope in ropes:  # the second is the complete one
            if rope and "sparse" in rope:
                plain = {"rope_type": "default", "rope_theta": theta}
                self.rope_by_kind = {kind: plain | (rope[kind] or {}) for kind in ("dense", "sparse")}
        if self.rope_by_kind:
            kwargs.pop("rope_scaling", None)
            self.rope_parameters, self.rope_theta = dict(self.rope_by_kind["dense"]), theta  # both are saved
        asked = kwargs.pop("attn_implementation", None)
        if asked not in (None, NAME, MARK):
            raise ValueError(_no_other(asked))
        super().__post_init__(**kwargs, attn_implementation=NAME)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if key == "rope_by_kind" and value:
            self.rope_parameters = dict(value["dense"])

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "attn_implementation": MARK}


def _no_other(asked: object) -> str:
    return f"attn_implementation={asked!r} would ignore the attention_layout of this model; leave it out"


# ---------------------------------------------------------------- which blocks a head sees


class Rule(NamedTuple):
    """A head's: the last `local` blocks; `(stride, residue, begin, end)`, of the blocks at distances from `begin` up to
    `end` those whose index leaves `residue`; the first `sinks` blocks."""

    local: int
    levels: tuple[tuple[int, int, int, int], ...]
    sinks: int


_DENSE = Rule(_FAR, (), 0)
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
    one_a_head = ("|" in match[1] or "*" in match[1]) and set(heads) != {_DENSE}
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
        else (_DENSE,) * num_kv_heads
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
    return _DENSE if local >= _FAR else Rule(local, tuple(levels), int(found[5] or 0))


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


# ---------------------------------------------------------------- attention without the package


def plain_attention(q: Tensor, k: Tensor, v: Tensor, rules: tuple[Rule, ...], block_size: int, scale: float) -> Tensor:
    """q `[B, Sq, Hq, D]`, k and v `[B, Skv, Hkv, D]` -> `[B, Sq, Hq, D]`; some queries at a time, also backward."""
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(len(rules) // x.shape[2], 1) for x in (k, v))
    length, keys, group = q.shape[2], k.shape[2], q.shape[1] // len(rules)
    if set(rules) == {_DENSE} and length in (1, keys):
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


# ---------------------------------------------------------------- padding and packed documents


class Batch:
    """Where the tokens of a batch's rows begin and end. It takes the place of a mask on its way to the layers.

    Raises:
        ValueError: a mask that is not of one run of tokens a row.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.starts: list[int] | None = None  # None: no row has padding on its left
        self.ends: list[int] | None = None
        self._borders: list[Tensor | None] = []
        if mask is None:
            return
        if mask.dim() != 2:
            raise ValueError(f"attention_mask of shape {list(mask.shape)} must be [batch, tokens]: 1 token, 0 padding")
        mask = mask.bool()
        column = torch.arange(mask.shape[1], device=mask.device)
        start = mask.int().argmax(dim=1)
        end = start + mask.sum(dim=1)
        one_run = (mask == (column >= start[:, None]) & (column < end[:, None])).all(dim=1)
        starts, self.ends, whole = torch.stack([start, end, one_run]).tolist()
        if not all(whole):
            raise ValueError("attention_mask has padding between tokens; pad on one side, for generation on the left")
        self.starts = starts if any(starts) else None

    def borders(self, position_ids: Tensor | None, rows: int, num_keys: int) -> Tensor | None:
        """Of packed documents, int32 `[n + 1]` over the tokens of all rows; None where each row is one document."""
        if not self._borders:  # the same in all layers
            self._borders = [None if position_ids is None else self._find_borders(position_ids, rows, num_keys)]
        return self._borders[0]

    def _find_borders(self, position_ids: Tensor, rows: int, num_keys: int) -> Tensor | None:
        position_ids = position_ids.expand(rows, -1)
        starts = torch.tensor(self.starts or [0], device=position_ids.device)
        length = position_ids.shape[1]
        if length < num_keys:
            if (position_ids[:, 0] < num_keys - length - starts).any():
                raise ValueError(
                    f"position_ids of fewer tokens than the {num_keys - length} in the cache: padding needs an "
                    f"attention_mask, and packed documents cannot be continued"
                )
            return None
        restart = position_ids[:, 1:] - position_ids[:, :-1] != 1
        if self.ends is not None:
            column = torch.arange(1, length, device=restart.device)
            ends = torch.tensor(self.ends, device=restart.device)
            restart = restart & (column > starts[:, None]) & (column < ends[:, None])
        if not restart.any():
            return None
        if self.starts is not None:
            raise ValueError("position_ids of packed documents with padding on the left; pad them on the right")
        if (position_ids[:, 1:][restart] != 0).any():
            raise ValueError("position_ids must grow by 1 from token to token, or begin again at 0 with a new document")
        begins = F.pad(restart, (1, 0), value=True).flatten().nonzero().flatten()
        return F.pad(begins, (0, 1), value=position_ids.numel()).int()


def batch_mask(
    *, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Tensor | None = None, **_: Any
) -> Batch:
    """What transformers calls for a mask of the attention `NAME`."""
    tokens = int(q_offset) + q_length
    masked = tokens if attention_mask is None else attention_mask.shape[-1]
    if (kv_length, masked) != (tokens, tokens):
        raise ValueError(
            f"{kv_length} keys and an attention_mask of {masked} for {tokens} tokens: the attention {NAME!r} takes a "
            f"cache that grows with the tokens (DynamicCache) and a mask of them all"
        )
    return Batch(attention_mask)


# ---------------------------------------------------------------- attention


def attention_forward(
    module: Any,
    query: Tensor,  # [B, Hq, Sq, D]
    key: Tensor,  # [B, Hkv, Skv, D]
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for the attention `NAME`, of any of its classes whose config has an `attention_layout`.

    Returns:
        `[B, Sq, Hq, D]`, and None for the probabilities, which nobody computes.

    Raises:
        ValueError: an option, a mask or a cache that would change what a layer sees.
    """
    _check(module, key, dropout, kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    batch = attention_mask if isinstance(attention_mask, Batch) else Batch(attention_mask)
    borders = batch.borders(position_ids, q.shape[0], k.shape[1]) if cu_seq_lens_q is None else cu_seq_lens_q
    if borders is not None:
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        return _attend(module, scale, *tokens, borders=borders.int()).view(q.shape), None
    if batch.starts is None:
        return _attend(module, scale, q, k, v), None
    out = q.new_zeros(q.shape)
    for start in set(batch.starts):  # positions and blocks count from a row's first token
        rows = [row for row, other in enumerate(batch.starts) if other == start]
        first = max(0, start - k.shape[1] + q.shape[1])
        out[rows, first:] = _attend(module, scale, q[rows, first:], k[rows, start:], v[rows, start:])
    return out, None


def _check(module: Any, key: Tensor, dropout: float, options: dict[str, Any]) -> None:
    config = module.config
    if None in (getattr(config, "attention_layout", None), getattr(config, "block_size", None)):
        raise ValueError(f"the attention {NAME!r} needs config.attention_layout ('L8V16') and config.block_size")
    if key.shape[1] != config.num_key_value_heads:
        raise ValueError(
            f"{key.shape[1]} KV heads of {config.num_key_value_heads}: tensor parallelism would change which blocks a "
            f"head sees; run the model without it"
        )
    if dropout:
        raise ValueError(f"attention_dropout={dropout} is not supported; set it to 0")
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"{name}={options[name]!r} is not supported by the attention {NAME!r}")


def _sizes(config: Any) -> tuple[str, int, int, int]:
    layout, layers = config.attention_layout, config.num_hidden_layers
    return layout, layers, config.num_attention_heads, config.num_key_value_heads


@functools.lru_cache(maxsize=64)
def _patterns(spec: str, num_layers: int, num_heads: int, num_kv_heads: int, block_size: int) -> list[tuple[Any, int]]:
    """Of each layer, as `s2_attention` takes them: pattern and rotation."""
    layout = LayerLayout.parse(spec, num_layers, block_size)
    layout.check_heads(num_heads, num_kv_heads)
    return list(zip(layout.patterns, layout.distinct_rotations(num_kv_heads), strict=True))


def _attend(module: Any, scale: float, q: Tensor, k: Tensor, v: Tensor, *, borders: Tensor | None = None) -> Tensor:
    """Rows of one document each, `[B, S, H, D]`, or with `borders` documents beside each other, `[T, H, D]`."""
    config, layer = module.config, module.layer_idx
    if s2_attention is not None:
        pattern, rotation = _patterns(*_sizes(config), config.block_size)[layer]
        return s2_attention(q, k, v, pattern, rotation=rotation, softmax_scale=scale, cu_seqlens=borders)
    logger.warning_once("The package s2 is not installed: attention runs in plain torch, which is right and slow.")
    how = layout_rules(*_sizes(config))[layer], config.block_size, scale
    if borders is None:
        return plain_attention(q, k, v, *how)
    lengths = borders.diff().tolist()
    documents = zip(*(x[None].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*document, *how)[0] for document in documents])


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, batch_mask)


# ---------------------------------------------------------------- model


class RopeByKind(nn.ModuleDict):
    """Cosines and sines of the dense and of the sparse layers, `{kind: (cos, sin)}`."""

    def __init__(self, config: S2LlamaConfig) -> None:
        super().__init__()
        for kind, rope in (config.rope_by_kind or {}).items():
            own = copy.deepcopy(config)
            own.rope_parameters = dict(rope)
            self[kind] = LlamaRotaryEmbedding(own)

    def forward(self, x: Tensor, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {kind: rope(x, position_ids) for kind, rope in self.items()}


def _take_rope(kind: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What an attention of a layer of this kind is given, from what all are."""
    return args, kwargs | {"position_embeddings": kwargs["position_embeddings"][kind]}


class S2LlamaForCausalLM(LlamaForCausalLM):
    """Llama (or Qwen2, Qwen3) whose layers attend by `config.attention_layout`."""

    config_class = S2LlamaConfig
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = False
    _can_compile_fullgraph = False

    def __init__(self, config: S2LlamaConfig) -> None:
        if config.attention_layout is None:
            raise ValueError("config.json lacks attention_layout; dense would be a guess")
        if config.qkv_bias and config.qk_norm:
            raise ValueError("qkv_bias and qk_norm are both true; no class of transformers has both")
        by_kind: Any = config.rope_by_kind
        rope: Any = config.rope_parameters
        if by_kind and {**rope, **by_kind["dense"]} != rope:
            raise ValueError(f"rope_parameters={rope} would be ignored; assign rope_by_kind, which is {by_kind}")
        rules = layout_rules(*_sizes(config))
        super().__init__(config)
        made: Any = Qwen2Attention if config.qkv_bias else Qwen3Attention if config.qk_norm else LlamaAttention
        for index, layer in enumerate(self.model.layers):
            if made is not LlamaAttention:
                layer.self_attn = made(config, index)
            if config.rope_by_kind:
                take = functools.partial(_take_rope, "dense" if set(rules[index]) == {_DENSE} else "sparse")
                layer.self_attn.register_forward_pre_hook(take, with_kwargs=True)
        if config.rope_by_kind:
            self.model.rotary_emb = RopeByKind(config)
        self.post_init()

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.config._attn_implementation != NAME:  # somebody has set it since
            raise ValueError(_no_other(self.config._attn_implementation))
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True is not supported: no probabilities are kept")
        return super().forward(*args, **kwargs)
