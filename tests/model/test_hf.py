"""Hugging Face folders: the logits of transformers both ways, the same token ids, errors that name files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from s2.model import ModelConfig, Transformer
from s2.model.hf import load_config, load_pretrained, load_state_dict, save_pretrained

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(**changes):
    return ModelConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_theta": 5e4,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
    )


def model(**changes):
    torch.manual_seed(0)
    built = Transformer(config(**changes))
    for parameter in built.parameters():  # norms too: a lost norm weight must show
        parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def ids():
    return torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours, theirs):
    with torch.no_grad():
        mine, other = ours(ids()), theirs(ids()).logits
    assert other.std() > 0.1
    torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_transformers_reads_our_folder_with_the_same_logits(tmp_path, tied, scaling, head_dim):
    ours = model(tie_word_embeddings=tied, rope_scaling=scaling, head_dim=head_dim)
    save_pretrained(ours, ours.config, tmp_path, dtype=torch.float32)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.dtype == torch.float32
    assert_same_logits(ours, theirs)
    assert ("lm_head.weight" in load_state_dict(tmp_path)) is not tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_we_read_a_transformers_folder_with_the_same_logits(tmp_path, tied, scaling):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            **{k: v for k, v in config().to_hf_dict().items() if not k.startswith(("rope", "tie_", "attention_l"))},
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 5e4},
        )
    )
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_pretrained(tmp_path)
    assert ours.config.rope_scaling == scaling
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    assert all(p.requires_grad for p in ours.parameters())
    assert_same_logits(ours, theirs)


def test_transformers_does_not_open_a_sparse_model_as_a_dense_one(tmp_path, tokenizer_file):
    ours = model(attention_layout="L1V2-inter", block_size=16)
    folder = save_pretrained(ours, ours.config, tmp_path / "hf", tokenizer_file=tokenizer_file)
    with pytest.raises(ValueError, match="s2_attention"):
        LlamaForCausalLM.from_pretrained(folder)
    assert load_config(folder) == ours.config
    assert AutoTokenizer.from_pretrained(folder)("some text")["input_ids"]


def test_a_sparse_layout_under_the_name_of_a_dense_model_is_refused(tmp_path):
    values = config(attention_layout="L1V2-inter", block_size=16).to_hf_dict()
    with pytest.raises(ValueError, match=r"model_type='llama' with attention_layout='L1V2-inter'.*'s2_llama'"):
        ModelConfig.from_hf_dict({**values, "model_type": "llama"})
    del values["attention_layout"]
    with pytest.raises(ValueError, match="lacks attention_layout"):
        ModelConfig.from_hf_dict(values)


def test_our_folder_comes_back_bit_for_bit(tmp_path):
    ours = model(attention_layout="L2V4+dense1", block_size=16)
    save_pretrained(ours.state_dict(), ours.config, tmp_path, dtype=torch.float32, max_shard_size=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    back = load_pretrained(tmp_path)
    assert back.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_saving_again_leaves_no_old_shard(tmp_path):
    ours = model()
    save_pretrained(ours, ours.config, tmp_path, max_shard_size=60_000)
    save_pretrained(ours, ours.config, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model.safetensors"]
    assert load_state_dict(tmp_path)["model.norm.weight"].dtype == torch.bfloat16
    assert load_pretrained(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    ours = model()
    save_pretrained(ours, ours.config, tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_folder_with_files_of_others_is_left_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    ours = model()
    with pytest.raises(ValueError, match=r"holds files that this program did not write \(config.json\)"):
        save_pretrained(ours, ours.config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_overrides_extend_the_context(tmp_path):
    ours = model()
    save_pretrained(ours, ours.config, tmp_path, dtype=torch.float32)
    changes = {
        "rope_theta": 1e6,
        "max_position_embeddings": 1024,
        "attention_layout": "L2V4",
        "block_size": 16,
    }
    longer = load_pretrained(tmp_path, overrides=changes)
    assert longer.config == ours.config.replace(**changes)
    assert longer(torch.zeros(1, 1000, dtype=torch.int64)).isfinite().all()
    expected = Transformer(longer.config)
    expected.load_state_dict(ours.state_dict())
    assert torch.equal(longer(ids()), expected(ids()))
    with pytest.raises(ValueError, match=r"overrides of .*did you mean 'rope_theta'"):
        load_pretrained(tmp_path, overrides={"rope_thetta": 1e6})


# -------------------------------------------------------------------- tokenizer and generation config


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=280,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the needle is in the haystack, the haystack is long"] * 20, trainer)
    folder = tmp_path / "data"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_exported_tokenizer_gives_the_same_ids(tmp_path, tokenizer_file):
    ours = model()
    save_pretrained(ours, ours.config, tmp_path / "hf", tokenizer_file)
    text = "The needle's  in\n\nthe haystack: 3.14 naïve 大<|end|>"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    expected = Tokenizer.from_file(str(tokenizer_file)).encode(text).ids
    assert theirs(text)["input_ids"] == expected
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert theirs.model_max_length == 256
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)


def test_settings_beside_the_tokenizer_are_taken_over(tmp_path, tokenizer_file):
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ messages }}",
        "eos_token": "<|end|>",
    }
    (tokenizer_file.parent / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = model()
    save_pretrained(ours, ours.config, tmp_path / "hf", tokenizer_file)
    written = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert written == {**settings, "model_max_length": 256}


@pytest.fixture
def chat_model(tmp_path, tokenizer_file):
    """A foreign folder: several ids end a text, the tokenizer has a template and a token to pad with."""
    ours = model(eos_token_id=[1, 5])
    folder = save_pretrained(ours, ours.config, tmp_path / "chat", tokenizer_file, dtype=torch.float32)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "e", "unk_token": "t"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>", "pad_token": "e"}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [1, 5, 7]}))
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"pad_token_id": 4}))
    return folder


def test_what_a_model_came_with_goes_with_it(tmp_path, chat_model):
    longer = load_pretrained(chat_model, overrides={"max_position_embeddings": 512})
    folder = save_pretrained(longer, longer.config, tmp_path / "out", source=chat_model)
    saved, before = (json.loads((path / "config.json").read_text()) for path in (folder, chat_model))
    assert [saved[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [0, [1, 5], 4]
    assert {key for key in saved if saved[key] != before[key]} == {"max_position_embeddings", "dtype", "torch_dtype"}
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "temperature": 0.6,
        "eos_token_id": [1, 5, 7],
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "e")
    assert tokenizer.unk_token == "t" and tokenizer.model_max_length == 512
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|begin|>hi"


def test_what_a_model_came_with_goes_through_every_stage(tmp_path, chat_model):
    """Conversion to a sparse layout, then an extension of that."""
    (chat_model / "additional_chat_templates").mkdir()
    kept = ["special_tokens_map.json", "chat_template.jinja", "generation_config.json", "tokenizer.json", "LICENSE"]
    kept += ["additional_chat_templates/tool.jinja"]
    for name in kept[-2:]:
        (chat_model / name).write_text(name)
    stage = chat_model
    for name, changes in (
        ("sparse", {"attention_layout": "L2V4+sink1", "block_size": 16}),
        ("longer", {"max_position_embeddings": 1024, "rope_theta": 1e6}),
    ):
        trained = load_pretrained(stage, overrides=changes)
        stage = save_pretrained(trained, trained.config, tmp_path / name, source=stage)
        for file in kept:
            read = json.loads if file == "generation_config.json" else str
            assert read((stage / file).read_text()) == read((chat_model / file).read_text()), file
        saved = json.loads((stage / "config.json").read_text())
        assert [saved[key] for key in ("model_type", "eos_token_id", "pad_token_id")] == ["s2_llama", [1, 5], 4]
        before, after = (json.loads((path / "tokenizer_config.json").read_text()) for path in (chat_model, stage))
        assert after == before | {"model_max_length": saved["max_position_embeddings"]}


COMPANIONS = ["tokenizer.model", "tokenizer.model.v3", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
TERMS = ["LICENSE", "License.md", "LICENCE-2.0", "NOTICE.txt", "USE_POLICY.md"]


@pytest.mark.parametrize("data_has_one", [True, False])
def test_a_model_with_a_slow_tokenizer_keeps_its_files(tmp_path, chat_model, tokenizer_file, data_has_one):
    """Its data brings the tokenizer.json that was made of it."""
    (chat_model / "tokenizer.json").unlink()
    (chat_model / "additional_chat_templates").mkdir()
    for name in (*COMPANIONS, *TERMS):
        (chat_model / name).write_text(name)
    ours = load_pretrained(chat_model, overrides={"max_position_embeddings": 512})
    given = tokenizer_file if data_has_one else None
    folder = save_pretrained(ours, ours.config, tmp_path / "out", given, source=chat_model)
    for name in (*COMPANIONS, *TERMS, "special_tokens_map.json"):
        assert (folder / name).read_text() == (chat_model / name).read_text(), name
    before, after = (json.loads((path / "tokenizer_config.json").read_text()) for path in (chat_model, folder))
    assert after == before | {"model_max_length": 512}
    assert (folder / "tokenizer.json").is_file() == data_has_one


def test_under_a_tokenizer_of_another_the_terms_of_the_model_stay(tmp_path, chat_model, tokenizer_file):
    for name in TERMS:
        (chat_model / name).write_text(name)
    ours = load_pretrained(chat_model)
    folder = save_pretrained(ours, ours.config, tmp_path / "out", tokenizer_file, source=chat_model)
    assert all((folder / name).read_text() == name for name in TERMS)
    assert not (folder / "chat_template.jinja").exists()


def test_token_ids_change_where_the_config_says_so_and_nowhere_else(tmp_path, chat_model):
    ended = load_pretrained(chat_model, overrides={"eos_token_id": 4})
    folder = save_pretrained(ended, ended.config, tmp_path / "out", source=chat_model)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 4
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": 4}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (0, 4, "e")


def test_a_tokenizer_that_does_not_fit_stops_the_export(tmp_path, tokenizer_file):
    small = model(vocab_size=200)
    with pytest.raises(ValueError, match=r"tokenizer.json: \d+ tokens do not fit in vocab_size=200"):
        save_pretrained(small, small.config, tmp_path / "hf", tokenizer_file)
    other = model(eos_token_id=299)
    with pytest.raises(ValueError, match="no token with id 299"):
        save_pretrained(other, other.config, tmp_path / "hf", tokenizer_file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_pretrained(other, other.config, tmp_path / "hf", tmp_path / "nowhere.json")
    assert not (tmp_path / "hf/config.json").exists()


# -------------------------------------------------------------------- errors


@pytest.fixture
def folder(tmp_path):
    ours = model()
    return save_pretrained(ours, ours.config, tmp_path / "hf", dtype=torch.float32)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing/config.json: not found"):
        load_config(tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_pretrained(folder)


def test_a_missing_shard_is_named(tmp_path):
    ours = model()
    save_pretrained(ours, ours.config, tmp_path, max_shard_size=60_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_pretrained(tmp_path)


def test_a_wrong_shape_names_tensor_both_shapes_and_folder(folder):
    with pytest.raises(ValueError) as error:
        load_pretrained(folder, overrides={"vocab_size": 310})
    for word in ("model.embed_tokens.weight", "[300, 48]", "[310, 48]", str(folder)):
        assert word in str(error.value)


def test_missing_and_unexpected_tensors_are_named(folder):
    state = load_file(folder / "model.safetensors")
    weight = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"hf: tensor 'model.layers.1.mlp.up_proj.weight' .*\[80, 48\] is missing"):
        load_pretrained(folder)
    save_file(
        {**state, "model.layers.1.mlp.up_proj.weight": weight, "extra": weight.clone()},
        folder / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"unexpected tensors.*extra"):
        load_pretrained(folder)


def test_a_head_that_a_tied_embedding_would_replace_is_refused(tmp_path):
    untied = model()
    folder = save_pretrained(untied, untied.config, tmp_path / "hf", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight.*tie_word_embeddings: true"):
        load_pretrained(folder, overrides={"tie_word_embeddings": True})
    tied = untied.config.replace(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"save_pretrained: lm_head.weight is not model.embed_tokens.weight"):
        save_pretrained(untied.state_dict(), tied, tmp_path / "other")
    state = untied.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()  # equal, and so dropped without harm
    folder = save_pretrained(state, untied.config, tmp_path / "equal", dtype=torch.float32)
    assert load_pretrained(folder, overrides={"tie_word_embeddings": True})(ids()).isfinite().all()


def test_a_head_that_is_missing_is_named_with_what_stands_in_for_it(tmp_path):
    tied = model(tie_word_embeddings=True)
    save_pretrained(tied, tied.config, tmp_path)
    with pytest.raises(ValueError, match=r"'lm_head.weight' .* is missing; with tie_word_embeddings: true"):
        load_pretrained(tmp_path, overrides={"tie_word_embeddings": False})


def test_tensors_and_files_that_the_index_leaves_out_are_named(tmp_path):
    ours = model()
    save_pretrained(ours, ours.config, tmp_path, max_shard_size=60_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    state = load_file(shard)
    save_file({**state, "extra": torch.ones(2)}, shard)
    with pytest.raises(ValueError, match=rf"{shard.name}: holds tensor 'extra'.*does not place"):
        load_state_dict(tmp_path)
    save_file(state, shard)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"/model.safetensors: model.safetensors.index.json does not list it"):
        load_state_dict(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors.index.json is missing"):
        load_state_dict(tmp_path)
    for name in ("model.safetensors", "model.fp16.safetensors"):
        shard.rename(tmp_path / name) if shard.exists() else save_file(state, tmp_path / name)
    for path in tmp_path.glob("model-*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors and model.fp16.safetensors are there"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, r"index.json: weight_map=None must be a mapping"),
        ({"model.norm.weight": None}, r"index.json: weight_map\['model.norm.weight'\]=None must be the name of a file"),
        ({"model.norm.weight": 5}, r"index.json: weight_map\['model.norm.weight'\]=5 must be the name of a file"),
        ({"model.norm.weight": "."}, r"missing, but model.safetensors.index.json lists it"),
    ],
)
def test_an_index_that_names_no_file_is_named(folder, weight_map, words):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_pretrained(folder)


def test_stored_rotary_frequencies_have_to_be_those_of_the_config(folder):
    state = load_file(folder / "model.safetensors")
    frequencies = 5e4 ** (-torch.arange(0, 8, 2) / 8)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**state, name: frequencies.to(torch.bfloat16)}, folder / "model.safetensors")
    assert name not in load_pretrained(folder).state_dict()
    save_file({**state, name: 1e6 ** (-torch.arange(0, 8, 2) / 8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"inv_freq' does not hold the rotary frequencies .*rope_theta 50000"):
        load_pretrained(folder)


def test_weights_that_are_no_numbers_are_named(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = torch.nan
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model.norm.weight' holds NaN"):
        load_pretrained(folder)
    state["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model.norm.weight' holds torch.int8; quantised"):
        load_pretrained(folder)


def test_damaged_files_are_named(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json, line 1: not valid JSON"):
        load_config(folder)


def test_an_incomplete_state_dict_is_not_saved(tmp_path):
    ours = model()
    state = ours.state_dict()
    state["model.norm.weight"] = state["model.norm.weight"][:0]  # what an ungathered ZeRO-3 shard looks like
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \[0\], but the config asks for \[48\]"):
        save_pretrained(state, ours.config, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_is_an_error_of_the_file_and_no_crash(tmp_path, small_files):
    ours = model()
    with pytest.raises(OSError, match="File too large") as raised:
        save_pretrained(ours.state_dict(), ours.config, tmp_path / "hf")
    assert raised.value.filename == str(tmp_path / "hf" / "model.safetensors")
