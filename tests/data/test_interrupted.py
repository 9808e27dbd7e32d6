"""Preparation that is killed, fails or runs twice: nothing finished is lost, an interrupted run never looks done."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data.prepare as prepare_module
import data.work as work_module
from data.prepare import is_prepared, prepare
from data.shards import ShardWriter, TokenShards
from data.spec import PrepareSpec
from data.tokenizer import TextTokenizer
from tests.data.preparing import identities, many_parts

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
