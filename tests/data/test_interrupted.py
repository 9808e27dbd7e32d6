"""Preparation that is killed, fails or runs twice: nothing finished is lost, an interrupted run never looks done."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import data.prepare.part as part_module
import data.prepare.stages as stages_module
from data.prepare import is_prepared, prepare
from data.prepare.spec import PrepareSpec
from data.shards import ShardWriter, TokenShards
from data.shards.reader import KIND
from s2 import files
from s2.ending import FailureError
from tests.data.preparing import identities, many_parts

KILLED_AT_EVERY_STEP = """
import json, os, pathlib, signal, sys
import data.prepare
from data.prepare.spec import PrepareSpec
values = json.loads(sys.argv[1])

def run(step):
    # A process that is killed just before the given atomic step; None lets it finish.
    pid = os.fork()
    if pid == 0:
        count, replace = [0], os.replace
        def killing(source, target):
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return replace(source, target)
        os.replace = killing
        data.prepare.prepare(PrepareSpec.parse(values))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

step, stride, output = int(sys.argv[2]), int(sys.argv[3]), values["output"]
while True:
    values["output"] = f"{output}/{step}"
    code = run(step)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    assert not (pathlib.Path(values["output"]) / "train" / "manifest.json").exists()
    assert run(None) == 0
    step += stride
print(step)
"""


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.nightly)])  # every third step, or each
def test_killed_at_any_step_it_goes_on_and_ends_the_same(corpora, stride, seed):
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
        [sys.executable, "-c", KILLED_AT_EVERY_STEP, json.dumps(values), str(seed % stride), str(stride)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    outputs = list((corpora / "killed").iterdir())
    assert len(outputs) > 20 // stride
    for output in outputs:
        assert identities(output) == whole, output
        assert {f.name for f in output.iterdir()} == {"train", "heldout", "tokenizer.json", ".lock"}
        assert not list(output.rglob("*tmp"))


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


@pytest.mark.nightly
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
    encode, done = part_module._encode, []

    def stops_at_the_fourth(task):
        if len(done) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(task.name)
        return encode(task)

    with monkeypatch.context() as patch:
        patch.setattr(part_module, "_encode", stops_at_the_fourth)
        with pytest.raises(OSError, match=r"the disk is full .*make room and run again, finished parts are kept"):
            prepare(asked)
    assert not is_prepared(asked)
    again = []
    monkeypatch.setattr(part_module, "_encode", lambda task: again.append(task.name) or encode(task))
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
        patch.setattr(part_module, "_encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(many_parts(corpora, corpora / "out", workers=1))
    files.make_folder(corpora / "out" / "train", KIND)
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
    encode, done = part_module._encode, []

    def fails(task):
        if len(done) == parts:
            raise KeyboardInterrupt
        done.append(task.name)
        return encode(task)

    with monkeypatch.context() as patch:
        patch.setattr(part_module, "_encode", fails)
        with pytest.raises(KeyboardInterrupt):
            prepare(asked)
    return done


def prepare_again(asked, monkeypatch):
    """Prepare; the names of the parts that were encoded."""
    again, encode = [], part_module._encode
    with monkeypatch.context() as patch:
        patch.setattr(part_module, "_encode", lambda task: again.append(task.name) or encode(task))
        prepare(asked)
    return again


def test_done_parts_are_not_thrown_away_for_other_settings_without_asking(corpora, monkeypatch):
    done = interrupt_after(3, monkeypatch, many_parts(corpora, corpora / "out", workers=1))
    with pytest.raises(
        ValueError, match=r"interrupted preparation is here, .*shard_tokens: 400 != 900.*delete .*work to"
    ):
        prepare(many_parts(corpora, corpora / "out", workers=1, shard_tokens=900))
    again = prepare_again(many_parts(corpora, corpora / "out", workers=1), monkeypatch)
    assert again and not set(again) & set(done)


CHANGES = {
    "mended": lambda a: (a / "0.jsonl").write_text('{"text": "another text"}\n'),
    "removed": lambda a: (a / "0.jsonl").unlink(),
    "added": lambda a: (a / "00.jsonl").write_text('{"text": "another text"}\n'),
    "touched": lambda a: os.utime(a / "0.jsonl"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part_bytes", [4000, 8000, 2000])  # a file a part, two in one, a file in several
def test_after_a_change_only_parts_with_changed_files_are_made_again(corpora, monkeypatch, change, part_bytes):
    for name in "ab":  # so that groups of files would move when one of them shrinks
        (corpora / name / "3.jsonl").write_text((corpora / name / "3.jsonl").read_text() * 2)
    asked = replace(many_parts(corpora, corpora / "out", workers=1), part_bytes=part_bytes)
    done = interrupt_after(7, monkeypatch, asked)
    plan = json.loads((corpora / "out" / "work" / "plan.json").read_text())
    parts = plan["sources"][0]["parts"]
    first = {f"000-{p['number']:05d}" for p in parts if any(path.endswith("0.jsonl") for path, *_ in p["files"])}
    CHANGES[change](corpora / "a")
    again = prepare_again(asked, monkeypatch)
    allowed = {"added": first if part_bytes == 8000 else set()}.get(change, first)
    assert set(done) & set(again) <= allowed
    shards = [TokenShards(corpora / "out" / split) for split in ("train", "heldout")]
    found = [each.origin(i)[0] for each in shards for i in range(len(each.offsets) - 1)]
    assert sorted(found) == sorted(document.id for source in asked.sources for document in source.documents())


def test_a_bad_row_can_be_mended_or_skipped_without_losing_finished_parts(corpora, monkeypatch):
    bad = corpora / "b" / "2.jsonl"
    good = bad.read_text()
    bad.write_text(good + '{"text": "bro\n{"text": 7}\n')
    asked = many_parts(corpora, corpora / "out", workers=1)
    with pytest.raises(
        ValueError, match=r"b/2\.jsonl, .*line [0-9]+: not valid JSON .*run again .*or set on_bad_row: skip"
    ):
        prepare(asked)
    done = sorted(file.stem for file in (corpora / "out" / "work").glob("0*-*.json"))
    assert len(done) >= 5
    again = prepare_again(replace(asked, on_bad_row="skip"), monkeypatch)
    assert again and not set(done) & set(again)
    source = TokenShards(corpora / "out" / "train").manifest["sources"][1]
    assert source["skipped"] == {"bad row": 2} and len(source["bad_rows"]) == 2
    assert re.search(r"b/2\.jsonl, .*line [0-9]+: not valid JSON", source["bad_rows"][0])
    with pytest.raises(
        ValueError, match=r"prepared with on_bad_row: skip, and 2 rows of '.*b/\*\.jsonl' were left out"
    ):
        prepare(asked)
    mended = replace(asked, output=str(corpora / "mended"))
    with pytest.raises(ValueError, match="not valid JSON"):
        prepare(mended)
    bad.write_text(good)
    again = prepare_again(mended, monkeypatch)
    assert again and not set(done) & set(again)


def test_duplicates_are_judged_again_after_a_change_but_scanned_only_where_files_changed(corpora, monkeypatch):
    asked = many_parts(corpora, corpora / "out", workers=1, deduplicate="exact")
    interrupt_after(3, monkeypatch, asked)
    text = json.loads((corpora / "a" / "3.jsonl").read_text().splitlines()[0])
    (corpora / "a" / "0.jsonl").write_text(json.dumps(text) + "\n")  # so the later one is the duplicate now
    scanned, scan = [], part_module.scan
    monkeypatch.setattr(part_module, "scan", lambda documents, settings: scanned.append(1) or scan(documents, settings))
    prepare(asked)
    assert len(scanned) == 1
    prepare(replace(asked, output=str(corpora / "whole")))

    def found(output):
        shards = TokenShards(corpora / output / "train")
        return [shards.origin(i) for i in range(len(shards.offsets) - 1)]

    assert found("out") == found("whole")


def test_another_part_size_does_not_undo_what_is_done(corpora, monkeypatch, capfd):
    asked = many_parts(corpora, corpora / "out", workers=1)
    done = interrupt_after(3, monkeypatch, asked)
    again = prepare_again(replace(asked, part_bytes=10**9), monkeypatch)
    assert again and not set(done) & set(again)
    assert "goes on with part_bytes 4000" in capfd.readouterr().err


@pytest.mark.parametrize("lost", ["heldout", "train"])
def test_a_finished_split_stays_while_the_other_is_made_again(corpora, lost):
    asked = many_parts(corpora, corpora / "out", workers=1)
    prepare(asked)
    whole = identities(corpora / "out")
    kept = corpora / "out" / ("train" if lost == "heldout" else "heldout")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in kept.iterdir()}
    files.remove_folder(corpora / "out" / lost)
    bad = corpora / "b" / "2.jsonl"
    good, stat = bad.read_text(), bad.stat()
    bad.write_text("{")
    with pytest.raises(ValueError, match=rf"b/2\.jsonl has changed, so {lost} cannot be made to go with what is there"):
        prepare(asked)
    bad.write_text(good)
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepare(asked)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in kept.iterdir()} == before
    assert identities(corpora / "out") == whole


def test_a_tokenizer_that_somebody_put_in_place_of_ours_is_left_alone(corpora, monkeypatch):
    asked = many_parts(corpora, corpora / "out", workers=1)
    interrupt_after(3, monkeypatch, asked)
    file = corpora / "out" / "tokenizer.json"
    ours = file.read_bytes()
    file.write_text("theirs")
    with pytest.raises(files.NotOursError, match=r"tokenizer\.json is not what a preparation wrote here; move it"):
        prepare(asked)
    assert file.read_text() == "theirs"
    file.unlink()
    prepare(asked)
    assert file.read_bytes() == ours
    prepare(many_parts(corpora, corpora / "whole"))
    assert identities(corpora / "out") == identities(corpora / "whole")


def test_folders_hold_only_what_the_manifest_lists(corpora):
    asked = many_parts(corpora, corpora / "out", workers=1)
    files.make_folder(corpora / "out" / "train", KIND)
    for name in ("shard-000-00099-000.bin", "shard-000-00000-007.npy", ".shard-000-00000-000.bin.1.s2-tmp"):
        (corpora / "out" / "train" / name).write_bytes(b"of an earlier attempt")
    prepare(asked)
    shards = TokenShards(corpora / "out" / "train").manifest["shards"]
    wanted = {f"{shard['name']}{end}" for shard in shards for end in (".bin", ".npy", ".parquet")}
    wanted |= {"manifest.json", "counts.npy", "files.parquet", files.MARK}
    assert {file.name for file in (corpora / "out" / "train").iterdir()} == wanted


def test_a_worker_that_dies_is_reported(corpora, monkeypatch):
    monkeypatch.setattr(stages_module, "encode_part", die)
    with pytest.raises(FailureError, match="a worker process was killed, perhaps for memory; run again"):
        prepare(many_parts(corpora, corpora / "out", workers=2))


def die(task):
    os.kill(os.getpid(), signal.SIGKILL)
