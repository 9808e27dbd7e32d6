"""What a model is: the Hugging Face Llama keys plus `attention_layout` and `block_size`.

`ModelConfig` is the one description of a network. Recipes write it as YAML, checkpoints as `config.json`;
everything else (layer patterns, parameter counts, FLOPs, memory) is derived from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from s2.attention import LayerLayout
from s2.files import read_json
from s2.integrations import HF_MODELING
from s2.settings import Check, Count, Settings, UnknownKeyError, Weight, read

from .rope import KINDS, require_positive, rope_of_kind, scales_by_kind, validate_rope_scaling


class _Family(NamedTuple):
    """A model_type of transformers that this network can be."""

    architecture: str
    parts: dict[str, bool]  # keys of ours that its config.json does not say, because its layers always have them so
    defaults: dict[str, Any]  # what transformers assumes for a key that config.json leaves out, where we do not


_LLAMA = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
_MISTRAL = _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "max_position_embeddings": 32768}
_PLAIN = {"qkv_bias": False, "qk_norm": False}
_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", _PLAIN, _LLAMA),
    "qwen2": _Family("Qwen2ForCausalLM", _PLAIN | {"qkv_bias": True}, _QWEN),
    "qwen3": _Family("Qwen3ForCausalLM", _PLAIN | {"qk_norm": True}, _QWEN | {"head_dim": 128}),
    "mistral": _Family("MistralForCausalLM", _PLAIN, _MISTRAL),
}
_WINDOW = 4096  # tokens, where a Mistral or Qwen config.json with a window does not say how wide
_THETA = 10000.0  # where a config.json does not say it
_HF_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# A sparse model has a type of its own, so that no library opens it as a dense Llama without a word.
_SPARSE_TYPE = "s2_llama"
_AUTO_MAP = {  # classes in the modeling file of the folder, for those who trust it
    "AutoConfig": f"{HF_MODELING.stem}.S2LlamaConfig",
    "AutoModel": f"{HF_MODELING.stem}.S2LlamaModel",
    "AutoModelForCausalLM": f"{HF_MODELING.stem}.S2LlamaForCausalLM",
}
# Where a class of transformers is called by name in spite of that, it refuses an attention that nobody has registered.
_SPARSE_ATTENTION = "s2_attention"
_HF_FIXED: dict[str, tuple[Any, str]] = {  # key -> what we implement, and why nothing else
    "hidden_act": ("silu", "the MLP is SwiGLU"),
    "attention_bias": (False, "the output projection has no bias (those of q, k and v may: model_type 'qwen2')"),
    "mlp_bias": (False, "projections of the MLP have no bias"),
    "attention_dropout": (0.0, "attention has no dropout"),
    "partial_rotary_factor": (1.0, "all dimensions of a head are rotated"),
    "quantization_config": (None, "quantised weights cannot be trained here"),
}


def _up_to(most: int) -> Check:
    return Check(f"a whole number from 1 to {most}", lambda n: 1 <= n <= most)


# Beyond these torch could not count the elements of a tensor, and making layers would not end.
_WIDEST = 1 << 24
_Width = Annotated[int, _up_to(_WIDEST)]
_Layers = Annotated[int, _up_to(10_000)]
_Tokens = Annotated[int, _up_to((1 << 31) - 1)]


@dataclass(frozen=True)
class ModelConfig(Settings):
    """A hybrid Llama (or Mistral, Qwen2, Qwen3): keys, meaning and defaults of Hugging Face Llama, plus the layout.

    Attributes:
        vocab_size: rows of the embedding; at least the tokenizer's size.
        hidden_size: width of the residual stream; a multiple of num_attention_heads (Hugging Face insists).
        intermediate_size: width of the SwiGLU MLP.
        num_hidden_layers: transformer blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides num_attention_heads. Default: num_attention_heads.
        head_dim: width of a head, even. Default: hidden_size / num_attention_heads.
        max_position_embeddings: longest document, in tokens; longer input is refused.
        rms_norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None or a mapping with `rope_type` linear, llama3 or yarn and the keys Hugging Face gives it. By
            kind of layer `{dense: ..., sparse: ...}`, each None or such a mapping, which may have a `rope_theta` of its
            own (OLMo-3 scales only its full layers); a layer with dense and sparse heads is sparse.
        qkv_bias: q, k and v projections have biases (Qwen2).
        qk_norm: queries and keys pass an RMSNorm over the head dimension before RoPE (Qwen3).
        tie_word_embeddings: the language-model head is the embedding.
        initializer_range: standard deviation of initial weights.
        bos_token_id, eos_token_id: document delimiters (several eos ids are allowed), None where there is none.
        attention_layout: which layer attends how, e.g. "L4V24+dense10-22", "L8V16-inter", "dense", by head as in
            "2*dense|6*L8V16", by range as in "L8V4<64V16"; all of it in `s2.attention.grammar`.
        block_size: tokens in an attention block: 16, 32, 64, 128 or 256.

    Raises:
        ValueError: a value does not fit; the message names the key, the value and what would be right.
    """

    vocab_size: _Width
    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Layers
    num_attention_heads: _Width
    num_key_value_heads: _Width = None  # type: ignore[assignment]  # resolved below
    head_dim: Annotated[int, Check("a positive even number (RoPE rotates pairs)", lambda n: n > 0 and n % 2 == 0)] = (
        None  # type: ignore[assignment]  # resolved below
    )
    max_position_embeddings: _Tokens = 2048
    rms_norm_eps: Weight = 1e-5
    rope_theta: Weight = 10000.0
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    initializer_range: Weight = 0.02
    bos_token_id: Count | None = None
    eos_token_id: Count | list[Count] | None = None
    attention_layout: str = "dense"
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={heads}")
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
            super().__post_init__()
        if heads * self.head_dim > _WIDEST:
            raise ValueError(f"head_dim={self.head_dim} of {heads} heads makes more than {_WIDEST} columns")
        if self.qkv_bias and self.qk_norm:
            raise ValueError("qkv_bias=True and qk_norm=True: no Hugging Face class has both; choose one")
        validate_rope_scaling(self.rope_scaling, "ModelConfig")
        for key, tokens in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            if any(token is not None and token >= self.vocab_size for token in tokens):
                raise ValueError(f"{key}={getattr(self, key)} must be below vocab_size={self.vocab_size}, or null")
        # a wrong layout stops here, not at the first batch
        self.layout.check_heads(self.num_attention_heads, self.num_key_value_heads)
        kinds = {pattern.is_dense for pattern in self.layout}
        if scales_by_kind(self.rope_scaling) and len(kinds) == 1:
            raise ValueError(
                f"rope_scaling={self.rope_scaling} is by kind of layer, but with attention_layout="
                f"{self.attention_layout} all layers are {'dense' if kinds.pop() else 'sparse'}; give it without kinds"
            )

    @cached_property
    def layout(self) -> LayerLayout:
        """The attention pattern of every layer."""
        return LayerLayout.parse(self.attention_layout, self.num_hidden_layers, self.block_size)

    @property
    def is_dense(self) -> bool:
        """Whether every layer attends to its whole context."""
        return all(pattern.is_dense for pattern in self.layout)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a document (empty when there is none)."""
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, list) else (self.eos_token_id,)

    def num_parameters(self) -> int:
        """Trainable parameters; a tied head counts once."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        vectors = 2 * self.hidden_size
        vectors += self.qkv_bias * (heads + 2 * kv_heads) * self.head_dim + self.qk_norm * 2 * self.head_dim
        blocks = self.num_hidden_layers * (self.layer_matrices + vectors)
        tables = 1 if self.tie_word_embeddings else 2
        return blocks + self.hidden_size + tables * self.vocab_size * self.hidden_size

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer's matrix products."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    def rope(self, *, dense: bool) -> tuple[float, dict[str, Any] | None]:
        """`rope_theta` and `rope_scaling` of the dense layers, or of the sparse ones."""
        return rope_of_kind(self.rope_theta, self.rope_scaling, dense=dense)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some keys changed, e.g. `rope_theta` and `max_position_embeddings` for context extension.

        Changing `hidden_size`, `num_attention_heads` alone keeps the old head_dim and num_key_value_heads.
        """
        if unknown := changes.keys() - asdict(self).keys():
            raise UnknownKeyError("", min(unknown), list(asdict(self)))
        return replace(self, **changes)

    # ---------------------------------------------------------------- dictionaries

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "model config") -> ModelConfig:
        """Build from a mapping. Unknown keys are errors.

        Raises:
            ValueError: names `source`, the key and the nearest known one.
        """
        try:
            return read(cls, values, "")
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_hf_dict(self) -> dict[str, Any]:
        """`config.json`; where every layer is dense that of a Hugging Face Llama, Qwen2 or Qwen3, readable by
        transformers 4.x and 5.x.

        With sparse layers `model_type` is "s2_llama" and `auto_map` names the classes in the folder's modeling file
        (of `s2.integrations.HF_FILES`); `attn_implementation` is "s2_attention", for which transformers 5.x stops where
        its Llama class is called by name (4.x only warns that the types differ). RoPE is written twice: `rope_theta`
        and `rope_scaling` (4.x), `rope_parameters` (5.x).
        """
        parts = {"qkv_bias": self.qkv_bias, "qk_norm": self.qk_norm}
        name = next(name for name, family in _FAMILIES.items() if family.parts == parts)
        ropes = {kind: self.rope(dense=kind == "dense") for kind in ("dense", "sparse")}
        rope: dict[str, Any] = {
            kind: {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
            for kind, (theta, scaling) in ropes.items()
        }
        values = {
            "architectures": [_FAMILIES[name].architecture],
            "model_type": name,
            **asdict(self),
            "rope_parameters": rope if scales_by_kind(self.rope_scaling) else rope["dense"],
            "hidden_act": "silu",
            "mlp_bias": False,
            "attention_dropout": 0.0,
        }
        if not self.qkv_bias:
            values["attention_bias"] = False
        if not self.is_dense:
            values |= {"architectures": ["S2LlamaForCausalLM"], "model_type": _SPARSE_TYPE}
            values |= {"auto_map": _AUTO_MAP, "attn_implementation": _SPARSE_ATTENTION}
        elif name != "llama":
            values["use_sliding_window"] = False
        return values

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read the `config.json` of a Hugging Face Llama, Mistral, Qwen2 or Qwen3, of transformers 4.x or 5.x.

        Without `attention_layout` it is dense. Keys that do not change the network are ignored.

        Args:
            values: the parsed JSON.
            source: where it came from, for error messages.

        Raises:
            ValueError: another architecture, an unsupported option or a missing key; names `source` and the key.
        """
        known_types = f"{', '.join(repr(name) for name in _FAMILIES)} (or {_SPARSE_TYPE!r}, our own)"
        if "model_type" not in values:
            raise ValueError(f"{source}: lacks model_type; it must be one of {known_types}")
        name = values["model_type"]
        if name not in (*_FAMILIES, _SPARSE_TYPE):
            raise ValueError(f"{source}: model_type={name!r} is not supported, must be one of {known_types}")
        for key, (supported, reason) in _HF_FIXED.items():
            if values.get(key) is not None and values[key] != supported:
                raise ValueError(f"{source}: {key}={values[key]!r} is not supported, must be {supported!r}: {reason}")
        if missing := [key for key in _HF_REQUIRED if values.get(key) is None]:
            raise ValueError(f"{source}: lacks {missing}")
        family = _FAMILIES.get(name, _FAMILIES["llama"])
        known = family.defaults | {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        if name != _SPARSE_TYPE:
            if wrong := [key for key in family.parts if known.get(key, family.parts[key]) != family.parts[key]]:
                raise ValueError(f"{source}: {wrong[0]}={known[wrong[0]]!r} is not what model_type={name!r} has")
            known |= family.parts
        rope: dict[str, Any] = {"rope_theta": _THETA, "rope_scaling": None}
        longest = cls.from_dict(known | rope, source).max_position_embeddings  # a number, as all sizes are then
        _check_window(values, longest, source)
        rope["rope_theta"], rope["rope_scaling"] = _read_rope(values, longest, source)
        config = cls.from_dict(known | rope, source)
        if name != _SPARSE_TYPE and not config.is_dense:
            raise ValueError(
                f"{source}: model_type={name!r} with attention_layout={config.attention_layout!r}: other libraries"
                f" would run this model dense; write model_type {_SPARSE_TYPE!r}"
            )
        if name == _SPARSE_TYPE and values.get("attention_layout") is None:
            raise ValueError(f"{source}: model_type={name!r} lacks attention_layout; dense would be a guess")
        return config


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or no object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face checkpoint folder")
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _check_window(values: Mapping[str, Any], longest: int, source: str) -> None:
    """Refuse layers that see less than the whole context, which no layout of ours says to the token."""
    has_window = {"mistral": True, "qwen2": values.get("use_sliding_window"), "qwen3": values.get("use_sliding_window")}
    window = values.get("sliding_window", _WINDOW) if has_window.get(values["model_type"]) else None
    if window is not None:
        require_positive(window, f"{source}: sliding_window")
        if window < longest:
            raise ValueError(
                f"{source}: sliding_window={window} is shorter than max_position_embeddings={longest}; windows of "
                f"tokens are not supported, so set max_position_embeddings there to at most {window}, where this one "
                f"never counts"
            )
    types = values.get("layer_types") or []
    known = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    if values["model_type"] != _SPARSE_TYPE and not (isinstance(types, list) and all(kind in known for kind in types)):
        raise ValueError(f"{source}: layer_types={types!r:.200} must be null or a list of {' and '.join(known)}")


def _check_same(
    said: Mapping[str, Mapping[str, Any]], named: str, other: str, outside: float | None, source: str
) -> None:
    """Where two spellings say it by kind of layer and one of them was changed, nobody knows which is meant."""
    for kind in ("dense", "sparse"):
        of_kind = [each[kind] if scales_by_kind(each) else each for each in (said[named], said[other])]
        ropes = [{"rope_type": "default", **(each or {})} for each in of_kind]
        ropes[0].setdefault("rope_theta", outside or ropes[1].get("rope_theta"))
        ropes[1].setdefault("rope_theta", ropes[0]["rope_theta"])
        if ropes[0] != ropes[1]:
            raise ValueError(
                f"{source}: rope_theta and {named} say {ropes[0]} of the {kind} layers, {other}.{kind} {ropes[1]};"
                " change both or remove one"
            )


def _read_rope(values: Mapping[str, Any], longest: int, source: str) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling` from either spelling. Where both are present they are read as transformers reads
    them: `rope_scaling` wins, a theta inside wins over one outside, an original length outside over one inside."""
    # by kind of layer transformers cannot say it: our class for it has a key of its own
    said = {key: values.get(key) or {} for key in ("rope_by_kind", "rope_scaling", "rope_parameters")}
    for key, rope in said.items():
        if not isinstance(rope, Mapping):
            raise ValueError(f"{source}: {key}={rope!r} must be null or a mapping with a rope_type")
        said[key] = _with_original(rope, values.get("original_max_position_embeddings"), source)
    named = next((key for key, rope in said.items() if rope), "rope_scaling")
    scaling, parameters = dict(said[named]), said["rope_parameters"]
    outside = values.get("rope_theta")
    for key, rope in said.items():
        if scales_by_kind(rope):
            validate_rope_scaling(rope, source, key)
            _check_same(said, named, key, outside, source)
        elif said["rope_by_kind"] and key == "rope_by_kind":
            raise ValueError(f"{source}: rope_by_kind={rope!r} must have dense and sparse")
        elif said["rope_by_kind"] and key == "rope_parameters" and rope:  # as the dense layers' is saved, too
            dense = {"rope_type": "default", **(scaling["dense"] or {})}
            if {**rope, **dense} != rope:
                raise ValueError(
                    f"{source}: rope_parameters={rope} is not rope_by_kind.dense, {dense}; change both or remove one"
                )
    if scales_by_kind(scaling):
        # transformers keeps none outside; our class for it says in rope_parameters what the dense layers have
        lacking = [kind for kind in ("dense", "sparse") if not (scaling[kind] or {}).get("rope_theta")]
        ropes = [parameters, *([parameters.get(kind) or {} for kind in lacking] or [scaling["dense"]])]
        thetas = (outside, *(each.get("rope_theta") for each in ropes), _THETA)
        return next(theta for theta in thetas if theta is not None), scaling
    theta = next(each for each in (scaling.pop("rope_theta", None), outside, _THETA) if each is not None)
    legacy = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", legacy or "default")
    if scaling.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ValueError(f"{source}: partial_rotary_factor must be 1.0: all dimensions of a head are rotated")
    if kind == "default":
        for key, value in scaling.items():
            if key != "rope_type" and value is not None:
                raise ValueError(
                    f"{source}: {named}.{key}={value!r} is not supported where {named} has no rope_type of its own, or "
                    f"'default', which takes rope_theta alone; name one of {list(KINDS)}, or remove it"
                )
        return theta, None
    if kind == "yarn" and scaling.get("original_max_position_embeddings") is None:
        scaling["original_max_position_embeddings"] = longest
    validate_rope_scaling(scaling, source, named)
    return theta, scaling


def _with_original(rope: Mapping[str, Any], original: Any, source: str) -> Mapping[str, Any]:
    """`rope`, or its parts by kind of layer, with the original length that config.json has outside of it."""
    if original is None:
        return rope
    if scales_by_kind(rope):
        return {
            kind: _with_original(each, original, source) if isinstance(each, Mapping) else each
            for kind, each in rope.items()
        }
    if rope.get("rope_type", rope.get("type")) not in ("llama3", "yarn"):
        return rope
    require_positive(original, f"{source}: original_max_position_embeddings")
    return {**rope, "original_max_position_embeddings": original}
