"""Readers: every corpus format gives the same documents, and every broken corpus says what is wrong."""

import bz2
import gzip
import itertools
import json
import lzma
import time
import tracemalloc
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.corpus.parts import Part
from data.corpus.readers import open_binary
from data.corpus.sources import LOST, Source

ROWS = [{"text": f"Document number {i} — naïve café.", "uid": f"u{i}", "other": i} for i in range(5)]
TEXTS = [row["text"] for row in ROWS]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_corpus(folder: Path, suffix: str) -> Path:
    file = folder / f"corpus{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif suffix.endswith(".bz2"):
        file.write_bytes(bz2.compress(jsonl(ROWS[:2])) + bz2.compress(jsonl(ROWS[2:])))
    elif suffix.endswith(".xz"):
        file.write_bytes(lzma.compress(jsonl(ROWS[:2])) + lzma.compress(jsonl(ROWS[2:])))
    elif suffix.endswith(".gz"):
        file.write_bytes(gzip.compress(jsonl(ROWS)))
    elif suffix.endswith(".zst"):
        frames = [zstandard.compress(jsonl(ROWS[:2])), zstandard.compress(jsonl(ROWS[2:]))]
        file.write_bytes(b"".join(frames))
    else:
        file.write_bytes(jsonl(ROWS))
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz"])
def test_row_formats_yield_all_documents_in_order(tmp_path, suffix):
    file = write_corpus(tmp_path, suffix)
    documents = list(Source(str(file), name="c").documents())
    assert [d.text for d in documents] == TEXTS
    begins = [len(jsonl(ROWS[:i])) for i in range(5)]
    places = range(5) if suffix == ".parquet" else begins
    assert [d.id for d in documents] == [f"c/{file.name}:{place}" for place in places]
    by_column = Source(str(file), name="c", id_column="uid").documents()
    assert [d.id for d in by_column] == [f"c/u{i}" for i in range(5)]


def test_hub_datasets_are_streamed(tmp_path):
    write_corpus(tmp_path, ".parquet")  # `datasets` opens a local repository folder the way it opens one on the hub
    documents = list(Source(str(tmp_path), format="hub", id_column="uid").documents())
    assert [d.text for d in documents] == TEXTS
    assert documents[3].id.endswith("/u3")
    with pytest.raises(ValueError, match="no column 'body'; it has: other, text, uid"):
        next(Source(str(tmp_path), format="hub", text_column="body").documents())
    with pytest.raises(ValueError, match="has no split 'validation'; it has: train"):
        next(Source(str(tmp_path), format="hub", split="validation").documents())


def test_a_folder_or_a_pattern_of_a_hub_dataset(tmp_path):
    for language in ("python", "rust"):
        (tmp_path / "data" / language).mkdir(parents=True)
        pq.write_table(pa.table({"text": [language]}), tmp_path / "data" / language / "0.parquet")
    documents = Source(str(tmp_path), format="hub", data_dir="data/rust").documents()
    assert [(d.text, d.id) for d in documents] == [("rust", f"{tmp_path.name}/data/rust/data/rust/0.parquet:0")]
    with pytest.raises(ValueError, match="data_dir: 'rust' is for hub datasets"):
        Source(str(tmp_path), data_dir="rust")


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
    source = Source(str(tmp_path), name="f")
    documents = [d for part in source.parts()[0] for d in source.read(part, skipped)]
    assert [d.id for d in documents] == ["f/a.md", "f/sub/b.py"]
    assert skipped == {"binary": 1, "undecodable": 1}
    assert [d.id for d in Source(str(tmp_path), name="f", suffixes=(".c",)).documents()] == ["f/skip.c"]


def test_python_env_is_deterministic_and_mixes_packages():
    source = Source("python-env")
    documents = list(itertools.islice(source.documents(), 60))
    assert documents == list(itertools.islice(source.documents(), 60))
    assert all(len(d.text) >= 200 for d in documents)
    assert len({d.id.split("/")[2] for d in documents}) > 3, "a capped sample should span packages"
    assert not any("__pycache__" in d.id for d in documents)


SCORED = [
    {"text": "good", "lang": "en", "score": 0.9, "url": "http://a"},
    {"text": "poor", "lang": "en", "score": 0.2, "url": None},
    {"text": "gut", "lang": "de", "score": 0.9, "url": "http://c"},
    {"text": "unknown", "lang": None, "score": None, "url": "http://d"},
    {"text": None, "lang": "en", "score": 0.8, "url": "http://e"},
    {"text": "x", "lang": "en", "score": 0.65, "url": "http://f"},
]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_conditions_on_columns_and_urls(tmp_path, suffix):
    file = tmp_path / f"c{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(SCORED), file)
    else:
        file.write_bytes(jsonl(SCORED))

    def kept(**settings):
        skipped: Counter[str] = Counter()
        source = Source(str(file), url_column="url", **settings)
        documents = [d for part in source.parts()[0] for d in source.read(part, skipped)]
        return [(d.text, d.url) for d in documents], skipped

    good, x = ("good", "http://a"), ("x", "http://f")
    assert kept(keep={"lang": "en", "score": {"min": 0.65}}, min_chars=2) == (
        [good],
        {"score not kept": 1, "lang not kept": 2, "null": 1, "short": 1},
    )
    assert kept(keep={"score": {"min": 0.6, "max": 0.8}})[0] == [x]
    assert kept(keep={"lang": ["de", "fr"]})[0] == [("gut", "http://c")]
    assert kept(keep={"lang": "en"})[0] == [good, ("poor", ""), x]
    with pytest.raises(ValueError, match="has no column 'language'; it has: lang, score, text, url"):
        list(Source(str(file), keep={"language": "en"}).documents())
    with pytest.raises(ValueError, match=r"column 'lang' holds 'en', and keep\.lang asks for numbers"):
        kept(keep={"lang": {"min": 0.5}})


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"score": {"least": 1}}, r"keep\.score: expected a value, a list or \{min, max\}"),
        ({"score": {"min": "high"}}, r"keep\.score: 'high' is neither a number nor a date such as 2024-01-31"),
        ({"score": {"min": float("nan")}}, r"keep\.score: nan is neither a number"),
        ({"score": {"min": 2, "max": "2024-01-31"}}, r"keep\.score: .* are not both numbers or both dates"),
        ({"score": {"min": 2, "max": 1}}, r"keep\.score: min 2 is above max 1"),
        ({"score": []}, r"keep\.score: an empty list keeps no row"),
        ({"score": None}, r"keep\.score: expected a value"),
        (["en"], "keep: expected a mapping"),
    ],
)
def test_wrong_conditions_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        Source("x", keep=keep)


@pytest.mark.parametrize("part_bytes", [1, 300, 5000, 10**9])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_parts_are_read_on_their_own_and_together_are_the_source(tmp_path, kind, part_bytes):
    rows = [{"text": f"row {i} " + "é✓ word " * (i * 37 % 50)} for i in range(200)]
    for number in range(3):
        some = rows[number * 70 : (number + 1) * 70]
        file = tmp_path / f"f{number}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(some), file, row_group_size=16)
        elif kind == "txt":
            file.write_text("\n".join(row["text"] for row in some))
        else:
            content = jsonl(some).replace(b"\n", b"\n\n", 3)
            file.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    source = Source(str(tmp_path / f"*.{kind}"))
    parts, revision = source.parts(part_bytes)
    assert revision is None
    assert [Part.from_json(json.loads(json.dumps(asdict(part)))) for part in parts] == parts
    whole = [d for part in source.parts(10**9)[0] for d in source.read(part)]
    assert [d for part in parts for d in source.read(part)] == whole
    assert kind == "txt" or [d.text for d in whole] == [row["text"] for row in rows]
    assert len({d.id for d in whole}) == len(whole)
    if part_bytes == 300:
        assert len(parts) > (20 if kind == "jsonl" else 2)
    if part_bytes == 10**9:
        assert len(parts) == 1


def test_lone_surrogates_do_not_stop_a_run(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "broken \\ud800 escape", "id": "\\ud800", "url": "\\ud800"}\n')
    [document] = Source(str(file), id_column="id", url_column="url").documents()
    assert (document.text, document.id, document.url) == ("broken ? escape", "c.jsonl/?", "?")


def test_lone_surrogates_are_counted(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "\\ud800 and \\udfff"}\n{"text": "pair \\ud83d\\ude00"}\n{"text": "é"}\n')
    source, skipped = Source(str(file)), Counter()
    assert [d.text for d in source.read(source.parts()[0][0], skipped)] == ["? and ?", "pair 😀", "é"]
    assert skipped == {LOST: 2}


def test_a_json_array_is_refused_from_its_first_bytes(tmp_path):
    file = tmp_path / "c.json"
    with file.open("wb") as stream:
        stream.write(b'[{"text": "')
        stream.truncate(2 << 30)  # a line of two gigabytes, of which the disk holds nothing
    tracemalloc.start()
    with pytest.raises(ValueError, match="begins an array"):
        next(Source(str(file)).documents())
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_a_small_packed_file_that_holds_much_is_read_a_little_at_a_time(tmp_path):
    line = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    file = tmp_path / "c.jsonl.zst"
    file.write_bytes(zstandard.compress(line * 200_000))
    assert file.stat().st_size < 1 << 20
    tracemalloc.start()
    with open_binary(file) as stream:
        assert sum(1 for _ in stream) == 200_000
        assert pa.total_allocated_bytes() < 20 << 20
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_many_small_zstd_frames_cost_no_more_than_their_content(tmp_path):
    """Each frame once cost the copy of all that follow it in the block."""
    frame = zstandard.compress(b'{"text": "hello"}\n')
    file = tmp_path / "c.jsonl.zst"
    file.write_bytes(frame * 20_000)
    begin = time.process_time()
    with open_binary(file) as stream:
        assert len(stream.read()) == 20_000 * 18
    assert time.process_time() - begin < 0.5


def test_rows_without_an_id_get_one_from_their_place(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_bytes(jsonl([{"text": "a", "id": "x", "url": None}, {"text": "b", "id": None}, {"text": "c"}]))
    documents = list(Source(str(file), id_column="id", url_column="url", name="s").documents())
    assert documents[0].id == "s/x" and len({d.id for d in documents}) == 3
    assert documents[2].id.startswith("s/c.jsonl:")


def test_a_local_hub_folder_keeps_files_of_one_name_apart(tmp_path):
    for name in ("2013", "2014"):
        (tmp_path / "web" / "data" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([{"text": name}] * 3), tmp_path / "web" / "data" / name / "0.parquet")
    ids = [d.id for d in Source(str(tmp_path / "web"), format="hub").documents()]
    assert ids == [f"web/data/{name}/0.parquet:{i}" for name in ("2013", "2014") for i in range(3)]


def test_one_suffix_needs_a_list():
    with pytest.raises(ValueError, match=r"suffixes: expected a list, got '\.txt'"):
        Source("x", suffixes=".txt")


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
        ("c.jsonl", b'{"text": "a"}\n["a"]\n', "line 2: expected a JSON object, got"),
        ("c.json", b'\xef\xbb\xbf\n [{"text": "a"}]\n', r"line 1: .* begins an array; `jq -c '\.\[\]' FILE"),
        ("c.json", b'{\n  "text": "a"\n}\n', "line 1: .* begins an object of several lines; `jq -c"),
        ("c.jsonl", b'{"text": 5}\n', "column 'text' holds int, expected text"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], r"c.jsonl.gz.*(broken|not valid JSON)"),
        ("c.parquet", b"no parquet", "not a parquet file"),
        ("c.jsonl.gz", gzip.compress(jsonl(ROWS * 99), mtime=0)[:-200], r"c\.jsonl\.gz: broken after line \d+"),
        ("c.jsonl.gz", b"no gzip", r"c\.jsonl\.gz: broken after line 0"),
        ("c.jsonl.zst", zstandard.compress(jsonl(ROWS * 99))[:-9], r"c\.jsonl\.zst: broken after line \d+"),
        ("c.jsonl.zst", b"no zstd at all", r"c\.jsonl\.zst: broken after line 0"),
        ("c.jsonl.bz2", bz2.compress(jsonl(ROWS * 99))[:-9], r"c\.jsonl\.bz2: broken after line \d+"),
        ("c.jsonl.bz2", b"no bzip2", r"c\.jsonl\.bz2: broken after line 0"),
        ("c.jsonl.xz", lzma.compress(jsonl(ROWS * 99))[:-9], r"c\.jsonl\.xz: broken after line \d+"),
        ("c.jsonl.xz", b"no xz", r"c\.jsonl\.xz: broken after line 0"),
        ("c.jsonl.zst", zstandard.compress(jsonl(ROWS)) + b"more", r"c\.jsonl\.zst: broken after line \d+"),
        ("c.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9], r"c\.txt\.gz: broken"),
        ("c.jsonl", b'{"text": "a"}\n{"text": "\xff\xfe"}\n', r"c\.jsonl, line 2: not valid UTF-8"),
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
    with pytest.raises(ValueError, match=r"format: expected auto, .* got 'csv'"):
        Source("x", format="csv")
    with pytest.raises(ValueError, match="max_bytes: expected a whole number >= 1, got -1"):
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


def test_truncated_parquet_is_refused_and_a_damaged_page_names_the_row(tmp_path):
    file = tmp_path / "c.parquet"
    rows = [{"text": f"{i} " * 500} for i in range(4000)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000, compression="zstd", use_dictionary=False)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"c\.parquet: not a parquet file, or a truncated one"):
        list(Source(str(file)).documents())
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    with pytest.raises(ValueError, match=r"c\.parquet: broken after row \d+"):
        list(Source(str(file)).documents())
