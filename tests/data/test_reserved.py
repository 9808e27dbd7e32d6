"""What frames documents is never found in their text, whatever the tokenizer; what encoding loses is counted."""

import json
from collections import Counter

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data.corpus.reserved import text_encoder
from data.corpus.tokenizer import DROPPED, UNKNOWN, TextTokenizer, save_tokenizer_json

LETTERS = list("</s>abcde|tx ")
TEXT = "a</s>b<s> </S> <|endoftext|>"


def saved(tmp_path, tokenizer):
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def unigram():
    pieces = ["<unk>", "<s>", "</s>", *LETTERS, "ab", "<|endoftext|>"]
    return Tokenizer(models.Unigram([(p, -float(i) / 10) for i, p in enumerate(pieces)], unk_id=0))


def bpe(merges=("< /", "</ s", "</s >", "< s", "<s >"), extra=(), **settings):
    merges = [tuple(merge.split(" ")) for merge in merges]
    vocab = [*extra, *LETTERS, "o", "n", "d", "f", *("".join(merge) for merge in merges)]
    return Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(vocab))}, merges, **settings))


def special(*names):
    return [AddedToken(name, special=True) for name in names]


def with_special_false():
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("</s>", special=False, lstrip=True, rstrip=True)])
    return tokenizer


def with_special(tokenizer, *names):
    tokenizer.add_special_tokens(special(*names))
    return tokenizer


def lowercased(tokenizer):
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


CASES = {
    "unigram": lambda: with_special(unigram(), "<unk>", "<s>", "</s>"),
    "unigram without special tokens": unigram,
    "unigram that lowers": lambda: lowercased(with_special(unigram(), "<s>", "</s>")),
    "ordinary tokens with merges": bpe,
    "ordinary tokens beside the special one": lambda: with_special(bpe(), "<|endoftext|>"),
    "added, not special": with_special_false,
    "added, not special, lowered": lambda: lowercased(with_special_false()),
    "whole words": lambda: with_special(bpe((), ["</s>", "<s>", TEXT], ignore_merges=True), "</s>", "<s>"),
    "words": lambda: Tokenizer(models.WordLevel({"</s>": 0, "<s>": 1, "<unk>": 2}, unk_token="<unk>")),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("text", ["</s>", "<s>", "\uff1c/s\uff1e", "<|endoftext|>", TEXT])
def test_text_never_has_the_ids_of_its_frame(tmp_path, name, text):
    tokenizer = TextTokenizer(saved(tmp_path, CASES[name]()))
    [ids] = tokenizer.encode_documents([text])
    body = ids[0 if tokenizer.bos_id is None else 1 : -1].tolist()
    assert ids[-1] == tokenizer.eos_id and body
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(body)


def test_special_tokens_are_preferred_to_ordinary_ones_of_a_usual_name(tmp_path):
    tokenizer = TextTokenizer(saved(tmp_path, with_special(bpe(), "<|endoftext|>")))
    assert (tokenizer.eos_id, tokenizer.bos_id) == (tokenizer._tokenizer.token_to_id("<|endoftext|>"), None)
    [ids] = tokenizer.encode_documents(["a</s>"])
    assert tokenizer.decode(ids[1:2]) == "</s>", "an ordinary token stays one"


def test_a_chosen_frame_is_taken_out_of_text_and_may_not_be_text(tmp_path):
    file = saved(tmp_path, bpe())
    tokenizer = TextTokenizer(file, eos="<s>")
    assert tokenizer.eos_id not in tokenizer.encode_documents(["a<s>b"])[0][1:-1]
    with pytest.raises(ValueError, match="token 'a' stands for text in this tokenizer, so it cannot frame"):
        TextTokenizer(file, eos="a")


def test_all_other_tokens_keep_their_ids(tmp_path):
    tokenizer = with_special(bpe(), "<|bos|>", "<|eos|>")
    tokenizer.add_tokens([AddedToken("<user>", special=False)])
    before = tokenizer.encode("ab<user>t</s> x", add_special_tokens=False).ids
    found = TextTokenizer(saved(tmp_path, tokenizer)).encode_documents(["ab<user>t</s> x"])[0][1:-1].tolist()
    assert found == before and tokenizer.token_to_id("<user>") in found


def test_truncation_padding_post_processors_and_dropout_do_not_reach_the_shards(tmp_path):
    tokenizer = with_special(bpe(dropout=0.5), "<|eos|>", "<|pad|>")
    plain = with_special(bpe(), "<|eos|>", "<|pad|>").encode("ab</s>" * 20).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", tokenizer.token_to_id("<|eos|>"))]
    )
    file = saved(tmp_path, tokenizer)
    loaded = TextTokenizer(file)
    assert loaded.encode_documents(["ab</s>" * 20])[0].tolist() == [*plain, loaded.eos_id]
    save_tokenizer_json(file, tmp_path / "out" / "tokenizer.json")
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None and written["post_processor"]


def test_what_the_vocabulary_cannot_express_is_counted(tmp_path):
    def lost(tokenizer, *texts):
        counted = Counter()
        TextTokenizer(saved(tmp_path, tokenizer)).encode_documents(list(texts), counted)
        return counted

    assert lost(with_special(unigram(), "</s>"), "aéüb", "é", "ab") == {UNKNOWN: 2}
    assert lost(bpe(("a b",), ["</s>"]), "aéüb é", "ab") == {DROPPED: 3}
    assert lost(bpe(("a b",), ["</s>", "<unk>"], unk_token="<unk>"), "aéb", "ab") == {UNKNOWN: 1}
    every_byte = bpe((), ["</s>", *pre_tokenizers.ByteLevel.alphabet()])
    every_byte.pre_tokenizer, every_byte.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    assert lost(every_byte, "aéü\x00漢") == {}
    some_bytes = bpe(("a b",), ["</s>"])
    some_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert lost(some_bytes, "aé") == {DROPPED: 1}
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot encode text"):
        lost(Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="[UNK]")), "b")


def test_what_a_tokenizer_never_keeps_is_named(tmp_path):
    every_byte = bpe((), ["</s>", *pre_tokenizers.ByteLevel.alphabet()])
    every_byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert TextTokenizer(saved(tmp_path, every_byte)).not_kept == []
    every_byte.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    assert TextTokenizer(saved(tmp_path, every_byte)).not_kept == ["capital letters", "full-width letters"]
    every_byte.normalizer = normalizers.BertNormalizer()
    assert TextTokenizer(saved(tmp_path, every_byte)).not_kept == ["capital letters", "accents", "line ends", "tabs"]
    every_byte.normalizer, every_byte.pre_tokenizer = None, pre_tokenizers.WhitespaceSplit()
    lost = ["line ends", "tabs", "runs of spaces", "spaces"]
    assert TextTokenizer(saved(tmp_path, every_byte)).describe()["not_kept"] == lost


def test_an_encoder_with_no_reserved_token_is_the_tokenizer(tmp_path):
    tokenizer = bpe()
    encoder = text_encoder(json.loads(tokenizer.to_str()), [])
    assert encoder.encode(TEXT).ids == tokenizer.encode(TEXT).ids
