"""Weights of our model, which are Hugging Face Llama's (Qwen2's, Qwen3's), as `GPTModel` has them, and back.

Megatron keeps Q, K and V in one matrix, by KV head: its query heads, its key head, its value head; gate and up
projection of the MLP in another, one above the other. Its norms have other names in Transformer Engine's layers.

Shapes: V vocabulary, E hidden size, H query heads, G KV heads, D head dimension, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from s2.model import ModelConfig

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_EXTRA = "_extra_state"


@dataclass(frozen=True)
class _Entry:
    """A tensor of Megatron and those of ours that it is made of.

    Attributes:
        name: in `GPTModel`'s state dict.
        ours: names in our state dict.
        shapes: theirs.
        split: the dimension that tensor-parallel ranks divide, None where each has all.
        groups: each of ours is cut into so many along dimension 0, and the pieces go in turn.
        fused: the name in Transformer Engine's layers, where it is another.
        apart: ranks divide each of ours by itself.
    """

    name: str
    ours: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: int | None = None
    groups: int = 1
    fused: str | None = None
    apart: bool = False

    def join(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)

    def part(self, whole: Tensor) -> list[Tensor]:
        if len(self.ours) == 1:
            return [whole]
        rows = [shape[0] // self.groups for shape in self.shapes]
        return [x.flatten(0, 1) for x in whole.unflatten(0, (self.groups, -1)).split(rows, 1)]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]


def to_megatron(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    vocab_size: int | None = None,
    tp_rank: int = 0,
    tp_size: int = 1,
    use_transformer_engine: bool = False,
) -> dict[str, Tensor]:
    """For `GPTModel.load_state_dict` of a model in one pipeline stage (others: save that model as a distributed
    checkpoint, which Megatron loads into any partition). With Transformer Engine pass `strict=False`: its modules keep
    entries `_extra_state` beside the weights.

    Args:
        state: of a `Transformer`, or `s2.model.hf.load_weights` of a Hugging Face folder.
        config: the model's.
        vocab_size: rows that Megatron's embedding is padded to; those added are 0.
        tp_rank, tp_size: the tensor-parallel rank that the weights are for.
        use_transformer_engine: the names in its layers.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; sizes that the ranks cannot divide; no such
            rank, or a number of another type.
    """
    rows = config.vocab_size if vocab_size is None else vocab_size
    for name, value in (("vocab_size", rows), ("tp_rank", tp_rank), ("tp_size", tp_size)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name}={value!r} must be a whole number")
    if tp_size < 1:
        raise ValueError(f"tp_size={tp_size} must be at least 1")
    if rows < config.vocab_size:
        raise ValueError(f"vocab_size={rows} must be at least the model's {config.vocab_size}")
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank={tp_rank} must be one of the {tp_size} ranks of tp_size, from 0 on")
    left = dict(state)
    if config.tie_word_embeddings:
        head, table = left.pop("lm_head.weight", None), left.get("model.embed_tokens.weight")
        if head is not None and table is not None and head is not table and not torch.equal(head, table):
            raise ValueError("lm_head.weight is not model.embed_tokens.weight, but the config ties them")
    made = {}
    for entry in _entries(config):
        whole = entry.join([_take(left, *each) for each in zip(entry.ours, entry.shapes, strict=True)])
        if entry.name in (_EMBEDDING, _HEAD):
            whole = torch.cat([whole, whole.new_zeros(rows - len(whole), *whole.shape[1:])])
        name = entry.fused if use_transformer_engine and entry.fused else entry.name
        made[name] = _shard(whole, entry, tp_rank, tp_size)
    if left:
        raise ValueError(f"unexpected tensors {sorted(left)[:4]}; the config has no place for them")
    return made


def from_megatron(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """For `Transformer.load_state_dict` and `s2.model.hf.save_pretrained`.

    Args:
        state: of a whole `GPTModel` (one tensor-parallel rank, one pipeline stage), local or Transformer Engine's; its
            entries `_extra_state` are left out, as are rows that pad the vocabulary.
        config: ours of the same sizes.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    left = {name: x for name, x in state.items() if not name.endswith(_EXTRA)}
    if config.tie_word_embeddings:
        head, table = left.pop(_HEAD, None), left.get(_EMBEDDING)
        if head is not None and table is not None and not torch.equal(head, table):
            raise ValueError(f"{_HEAD} is not {_EMBEDDING}, but the config ties them")
    made: dict[str, Tensor] = {}
    for entry in _entries(config):
        name = entry.fused if entry.fused in left else entry.name
        if entry.name in (_EMBEDDING, _HEAD) and name in left and len(left[name]) > config.vocab_size:
            left[name] = left[name][: config.vocab_size]
        made |= zip(entry.ours, entry.part(_take(left, name, entry.shape)), strict=True)
    if left:
        raise ValueError(f"unexpected tensors {sorted(left)[:4]}; the config has no place for them")
    if config.tie_word_embeddings:
        made["lm_head.weight"] = made["model.embed_tokens.weight"]
    return made


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, G, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    yield _Entry(_EMBEDDING, ("model.embed_tokens.weight",), ((V, E),), split=0)
    for i in range(config.num_hidden_layers):
        theirs, ours = f"decoder.layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attention", f"{theirs}.mlp"
        for norm, name, fused in (
            ("input_layernorm", "input_layernorm", f"{attention}.linear_qkv"),
            ("post_attention_layernorm", "pre_mlp_layernorm", f"{mlp}.linear_fc1"),
        ):
            yield _Entry(
                f"{theirs}.{name}.weight", (f"{ours}.{norm}.weight",), ((E,),), fused=f"{fused}.layer_norm_weight"
            )
        for kind, width in [("weight", (E,)), *([("bias", ())] if config.qkv_bias else [])]:
            yield _Entry(
                f"{attention}.linear_qkv.{kind}",
                tuple(f"{ours}.self_attn.{x}_proj.{kind}" for x in "qkv"),
                ((H * D, *width), (G * D, *width), (G * D, *width)),
                split=0,
                groups=G,
            )
        for x in "qk" if config.qk_norm else "":
            yield _Entry(f"{attention}.{x}_layernorm.weight", (f"{ours}.self_attn.{x}_norm.weight",), ((D,),))
        yield _Entry(f"{attention}.linear_proj.weight", (f"{ours}.self_attn.o_proj.weight",), ((E, H * D),), split=1)
        gates = (f"{ours}.mlp.gate_proj.weight", f"{ours}.mlp.up_proj.weight")
        yield _Entry(f"{mlp}.linear_fc1.weight", gates, ((F, E), (F, E)), split=0, apart=True)
        yield _Entry(f"{mlp}.linear_fc2.weight", (f"{ours}.mlp.down_proj.weight",), ((E, F),), split=1)
    yield _Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((E,),))
    if not config.tie_word_embeddings:
        yield _Entry(_HEAD, ("lm_head.weight",), ((V, E),), split=0)


def _take(left: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in left:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} is missing")
    tensor = left.pop(name)
    if tensor.shape != shape:
        raise ValueError(f"tensor {name!r} has shape {list(tensor.shape)}, but the config asks for {list(shape)}")
    return tensor


def _shard(whole: Tensor, entry: _Entry, rank: int, ranks: int) -> Tensor:
    if entry.split is None or ranks == 1:
        return whole
    parts = entry.part(whole) if entry.apart else [whole]
    for part in parts:
        if (width := part.shape[entry.split]) % ranks:
            raise ValueError(f"tensor {entry.name!r}: {width} rows or columns do not divide by {ranks} ranks")
    return torch.cat([part.chunk(ranks, entry.split)[rank] for part in parts])
