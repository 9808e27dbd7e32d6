"""Preparation: what lands in shards, when it is done again, and what settings it takes."""

import inspect
import json
import os
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import data.prepare.part as part_module
import data.prepare.run as prepare_module
from data.corpus.sample import sample_texts
from data.corpus.sources import Source
from data.corpus.tokenizer import TextTokenizer
from data.datamodule import PackedDataModule
from data.prepare import changed_sources, is_prepared, prepare, prepare_all
from data.prepare.cli import main
from data.prepare.spec import PrepareSpec
from data.section import DataSection
from data.shards import TokenShards
from tests.data.preparing import ROWS, identities, many_parts, spec


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
        counts = shards.counts()
        assert {t: int(n) for t, n in enumerate(counts[0]) if n} == every
        assert counts[1][tokenizer.bos_id] == len(documents) == counts[1].sum()
        assert (shards.counts("c") == counts).all()
        texts += split_texts
    assert len(TokenShards(tmp_path / "out" / "train").manifest["shards"]) > 3
    assert sorted(texts) == sorted(row["text"] for row in ROWS)


def is_heldout(asked, document_id):
    return asked.place(document_id) < asked.heldout_below


def test_split_depends_only_on_id_and_seed(corpus, tmp_path):
    base = spec(corpus, tmp_path)
    ids = [f"c/{i}" for i in range(20_000)]
    heldout = {i for i in ids if is_heldout(base, i)}
    assert abs(len(heldout) / len(ids) - 0.2) < 0.02
    assert {i for i in reversed(ids) if is_heldout(base, i)} == heldout
    other = spec(corpus, tmp_path, seed=1)
    assert {i for i in ids if is_heldout(other, i)} != heldout
    smaller = spec(corpus, tmp_path, heldout_fraction=0.1)
    assert {i for i in ids if is_heldout(smaller, i)} < heldout


def test_tokenizer_never_sees_heldout_text(corpus, tmp_path):
    asked = spec(corpus, tmp_path, tokenizer={"train": {"vocab_size": 300, "sample_bytes": 10**9}})
    parts, _ = asked.sources[0].parts()
    sample = set(sample_texts(asked.sources, [parts], 10**9, asked.seed, lambda i: is_heldout(asked, i)))
    expected = {d.text for d in Source(str(corpus), name="c").documents() if not is_heldout(asked, d.id)}
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
    prepare(spec(corpus, tmp_path / "second", tokenizer={"path": str(file)}))  # finished, so it may be gone
    assert is_prepared(spec(corpus, tmp_path / "second", tokenizer={"path": str(moved)}))
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*tokenizer\.json"):
        prepare(spec(corpus, tmp_path / "third", tokenizer={"path": str(file)}))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"deduplicate": "exact"},
        {"deduplicate": {"threshold": 0.7, "words": 2}, "heldout_fraction": 0.3},
    ],
)
def test_result_does_not_depend_on_the_number_of_workers(corpora, overrides):
    prepare(many_parts(corpora, corpora / "one", workers=1, **overrides))
    prepare(many_parts(corpora, corpora / "two", workers=2, **overrides))
    assert identities(corpora / "one") == identities(corpora / "two")
    assert not (corpora / "one" / "work").exists()
    sources = TokenShards(corpora / "one" / "train").manifest["sources"]
    assert [source["name"] for source in sources] == ["a", "b"]
    assert sources[0]["files"] == 4
    if not overrides:
        assert sum(source["documents"] for source in sources) == 320
    if overrides.get("deduplicate") == "exact":
        # rows 0..149 of a, 10 repeated in a; of b rows 70..149 and 0..79 again, but with other tails
        texts = {d.text for source in many_parts(corpora, "x").sources for d in source.documents()}
        assert sum(source["documents"] for source in sources) == len(texts) < 320
        assert sum(source["skipped"].get("duplicate", 0) for source in sources) == 320 - len(texts)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("deduplicate", [None, "exact"])
def test_limits_take_the_first_documents_of_a_source(corpora, workers, deduplicate):
    for file in (corpora / "a").iterdir():  # one that would still fit after the one that does not
        file.write_text(file.read_text() + json.dumps({"text": f"short {file.name}"}) + "\n")
    sources = [
        {"path": str(corpora / "a" / "*.jsonl"), "name": "a", "max_bytes": 13_000},
        {"path": str(corpora / "b" / "*.jsonl"), "name": "b", "max_documents": 55},
    ]
    limited = spec(None, corpora / "out", sources=sources, part_bytes=2500, workers=workers, deduplicate=deduplicate)
    prepare(limited)
    wanted, seen = [], set()
    for source in limited.sources:
        size = count = 0
        for document in source.documents():
            if deduplicate is not None and document.text in seen:
                continue
            size, count = size + len(document.text.encode()), count + 1
            if size > (source.max_bytes or 10**9) or count > (source.max_documents or 10**9):
                break
            wanted.append(document.id)
            seen.add(document.text)
    assert len(wanted) > 60
    found = []
    for split in ("train", "heldout"):
        shards = TokenShards(corpora / "out" / split)
        found += [shards.origin(i)[0] for i in range(len(shards.offsets) - 1)]
        listed = {f"{shard['name']}.bin" for shard in shards.manifest["shards"]}
        assert {file.name for file in (corpora / "out" / split).glob("*.bin")} == listed
    assert sorted(found) == sorted(wanted)
    prepare(replace(limited, output=str(corpora / "other"), workers=3 - workers))
    assert identities(corpora / "other") == identities(corpora / "out")


def test_a_first_document_beyond_the_limit_is_taken(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "out", sources=[{"path": str(corpus), "max_bytes": 1}], heldout_fraction=0))
    assert TokenShards(tmp_path / "out" / "train").manifest["documents"] == 1


def test_a_wrong_column_in_the_last_source_shows_before_any_work(corpora, monkeypatch):
    monkeypatch.setattr(part_module, "_encode", lambda *a: pytest.fail("nothing should be encoded"))
    sources = [str(corpora / "a" / "*.jsonl"), {"path": str(corpora / "b" / "*.jsonl"), "text_column": "body"}]
    with pytest.raises(ValueError, match=r"b/0\.jsonl has no column 'body'; it has: text"):
        prepare(spec(None, corpora / "out", sources=sources, workers=1))


def test_a_broken_file_stops_the_run_and_is_named(corpora):
    (corpora / "b" / "2.jsonl").write_text('{"text": "fine"}\n{"text": "bro')
    with pytest.raises(ValueError, match=r"b/2\.jsonl, line 2: not valid JSON"):
        prepare(many_parts(corpora, corpora / "out", workers=2))
    assert not (corpora / "out" / "train" / "manifest.json").exists()


@pytest.mark.nightly
def test_empty_and_100_mb_documents(tmp_path):
    line = "line of a very long document, number 12345 ✓\n"
    huge = line * (100_000_000 // len(line.encode()))
    rows = [{"text": ""}, {"text": huge}, {"text": "end"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = {"train": {"vocab_size": 400, "sample_bytes": 50_000}}
    source = str(tmp_path / "c.jsonl")
    prepare(spec(None, tmp_path / "out", heldout_fraction=0, sources=[source], tokenizer=trained, shard_tokens=1 << 24))
    shards = TokenShards(tmp_path / "out" / "train")
    tokenizer = TextTokenizer(shards.tokenizer_file)
    assert shards.manifest["sources"][0]["skipped"] == {"short": 1}
    assert len(shards.offsets) == 3
    end = int(shards.offsets[1]) - 1
    assert int(shards.byte_offsets[1]) == len(huge.encode()) > 99_000_000
    for begin, text in ((1, huge[:500]), (end - 400, huge[-500:])):
        assert tokenizer.decode(shards.read(begin, begin + 400))[-100:] in text


def test_a_source_without_documents_is_named(corpora):
    (corpora / "empty.jsonl").write_text("\n\n")
    (corpora / "blank.jsonl").write_text('{"text": ""}\n')
    whys = {"empty": "it has no rows", "blank": "no document is left of it; left out: 1 shorter than min_chars"}
    for name, why in whys.items():
        with pytest.raises(ValueError, match=rf"{name}\.jsonl': {why}"):
            prepare(spec(None, corpora / name, sources=[str(corpora / f"{name}.jsonl")], heldout_fraction=0))


def test_near_duplicates_go_and_the_first_stays(tmp_path):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(2000)]
    texts = []
    for i in range(30):
        text = rng.choice(words, size=400).tolist()
        texts.append(" ".join(text))
        if i % 3 == 0:
            texts.append(" ".join([*text[:-4], "another", "end", "of", "it"]))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    common = {"sources": [{"path": str(tmp_path / "c.jsonl"), "name": "c"}], "heldout_fraction": 0}
    prepare(spec(None, tmp_path / "exact", deduplicate="exact", **common))
    assert TokenShards(tmp_path / "exact" / "train").manifest["documents"] == 40
    prepare(spec(None, tmp_path / "near", deduplicate="near", **common))
    shards = TokenShards(tmp_path / "near" / "train")
    assert shards.manifest["sources"][0]["skipped"] == {"near duplicate": 10}
    tokenizer = TextTokenizer(shards.tokenizer_file)
    kept = [
        tokenizer.decode(shards.read(int(a), int(b)))[7:-7]
        for a, b in zip(shards.offsets, shards.offsets[1:], strict=False)
    ]
    assert kept == [text for text in texts if not text.endswith("another end of it")]


def test_damaged_shards_are_refused(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "out"))
    folder = tmp_path / "out" / "train"
    content = (folder / "shard-000-00000-001.bin").read_bytes()
    (folder / "shard-000-00000-001.bin").write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"shard-000-00000-001\.bin: \d+ bytes, manifest\.json says"):
        TokenShards(folder)
    (folder / "shard-000-00000-001.bin").write_bytes(content[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"shard-000-00000-001\.bin: checksum differs"):
        TokenShards(folder).verify()
    (folder / "shard-000-00000-001.bin").write_bytes(content)
    for name in ("shard-000-00000-001.parquet", "counts.npy", "../tokenizer.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"{Path(name).name}: checksum differs"):
            TokenShards(folder).verify()
        (folder / name).write_bytes(before)
    TokenShards(folder).verify()
    offsets = (folder / "shard-000-00000-000.npy").read_bytes()
    (folder / "shard-000-00000-000.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-000-00000-000\.npy: not readable"):
        TokenShards(folder)
    (folder / "shard-000-00000-000.npy").write_bytes(offsets)
    (folder / "shard-000-00000-001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000-00000-001\.bin: listed"):
        TokenShards(folder)


@pytest.mark.parametrize(("fraction", "said"), [(1e-9, "is held out"), (1 - 1e-9, "is trained on")])
@pytest.mark.parametrize("deduplicate", [None, "exact"])
def test_a_small_corpus_has_a_document_in_either_split(corpus, tmp_path, capfd, fraction, said, deduplicate):
    prepare(spec(corpus, tmp_path / "out", heldout_fraction=fraction, deduplicate=deduplicate))
    assert re.search(
        rf"out: of 120 documents .* falls? below heldout_fraction .*, so one {said}: c/", capfd.readouterr().err
    )
    sizes = [TokenShards(tmp_path / "out" / split).manifest["documents"] for split in ("train", "heldout")]
    assert sorted(sizes) == [1, 119]
    prepare(spec(corpus, tmp_path / "none", heldout_fraction=0))
    assert not (tmp_path / "none" / "heldout").exists()


def test_a_single_document_is_refused_before_it_is_tokenized(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("A book.")
    asked = spec(tmp_path / "book.txt", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "train_tokenizer", lambda *a: pytest.fail("too late"))
        with pytest.raises(ValueError, match=r"out: the corpus is a single document, .*set heldout_fraction to 0"):
            prepare(asked)
    prepare(asked, only_tokenizer=True)
    prepare(spec(tmp_path / "book.txt", tmp_path / "out", heldout_fraction=0))
    assert TokenShards(tmp_path / "out" / "train").manifest["documents"] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sources": ["nowhere/*.jsonl"]}, r"source path 'nowhere/\*\.jsonl': no such file"),
        ({"tokenizer": {"path": "nowhere/tokenizer.json"}}, r"nowhere/tokenizer\.json"),
        ({"output": "finished", "seed": 3}, r"finished/train was prepared with other settings \(seed: 0 != 3"),
        ({"output": "notes.txt"}, r"output notes\.txt is not a folder"),
    ],
)
def test_what_would_stop_a_later_preparation_shows_before_the_first_begins(
    wrong, message, corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    prepare(spec(corpus, "finished"))
    Path("notes.txt").write_text("mine")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_all([spec(corpus, "first"), spec(corpus, **{"output": "second"} | wrong)])
    assert not Path("first").exists()


@pytest.mark.parametrize("tokenizer", ["first/tokenizer.json", "brought/tokenizer.json"])
def test_a_later_preparation_may_read_what_an_earlier_one_makes(tokenizer, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(spec(corpus, "brought"), only_tokenizer=True)
    rows = (json.dumps({"text": f"line {i} of a text\n" * 20}) for i in range(20))
    Path("lines.jsonl").write_text("\n".join(rows))  # what fills documents has lines
    facts = {"documents": 4, "facts": [2, 3], "chars": [200, 300], "filler": "first/train"}
    second = {"sources": [{"path": "retrieval", "retrieval": facts}], "tokenizer": {"path": tokenizer}}
    asked = [spec("lines.jsonl", "first"), spec(None, "second", **second, heldout_fraction=0)]
    prepare_all(asked)
    assert all(map(is_prepared, asked))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sources": []}, r"prepare\.sources: expected a list"),
        (
            {"sources": [{"pth": "x"}]},
            r"prepare\.sources\[0\]: unknown key 'pth'; known keys: path.* \(did you mean 'path'\?\)",
        ),
        ({"sources": [{"format": "text"}]}, r"prepare\.sources\[0\]: missing key 'path'"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction: expected a number of \[0, 1\), got 1\.0"),
        ({"tokenizer": {}}, r"prepare\.tokenizer: expected exactly one of"),
        ({"shard_tokens": 0}, r"shard_tokens: expected a whole number >= 1"),
        ({"out": "x"}, "prepare: unknown key 'out'"),
        ({"workers": 0}, r"prepare\.workers: expected a whole number >= 1"),
        ({"deduplicate": "fuzzy"}, r"prepare\.deduplicate: unknown 'fuzzy'; known: exact, near"),
        ({"deduplicate": {"threshold": 2}}, r"deduplicate\.threshold: expected a number between 0 and 1, got 2"),
        ({"deduplicate": {"threshold": 0.999, "permutations": 16}}, r"deduplicate\.threshold: 0\.999 with 16 perm"),
        ({"heldout_fraction": "a tenth"}, r"prepare\.heldout_fraction: expected a number, got 'a tenth'"),
        ({"seed": "x"}, r"prepare\.seed: expected a whole number, got 'x'"),
        ({"shard_tokens": "5e6"}, r"prepare\.shard_tokens: expected a whole number, got '5e6'"),
        ({"sources": [{"path": 5}]}, r"prepare\.sources\[0\]\.path: expected text, got 5"),
        ({"sources": [{"path": "x", "keep": 3}]}, r"prepare\.sources\[0\]\.keep: expected a mapping"),
        (
            {"sources": [{"path": "x", "on_bad_row": "no"}]},
            r"sources\[0\]\.on_bad_row: expected stop, skip or null, got 'no'",
        ),
        ({"on_bad_row": "warn"}, r"prepare\.on_bad_row: expected stop or skip, got 'warn'"),
        ({"tokenizer": {"path": 5}}, r"prepare\.tokenizer\.path: expected text or null, got 5"),
        ({"heldout_fractoin": 0.1}, r"unknown key 'heldout_fractoin'; .* \(did you mean 'heldout_fraction'\?\)"),
        (
            {"sources": ["a/data.jsonl", "b/data.jsonl"]},
            r"sources\[1\]: the name 'data\.jsonl' occurs twice; set `name`",
        ),
        ({"deduplicate": {"bands": 2}}, r"prepare\.deduplicate: unknown key 'bands'"),
    ],
)
def test_wrong_settings_name_their_key(corpus, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        spec(corpus, tmp_path, **overrides)


@pytest.mark.parametrize(("output", "message"), [(5, "expected text, got 5"), ("", "expected the folder to write")])
def test_a_wrong_output_is_named(output, message):
    values = {"output": output, "sources": ["x"], "tokenizer": {"train": {"vocab_size": 300}}}
    with pytest.raises(ValueError, match=rf"prepare\.output: {message}"):
        PrepareSpec.parse(values)


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
    plain = ["--sources", str(corpus), "--vocab-size", "300", "--heldout-fraction", "0.2"]
    main([*plain, "--output", str(tmp_path / "b"), "--eos", "<|pad|>", "--bos", "none"])
    main(["--verify", str(tmp_path / "a" / "train")])
    out = capsys.readouterr().out
    assert "checksums match" in out
    main(["--verify", str(tmp_path / "a")])  # all that was prepared
    verified = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in verified] == [str(tmp_path / "a" / name) for name in ("train", "heldout")]
    assert all(line.endswith(": checksums match") for line in verified)
    assert "vocabulary 300" in out
    tokenizer = TokenShards(tmp_path / "b" / "train").manifest["tokenizer"]
    assert (tokenizer["bos_id"], tokenizer["eos_id"]) == (None, 2)
    recipe.write_text("model: {}")
    with pytest.raises(ValueError, match=r"no data\.init_args\.prepare section"):
        main(["--recipe", str(recipe)])


def test_shards_of_plain_sources_are_those_of_a_recipe_with_overrides(corpus, tmp_path, monkeypatch, capfd):
    """`make data SOURCES=...`, then a recipe without names and with relative paths."""
    monkeypatch.chdir(tmp_path)
    main(["--sources", str(corpus), "--output", "out", "--vocab-size", "300", "--heldout-fraction", "0.2"])
    before = (tmp_path / "out" / "train" / "manifest.json").stat().st_mtime_ns
    section = {
        "output": "out",
        "sources": [{"path": "hf://nobody/nothing"}],
        "tokenizer": {"train": {"vocab_size": 300}},
    }
    recipe = tmp_path / "recipe.yaml"
    data = {"class_path": "data.datamodule.PackedDataModule", "init_args": {"seq_len": 8, "prepare": section}}
    recipe.write_text(yaml.safe_dump({"data": data, "trainer": {}}))
    overrides = ["data.prepare.sources=[corpus.jsonl]", "data.prepare.heldout_fraction=2e-1", "trainer.max_steps=3"]
    main(["--recipe", str(recipe), *overrides])
    assert (tmp_path / "out" / "train" / "manifest.json").stat().st_mtime_ns == before
    for wrong, message in (
        ("data.prepar.sources=[x]", r"unknown key data\.prepar on the command line; did you mean data\.prepare\?"),
        ("dat.prepare.sources=[x]", r"unknown key dat on the command line; did you mean data\?"),
        ("data.prepare.source=[x]", r"data\.prepare: unknown key 'source'; .* \(did you mean 'sources'\?\)"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["--recipe", str(recipe), wrong])
    with pytest.raises(SystemExit):
        main(["--recipe", str(recipe), "--bogus=1"])


def test_the_known_keys_of_data_are_those_of_the_datamodule():
    assert set(inspect.signature(PackedDataModule).parameters) == {field.name for field in fields(DataSection)}


def test_a_folder_with_a_tokenizer_counts_as_its_file(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "first"))
    (tmp_path / "hf").mkdir()
    with pytest.raises(FileNotFoundError, match=r"hf': the folder holds no tokenizer\.json and no tokenizer\.model"):
        spec(corpus, tmp_path / "second", tokenizer={"path": str(tmp_path / "hf")})
    (tmp_path / "hf" / "tokenizer.json").write_bytes((tmp_path / "first" / "tokenizer.json").read_bytes())
    prepare(spec(corpus, tmp_path / "second", tokenizer={"path": str(tmp_path / "hf")}))
    assert is_prepared(spec(corpus, tmp_path / "second", tokenizer={"path": str(tmp_path / "hf" / "tokenizer.json")}))


@pytest.mark.parametrize("change", ["changed", "new", "gone"])
def test_a_change_of_the_sources_after_the_end_is_said(corpora, capfd, change):
    asked = many_parts(corpora, corpora / "out")
    prepare(asked)
    before = identities(corpora / "out")
    os.utime(corpora / "a" / "1.jsonl")  # touched alone
    assert changed_sources(asked) == []
    file = corpora / "a" / {"changed": "0.jsonl", "new": "9.jsonl", "gone": "0.jsonl"}[change]
    if change == "gone":
        file.unlink()
    else:
        file.write_text('{"text": "another"}\n')
    capfd.readouterr()
    prepare(asked)  # training goes on
    assert re.search(
        rf"out: the sources are not what was prepared: .*{file.name} (has|is) {change}", capfd.readouterr().err
    )
    assert identities(corpora / "out") == before


def test_make_data_refuses_changed_sources_and_names_them(corpus, tmp_path):
    command = ["--sources", str(corpus), "--output", str(tmp_path / "out"), "--vocab-size", "300"]
    main(command)
    main(command)
    corpus.write_text(corpus.read_text() + '{"text": "more"}\n')
    with pytest.raises(
        ValueError, match=r"corpus\.jsonl has changed\. To prepare them as they are now, choose another"
    ):
        main(command)


def test_behind_a_limit_files_may_change(corpora):
    sources = [{"path": str(corpora / "a" / "*.jsonl"), "name": "a", "max_documents": 50}]
    asked = spec(None, corpora / "out", sources=sources, part_bytes=4000)
    prepare(asked)
    (corpora / "a" / "3.jsonl").write_text("")
    (corpora / "a" / "9.jsonl").write_text("")
    assert changed_sources(asked) == []
    (corpora / "a" / "00.jsonl").write_text("")
    assert changed_sources(asked) == [f"{corpora}/a/00.jsonl is new"]


def test_the_same_sources_from_another_working_folder_are_the_same(corpus, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(corpus.parent)
    prepare(spec(corpus.name, tmp_path / "out"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert is_prepared(spec(corpus, tmp_path / "out"))
    assert is_prepared(spec(os.path.relpath(corpus), tmp_path / "out"))
    with pytest.raises(ValueError, match=r"sources\[0\]\.path: '.*' != '.*other\.jsonl'"):
        is_prepared(spec(tmp_path / "other.jsonl", tmp_path / "out"))


def test_a_change_of_the_sources_is_said_in_another_working_folder_too(corpus, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(corpus.parent)
    prepare(spec(corpus.name, tmp_path / "out"))
    with corpus.open("a") as stream:
        stream.write('{"text": "one more"}\n')
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert changed_sources(spec(corpus, tmp_path / "out")) == [f"{corpus} has changed"]


def test_the_home_folder_is_written_as_in_a_shell(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prepare(spec(corpus, "~/out"))
    assert (tmp_path / "out" / "train" / "manifest.json").is_file()
    assert not (tmp_path / "~").exists()
    brought = spec(corpus, "~/second", tokenizer={"path": "~/out/tokenizer.json"})
    prepare(brought)
    data = PackedDataModule(8, 1, [{"path": "~/out/train"}], [{"name": "h", "path": "~/out/heldout"}])
    assert [data.components[0].path, data.heldout_sets[0].path] == [f"{tmp_path}/out/train", f"{tmp_path}/out/heldout"]


@pytest.mark.parametrize("tokenizer", [{"path": "{}", "eos": "nope"}, {"path": "broken.json"}])
def test_a_wrong_tokenizer_shows_before_the_corpus_is_read(corpus, tmp_path, monkeypatch, tokenizer):
    prepare(spec(corpus, tmp_path / "first"), only_tokenizer=True)
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    wrong = tokenizer | {"path": tokenizer["path"].format(tmp_path / "first" / "tokenizer.json")}
    with pytest.raises(ValueError, match=r"'nope' is not in the vocabulary|broken\.json: not a tokenizer"):
        prepare(spec(corpus, tmp_path / "out", tokenizer=wrong, deduplicate="exact"))
    assert not (tmp_path / "out").exists()


def test_a_trained_tokenizer_has_only_its_own_special_tokens(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.eos: '</s>' is none of a trained tokenizer's"):
        spec(corpus, tmp_path, tokenizer={"train": {"vocab_size": 300}, "eos": "</s>"})


@pytest.mark.parametrize("path", ["", " ", "hf://"])
def test_a_source_without_a_path_is_refused(tmp_path, path):
    with pytest.raises(ValueError, match=rf"sources\[0\]\.path: expected a file, a folder or a dataset, got '{path}'"):
        spec(None, tmp_path / "out", sources=[path])


def test_a_source_that_is_named_twice_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    with pytest.raises(ValueError, match="is named 2 times"):
        main(["--sources", str(corpus), f"./{corpus.name}", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("key", ["mixture", "validation"])
def test_what_nothing_reads_is_not_prepared(key):
    """As when `output` is changed on the command line and the paths of the mixture are not."""
    source = {"sources": ["a.jsonl"], "tokenizer": {"path": "books/tokenizer.json"}}
    sections = [source | {"output": "books"}, source | {"output": "web"}]
    paths = {"mixture": [{"path": "books/train"}], "validation": [{"name": "a", "path": "books/heldout"}]}
    with pytest.raises(ValueError, match=r"data\.prepare: nothing reads what is prepared in web: .* books/train;"):
        PackedDataModule(8, 1, prepare=sections, **paths)
    paths[key].append({"name": "b", "path": "./web/train"} if key == "validation" else {"path": "./web/train"})
    assert len(PackedDataModule(8, 1, prepare=sections, **paths).section.specs) == 2
    assert len(PackedDataModule(8, 1, prepare=sections).section.components) == 2


def test_a_mixture_takes_no_source_that_is_not_prepared():
    prepare = {"output": "d", "sources": ["a.jsonl", {"path": "b.jsonl", "name": "b"}], "tokenizer": {"path": "t.json"}}
    mixture = [{"path": "./d/train", "source": "b"}, {"path": "d/train", "source": "a"}]
    with pytest.raises(ValueError, match=r"data\.mixture\[1\]\.source: 'a' is none of .*: a\.jsonl, b;"):
        PackedDataModule(8, 1, mixture=mixture, validation=[], prepare=prepare)
    mixture[1]["source"] = "a.jsonl"
    PackedDataModule(8, 1, mixture=mixture, validation=[], prepare=prepare)
