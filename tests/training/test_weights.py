"""Weights in and out of a training run: all of a checkpoint or an error, and the tokens that it knows."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from s2.model import ModelConfig, Transformer
from s2.model.hf import FOLDER_KIND, load_pretrained, save_pretrained
from s2.training.weights import check_same_tokens, cut_batch, export, load_into, sink_warning
from tests.eval.small_checkpoint import make_checkpoint


def model(**changes) -> Transformer:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return Transformer(ModelConfig(**{**sizes, **changes}))


def test_a_deeper_checkpoint_is_not_taken_for_a_shallower_model(tmp_path: Path) -> None:
    deep = model(num_hidden_layers=4)
    save_pretrained(deep, deep.config, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"unexpected tensors .*model.layers.2.* keys of the recipe's model.config"):
        load_into(model(), str(tmp_path / "hf"))


def test_a_head_of_its_own_is_not_replaced_by_the_embedding(tmp_path: Path) -> None:
    untied = model()
    save_pretrained(untied, untied.config, tmp_path / "hf", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        load_into(model(tie_word_embeddings=True), str(tmp_path / "hf"))
    other = model()
    load_into(other, str(tmp_path / "hf"))
    assert torch.equal(other.lm_head.weight, untied.lm_head.weight)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("weights") / "hf")


def test_data_of_another_tokenizer_is_refused_by_a_token_that_differs(tmp_path: Path, checkpoint: Path) -> None:
    data = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.save(str(data), pretty=False)  # other bytes, the same tokens
    check_same_tokens(data, str(checkpoint))
    check_same_tokens(data, str(tmp_path / "weights-alone"))
    first, second = (tokenizer.id_to_token(i) for i in (300, 301))
    text = data.read_text().replace(f'"{first}":300', f'"{first}":301').replace(f'"{second}":301', f'"{second}":300')
    data.write_text(text)
    with pytest.raises(ValueError, match=r"is token 30[01], but in .* it is 30[01]; prepare the data"):
        check_same_tokens(data, str(checkpoint))
    tokenizer.add_tokens(["another"])  # which the model has no embedding for
    tokenizer.save(str(data))
    with pytest.raises(ValueError, match=r"'another' is token \d+, but in .* it is none"):
        check_same_tokens(data, str(checkpoint))


def test_an_export_appears_whole_and_leaves_a_folder_of_others_beside_it(tmp_path: Path, checkpoint: Path) -> None:
    trained = load_pretrained(checkpoint)
    folder = tmp_path / "run" / "hf"
    (folder / "mine").mkdir(parents=True)
    export(trained, trained.config, folder, checkpoint / "tokenizer.json")
    assert (tmp_path / "run" / "hf.1" / "mine").is_dir() and not (tmp_path / "run" / "hf.partial").exists()
    (folder / "note.txt").write_text("mine")
    export(trained, trained.config, folder, tmp_path / "no-tokenizer.json", str(checkpoint))
    assert (tmp_path / "run" / "hf.2" / "note.txt").read_text() == "mine"
    assert torch.equal(load_pretrained(folder).lm_head.weight, trained.lm_head.weight)
    (tmp_path / "run" / "hf.partial").mkdir()
    (tmp_path / "run" / "hf.partial" / "mine.txt").write_text("mine")
    export(trained, trained.config, folder, checkpoint / "tokenizer.json")
    assert (tmp_path / "run" / "hf.partial.1" / "mine.txt").read_text() == "mine"
    assert FOLDER_KIND in (folder / ".s2-folder.json").read_text()


@pytest.mark.parametrize(
    ("borders", "cut"), [(None, [0, 4, 8, 10, 14, 18, 20]), ([0, 3, 3, 10, 20, 20], [0, 3, 7, 10, 14, 18, 20])]
)
def test_documents_are_cut_to_what_a_model_reads(borders: list[int] | None, cut: list[int]) -> None:
    batch = {"input_ids": torch.zeros(2, 10, dtype=torch.int64), "labels": torch.zeros(2, 10, dtype=torch.int64)}
    if borders is not None:
        batch["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
    after = cut_batch(batch, 4)
    assert after["cu_seqlens"].tolist() == cut and after["cu_seqlens"].dtype == torch.int32
    assert after["labels"] is batch["labels"] and cut_batch(batch, 10)["cu_seqlens"].tolist()[-1] == 20


@pytest.mark.parametrize(
    ("layout", "better"),
    [
        ("L8V16", "L8V16+sink1"),
        ("W4+dense0", "W4+sink1+dense0"),
        ("L8V4<64V16-inter", "L8V4<64V16+sink1-inter"),
        ("dense|L1V2", "dense|L1V2+sink1"),
        ("L2V2+sink0", "L2V2+sink1"),
        ("W4+sink00|L16V8<64+sink0-inter", "W4+sink1|L16V8<64+sink1-inter"),
        ("W16+sink2|L8V16", "W16+sink2|L8V16+sink1"),
        ("L8V4<64+sink1+dense1", None),
        ("dense", None),
    ],
)
def test_a_layout_that_takes_the_first_block_from_dense_weights_is_warned_of(layout: str, better: str | None) -> None:
    dense = model().config
    sparse = dense.replace(attention_layout=layout)
    said = sink_warning(dense, sparse, {"long": 3.25}, {"long": 3.5})
    if better is None:
        assert said == ""
    else:
        assert "long 3.2500 -> 3.5000" in said and f"model.config.attention_layout='{better}'" in said
        assert sink_warning(dense, dense.replace(attention_layout=better), {}, {}) == ""
        assert sink_warning(sparse, sparse, {}, {}) == ""
