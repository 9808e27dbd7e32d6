"""RoPE as a config.json says it: the frequencies of transformers' own classes, or one sentence."""

import copy

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from s2.integrations.modeling_s2_llama import RopeByKind, S2LlamaConfig
from s2.model import ModelConfig
from s2.model.rope import rope_frequencies

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 32}
LONGER = {"original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "said",
    [
        {"rope_scaling": YARN, **ORIGINAL},
        {"rope_scaling": {**YARN, **LONGER}, **ORIGINAL},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, **ORIGINAL},
        {"rope_parameters": {**YARN, "rope_theta": 5e4}, **ORIGINAL},
        {"rope_scaling": {**LLAMA3, **LONGER}, **ORIGINAL},
        {"rope_scaling": LLAMA3, **ORIGINAL},
        {"rope_scaling": LINEAR, **ORIGINAL},
        {"rope_theta": 5e4, **ORIGINAL},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4.0}, "rope_theta": 7e4},
    ],
)
def test_frequencies_are_those_of_transformers(said):
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES, **copy.deepcopy(said)))
    ours = ModelConfig.from_hf_dict({"model_type": "llama", **SIZES, **said})
    inv_freq, factor = rope_frequencies(ours.head_dim, *ours.rope(dense=True))
    torch.testing.assert_close(inv_freq, theirs.inv_freq)
    assert factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_frequencies_by_kind_of_layer_are_those_of_our_class_of_transformers(key):
    ropes = {"dense": {**YARN, **LONGER, "rope_theta": 5e4}, "sparse": {**LLAMA3, **LONGER, "rope_theta": 2e4}}
    said = {**SIZES, key: ropes, "attention_layout": "L2V4+dense1", "block_size": 16, **ORIGINAL}
    theirs = RopeByKind(S2LlamaConfig(**copy.deepcopy(said)))
    ours = ModelConfig.from_hf_dict({"model_type": "s2_llama", **said})
    for kind in ("dense", "sparse"):
        inv_freq, factor = rope_frequencies(ours.head_dim, *ours.rope(dense=kind == "dense"))
        torch.testing.assert_close(inv_freq, theirs[kind].inv_freq)
        assert factor == pytest.approx(theirs[kind].attention_scaling)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"rope_scaling": YARN, "original_max_position_embeddings": "x"}, ["embeddings='x' must be"]),
        ({"rope_theta": 0}, ["rope_theta: expected a positive number, got 0"]),
        ({"rope_parameters": {"factor": 4.0, "rope_theta": 5e4}}, ["rope_parameters.factor=4.0", "rope_type"]),
        ({"rope_scaling": {"factor": 4.0}}, ["rope_scaling.factor=4.0", "rope_type"]),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, ["rope_scaling.factor=4.0", "'default'"]),
        ({"rope_parameters": {"full_attention": PLAIN}}, ["rope_parameters.full_attention={", "500.0"]),
        (
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
            ["rope_parameters.full_attention={", "'linear'"],
        ),
        ({"rope_parameters": {**LINEAR, "sliding_attention": PLAIN}}, ["rope_parameters of type", "sliding_attention"]),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_no_rope_of_a_config_is_ignored(name, said, words):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf_dict({"model_type": name, "num_key_value_heads": 2, **SIZES, **said}, "some/config.json")
    for word in ["some/config.json: ", *words]:
        assert word in str(error.value)
