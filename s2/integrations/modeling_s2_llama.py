"""A hybrid (sparse and dense layers) Llama for transformers: its config, its attention, its model.

The file (Apache-2.0) goes with `plain_s2_llama.py` into every exported folder, so that it opens without the package:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Where the package `s2` is installed its kernels attend. Elsewhere `plain_attention` does: the same numbers in plain
torch, slower, in memory that grows with the context, not with its square. All but the attention is transformers' own.

Shapes: B batch, S tokens, Sq queries, Skv keys (the queries are the last of them), H heads, Hq and Hkv of queries and
of keys and values, D head dimension.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import logging

from .plain_s2_llama import (
    BLOCK_SIZES,
    DENSE,
    as_autocast_has_it,
    check_rope,
    layout_rules,
    plain_attention,
    plain_documents,
    ropes_by_kind,
)

try:
    from s2.attention import LayerLayout, s2_attention
except ImportError:
    s2_attention = None  # type: ignore[assignment]
try:
    from s2.integrations.kept_layer import LAYER_TYPE
except ImportError:
    LAYER_TYPE = ""

logger = logging.get_logger(__name__)

NAME = "s2"  # of the attention among transformers' own ("sdpa", "eager")
# What config.json says. Nobody registers it: where a dense class opens the folder by its own name, it stops.
MARK = "s2_attention"


@strict
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
        said = {"rope_by_kind": self.rope_by_kind, "rope_scaling": kwargs.get("rope_scaling")}
        outside, complete = kwargs.get("rope_theta"), self.rope_parameters or {}
        if by_kind := ropes_by_kind({**said, "rope_parameters": complete}, outside):
            kwargs.pop("rope_scaling", None)
            self.rope_by_kind, self.rope_parameters = by_kind, dict(by_kind["dense"])
            self.rope_theta = complete.get("rope_theta", 10000.0) if outside is None else outside  # saved beside them
        asked = kwargs.pop("attn_implementation", None)
        if asked not in (None, NAME, MARK):
            raise ValueError(_no_other(asked))
        super().__post_init__(**kwargs, attn_implementation=NAME)
        self._is_made = True

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "rope_by_kind" and value and getattr(self, "_is_made", False):
            theta = getattr(self, "rope_theta", (self.rope_parameters or {}).get("rope_theta"))
            value = ropes_by_kind({key: value}, theta)
            super().__setattr__("rope_parameters", dict(value["dense"]))
        super().__setattr__(key, value)

    @property
    def layer_types(self) -> list[str]:
        """What cache each layer gets: with the package sparse ones keep what later queries see, but for rules of query
        heads that share a KV head. Without it there are no types, and all layers keep everything."""
        try:
            if s2_attention is None or not LAYER_TYPE:
                raise ValueError("the package s2 is not installed")
            rules = layout_rules(*_sizes(self))
        except (ValueError, TypeError) as error:
            raise AttributeError(f"no layer_types: {error}") from error
        plain = [set(heads) == {DENSE} or len(heads) != self.num_key_value_heads for heads in rules]
        return ["full_attention" if is_plain else LAYER_TYPE for is_plain in plain]

    def validate_layer_type(self) -> None:
        """The types follow from the layout."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "_is_made"} | {
            "attn_implementation": MARK
        }


def _no_other(asked: object) -> str:
    return f"attn_implementation={asked!r} would ignore the attention_layout of this model; leave it out"


# ---------------------------------------------------------------- padding and packed documents


class Batch:
    """Where the tokens of a batch's rows are. It takes the place of a mask on its way to the layers.

    Attributes:
        starts, ends: of each row's run of tokens; `starts` is None where no row has padding on its left. Of a row
            without a token (yet) both are the number of columns.
        unlike: what transformers asked for that no pattern is, for the layer that is given this.
        places: of each row's tokens, int64 `[n]`; None where each row is one run.
        memo: what the layers of one forward share.

    Raises:
        ValueError: a mask of other than two dimensions.
    """

    def __init__(self, mask: Tensor | None = None, unlike: str = "") -> None:
        self.unlike = unlike
        self.starts: list[int] | None = None
        self.ends: list[int] | None = None
        self.places: list[Tensor] | None = None
        self.memo: dict[Any, Any] = {}
        self._borders: list[Tensor | None] = []
        if mask is None:
            return
        if mask.dim() != 2:
            raise ValueError(f"attention_mask of shape {list(mask.shape)} must be [batch, tokens]: 1 token, 0 padding")
        mask = mask.bool()
        column = torch.arange(mask.shape[1], device=mask.device)
        start = torch.where(mask, column, mask.shape[1]).amin(dim=1)
        end = start + mask.sum(dim=1)
        one_run = (mask == (column >= start[:, None]) & (column < end[:, None])).all(dim=1)
        starts, self.ends, whole = torch.stack([start, end, one_run]).tolist()
        if not all(whole):  # as transformers infers a mask where the pad token is in the text
            self.places = [row.nonzero().flatten() for row in mask]
            return
        self.starts = starts if any(starts) else None

    def is_padded_left_alone(self, num_keys: int) -> bool:
        """Whether the tokens of every row, if any, are one run up to the end."""
        return self.places is None and (self.ends is None or set(self.ends) == {num_keys})

    def has_padding(self, num_keys: int) -> bool:
        return self.starts is not None or not self.is_padded_left_alone(num_keys)

    def borders(self, position_ids: Tensor | None, rows: int, num_keys: int) -> Tensor | None:
        """Of packed documents, int32 `[n + 1]` over the tokens of all rows; None where each row is one document."""
        if not self._borders:  # the same in all layers
            self._borders = [None if position_ids is None else self._find_borders(position_ids, rows, num_keys)]
        return self._borders[0]

    def _find_borders(self, position_ids: Tensor, rows: int, num_keys: int) -> Tensor | None:
        position_ids = position_ids.expand(rows, -1)
        if self.places is not None:
            self._check_places(self.places, position_ids, num_keys)
            return None
        starts = torch.tensor(self.starts or [0], device=position_ids.device)
        before = num_keys - position_ids.shape[1]
        restart = position_ids[:, 1:] - position_ids[:, :-1] != 1
        if self.ends is not None:
            column = torch.arange(before + 1, num_keys, device=restart.device)
            ends = torch.tensor(self.ends, device=restart.device)
            restart = restart & (column > starts[:, None]) & (column < ends[:, None])
        if before:
            if (position_ids[:, 0] < before - starts).any():
                raise ValueError(
                    f"position_ids of fewer tokens than the {before} in the cache: padding needs an attention_mask, "
                    f"and packed documents cannot be continued"
                )
            if restart.any():
                raise ValueError(
                    f"position_ids must grow by 1 from token to token behind the {before} in the cache: packed "
                    f"documents cannot follow there"
                )
            return None
        if not restart.any():
            return None
        if any(0 < start < end for start, end in zip(self.starts or (), self.ends or (), strict=False)):
            raise ValueError("position_ids of packed documents with padding on the left; pad them on the right")
        if (position_ids[:, 1:][restart] != 0).any():
            raise ValueError("position_ids must grow by 1 from token to token, or begin again at 0 with a new document")
        begins = F.pad(restart, (1, 0), value=True).flatten().nonzero().flatten()
        return F.pad(begins, (0, 1), value=position_ids.numel()).int()

    def _check_places(self, places: list[Tensor], position_ids: Tensor, num_keys: int) -> None:
        before = num_keys - position_ids.shape[1]
        for row, place in enumerate(places):
            new = place >= before
            positions = position_ids[row, place[new] - before]
            if (positions[:1] < (~new).sum()).any() or (positions.diff() < 1).any():
                raise ValueError(
                    "position_ids of packed documents with padding between tokens; pad on the right of them all"
                )


def _joined(function: Callable) -> list[Callable]:
    """The mask functions that transformers' `and_masks` has joined, or the one that it is."""
    if getattr(function, "__name__", "") != "and_mask":
        return [function]
    (inner,) = function.__closure__ or ()
    return [part for each in inner.cell_contents for part in _joined(each)]


def batch_mask(
    *, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Tensor | None = None,
    mask_function: Callable | None = None, **_: Any,
) -> Batch:  # fmt: skip
    """What transformers calls for a mask of the attention `NAME`: once for each kind of layer that a class may have, so
    one that is not causal is refused where a layer takes it (`Batch.unlike`)."""
    tokens = int(q_offset) + q_length
    masked = tokens if attention_mask is None else attention_mask.shape[-1]
    if (kv_length, masked) != (tokens, tokens):
        raise ValueError(
            f"{kv_length} keys and an attention_mask of {masked} for {tokens} tokens: the attention {NAME!r} takes a "
            f"cache that grows with the tokens (DynamicCache) and a mask of them all"
        )
    parts = [] if mask_function is None else _joined(mask_function)
    names = [getattr(part, "__qualname__", repr(part)).split(".")[0] for part in parts]
    return Batch(attention_mask, ", ".join(name for name in names if name not in _CAUSAL))


# Of transformers' mask functions those that a pattern is within; documents are found in `position_ids` again
_CAUSAL = ("causal_mask_function", "packed_sequence_mask_function")


# ---------------------------------------------------------------- attention


def attention_forward(
    module: Any,
    query: Tensor,  # [B, Hq, Sq, D]
    key: Any,  # [B, Hkv, Skv, D]; of a cache layer that drops keys the new ones, in a `kept_layer.Arriving`
    value: Any,
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
    kept = None if isinstance(key, Tensor) else key.layer
    if kept is not None:
        kept.received()
        key, value = key.states, value.states
    _check(module, key, dropout, kwargs)
    query, key, value = (as_autocast_has_it(x) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    batch = attention_mask if isinstance(attention_mask, Batch) else Batch(attention_mask)
    num_keys = k.shape[1] + (0 if kept is None else kept.seen)
    if batch.unlike:
        raise ValueError(
            f"the attention {NAME!r} is causal, and this model's mask is not of that alone: {batch.unlike}"
        )
    if cu_seq_lens_q is not None and batch.has_padding(num_keys):
        raise ValueError("an attention_mask with padding beside cu_seq_lens_q; leave it out, the borders say it all")
    borders = batch.borders(position_ids, q.shape[0], num_keys) if cu_seq_lens_q is None else cu_seq_lens_q
    if kept is not None:
        gets_gradients = torch.is_grad_enabled() and k.requires_grad  # through the cache, from tokens to come
        if borders is None and batch.is_padded_left_alone(num_keys) and not (kept.is_empty and gets_gradients):
            pattern, rotation = _patterns(*_sizes_of(module), module.config.block_size)[module.layer_idx]
            out = kept.attend(q, k, v, pattern, rotation, scale=scale, starts=batch.starts, memo=batch.memo)
            return out, None
        k, v = (x.transpose(1, 2) for x in kept.keep_all(key, value))
    if borders is not None:
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        return _attend(module, scale, *tokens, borders=borders.int()).view(q.shape), None
    if batch.starts is None and batch.places is None:
        return _attend(module, scale, q, k, v), None
    out = q.new_zeros(q.shape)
    if batch.places is not None:  # padding is left out, and blocks count what remains
        for row, place in enumerate(batch.places):
            new = place[place >= k.shape[1] - q.shape[1]] - k.shape[1] + q.shape[1]
            if len(new):
                out[row, new] = _attend(module, scale, q[row, new][None], k[row, place][None], v[row, place][None])[0]
        return out, None
    assert batch.starts is not None
    for start in set(batch.starts) - {num_keys}:  # positions and blocks count from a row's first token
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
    if options.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(f"is_causal=False is not supported by the attention {NAME!r}")
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"{name}={options[name]!r} is not supported by the attention {NAME!r}")


def _sizes(config: Any) -> tuple[str, int, int, int]:
    layout, layers = config.attention_layout, config.num_hidden_layers
    return layout, layers, config.num_attention_heads, config.num_key_value_heads


def _sizes_of(module: Any) -> tuple[str, int, int, int]:
    """`_sizes` of the model that this attention was made for; early exit has `config` say fewer layers for a while."""
    layout, layers, heads, kv_heads = _sizes(module.config)
    return layout, getattr(module, "num_layers", layers), heads, kv_heads


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
        pattern, rotation = _patterns(*_sizes_of(module), config.block_size)[layer]
        return s2_attention(q, k, v, pattern, rotation=rotation, softmax_scale=scale, cu_seqlens=borders)
    logger.warning_once("The package s2 is not installed: attention runs in plain torch, which is right and slow.")
    how = layout_rules(*_sizes_of(module))[layer], config.block_size, scale
    return plain_attention(q, k, v, *how) if borders is None else plain_documents(q, k, v, borders, *how)


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


class S2LlamaModel(LlamaModel):
    """Llama (or Qwen2, Qwen3) without a head, whose layers attend by `config.attention_layout`."""

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
        for kind, each in (by_kind or {"": rope}).items():
            check_rope(each, f"rope_by_kind.{kind}" if kind else "rope_parameters")
        rules = layout_rules(*_sizes(config))
        if config.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size={config.block_size!r} is not supported; use one of {BLOCK_SIZES}")
        super().__init__(config)
        made: Any = Qwen2Attention if config.qkv_bias else Qwen3Attention if config.qk_norm else LlamaAttention
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            if made is not LlamaAttention:
                layer.self_attn = made(config, index)
            layer.self_attn.num_layers = len(rules)
            if config.rope_by_kind:
                take = functools.partial(_take_rope, "dense" if set(rules[index]) == {DENSE} else "sparse")
                layer.self_attn.register_forward_pre_hook(take, with_kwargs=True)
        if config.rope_by_kind:
            self.rotary_emb = RopeByKind(config)  # type: ignore[assignment]
        self.post_init()

    @functools.wraps(LlamaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.config._attn_implementation != NAME:  # somebody has set it since
            raise ValueError(_no_other(self.config._attn_implementation))
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True is not supported: no probabilities are kept")
        return super().forward(*args, **kwargs)


class S2LlamaForCausalLM(LlamaForCausalLM):
    """`S2LlamaModel` and a head of next tokens."""

    config_class = S2LlamaConfig
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = False
    _can_compile_fullgraph = False

    def __init__(self, config: S2LlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # Llama's own would draw weights of another model first
        self.model = S2LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
