"""Preparation: what lands in shards, when it is done again, and that an interrupted run never looks done."""

import json
from collections import Counter

import numpy as np
import pytest
import yaml

import data.prepare as prepare_module
from data.prepare import PrepareSpec, is_prepared, main, prepare
from data.shards import TokenShards
from data.sources import Source
from data.tokenizer import TextTokenizer

ROWS = [{"text": f"Text of row {i}: " + "lorem ipsum dolor ✓ " * (i % 7 + 1)} for i in range(120)]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def spec(corpus, output, **overrides):
    values = {
        "output": str(output),
        "sources": [{"path": str(corpus), "name": "c"}],
        "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 5000}},
        "heldout_fraction": 0.2,
        "shard_tokens": 400,
    }
    return PrepareSpec.parse(values | overrides)


def test_shards_hold_every_document_once_in_one_split(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "out"))
    tokenizer = TextTokenizer(tmp_path / "out" / "tokenizer.json")
    texts = []
    for split in ("train", "heldout"):
        shards = TokenShards(tmp_path / "out" / split)
        shards.verify()
        documents = [shards.read(a, b) for a, b in zip(shards.offsets, shards.offsets[1:], strict=False)]
        decoded = [tokenizer.decode(document) for document in documents]
        assert all(text.startswith("<|bos|>") and text.endswith("<|eos|>") for text in decoded)
        split_texts = [text[7:-7] for text in decoded]
        assert np.diff(shards.byte_offsets).tolist() == [len(text.encode()) for text in split_texts]
        manifest = shards.manifest
        assert manifest["documents"] == len(documents)
        assert manifest["tokens"] == sum(map(len, documents))
        assert manifest["bytes"] == sum(len(text.encode()) for text in split_texts)
        assert manifest["tokenizer"]["sha256"] == tokenizer.sha256
        assert shards.tokenizer_file == (tmp_path / "out" / "tokenizer.json").resolve()
        every = Counter(int(token) for document in documents for token in document)
        assert {t: int(n) for t, n in enumerate(shards.counts[0]) if n} == every
        assert shards.counts[1][tokenizer.bos_id] == len(documents) == shards.counts[1].sum()
        texts += split_texts
    assert len(TokenShards(tmp_path / "out" / "train").manifest["shards"]) > 3
    assert sorted(texts) == sorted(row["text"] for row in ROWS)


def test_split_depends_only_on_id_and_seed(corpus, tmp_path):
    base = spec(corpus, tmp_path)
    ids = [f"c/{i}" for i in range(20_000)]
    heldout = {i for i in ids if base.is_heldout(i)}
    assert abs(len(heldout) / len(ids) - 0.2) < 0.02
    assert {i for i in reversed(ids) if base.is_heldout(i)} == heldout
    other = spec(corpus, tmp_path, seed=1)
    assert {i for i in ids if other.is_heldout(i)} != heldout
    smaller = spec(corpus, tmp_path, heldout_fraction=0.1)
    assert {i for i in ids if smaller.is_heldout(i)} < heldout


def test_tokenizer_never_sees_heldout_text(corpus, tmp_path):
    asked = spec(corpus, tmp_path, tokenizer={"train": {"vocab_size": 300, "sample_bytes": 10**9}})
    sample = set(prepare_module._sample(asked, 10**9))
    expected = {d.text for d in Source(str(corpus), name="c").documents() if not asked.is_heldout(d.id)}
    assert sample == expected


def test_same_settings_do_nothing_and_other_settings_name_the_key(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "out"))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*")}
    prepare(spec(corpus, tmp_path / "out"))
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(ValueError, match=r"tokenizer\.train\.vocab_size: 300 != 310"):
        prepare(spec(corpus, tmp_path / "out", tokenizer={"train": {"vocab_size": 310, "sample_bytes": 5000}}))
    with pytest.raises(ValueError, match=r"sources\[0\]\.min_chars: None != 9"):
        prepare(spec(corpus, tmp_path / "out", sources=[{"path": str(corpus), "name": "c", "min_chars": 9}]))
    corpus.unlink()
    prepare(spec(corpus, tmp_path / "out"))  # the corpus may be gone by then


def test_a_brought_tokenizer_is_known_by_content(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "first"))
    file = tmp_path / "first" / "tokenizer.json"
    prepare(spec(corpus, tmp_path / "second", tokenizer={"path": str(file)}))
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == file.read_bytes()
    moved = file.rename(tmp_path / "moved.json")
    assert is_prepared(spec(corpus, tmp_path / "second", tokenizer={"path": str(moved)}))
    with pytest.raises(FileNotFoundError, match="tokenizer path"):
        prepare(spec(corpus, tmp_path / "third", tokenizer={"path": str(file)}))


@pytest.mark.parametrize("moment", ["first split", "second split"])
def test_interrupted_run_is_unfinished_and_made_again(corpus, tmp_path, monkeypatch, moment):
    writer = prepare_module.ShardWriter
    original, calls = writer.finish, []

    def finish(self, **fields):
        calls.append(self)
        if moment == "first split" or len(calls) == 2:
            raise KeyboardInterrupt
        original(self, **fields)

    asked = spec(corpus, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            prepare(asked)
    assert list((tmp_path / "out" / "train").glob("shard-*")), "the interruption should come after some writing"
    assert not is_prepared(asked)
    with pytest.raises(FileNotFoundError, match=r"unfinished \(it has no manifest.json\)"):
        TokenShards(tmp_path / "out" / "train")
    (tmp_path / "out" / "train" / "shard-00099.bin").write_bytes(b"leftover")
    prepare(asked)
    prepare(spec(corpus, tmp_path / "fresh"))
    for split in ("train", "heldout"):
        assert not list((tmp_path / "out" / split).glob("*.tmp"))
        assert not (tmp_path / "out" / split / "shard-00099.bin").exists()
        assert TokenShards(tmp_path / "out" / split).identity == TokenShards(tmp_path / "fresh" / split).identity


def test_damaged_shards_are_refused(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "out"))
    folder = tmp_path / "out" / "train"
    content = (folder / "shard-00001.bin").read_bytes()
    (folder / "shard-00001.bin").write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"shard-00001\.bin: \d+ bytes, manifest\.json says"):
        TokenShards(folder)
    (folder / "shard-00001.bin").write_bytes(content[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"shard-00001\.bin: checksum differs"):
        TokenShards(folder).verify()
    (folder / "shard-00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.bin: listed"):
        TokenShards(folder)


def test_empty_split_is_an_error(corpus, tmp_path):
    with pytest.raises(ValueError, match="no document fell into the heldout split with heldout_fraction 1e-09"):
        prepare(spec(corpus, tmp_path / "out", heldout_fraction=1e-9))
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    prepare(spec(corpus, tmp_path / "none", heldout_fraction=0))
    assert not (tmp_path / "none" / "heldout").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sources": []}, r"prepare\.sources: expected a list"),
        ({"sources": [{"pth": "x"}]}, r"prepare\.sources\[0\]: unknown key 'pth'; known keys: path"),
        ({"sources": [{"format": "text"}]}, r"prepare\.sources\[0\]: missing key 'path'"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction: 1\.0 is not in \[0, 1\)"),
        ({"tokenizer": {}}, r"prepare\.tokenizer: expected exactly one of"),
        ({"shard_tokens": 0}, r"shard_tokens: expected a whole number >= 1"),
        ({"out": "x"}, "prepare: unknown key 'out'"),
    ],
)
def test_wrong_settings_name_their_key(corpus, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        spec(corpus, tmp_path, **overrides)


def test_command_line_prepares_a_recipe_and_plain_sources(corpus, tmp_path, capsys):
    section = {
        "output": str(tmp_path / "a"),
        "sources": [str(corpus)],
        "tokenizer": {"train": {"vocab_size": 300}},
        "heldout_fraction": 0.2,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"class_path": "x", "init_args": {"prepare": section}}}))
    main(["--recipe", str(recipe)])
    main(["--sources", str(corpus), "--output", str(tmp_path / "b"), "--vocab-size", "300"])
    main(["--verify", str(tmp_path / "a" / "train")])
    out = capsys.readouterr().out
    assert "checksums match" in out
    assert "vocabulary 300" in out
    recipe.write_text("model: {}")
    with pytest.raises(ValueError, match=r"no data\.init_args\.prepare section"):
        main(["--recipe", str(recipe)])
