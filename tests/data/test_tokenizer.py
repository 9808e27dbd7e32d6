"""Tokenizers: training, framing of documents, identity, and foreign files."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from data.tokenizer import BOS, EOS, TextTokenizer, TokenizerSpec, train_tokenizer

TEXTS = [f"def function_{i}(x):\n    return x + {i}  # naïve ✓\n" for i in range(200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 400, file)
    return TextTokenizer(file)


def test_any_text_survives_a_round_trip_inside_its_frame(trained):
    text = "Zażółć 12345 \t\n\n  🙂 \x00 def f(): pass"
    [ids] = trained.encode_documents([text])
    assert (ids[0], ids[-1]) == (trained.bos_id, trained.eos_id) == (0, 1)
    assert trained.decode(ids) == BOS + text + EOS
    assert ids.dtype == np.uint16


def test_text_that_spells_a_special_token_stays_text(trained):
    [ids] = trained.encode_documents([f"the token {EOS} ends a text, {BOS} begins it"])
    assert list(ids).count(trained.eos_id) == 1
    assert list(ids).count(trained.bos_id) == 1


def test_special_token_encoding_prepends_the_bos_of_the_shards(trained):
    assert Tokenizer.from_file(str(trained.file)).encode("x").ids[0] == trained.bos_id


def test_training_is_reproducible_and_the_hash_is_the_identity(trained, tmp_path):
    train_tokenizer(TEXTS, 400, tmp_path / "same.json")
    train_tokenizer(TEXTS, 380, tmp_path / "other.json")
    assert TextTokenizer(tmp_path / "same.json").sha256 == trained.sha256
    assert TextTokenizer(tmp_path / "other.json").sha256 != trained.sha256
    assert trained.vocab_size <= 400


def foreign(tmp_path, tokens, filler=300):
    vocab = {token: i for i, token in enumerate([*tokens, *(f"w{i}" for i in range(filler))])}
    file = tmp_path / "foreign.json"
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(file))
    return file


@pytest.mark.parametrize(
    ("tokens", "bos", "eos"),
    [(["<s>", "</s>"], 0, 1), (["<|begin_of_text|>", "<|end_of_text|>"], 0, 1), (["<|endoftext|>"], None, 0)],
)
def test_usual_names_of_foreign_tokenizers_are_found(tmp_path, tokens, bos, eos):
    tokenizer = TextTokenizer(foreign(tmp_path, tokens))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)


def test_explicit_tokens_and_no_bos(tmp_path):
    file = foreign(tmp_path, ["<s>", "</s>", "<|im_end|>"])
    tokenizer = TextTokenizer(file, bos="none", eos="<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    assert tokenizer.encode_documents(["w5"])[0].tolist() == [8, 2]
    with pytest.raises(ValueError, match=r"bos token '<\?>' is not in the vocabulary"):
        TextTokenizer(file, bos="<?>")


def test_large_vocabularies_use_uint32_and_count_holes(tmp_path):
    file = foreign(tmp_path, ["</s>"], filler=65_535)
    assert TextTokenizer(file).dtype == np.uint16
    content = json.loads(file.read_text())
    content["model"]["vocab"]["far"] = 70_000
    file.write_text(json.dumps(content))
    assert TextTokenizer(file).vocab_size == 70_001
    assert TextTokenizer(file).dtype == np.uint32


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        TextTokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer\.json"):
        TextTokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no end-of-document token"):
        TextTokenizer(foreign(tmp_path, []))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of"),
        ({"train": {"vocab_size": 300}, "path": "x"}, "exactly one of"),
        ({"train": {"vocab_size": 100}}, r"train\.vocab_size: expected a whole number >= 259, got 100"),
        ({"train": {"vocab": 300}}, "unknown key 'vocab'"),
    ],
)
def test_wrong_tokenizer_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenizerSpec(**settings)
