"""The tokenizer's sample is spread over all of a corpus, and the same every time."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus import sample
from data.corpus.sample import sample_texts
from data.corpus.sources import Source
from data.corpus.tokenizer import TextTokenizer, train_tokenizer

KINDS = ["jsonl", "jsonl.gz", "parquet", "txt"]


def corpus(folder, kind, texts_by_file):
    folder.mkdir(exist_ok=True)
    for name, texts in texts_by_file.items():
        file = folder / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), file, row_group_size=20)
        elif kind == "txt":
            for i, text in enumerate(texts):
                (folder / f"{name}-{i:04d}.txt").write_text(text)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
            file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    return Source(str(folder), name=folder.name)


def words(letter, count=400):
    return [f"{letter * (3 + i % 5)} " * 20 for i in range(count)]


def sampled(sources, size, seed=0, is_heldout=lambda document: False, part_bytes=8000):
    parts = [source.parts(part_bytes)[0] for source in sources]
    return list(sample_texts(sources, parts, size, seed, is_heldout))


def shares(texts):
    count = Counter("".join(texts).replace(" ", ""))
    return {letter: n / count.total() for letter, n in count.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2_000, 20_000])
def test_every_file_counts_by_its_size(tmp_path, kind, size):
    """A quarter is in files whose names come last, three quarters in those that come first."""
    source = corpus(tmp_path / "c", kind, {"a-1": words("a"), "a-2": words("b"), "a-3": words("c"), "z": words("z")})
    texts = sampled([source], size)
    assert size * 0.98 < sum(map(len, texts)) <= size
    assert shares(texts) == pytest.approx(dict.fromkeys("abcz", 0.25), abs=0.2 if size < 10_000 else 0.06)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_end_of_one_large_file_counts_like_its_beginning(tmp_path, kind):
    source = corpus(tmp_path / "c", kind, {"all": [*words("a", 2000), *words("z", 2000)]})
    for part_bytes in (10_000, 10**9):
        assert shares(sampled([source], 4_000, part_bytes=part_bytes)) == pytest.approx({"a": 0.5, "z": 0.5}, abs=0.1)


def test_only_some_of_a_large_corpus_is_looked_at(tmp_path, monkeypatch):
    source = corpus(tmp_path / "c", "jsonl", {"all": words("a", 5000)})
    read, characters = Counter(), []
    whole = Source.read

    def counted(self, part, skipped=None, **more):
        for document in whole(self, part, skipped, **more):
            read[document.id] += 1
            characters.append(len(document.text))
            yield document

    monkeypatch.setattr(Source, "read", counted)
    texts = sampled([source], 2_000, part_bytes=10**9)
    assert sum(map(len, texts)) == 2_000
    assert sum(characters) < 3 * sample.READ * 2_000, "of 500,000 characters"
    assert set(read.values()) == {1}


def test_the_sample_is_the_same_every_time_and_another_with_another_seed(tmp_path):
    source = corpus(tmp_path / "c", "jsonl", {"a": words("a"), "b": words("b")})
    assert sampled([source], 5_000) == sampled([source], 5_000)
    assert sampled([source], 5_000) != sampled([source], 5_000, seed=1)


def test_sources_share_evenly_and_what_a_small_one_lacks_goes_to_the_others(tmp_path):
    sources = [
        corpus(tmp_path / "large", "jsonl", {"a": words("a")}),
        corpus(tmp_path / "small", "jsonl", {"b": words("b", 5)}),
        corpus(tmp_path / "other", "jsonl", {"c": words("c")}),
    ]
    texts = sampled(sources, 9_000)
    assert 8_900 < sum(map(len, texts)) <= 9_000
    assert sum(text.count("b") for text in texts) == sum(text.count("b") for text in words("b", 5))
    assert sum(text.count("a") for text in texts) == pytest.approx(sum(text.count("c") for text in texts), rel=0.05)


def test_held_out_documents_and_those_beyond_a_limit_are_not_taken(tmp_path):
    corpus(tmp_path / "c", "jsonl", {"a": words("a"), "z": words("z")})
    limited = Source(str(tmp_path / "c"), name="c", max_documents=30)
    assert set(shares(sampled([limited], 10**6))) == {"a"}
    limited = Source(str(tmp_path / "c"), name="c", max_bytes=3000)
    assert sum(map(len, sampled([limited], 10**6))) <= 3000
    source = Source(str(tmp_path / "c"), name="c")
    assert set(shares(sampled([source], 10**6, is_heldout=lambda document: "/a.jsonl" in document))) == {"z"}


def test_a_document_longer_than_the_sample_gives_its_beginning(tmp_path):
    source = corpus(tmp_path / "c", "txt", {"a": ["é" * 10_000]})
    [text] = sampled([source], 1_001)
    assert text == "é" * 500


def test_a_tokenizer_knows_the_alphabets_of_all_files(tmp_path):
    """Two alphabets in files that sort apart: both get tokens longer than a byte."""
    texts = {"a": [f"hello there number {i}" for i in range(300)], "z": [f"привет номер {i}" for i in range(300)]}
    source = corpus(tmp_path / "c", "jsonl", texts)
    train_tokenizer(sampled([source], 4_000), 400, tmp_path / "tokenizer.json")
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    for text in ("hello there number 5", "привет номер 5"):
        assert len(text.encode()) / len(tokenizer.encode_documents([text])[0]) > 2
