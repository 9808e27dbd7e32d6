"""Preparation: what lands in shards, when it is done again, and that an interrupted run never looks done."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import data.prepare as prepare_module
import data.work as work_module
from data.prepare import is_prepared, main, prepare
from data.shards import ShardWriter, TokenShards
from data.sources import Source
from data.spec import PrepareSpec
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
        counts = shards.counts()
        assert {t: int(n) for t, n in enumerate(counts[0]) if n} == every
        assert counts[1][tokenizer.bos_id] == len(documents) == counts[1].sum()
        assert (shards.counts("c") == counts).all()
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
    parts, _ = asked.sources[0].parts()
    sample = set(prepare_module._sample(asked, [parts], 10**9))
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
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*tokenizer\.json"):
        prepare(spec(corpus, tmp_path / "third", tokenizer={"path": str(file)}))


def identities(output):
    """What tells two outputs apart: tokens, counts and origins of both splits."""
    found = []
    for split in ("train", "heldout"):
        shards = TokenShards(output / split)
        shards.verify()
        origins = [shards.origin(i) for i in range(len(shards.offsets) - 1)]
        found.append((shards.identity, shards.counts().tolist(), origins, shards.manifest["sources"]))
    return found


@pytest.fixture
def corpora(tmp_path):
    """Two sources in several files with duplicates inside and between them."""
    for name, begin in (("a", 0), ("b", 70)):
        (tmp_path / name).mkdir()
        for number in range(4):
            rows = [f"Text of row {i % 150}: " + "lorem ipsum ✓ " * (i * 7 % 23) for i in range(begin, begin + 40)]
            begin += 40
            file = tmp_path / name / f"{number}.jsonl"
            file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path


def many_parts(corpora, output, **overrides):
    sources = [{"path": str(corpora / name / "*.jsonl"), "name": name} for name in "ab"]
    return spec(None, output, sources=sources, part_bytes=4000, **overrides)


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


KILLED_AT_EVERY_STEP = """
import json, os, pathlib, signal, sys
import data.prepare, data.shards
from data.spec import PrepareSpec
values = json.loads(sys.argv[1])

def run(step):
    # A process that is killed just before the given atomic step; None lets it finish.
    pid = os.fork()
    if pid == 0:
        count, replace = [0], pathlib.Path.replace
        def killing(self, target):
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return replace(self, target)
        pathlib.Path.replace = killing
        data.prepare.prepare(PrepareSpec.parse(values))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

step, output = 0, values["output"]
while True:
    values["output"] = f"{output}/{step}"
    code = run(step)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    assert not (pathlib.Path(values["output"]) / "train" / "manifest.json").exists()
    assert run(None) == 0
    step += 1
print(step)
"""


@pytest.mark.slow
def test_killed_at_any_step_it_goes_on_and_ends_the_same(corpora):
    values = {
        "output": str(corpora / "killed"),
        "sources": [{"path": str(corpora / name / "*.jsonl"), "name": name} for name in "ab"],
        "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 5000}},
        "deduplicate": "exact",
        "heldout_fraction": 0.2,
        "part_bytes": 1_000_000,
        "workers": 1,
    }
    prepare(PrepareSpec.parse(values | {"output": str(corpora / "whole")}))
    whole = identities(corpora / "whole")
    result = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_STEP, json.dumps(values)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    outputs = list((corpora / "killed").iterdir())
    assert len(outputs) > 20
    for output in outputs:
        assert identities(output) == whole, output
        assert {f.name for f in output.iterdir()} == {"train", "heldout", "tokenizer.json", ".lock"}
        assert not list(output.rglob("*.tmp"))


def command(output, corpora, *more):
    sources = [str(corpora / name / "*.jsonl") for name in "ab"]
    return [
        sys.executable,
        "-m",
        "data.prepare",
        "--output",
        str(output),
        "--vocab-size",
        "300",
        *more,
        "--sources",
        *sources,
    ]


@pytest.mark.slow
def test_killed_parent_takes_its_workers_along_and_another_run_finishes(corpora):
    for name in "ab":
        for file in (corpora / name).iterdir():
            file.write_text(file.read_text() * 15)
    values = command(corpora / "out", corpora, "--workers", "2", "--part-bytes", "30000")
    root = Path(__file__).parents[2]
    process = subprocess.Popen(values, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    work = corpora / "out" / "work"
    deadline = time.monotonic() + 60
    while not list(work.glob("0*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    process.wait()
    assert workers and not (corpora / "out" / "train" / "manifest.json").exists()
    done = {file.name: file.stat().st_mtime_ns for file in work.glob("0*.json")}
    again = subprocess.run(values, cwd=root, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert done, "some parts should have been done"
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    other = subprocess.run(
        [v if v != str(corpora / "out") else str(corpora / "whole") for v in values], cwd=root, capture_output=True
    )
    assert other.returncode == 0
    assert identities(corpora / "out") == identities(corpora / "whole")


@pytest.mark.slow
def test_two_processes_preparing_the_same_data_take_turns(corpora):
    root = Path(__file__).parents[2]
    values = command(corpora / "out", corpora, "--workers", "1")
    both = [subprocess.Popen(values, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "12"]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    alone = subprocess.run(command(corpora / "alone", corpora, "--workers", "2"), cwd=root, capture_output=True)
    assert alone.returncode == 0
    assert identities(corpora / "out") == identities(corpora / "alone")


def test_finished_parts_are_not_done_again(corpora, monkeypatch):
    asked = many_parts(corpora, corpora / "out", workers=1)
    encode, done = work_module._encode, []

    def stops_at_the_fourth(task):
        if len(done) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(task.name)
        return encode(task)

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "_encode", stops_at_the_fourth)
        with pytest.raises(OSError, match=r"the disk is full .*make room and run again, finished parts are kept"):
            prepare(asked)
    assert not is_prepared(asked)
    again = []
    monkeypatch.setattr(work_module, "_encode", lambda task: again.append(task.name) or encode(task))
    prepare(asked)
    assert len(done) == 3 and again and not set(done) & set(again)


def test_a_disk_that_fills_while_a_shard_is_written_leaves_nothing_of_the_part(corpora, monkeypatch):
    asked = many_parts(corpora, corpora / "out", workers=1)
    add = ShardWriter.add

    def full(self, *arguments):
        add(self, *arguments)
        if self.prefix.endswith("00002"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(OSError, match="the disk is full"):
            prepare(asked)
    assert list((corpora / "out" / "train").glob("shard-000-00001-*"))
    for split in ("train", "heldout"):
        assert not list((corpora / "out" / split).glob("shard-000-00002-*"))
        with pytest.raises(FileNotFoundError, match=r"unfinished \(it has no manifest.json\)"):
            TokenShards(corpora / "out" / split)
    prepare(asked)
    prepare(many_parts(corpora, corpora / "whole"))
    assert identities(corpora / "out") == identities(corpora / "whole")


@pytest.mark.parametrize("change", ["settings", "file"])
def test_a_run_interrupted_before_any_part_was_done_may_change(corpora, monkeypatch, change):
    def interrupted(task):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "_encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(many_parts(corpora, corpora / "out", workers=1))
    (corpora / "out" / "train").mkdir(exist_ok=True)
    (corpora / "out" / "train" / "shard-009-00000-000.bin").write_bytes(b"leftover")
    (corpora / "out" / "train" / "mine.txt").write_text("not of the preparation")
    overrides = {"shard_tokens": 900} if change == "settings" else {}
    if change == "file":
        (corpora / "a" / "0.jsonl").write_text('{"text": "another text"}\n')
    prepare(many_parts(corpora, corpora / "out", **overrides))
    prepare(many_parts(corpora, corpora / "whole", **overrides))
    assert identities(corpora / "out") == identities(corpora / "whole")
    assert (corpora / "out" / "train" / "mine.txt").exists()
    assert not (corpora / "out" / "train" / "shard-009-00000-000.bin").exists()


def interrupt_after(parts, monkeypatch, asked):
    """Prepare until some parts are done, then fail."""
    encode, done = work_module._encode, []

    def fails(task):
        if len(done) == parts:
            raise KeyboardInterrupt
        done.append(task.name)
        return encode(task)

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "_encode", fails)
        with pytest.raises(KeyboardInterrupt):
            prepare(asked)
    return done


@pytest.mark.parametrize("change", ["settings", "changed file", "added file"])
def test_done_parts_are_not_thrown_away_for_a_change_without_asking(corpora, monkeypatch, change):
    done = interrupt_after(3, monkeypatch, many_parts(corpora, corpora / "out", workers=1))
    file = corpora / "a" / ("0.jsonl" if change == "changed file" else "9.jsonl")
    before = file.read_bytes() if file.exists() else None
    stat = file.stat() if file.exists() else None
    if change != "settings":
        file.write_text('{"text": "another text"}\n')
    expected = {"settings": "shard_tokens: 400 != 900"}.get(change, file.name.replace(".", r"\."))
    overrides = {"shard_tokens": 900} if change == "settings" else {}
    with pytest.raises(ValueError, match=rf"an interrupted preparation is here, .*{expected}.*delete .*work to start"):
        prepare(many_parts(corpora, corpora / "out", **overrides))
    if before is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(before)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = []
    encode = work_module._encode
    monkeypatch.setattr(work_module, "_encode", lambda task: again.append(task.name) or encode(task))
    prepare(many_parts(corpora, corpora / "out", workers=1))
    assert again and not set(again) & set(done)


def test_a_wrong_column_in_the_last_source_shows_before_any_work(corpora, monkeypatch):
    monkeypatch.setattr(work_module, "_encode", lambda task: pytest.fail("nothing should be encoded"))
    sources = [str(corpora / "a" / "*.jsonl"), {"path": str(corpora / "b" / "*.jsonl"), "text_column": "body"}]
    with pytest.raises(ValueError, match=r"b/0\.jsonl has no column 'body'; it has: text"):
        prepare(spec(None, corpora / "out", sources=sources, workers=1))


def test_parts_of_another_tokenizer_are_made_again(corpora, monkeypatch):
    """A user replaces tokenizer.json between two attempts, in one process: no part keeps the old ids."""
    asked = many_parts(corpora, corpora / "out", workers=1, heldout_fraction=0)
    done = interrupt_after(3, monkeypatch, asked)
    prepare(many_parts(corpora, corpora / "x", tokenizer={"train": {"vocab_size": 280}}, heldout_fraction=0))
    (corpora / "out" / "tokenizer.json").write_bytes((corpora / "x" / "tokenizer.json").read_bytes())
    prepare(asked)
    shards = TokenShards(corpora / "out" / "train")
    shards.verify()
    tokenizer = TextTokenizer(shards.tokenizer_file)
    texts = [d.text for source in asked.sources for d in source.documents()]
    assert done
    for i, text in enumerate(texts):
        assert tokenizer.decode(shards.read(int(shards.offsets[i]), int(shards.offsets[i + 1])))[7:-7] == text


def test_folders_hold_only_what_the_manifest_lists(corpora):
    asked = many_parts(corpora, corpora / "out", workers=1)
    (corpora / "out" / "train").mkdir(parents=True)
    for name in ("shard-000-00099-000.bin", "shard-000-00000-007.npy", "shard-000-00000-000.bin.tmp"):
        (corpora / "out" / "train" / name).write_bytes(b"of an earlier attempt")
    prepare(asked)
    shards = TokenShards(corpora / "out" / "train").manifest["shards"]
    wanted = {f"{shard['name']}{end}" for shard in shards for end in (".bin", ".npy", ".parquet")}
    assert {file.name for file in (corpora / "out" / "train").iterdir()} == wanted | {"manifest.json", "counts.npy"}


def test_a_worker_that_dies_is_reported(corpora, monkeypatch):
    monkeypatch.setattr(prepare_module, "encode_part", die)
    with pytest.raises(RuntimeError, match="a worker process was killed, perhaps for memory; run again"):
        prepare(many_parts(corpora, corpora / "out", workers=2))


def die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_broken_file_stops_the_run_and_is_named(corpora):
    (corpora / "b" / "2.jsonl").write_text('{"text": "fine"}\n{"text": "bro')
    with pytest.raises(ValueError, match=r"b/2\.jsonl, line 2: not valid JSON"):
        prepare(many_parts(corpora, corpora / "out", workers=2))
    assert not (corpora / "out" / "train" / "manifest.json").exists()


@pytest.mark.slow
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
    for name, why in (("empty", "it has no rows"), ("blank", r"1 short")):
        with pytest.raises(ValueError, match=rf"{name}\.jsonl': no documents \({why}\)"):
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
        ({"workers": 0}, r"prepare\.workers: expected a whole number >= 1"),
        ({"deduplicate": "fuzzy"}, r"prepare\.deduplicate: unknown 'fuzzy'; known: exact, near"),
        ({"deduplicate": {"threshold": 2}}, r"prepare\.deduplicate: threshold: 2 is not in \(0, 1\)"),
        ({"deduplicate": {"threshold": 0.999, "permutations": 16}}, r"deduplicate: threshold: 0\.999 with 16 perm"),
        ({"heldout_fraction": "a tenth"}, r"prepare\.heldout_fraction: 'a tenth' is not in \[0, 1\)"),
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
