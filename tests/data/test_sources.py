"""Readers: every corpus format gives the same documents, and every broken corpus says what is wrong."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from data.sources import Source

ROWS = [{"text": f"Document number {i} — naïve café.", "uid": f"u{i}", "other": i} for i in range(5)]
TEXTS = [row["text"] for row in ROWS]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_corpus(folder: Path, suffix: str) -> Path:
    file = folder / f"corpus{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif suffix.endswith(".gz"):
        file.write_bytes(gzip.compress(jsonl(ROWS)))
    elif suffix.endswith(".zst"):
        frames = [zstandard.compress(jsonl(ROWS[:2])), zstandard.compress(jsonl(ROWS[2:]))]
        file.write_bytes(b"".join(frames))
    else:
        file.write_bytes(jsonl(ROWS))
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_row_formats_yield_all_documents_in_order(tmp_path, suffix):
    file = write_corpus(tmp_path, suffix)
    documents = list(Source(str(file), name="c").documents())
    assert [d.text for d in documents] == TEXTS
    assert [d.id for d in documents] == [f"c/{file.name}:{i}" for i in range(5)]
    assert {d.source for d in documents} == {"c"}
    by_column = Source(str(file), name="c", id_column="uid").documents()
    assert [d.id for d in by_column] == [f"c/u{i}" for i in range(5)]


def test_hub_datasets_are_streamed(tmp_path):
    write_corpus(tmp_path, ".parquet")  # `datasets` opens a local repository folder the way it opens one on the hub
    documents = list(Source(str(tmp_path), format="hub", id_column="uid").documents())
    assert [d.text for d in documents] == TEXTS
    assert documents[3].id.endswith("/u3")
    with pytest.raises(ValueError, match="no column 'body'; it has: other, text, uid"):
        next(Source(str(tmp_path), format="hub", text_column="body").documents())


def test_ids_do_not_depend_on_where_the_corpus_lies(tmp_path):
    ids = []
    for place in ("here", "there"):
        (tmp_path / place / "corpus").mkdir(parents=True)
        write_corpus(tmp_path / place / "corpus", ".jsonl")
        ids.append([d.id for d in Source(str(tmp_path / place / "corpus" / "*.jsonl")).documents()])
    assert ids[0] == ids[1]
    assert ids[0][0] == "corpus/corpus.jsonl:0"


def test_globs_read_their_matches_in_sorted_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([{"text": name}]))
    assert [d.text for d in Source(str(tmp_path / "*.jsonl")).documents()] == ["a", "b", "c"]


def test_text_file_is_one_document(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes("line one\r\nline two ✓\n".encode())
    [document] = Source(str(file)).documents()
    assert document.text == "line one\nline two ✓\n"
    assert document.id == "book.txt/book.txt"


def test_folder_takes_its_suffixes_and_counts_what_it_cannot_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("print('b')")
    (tmp_path / "a.md").write_text("# a")
    (tmp_path / "skip.c").write_text("int main;")
    (tmp_path / "zero.txt").write_bytes(b"nul\0byte")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    skipped: Counter[str] = Counter()
    documents = list(Source(str(tmp_path), name="f").documents(skipped))
    assert [d.id for d in documents] == ["f/a.md", "f/sub/b.py"]
    assert skipped == {"binary": 1, "undecodable": 1}
    assert [d.id for d in Source(str(tmp_path), name="f", suffixes=(".c",)).documents()] == ["f/skip.c"]


def test_python_env_is_deterministic_deduplicated_and_capped():
    source = Source("python-env", max_bytes=300_000)
    documents = list(source.documents())
    assert documents == list(source.documents())
    assert 100_000 < sum(len(d.text.encode()) for d in documents) <= 300_000
    assert all(len(d.text) >= 200 for d in documents)
    assert len({d.text for d in documents}) == len(documents)
    assert len({d.id.split("/")[2] for d in documents}) > 3, "a capped sample should span packages"
    assert not any("__pycache__" in d.id for d in documents)


def test_filters_and_caps(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_bytes(jsonl([{"text": t} for t in ["same text", "x", "same text", None, "third text", "last text"]]))
    skipped: Counter[str] = Counter()
    source = Source(str(file), min_chars=2, deduplicate=True, max_documents=2)
    assert [d.text for d in source.documents(skipped)] == ["same text", "third text"]
    assert skipped == {"short": 1, "duplicate": 1, "null": 1}
    assert [d.text for d in Source(str(file), max_bytes="1e1").documents()] == ["same text", "x"]


def test_lone_surrogates_do_not_stop_a_run(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "broken \\ud800 escape"}\n')
    assert [d.text for d in Source(str(file)).documents()] == ["broken ? escape"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_missing_column_names_file_and_columns(tmp_path, suffix):
    file = write_corpus(tmp_path, suffix)
    with pytest.raises(ValueError, match=rf"corpus{suffix} has no column 'content'; it has: other, text, uid"):
        list(Source(str(file), text_column="content").documents())
    with pytest.raises(ValueError, match="no column 'id'"):
        list(Source(str(file), id_column="id").documents())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b'{"text": "a"}\n{"text": \n', "c.jsonl, line 2: not valid JSON"),
        ("c.jsonl", b'["a"]\n', "line 1: expected a JSON object"),
        ("c.jsonl", b'{"text": 5}\n', "column 'text' holds int, expected text"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], r"c.jsonl.gz.*(broken|not valid JSON)"),
        ("c.parquet", b"no parquet", "not a parquet file"),
        ("c.jsonl", b"\n\n", "no documents"),
        ("c.jsonl", b'{"text": ""}\n', r"no documents \(1 short\)"),
    ],
)
def test_broken_corpus_names_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(Source(str(tmp_path / name)).documents())


def test_unknown_paths_and_formats_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl.*hf://owner/name"):
        Source(str(tmp_path / "nothing.jsonl")).resolve()
    with pytest.raises(FileNotFoundError, match="no such file, folder or match"):
        Source(str(tmp_path / "*.parquet")).resolve()
    (tmp_path / "corpus.dat").write_text("?")
    with pytest.raises(ValueError, match="cannot tell the format"):
        Source(str(tmp_path / "corpus.dat")).resolve()
    (tmp_path / "corpus.dat").unlink()
    (tmp_path / "a.txt").write_text("text")
    write_corpus(tmp_path, ".jsonl")
    with pytest.raises(ValueError, match="several formats"):
        Source(str(tmp_path / "*[lt]")).resolve()
    with pytest.raises(ValueError, match="format: unknown 'csv'"):
        Source("x", format="csv")
    with pytest.raises(ValueError, match="max_bytes: expected a whole number >= 0, got -1"):
        Source("x", max_bytes=-1)


def test_files_of_one_name_in_many_folders_have_ids_of_their_own(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "content.txt").write_text(f"the text of {folder}")
        (tmp_path / folder / "part.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    texts = Source(path=str(tmp_path / "*" / "content.txt")).documents()
    assert sorted(d.id.rpartition("content.txt")[0][-2:-1] for d in texts) == ["a", "b", "c"]
    rows = list(Source(path=str(tmp_path / "*" / "part.jsonl")).documents())
    assert len({d.id for d in rows}) == len(rows) == 6
