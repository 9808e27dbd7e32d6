"""The output folder: what a preparation did not write is refused before anything is touched, and stays as it was."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from data.prepare import is_prepared, prepare
from data.prepare.cli import main
from data.shards import DamagedShardsError, TokenShards
from s2 import ending, files
from tests.data.preparing import spec


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if path.name != ".lock"}


FOREIGN = {
    "train": lambda out: (
        out / "train" / "shard-000-00000-000.bin",
        r"out/train holds files that this program did not",
    ),
    "heldout": lambda out: (out / "heldout" / "counts.npy", r"out/heldout holds files that this program did not write"),
    "work": lambda out: (out / "work" / "t.tex", r"out/work holds files that this program did not write \(t\.tex\)"),
    "tokenizer": lambda out: (
        out / "tokenizer.json",
        r"out/tokenizer\.json is not what a preparation wrote here; move it",
    ),
    "a file": lambda out: (out / "train", r"out/train is a file, and a folder for token shards is to stand there"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_our_names_that_we_did_not_write_are_refused_and_stay(corpus, tmp_path, what):
    file, message = FOREIGN[what](tmp_path / "out")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("theirs")
    (tmp_path / "out" / "notes.txt").write_text("theirs")
    before = snapshot(tmp_path / "out")
    with pytest.raises(files.NotOursError, match=message):
        prepare(spec(corpus, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == before


def test_other_files_in_the_output_are_left_alone(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("theirs")
    prepare(spec(corpus, tmp_path / "out"))
    assert (tmp_path / "out" / "notes.txt").read_text() == "theirs"
    (tmp_path / "file").write_text("")
    with pytest.raises(files.NotOursError, match="file is not a folder; choose another, or move it"):
        prepare(spec(corpus, tmp_path / "file"))


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("c/train/*.jsonl", "c", r"c/train/x\.jsonl lies inside of the output c;"),
        ("c", "c", r"the output c lies inside of this folder"),
        ("c", "c/train/shards", r"the output c/train/shards lies inside of this folder"),
        ("link/train/x.jsonl", "c", r"c/train/x\.jsonl lies inside of the output c;"),
        ("c/train/x.jsonl", "link", r"c/train/x\.jsonl lies inside of the output link;"),
        ("c/**/*.json*", "c/out", r"would also read c/out/tokenizer\.json, which is written here"),
        ("c/*/*.json*", "c/out", r"would also read c/out/tokenizer\.json, which is written here"),
    ],
)
def test_sources_and_output_inside_of_each_other_are_refused(tmp_path, monkeypatch, source, output, message):
    monkeypatch.chdir(tmp_path)
    Path("c/train").mkdir(parents=True)
    Path("c/train/x.jsonl").write_text("".join(f'{{"text": "doc {i}"}}\n' for i in range(30)))
    Path("link").symlink_to("c")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare(spec(source, output))
    assert snapshot(tmp_path) == before


def test_the_output_may_be_a_link_and_hold_the_tokenizer_that_is_brought(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "first"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    brought = tmp_path / "out" / "tokenizer.json"
    brought.write_bytes((tmp_path / "first" / "tokenizer.json").read_bytes())
    before = brought.stat()
    prepare(spec(corpus, tmp_path / "out", tokenizer={"path": str(brought)}))
    assert brought.stat().st_mtime_ns == before.st_mtime_ns
    assert (tmp_path / "out").is_symlink() and sorted(p.name for p in (tmp_path / "disk").iterdir()) == [
        ".lock",
        "heldout",
        "tokenizer.json",
        "train",
    ]
    TokenShards(tmp_path / "disk" / "train").verify()


@pytest.mark.parametrize("name", ["train", "heldout", "work"])
@pytest.mark.parametrize("is_link", [False, True], ids=["folder", "link"])
def test_an_empty_folder_may_stand_where_one_is_written(corpus, tmp_path, name, is_link):
    (tmp_path / "out").mkdir()
    (tmp_path / "disk").mkdir()
    if is_link:
        (tmp_path / "out" / name).symlink_to("../disk")
    else:
        (tmp_path / "out" / name).mkdir()
    prepare(spec(corpus, tmp_path / "out"))
    assert is_prepared(spec(corpus, tmp_path / "out"))
    assert (tmp_path / "disk").is_dir() and (not is_link or (tmp_path / "out" / name).is_symlink())


def test_a_tokenizer_alone_may_be_followed_by_other_settings(corpus, tmp_path, capfd):
    prepare(spec(corpus, tmp_path / "out"), only_tokenizer=True)
    first = (tmp_path / "out" / "tokenizer.json").read_bytes()
    prepare(spec(corpus, tmp_path / "out", tokenizer={"train": {"vocab_size": 280}}))
    assert "begins anew, with other settings than the interrupted preparation" in capfd.readouterr().err
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() != first
    assert TokenShards(tmp_path / "out" / "train").vocab_size == 280


def test_a_note_in_the_work_folder_stays(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "out"), only_tokenizer=True)
    (tmp_path / "out" / "work" / "note.txt").write_text("theirs")
    prepare(spec(corpus, tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out" / "work").iterdir()} == {"note.txt", files.MARK}
    assert is_prepared(spec(corpus, tmp_path / "out"))


def test_damaged_shards_end_the_command_as_damage(corpus, tmp_path):
    prepare(spec(corpus, tmp_path / "out"))
    file = tmp_path / "out" / "train" / "manifest.json"
    file.write_text("")
    with pytest.raises(
        DamagedShardsError, match=r"manifest\.json: the file is empty; delete .*train and prepare it again"
    ):
        main(["--verify", str(tmp_path / "out" / "train")])
    assert ending.exit_code(DamagedShardsError()) == ending.DAMAGED


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """What an earlier version left: no marks, no list of files, settings without the keys that came later."""
    with tarfile.open(Path(__file__).parent / "outputs_of_an_earlier_version.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return {
        "sources": [{"path": "corpus.jsonl"}],
        "tokenizer": {"train": {"vocab_size": 270, "sample_bytes": 1000}},
        "heldout_fraction": 0.2,
        "part_bytes": 600,
    }


def test_finished_outputs_of_earlier_versions_open_and_stay(earlier, capfd):
    finished = spec(None, "finished", **earlier, shard_tokens=1 << 27)
    before = snapshot(Path("finished"))
    prepare(finished)
    assert is_prepared(finished) and snapshot(Path("finished")) == before
    assert capfd.readouterr().err == ""
    for split in ("train", "heldout"):
        TokenShards(f"finished/{split}").verify()
    assert TokenShards("finished/train").source_files is None
    shutil.rmtree("finished/heldout")
    prepare(finished)
    assert {k: v for k, v in snapshot(Path("finished/train")).items() if k.name != files.MARK} == {
        k: v for k, v in before.items() if k.parent == Path("finished/train")
    }
    for name in ("shard-000-00000-000.bin", "shard-000-00001-000.npy"):
        assert (Path("finished/heldout") / name).read_bytes() == before[Path("finished/heldout") / name]
    with pytest.raises(ValueError, match=r"prepared with other settings \(seed: 0 != 1;"):
        prepare(spec(None, "finished", **earlier, shard_tokens=1 << 27, seed=1))


def test_interrupted_outputs_of_earlier_versions_are_refused_with_a_way_on(earlier):
    before = snapshot(Path("interrupted"))
    asked = spec(None, "interrupted", **earlier)
    with pytest.raises(
        files.NotOursError,
        match=r"interrupted/work holds files that this program did not write .*; choose another folder, or move them",
    ):
        prepare(asked)
    assert snapshot(Path("interrupted")) == before
    assert json.loads(Path("interrupted/work/plan.json").read_text())["settings"]
    for name in ("work", "train", "heldout"):
        shutil.rmtree(f"interrupted/{name}", ignore_errors=True)
    os.unlink("interrupted/tokenizer.json")
    prepare(asked)
    assert is_prepared(asked)
