"""ModelConfig: derived sizes, Hugging Face dictionaries of both spellings, errors that name what is wrong."""

import json
from functools import partial

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from s2.integrations.modeling_s2_llama import S2LlamaConfig
from s2.model import ModelConfig, Transformer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
BY_KIND = {"dense": LLAMA3, "sparse": {"rope_theta": 2e4}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
NAN, INF = float("nan"), float("inf")


def test_defaults_are_derived_from_sizes():
    config = ModelConfig.from_dict({**SIZES, "num_key_value_heads": None})
    assert (config.head_dim, config.num_key_value_heads) == (8, 6)
    assert len(config.layout) == 3 and all(pattern.is_dense for pattern in config.layout)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [None, 10])
def test_num_parameters_equals_the_network(tied, head_dim):
    config = ModelConfig(**SIZES, tie_word_embeddings=tied, head_dim=head_dim)
    model = Transformer(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_hf_dict_round_trip_and_transformers_agree(scaling):
    config = ModelConfig(
        **SIZES,
        max_position_embeddings=4096,
        rope_theta=5e5,
        rope_scaling=scaling,
        eos_token_id=[2, 3],
        attention_layout="L2V4+dense1",
        block_size=16,
    )
    assert ModelConfig.from_hf_dict(config.to_hf_dict()) == config
    theirs = LlamaConfig.from_dict({**config.to_hf_dict(), "model_type": "llama"})
    assert theirs.rope_parameters == {"rope_type": "default", **(scaling or {}), "rope_theta": 5e5}
    assert (theirs.head_dim, theirs.attention_layout, theirs.block_size) == (8, "L2V4+dense1", 16)
    as_5x_writes_it = {**theirs.to_dict(), "model_type": "s2_llama"}
    assert ModelConfig.from_hf_dict(as_5x_writes_it) == config


def test_rope_by_kind_of_layer_comes_back_from_the_config_of_a_sparse_model():
    values = SIZES | {"rope_theta": 5e5, "rope_scaling": BY_KIND, "attention_layout": "L2V4+dense1"}
    config = ModelConfig.from_dict(values)
    assert (config.rope(dense=True), config.rope(dense=False)) == ((5e5, LLAMA3), (2e4, None))
    written = config.to_hf_dict()
    dense, sparse = (written["rope_parameters"][kind] for kind in ("dense", "sparse"))
    assert dense == {**LLAMA3, "rope_theta": 5e5}
    assert sparse == {"rope_type": "default", "rope_theta": 2e4}
    assert ModelConfig.from_hf_dict(written) == config
    del written["rope_scaling"]
    read = ModelConfig.from_hf_dict(written)
    assert all(read.rope(dense=dense) == config.rope(dense=dense) for dense in (True, False))
    del written["rope_theta"]  # as transformers saved it with earlier versions of the modeling file
    written |= {"rope_by_kind": written["rope_parameters"], "rope_parameters": written["rope_parameters"]["dense"]}
    assert ModelConfig.from_hf_dict(written).replace(rope_scaling=None).rope_theta == 5e5


@pytest.mark.parametrize(
    ("complete", "theta"),
    [({}, 1e4), ({"rope_parameters": {"dense": {"rope_theta": 2e5}, "sparse": {"rope_theta": 3e4}}}, 3e4)],
)
def test_layers_whose_rope_a_file_leaves_unsaid_do_not_turn_as_those_of_the_other_kind(complete, theta):
    written = ModelConfig.from_dict(SIZES | {"attention_layout": "L2V4+dense1"}).to_hf_dict()
    written = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_parameters")}
    written |= {"rope_scaling": {"dense": {"rope_theta": 2e5}, "sparse": None}, **complete}
    ours, theirs = ModelConfig.from_hf_dict(written), S2LlamaConfig(**written)
    assert ours.rope(dense=False)[0] == theta == theirs.rope_by_kind["sparse"]["rope_theta"]
    assert ours.rope(dense=True)[0] == 2e5 == theirs.rope_by_kind["dense"]["rope_theta"]


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda c: c.update(rope_theta=1e6), "dense"),
        (lambda c: c["rope_scaling"]["sparse"].update(rope_theta=1e6), "sparse"),
        (lambda c: c["rope_parameters"]["sparse"].update(rope_theta=1e6), "sparse"),
        (lambda c: c["rope_parameters"]["dense"].update(factor=4.0), "dense"),
        (lambda c: c["rope_scaling"].update(dense=None), "dense"),
        (lambda c: c.update(rope_scaling=LLAMA3), "sparse"),
        (lambda c: c.update(rope_scaling=YARN), "dense"),
    ],
)
def test_ropes_by_kind_of_which_one_spelling_was_edited_are_refused(edit, kind):
    """Ours and transformers' class would each read another."""
    values = SIZES | {"rope_theta": 5e5, "rope_scaling": BY_KIND, "attention_layout": "L2V4+dense1"}
    written = json.loads(json.dumps(ModelConfig.from_dict(values).to_hf_dict()))
    assert S2LlamaConfig(**written).rope_by_kind == written["rope_parameters"]
    edit(written)
    for read in (partial(ModelConfig.from_hf_dict, written), partial(S2LlamaConfig, **written)):
        with pytest.raises(ValueError, match=rf"of the {kind} layers, rope_parameters\.{kind} .*; change both or"):
            read()


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ("x", "rope_parameters='x' must be null or a mapping"),
        ({"dense": {"rope_theta": 1}}, "rope_parameters by kind of layer has the keys .'dense'., must have"),
        ({"dense": None, "sparse": "y"}, "rope_parameters.sparse='y' must be null or have a rope_type"),
        ({"dense": {"rope_theta": -1}, "sparse": None}, "rope_parameters.dense.rope_theta=-1 must be a positive"),
    ],
)
def test_a_wrong_second_spelling_of_ropes_by_kind_is_named(rope, said):
    values = SIZES | {"rope_theta": 5e5, "rope_scaling": BY_KIND, "attention_layout": "L2V4+dense1"}
    with pytest.raises(ValueError, match=said):
        ModelConfig.from_hf_dict(ModelConfig.from_dict(values).to_hf_dict() | {"rope_parameters": rope})


def test_what_a_family_leaves_unsaid_is_as_in_transformers():
    for name, cls in (("mistral", MistralConfig), ("qwen2", Qwen2Config), ("qwen3", Qwen3Config)):
        sizes = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"} | {"num_attention_heads": 32}
        sizes |= {"hidden_size": 64, "sliding_window": None}
        ours, theirs = ModelConfig.from_hf_dict({"model_type": name, **sizes}), cls(**sizes)
        for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id"):
            assert getattr(ours, key) == getattr(theirs, key), (name, key)
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
        assert (ours.qkv_bias, ours.qk_norm) == (name == "qwen2", name == "qwen3")


def test_transformers_4_spelling_is_read():
    config = ModelConfig.from_hf_dict(
        {
            "model_type": "llama",
            **SIZES,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "attention_bias": False,
            "hidden_act": "silu",
            "pretraining_tp": 1,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        }
    )
    assert config.rope_theta == 5e5
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert config.attention_layout == "dense"
    assert config.rms_norm_eps == LlamaConfig().rms_norm_eps  # what a left-out key means there


def test_yarn_without_original_length_means_the_current_one():
    values = {"model_type": "llama", **SIZES, "max_position_embeddings": 1024}
    config = ModelConfig.from_hf_dict({**values, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert config.rope_scaling is not None
    assert config.rope_scaling["original_max_position_embeddings"] == 1024


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma2"}, ["model_type='gemma2'", "'llama', 'qwen2', 'qwen3', 'mistral'", "'s2_llama'"]),
        ({"qk_norm": True}, ["qk_norm=True", "model_type='llama'"]),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, ["sliding_window=4096", "8192"]),
        ({"model_type": "mistral", "sliding_window": 64}, ["sliding_window=64", "max_position_embeddings=131072"]),
        ({"model_type": "qwen2", "use_sliding_window": True}, ["sliding_window=4096", "32768"]),
        ({"attention_bias": True}, ["attention_bias=True", "bias"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"hidden_size": None}, ["hidden_size", "lacks"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'", "llama3", "yarn"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["lacks", "low_freq_factor"]),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, ["rope_scaling.rope_type=['linear']"]),
        ({"rope_parameters": {"type": {}, "rope_type": {}}}, ["rope_parameters.rope_type={}"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**30}}, ["rope_scaling.factor=1000000"]),
        ({"max_position_embeddings": "128", "rope_scaling": YARN}, ["max_position_embeddings", "'128'"]),
        ({"model_type": "mistral", "max_position_embeddings": "128"}, ["max_position_embeddings", "'128'"]),
        ({"model_type": "mistral", "sliding_window": "x"}, ["sliding_window='x'", "a positive number"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, ["layer_types=['sliding_attention'"]),
        ({"layer_types": 5}, ["layer_types=5"]),
        *(
            ({key: size}, [key, f"from 1 to {most}", repr(size)])
            for key, most in {
                **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 1 << 24),
                **{"num_key_value_heads": 1 << 24, "num_hidden_layers": 10_000},
                "max_position_embeddings": (1 << 31) - 1,
            }.items()
            for size in (1e30, 10**30)
        ),
        ({"head_dim": 1e30}, ["head_dim", "of 6 heads", "more than 16777216 columns"]),
    ],
)
def test_unsupported_hf_configs_name_file_key_and_value(change, words):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf_dict({"model_type": "llama", **SIZES, **change}, source="some/config.json")
    for word in ["some/config.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 4}, ["num_key_value_heads=4", "num_attention_heads=6"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["hidden_size=48", "5"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers=True", "a whole number"]),
        ({"rope_theta": "1e6"}, ["rope_theta=1e6", "a number"]),
        ({"rms_norm_eps": 0.0}, ["rms_norm_eps=0.0"]),
        ({"eos_token_id": 96}, ["eos_token_id=96", "vocab_size=96"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings=no", "true or false"]),
        ({"attention_layout": "L2V4+dense7"}, ["dense layer 7"]),
        ({"attention_layout": "X3"}, ["X3"]),
        ({"attention_layout": "2*dense|L2V4"}, ["2*dense|L2V4", "3 heads", "2 KV heads and 6 query heads"]),
        ({"attention_layout": "L2V4", "block_size": 48}, ["block_size=48"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "rope_type"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["factor=0.5"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}}, ["beta_fast"]),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, ["low_freq_factor=4.0"]),
        ({"num_layers": 3}, ["num_layers", "num_hidden_layers"]),
        ({"qkv_bias": True, "qk_norm": True}, ["qkv_bias=True", "qk_norm=True"]),
        ({"rope_scaling": BY_KIND}, ["rope_scaling", "by kind", "attention_layout=dense", "all layers are dense"]),
        ({"rope_scaling": BY_KIND, "attention_layout": "L2V4"}, ["all layers are sparse"]),
        ({"rope_scaling": {"dense": LLAMA3}}, ["rope_scaling", "['dense']", "dense and sparse"]),
        ({"rope_scaling": {"dense": {"factor": 2.0}, "sparse": None}}, ["rope_scaling.dense", "rope_type"]),
        ({"rope_scaling": {"dense": None, "sparse": {"rope_theta": -1}}}, ["rope_scaling.sparse.rope_theta=-1"]),
        ({"rope_scaling": {"dense": {"rope_theta": NAN}, "sparse": None}}, ["rope_scaling.dense.rope_theta=nan"]),
        ({"rope_scaling": {"dense": {"rope_theta": INF}, "sparse": None}}, ["rope_scaling.dense.rope_theta=inf"]),
        ({"rope_scaling": {"rope_type": [], "factor": 2.0}}, ["rope_scaling.rope_type=[]"]),
        ({"rope_scaling": {"dense": {"rope_type": {}}, "sparse": None}}, ["rope_scaling.dense.rope_type={}"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": NAN}}, ["rope_scaling.factor=nan"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": INF}}, ["rope_scaling.factor=inf"]),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": INF}}, ["rope_scaling.high_freq_factor=inf"]),
        ({"rope_scaling": {**YARN, "attention_factor": NAN}}, ["rope_scaling.attention_factor=nan"]),
        ({"rope_scaling": {**YARN, "truncate": 0.5}}, ["rope_scaling.truncate=0.5", "true or false"]),
    ],
)
def test_wrong_values_are_named(change, words):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict({**SIZES, **change}, source="recipe.yaml")
    for word in ["recipe.yaml", *(word for part in words for word in part.split("=", 1))]:
        assert word.strip("'") in str(error.value)


def test_replace_checks_keys_and_values():
    config = ModelConfig(**SIZES)
    assert config.replace(rope_theta=8e6, max_position_embeddings=65536).rope_theta == 8e6
    with pytest.raises(ValueError, match="did you mean 'rope_theta'"):
        config.replace(rope_teta=8e6)
    with pytest.raises(ValueError, match=r"max_position_embeddings: .* got 0"):
        config.replace(max_position_embeddings=0)
