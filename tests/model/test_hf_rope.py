"""RoPE as a config.json says it: the frequencies of transformers' own classes, or one sentence."""

import copy

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from s2.integrations.modeling_s2_llama import RopeByKind, S2LlamaConfig, S2LlamaForCausalLM
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


SPARSE = {**SIZES, "attention_layout": "L2V4+dense1", "block_size": 16}
BY_KIND = {"dense": {**LINEAR, "rope_theta": 5e4}, "sparse": PLAIN}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"rope_parameters": {"full_attention": PLAIN}}, r"rope_parameters\.full_attention=\{.*500\.0"),
        ({"rope_scaling": {"factor": 4.0}}, r"rope_(scaling|parameters)\.factor=4\.0"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, r"rope_type=\['linear'\] is not supported"),
        ({"rope_scaling": {"rope_type": {}, "factor": 2.0}}, r"rope_type=\{\} is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**30}}, r"factor=1000.* must be a positive number"),
        ({"rope_theta": 0}, "rope_theta.* positive number"),
        ({"rope_scaling": 5}, "rope_scaling=5 must be null or a mapping"),
        (
            {"rope_by_kind": {"dense": PLAIN}},
            r"rope_by_kind by kind of layer has the keys \['dense'\], must have dense",
        ),
        ({"rope_by_kind": PLAIN}, r"rope_by_kind.* must have dense and sparse"),
        ({"rope_by_kind": {"dense": "x", "sparse": None}}, "rope_by_kind.dense='x' must be null or"),
        ({"rope_by_kind": {"dense": None, "sparse": {"rope_type": []}}}, r"rope_by_kind.sparse.rope_type=\[\] is not"),
        ({"rope_by_kind": BY_KIND, "rope_parameters": PLAIN}, r"rope_parameters=\{.*\} is not rope_by_kind.dense"),
        (
            {"rope_by_kind": BY_KIND, "rope_scaling": {**BY_KIND, "sparse": LINEAR}},
            "of the sparse layers, rope_scaling",
        ),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers.* from 1 to 10000"),
        ({"attention_layout": "1000000000000*dense"}, "1000000000000"),
    ],
)
def test_what_we_refuse_our_class_of_transformers_refuses(said, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_hf_dict({"model_type": "s2_llama", **SPARSE, **said})
    with pytest.raises(ValueError, match=words):
        S2LlamaForCausalLM(S2LlamaConfig(**copy.deepcopy({**SPARSE, **said})))


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 7e4}])
@pytest.mark.parametrize("rope", [None, {"rope_theta": 2e4}, {"rope_type": "linear", "factor": 2.0}])
def test_a_kind_that_rope_by_kind_leaves_out_turns_as_in_ours(rope, theta):
    said = {**SPARSE, **theta, "rope_by_kind": {"dense": rope, "sparse": {"rope_theta": 3e4}}}
    ours = ModelConfig.from_hf_dict({"model_type": "s2_llama", **said})
    later = S2LlamaConfig(**SPARSE, **theta)
    later.rope_by_kind = said["rope_by_kind"]
    for theirs in (S2LlamaConfig(**copy.deepcopy(said)), later):
        turned = S2LlamaForCausalLM(theirs).model.rotary_emb
        for kind in ("dense", "sparse"):
            expected = rope_frequencies(ours.head_dim, *ours.rope(dense=kind == "dense"))[0]
            torch.testing.assert_close(turned[kind].inv_freq, expected)
        assert theirs.rope_parameters == theirs.rope_by_kind["dense"]
