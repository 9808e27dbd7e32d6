"""What the program did not write stays; what it writes is whole or not there."""

import json
import os
from pathlib import Path

import pytest

from s2 import files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    files.write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), files.whole(file) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert files.read_json(file) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_json_is_strict_and_keeps_permissions_and_links(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text("{}")
    file.chmod(0o640)
    (tmp_path / "link.json").symlink_to("real.json")
    files.write_json(tmp_path / "link.json", {"nan": float("nan"), "deep": [float("inf")], "text": "\ud800é"})
    assert json.loads(file.read_text()) == {"nan": None, "deep": [None], "text": "\ud800é"}
    assert (tmp_path / "link.json").is_symlink() and file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b'{"a":\n', "line 2"), (b"\xff", "UTF-8"), (b"9" * 5000, "not valid JSON")],
)
def test_a_broken_json_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "meta.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        files.read_json(file)
    assert str(file) in str(caught.value)


def test_folders_of_others_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    theirs = tmp_path / "work"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    with pytest.raises(files.NotOursError, match=r"thesis\.tex"):
        files.make_folder(theirs, "work")
    for remove in (files.remove_folder, lambda folder: files.remove_files(folder, "*")):
        with pytest.raises(files.NotOursError, match=r"work"):
            remove(theirs)
    assert (theirs / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("is_there", [False, True])
def test_two_processes_may_make_one_folder_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """The other one makes and marks it right after this one has looked for a mark."""
    folder, look = tmp_path / "made", files.kind_of
    if is_there:
        folder.mkdir()

    def look_and_lose(path: Path) -> str | None:
        found = look(path)
        monkeypatch.setattr(files, "kind_of", look)
        files.make_folder(folder, "shards")
        (folder / "shard.bin").write_bytes(b"1")
        return found

    monkeypatch.setattr(files, "kind_of", look_and_lose)
    assert files.make_folder(folder, "shards") == folder and (folder / "shard.bin").exists()
    assert files.kind_of(folder) == "shards"


def test_what_stands_in_the_way_of_a_folder_moves_aside_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("hf", "hf.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text(name)
    files.publish(files.begin(tmp_path / "hf", "export"), tmp_path / "hf")
    assert (tmp_path / "hf.1" / "thesis.tex").read_text() == "hf"
    assert (tmp_path / "hf.partial.1" / "thesis.tex").read_text() == "hf.partial"
    assert files.kind_of(tmp_path / "hf") == "export" and capsys.readouterr().out.count("it is now") == 2


def test_what_a_killed_process_left_of_a_folder_is_removed(tmp_path: Path) -> None:
    (files.begin(tmp_path / "hf", "export") / "half").write_text("x")
    assert os.listdir(files.begin(tmp_path / "hf", "export")) == [files.MARK]


def test_a_folder_of_another_kind_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a", "checkpoint")
    with pytest.raises(files.NotOursError, match="holds checkpoint, not shards"):
        files.make_folder(tmp_path / "a", "shards")
    (tmp_path / "b").write_text("x")
    with pytest.raises(files.NotOursError, match="is a file"):
        files.make_folder(tmp_path / "b", "shards")


def test_only_listed_files_of_a_published_folder_are_removed(tmp_path: Path) -> None:
    partial = files.make_folder(tmp_path / "step-1.partial", "checkpoint")
    (partial / "state").mkdir()
    (partial / "state" / "w.pt").write_text("weights")
    files.publish(partial, tmp_path / "step-1")
    note = tmp_path / "step-1" / "note.txt"
    note.write_text("the good one")
    assert files.remove_folder(tmp_path / "step-1") is False
    assert note.read_text() == "the good one" and not (tmp_path / "step-1" / "state" / "w.pt").exists()
    note.unlink()
    assert files.remove_folder(tmp_path / "step-1") and not (tmp_path / "step-1").exists()


def test_what_was_made_later_inside_a_published_folder_goes_with_it(tmp_path: Path) -> None:
    partial = files.make_folder(tmp_path / "a.partial", "checkpoint")
    (partial / "w").write_text("w")
    files.publish(partial, tmp_path / "a")
    (files.make_folder(tmp_path / "a" / "converted", "conversion") / "x").write_text("x")
    assert files.remove_folder(tmp_path / "a") and not (tmp_path / "a").exists()


def test_publishing_over_a_folder_with_a_note_moves_it_aside(tmp_path: Path) -> None:
    for content in ("old", "new"):
        partial = files.make_folder(tmp_path / "hf.partial", "export")
        (partial / "w").write_text(content)
        files.publish(partial, tmp_path / "hf")
        if content == "old":
            (tmp_path / "hf" / "README.md").write_text("my model card")
    assert (tmp_path / "hf" / "w").read_text() == "new"
    assert (tmp_path / "hf.1" / "README.md").read_text() == "my model card"


def test_patterns_bound_what_is_removed(tmp_path: Path) -> None:
    work = files.make_folder(tmp_path / "work", "work")
    for name in ("000-00001.json", "notes.json"):
        (work / name).write_text("x")
    files.remove_files(work, "[0-9]*.json")
    assert sorted(p.name for p in work.glob("*.json") if p.name != files.MARK) == ["notes.json"]
    assert files.remove_folder(work, "[0-9]*") is False and (work / "notes.json").exists()


def test_move_aside_never_takes_a_name_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "run.1").write_text("first")
    (tmp_path / "run").write_text("second")
    assert files.move_aside(tmp_path / "run").name == "run.2"
    assert (tmp_path / "run.1").read_text() == "first"


def test_a_link_takes_the_place_of_links_only(tmp_path: Path) -> None:
    files.point(tmp_path / "last", "step-1")
    files.point(tmp_path / "last", "step-2")
    assert os.readlink(tmp_path / "last") == "step-2"
    (tmp_path / "copy").mkdir()
    files.point(tmp_path / "copy", "step-2")
    assert os.readlink(tmp_path / "copy") == "step-2" and (tmp_path / "copy.1").is_dir()


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_damage_names_the_file(tmp_path: Path, change: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    recorded = files.inventory(tmp_path)
    assert set(recorded) == {"a", "b"} and files.damage(tmp_path, recorded) is None
    file = tmp_path / "b"
    if change == "flip":
        file.write_bytes(b"b" * 50 + b"x" + b"b" * 49)
        assert files.damage(tmp_path, recorded, checksums=False) is None
    elif change == "cut":
        file.write_bytes(b"b" * 99)
    else:
        file.unlink()
    assert str(file) in str(files.damage(tmp_path, recorded))


def test_an_unwritable_place_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write there"):
        files.require_writable(tmp_path / "file" / "results")


def test_the_folder_behind_a_link_is_emptied_and_the_link_stays(tmp_path):
    """Somebody has put a working folder on another disk."""
    for patterns in ((), ("*.bin",)):
        (tmp_path / "disk").mkdir(exist_ok=True)
        link = tmp_path / "work"
        link.unlink(missing_ok=True)
        link.symlink_to("disk")
        files.make_folder(link, "scratch")
        (link / "a.bin").write_text("a")
        assert files.remove_folder(link, *patterns)
        assert link.is_symlink() and not any(path.is_file() for path in (tmp_path / "disk").rglob("*"))


def test_whoever_is_alone_in_a_folder_removes_what_killed_processes_left(tmp_path):
    for name in (".a.json.1.s2-tmp", ".b.json.1.s2-tmp", ".a.json.s2-tmp"):
        (tmp_path / name).write_text("")
    files.sweep(tmp_path / "a.json")
    assert len(list(tmp_path.iterdir())) == 3
    files.sweep(tmp_path / "a.json", is_alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {".b.json.1.s2-tmp", ".a.json.s2-tmp"}


def test_a_folder_that_was_made_and_not_yet_marked_is_removed(tmp_path):
    folder = tmp_path / "x.partial"
    folder.mkdir()
    (folder / f".{files.MARK}.123.s2-tmp").write_text("{")
    assert files.remove_folder(folder) and not folder.exists()


def test_a_folder_in_the_place_of_a_file_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    with pytest.raises(IsADirectoryError, match="page is a folder, and a file is to be written there"):
        files.write_text(tmp_path / "page", "x")
    assert os.listdir(tmp_path) == ["page"]


def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path, small_files):
    target = tmp_path / "results.json"
    target.write_text("old")
    with pytest.raises(OSError, match="File too large") as raised:
        files.write_text(target, "x" * (1 << 17))
    assert raised.value.filename == str(target)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_errors_that_name_a_file_or_are_no_streams_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, files.naming(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert raised.value.filename == str(tmp_path / "b")
    with pytest.raises(OSError, match=r"^a sentence$"), files.naming(tmp_path / "a"):
        raise OSError("a sentence")
