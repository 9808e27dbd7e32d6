"""Loss by position: each document whole and alone, every token in its bucket, intervals over documents."""

import json
import math
import random
import statistics

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from data.prepare import prepare
from data.prepare.spec import PrepareSpec
from eval.checkpoint import Checkpoint
from eval.positions import buckets, losses, main, may_have, summarise
from eval.sweep import student
from s2.inference.folder import bos_of, load_tokenizer
from tests.eval.small_checkpoint import make_checkpoint, prose


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("positions") / "hf")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    file = tmp_path_factory.mktemp("documents") / "books.jsonl"
    texts = [prose(40, 1), prose(2, 2), prose(60, 3), prose(12, 4), prose(50, 5)]
    file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    return file


def run(folder, documents, tmp_path, *arguments):
    command = ["--ckpt", str(folder), "--device", "cpu", "--documents", str(documents)]
    tmp_path.mkdir(exist_ok=True)
    main([*command, "--output", str(tmp_path / "positions.json"), *arguments])
    return json.loads((tmp_path / "positions.json").read_text())


def test_buckets_are_powers_of_two_up_to_the_length():
    assert buckets(300) == [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert buckets(128) == [(0, 64), (64, 128)] and buckets(50) == [(0, 50)]


def test_losses_are_those_of_each_token_after_all_before_it(folder):
    checkpoint = Checkpoint.load(folder, "cpu")
    tokens = [0, *checkpoint.tokenizer.encode(prose(40), add_special_tokens=False).ids][:200]
    with torch.inference_mode():
        scores = checkpoint.model(torch.tensor([tokens]))[0].log_softmax(-1)
    expected = [-scores[i - 1, tokens[i]].item() for i in range(1, 200)]
    [parts] = losses(checkpoint, [tokens])
    assert [part[:3] for part in parts] == [[0, 64, 63], [64, 128, 64], [128, 200, 72]]
    for start, stop, _, mean in parts:
        assert mean == pytest.approx(statistics.fmean(expected[max(0, start - 1) : stop - 1]), abs=1e-5)


def test_only_documents_of_the_length_are_read_each_from_its_one_bos_on(folder, documents, tmp_path):
    results = run(folder, documents, tmp_path, "--lengths", "100,256")
    by_length = {row["length"]: row for row in results["summary"]["lengths"]}
    assert [sample["id"] for sample in results["samples"]] == [
        "100/0",
        "100/2",
        "100/3",
        "100/4",
        "256/0",
        "256/2",
        "256/4",
    ]
    assert by_length[100]["documents"] == 4 and by_length[256]["tokens"] == 3 * 255
    assert results["conditions"]["bos"] == "exactly one (<|bos|>)"
    assert "cut" not in results["conditions"]  # a longer document is not a cut one
    checkpoint = Checkpoint.load(folder, "cpu")
    text = json.loads(documents.read_text().splitlines()[2])["text"]
    tokens = [bos_of(checkpoint.tokenizer), *checkpoint.tokenizer.encode(text, add_special_tokens=False).ids][:256]
    sample = next(sample for sample in results["samples"] if sample["id"] == "256/2")
    assert sample["losses"] == losses(checkpoint, [tokens])[0]


def test_documents_of_one_source_alone_are_read_where_shards_know_it(folder, documents, tmp_path):
    web = tmp_path / "web.jsonl"
    web.write_text(json.dumps({"text": prose(55, 6)}) + "\n")
    sources = [{"path": str(web), "name": "web"}, {"path": str(documents), "name": "books"}]
    tokenizer = {"path": str(folder / "tokenizer.json")}
    prepare(PrepareSpec.parse({"output": str(tmp_path / "c"), "sources": sources, "tokenizer": tokenizer}))
    shards = tmp_path / "c" / "train"
    both, books = (
        run(folder, shards, tmp_path / name, "--lengths", "256", *more)
        for name, more in (("both", []), ("books", ["--source", "books"]))
    )
    assert both["conditions"]["n"] == 4 and books["conditions"]["n"] == 3
    prompts = [{sample["prompt"] for sample in results["samples"]} for results in (both, books)]
    assert prompts[1] < prompts[0]
    assert books["settings"]["source"] == "books" and "source" not in both["settings"]
    with pytest.raises(ValueError, match=r"--source: .* has no source 'essays'; it has: web, books"):
        run(folder, shards, tmp_path / "x", "--source", "essays")
    with pytest.raises(ValueError, match=r"--source books: .*books\.jsonl is no shard folder"):
        run(folder, documents, tmp_path / "x", "--source", "books")
    main(["--ckpt", str(folder), "--device", "cpu", "--documents", str(shards), "--output", str(tmp_path / "all"),
          "--source", "books"])  # fmt: skip
    assert (tmp_path / "all" / "positions-train-of-books.json").is_file()


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_losses_of_a_folder_or_pattern_are_measured_again_when_its_texts_change(folder, tmp_path, pattern):
    texts, output = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()

    def measured():
        main(["--ckpt", str(folder), "--device", "cpu", "--documents", str(texts / pattern), "--lengths", "100",
              "--output", str(output)])  # fmt: skip
        newest = max(output.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        return newest, json.loads(newest.read_text())

    (texts / "a.jsonl").write_text(json.dumps({"text": prose(40, 1)}) + "\n")
    first, before = measured()
    again, same = measured()
    assert again == first and same["samples"] == before["samples"]
    (texts / "a.jsonl").write_text(json.dumps({"text": prose(40, 2)}) + "\n")
    second, after = measured()
    assert second != first and after["samples"][0]["prompt"] != before["samples"][0]["prompt"]
    assert after["summary"]["lengths"][0]["loss"] != before["summary"]["lengths"][0]["loss"]


def test_losses_of_another_column_are_not_those_of_the_first(folder, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": prose(40, 1), "summary": prose(40, 2)}) + "\n")
    run(folder, texts, tmp_path, "--lengths", "100")
    with pytest.raises(ValueError, match=r"positions\.json is of another checkpoint, haystack or kind"):
        run(folder, texts, tmp_path, "--lengths", "100", "--text-column", "summary")


@pytest.fixture
def encoded(monkeypatch):
    """The texts that are encoded."""
    texts: list[str] = []

    class Counting:
        def __init__(self, tokenizer):
            self._tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def encode(self, text, **options):
            texts.append(text)
            return self._tokenizer.encode(text, **options)

    monkeypatch.setattr("s2.inference.folder.load_tokenizer", lambda folder: Counting(load_tokenizer(folder)))
    return texts


def test_documents_that_cannot_be_long_enough_are_not_encoded(folder, tmp_path, encoded):
    texts = [prose(60, i) if i % 10 == 3 else prose(1, i) for i in range(40)]
    (tmp_path / "books.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    results = run(folder, tmp_path / "books.jsonl", tmp_path, "--lengths", "100,200", "--n", "3")
    names = [f"{length}/{i}" for length in (100, 200) for i in (3, 13, 23)]
    assert [sample["id"] for sample in results["samples"]] == names
    assert [text for text in encoded if text in texts] == [texts[3], texts[13], texts[23]]
    with pytest.raises(ValueError, match=r"--lengths 10240: .*\(the longest: \d{3,4}\)"):
        run(folder, tmp_path / "books.jsonl", tmp_path, "--lengths", "10k", "--beyond")


def tokenizers():
    """Of bytes, and what makes more tokens of a text than it has characters or bytes."""
    ours = Tokenizer(models.BPE())
    ours.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    ours.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    growing = Tokenizer.from_str(ours.to_str())
    growing.normalizer = normalizers.NFKC()  # makes 18 characters of one of three bytes
    marking = Tokenizer.from_str(ours.to_str())
    marking.add_tokens(["-"])  # and the prefix after each
    return {"bytes": ours, "growing": growing, "marking": marking}


@pytest.mark.parametrize("which", ["bytes", "growing", "marking"])
def test_no_document_is_skipped_that_is_long_enough(which, seed):
    tokenizer = tokenizers()[which]
    rng, may = random.Random(seed), may_have(tokenizer)
    tight = []
    for alphabet in ("a", "ab ", "大 ", "\ufdfa", "-a", "a-\ufdfa 大"):
        for size in (0, 1, 7, 40):
            text = "".join(rng.choices(alphabet, k=size))
            count = len(tokenizer.encode(text, add_special_tokens=False).ids)
            assert may(text, count), (text, count)
            tight.append(not may(text, 2 * count + 2))
    assert which == "marking" or any(tight)


def test_every_figure_has_n_perplexity_and_an_interval_over_documents():
    rows = [{"length": 128, "losses": [[0, 64, 63, a], [64, 128, 64, b]]} for a, b in ((2, 3), (3, 3), (4, 3))]
    [row] = summarise(rows)["lengths"]
    assert [bucket["loss"] for bucket in row["buckets"]] == [3, 3] and row["documents"] == 3 and row["tokens"] == 381
    half = student(2) / math.sqrt(3)
    assert row["buckets"][0]["interval"] == [round(3 - half, 5), round(3 + half, 5)]
    assert row["loss"] == pytest.approx(3) and row["perplexity"] == pytest.approx(math.e**3, abs=1e-3)
    assert summarise(rows[:1])["lengths"][0]["interval"] is None


def test_student_is_the_tabulated_distribution():
    for freedom, value in ((1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (1000, 1.962)):
        assert student(freedom) == pytest.approx(value, rel=2e-3)


def test_documents_that_are_known_are_not_read_again(folder, documents, tmp_path, monkeypatch, capsys):
    first = run(folder, documents, tmp_path, "--lengths", "100", "--n", "2")
    assert first["conditions"]["n"] == 2
    more = run(folder, documents, tmp_path, "--lengths", "100")
    assert "2 samples are there already, 2 to go" in capsys.readouterr().out
    assert more["samples"][:2] == first["samples"] and more["conditions"]["n"] == 4


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--lengths", "512"], "--lengths 512: the checkpoint reads at most 256 tokens"),
        (["--lengths", "1"], "--lengths 1: expected at least 2"),
        (["--lengths", "2k", "--beyond"], r"--lengths 2048: no document of .* has so many tokens \(the longest: \d+\)"),
        (["--n", "0"], "--n 0: expected at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, documents, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(folder, documents, tmp_path, *arguments)
