"""Folders as sources: one format each, every file of it, once, and what is left out is said."""

import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.sources import Source


def ids(path, **settings):
    return [d.id for d in Source(str(path), name="c", **settings).documents()]


def rows(file, *texts):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}), file)
    else:
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_folder_of_parquet_and_a_readme_is_its_parquet(tmp_path, capsys):
    rows(tmp_path / "data" / "b.parquet", "two")
    rows(tmp_path / "a.parquet", "one")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "more.csv").write_text("text\nx\n")
    for settings in ({}, {"format": "parquet"}):
        assert ids(tmp_path, **settings) == ["c/a.parquet:0", "c/data/b.parquet:0"]
        said = capsys.readouterr().err
        assert said == "source c: reading 2 parquet files, leaving out README.md, dataset_info.json, more.csv\n"
    assert ids(tmp_path, format="text") == ids(tmp_path, format="folder") == ["c/README.md"]


def test_rows_about_citations_are_rows(tmp_path):
    for name in ("citations.jsonl", "notice.jsonl", "authors.jsonl"):
        rows(tmp_path / name, name)
    (tmp_path / "ReadMe.en.md").write_text("about")
    assert len(ids(tmp_path)) == 3


def test_a_folder_of_several_formats_wants_one_said(tmp_path):
    rows(tmp_path / "a.parquet", "one")
    rows(tmp_path / "b.jsonl", "two")
    (tmp_path / "c.txt").write_text("three")
    with pytest.raises(
        ValueError, match=r"several formats \(1 jsonl, 1 parquet, 1 text\): say which one with `format`"
    ):
        ids(tmp_path)
    assert ids(tmp_path, format="parquet") == ["c/a.parquet:0"]
    assert ids(tmp_path, format="jsonl") == ["c/b.jsonl:0"]
    assert ids(tmp_path, suffixes=[".txt"]) == ["c/c.txt"]


def test_packed_files_of_a_folder_are_read_and_hidden_ones_are_not(tmp_path, capsys):
    for pack, compress in ((".gz", gzip.compress), (".xz", lzma.compress)):
        (tmp_path / f"a.txt{pack}").write_bytes(compress(b"packed"))
    (tmp_path / "b c [1]*.txt").write_text("odd name")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / ".x.txt").write_text("hidden")
    assert ids(tmp_path) == ["c/a.txt.gz", "c/a.txt.xz", "c/b c [1]*.txt"]
    assert capsys.readouterr().err == ""
    assert ids(tmp_path / "b c [1]*.txt") == ["c/b c [1]*.txt"]
    assert Source(str(tmp_path / "b c [1]*.txt")).label == "b c [1]*.txt"


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_links_are_followed_and_no_file_is_read_twice(tmp_path, pattern):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for file in (inside / "a" / "x.txt", outside / "y.txt"):
        file.parent.mkdir(parents=True)
        file.write_text(file.name)
    (inside / "a" / "loop").symlink_to(inside)
    (inside / "again").symlink_to(inside / "a")
    (inside / "beside").symlink_to(outside)
    (inside / "x-too.txt").symlink_to(inside / "a" / "x.txt")
    (inside / "broken.txt").symlink_to(tmp_path / "nothing")
    path = inside / pattern if pattern else inside
    assert sorted(d.text for d in Source(str(path)).documents()) == ["x.txt", "y.txt"]


def test_folders_without_data_and_wrong_formats_say_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="no files of a known format in the folder, it is empty"):
        ids(tmp_path)
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"no files of a known format in the folder, it holds a\.csv; known suffixes"):
        ids(tmp_path)
    with pytest.raises(ValueError, match=r"no parquet files in the folder, it holds a\.csv"):
        ids(tmp_path, format="parquet")
    for kind in ("folder", "python-env"):
        with pytest.raises(ValueError, match=f"with format '{kind}' the path is"):
            ids(tmp_path / "a.csv", format=kind)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path):
    (tmp_path / "secret").mkdir(mode=0)
    with pytest.raises(PermissionError, match="secret"):
        ids(tmp_path)
