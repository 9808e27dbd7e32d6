"""Columns: nested names, conditions on dates and numbers, columns that some rows lack."""

import json
from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.sources import Source

ROWS = [
    {"text": "a", "meta": {"set": "web", "url": "http://a"}, "when": "2023-05-01T10:00:00Z", "year": 2023},
    {"text": "b", "meta": {"set": "book", "url": None}, "when": "2024-01-31T23:30:00Z", "year": 2024},
    {"text": "c", "meta": None, "when": "2024-02-01T00:30:00+01:00", "year": 2024},
    {"text": "d", "meta": {"set": "web", "url": "http://d"}, "when": None, "year": 2025},
]


def write(file, rows):
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    return file


def texts(file, **settings):
    return "".join(d.text for d in Source(str(file), **settings).documents())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_point_reaches_into_a_column(tmp_path, suffix):
    file = write(tmp_path / f"c{suffix}", ROWS)
    assert texts(file, keep={"meta.set": "web"}) == "ad"
    documents = list(Source(str(file), url_column="meta.url", id_column="meta.set").documents())
    assert [d.url for d in documents] == ["http://a", "", "", "http://d"]
    assert [d.id.rpartition("/")[2] for d in documents[:2]] == ["web", "book"]
    with pytest.raises(ValueError, match=r"no column 'meta\.sett'"):
        texts(file, keep={"meta.sett": "web"})
    with pytest.raises(ValueError, match=r"no column 'meta\.set\.x'"):
        texts(file, text_column="meta.set.x")
    nested = write(tmp_path / f"n{suffix}", [{"doc": {"body": "x"}}, {"doc": {"body": "y"}}])
    assert texts(nested, text_column="doc.body") == "xy"
    pointed = write(tmp_path / f"p{suffix}", [{"a.b": "own", "a": {"b": "inner"}}])
    assert texts(pointed, text_column="a.b") == "own"


@pytest.mark.parametrize("kind", ["text", "time", "date"])
def test_dates_are_compared_as_dates(tmp_path, kind):
    rows, suffix = ROWS, ".jsonl"
    if kind != "text":
        suffix = ".parquet"
        times = [None if row["when"] is None else datetime.fromisoformat(row["when"]).astimezone(UTC) for row in ROWS]
        rows = [
            {"text": row["text"], "when": time.date() if time and kind == "date" else time}
            for row, time in zip(ROWS, times, strict=True)
        ]
    file = write(tmp_path / f"c{suffix}", rows)
    assert texts(file, keep={"when": {"min": "2024-01-01"}}) == "bc"
    assert texts(file, keep={"when": {"min": "2024-01-01", "max": "2024-01-31"}}) == "bc", "31 January in UTC"
    assert texts(file, keep={"when": {"max": "2023-12-31"}}) == "a"
    assert texts(file, keep={"when": {"min": "2023-01-01", "max": "2023-05-01"}}) == "a"
    if kind != "text":
        assert texts(file, keep={"when": "2023-05-01"}) == "a"
    if kind != "date":
        assert texts(file, keep={"when": {"min": "2024-01-31T23:15:00", "max": "2024-01-31T23:30:00Z"}}) == "bc"[:2]


def test_values_that_no_condition_can_mean_name_row_and_column(tmp_path):
    file = write(tmp_path / "c.jsonl", [{"text": "a", "n": 1, "when": "soon"}, {"text": "b", "n": "2", "when": 7}])
    for keep, message in (
        ({"n": {"min": 1}}, r"c\.jsonl, line 2: column 'n' holds '2', and keep\.n asks for numbers"),
        ({"n": 1}, r"c\.jsonl, line 2: column 'n' holds '2', which is never 1 \(keep\.n\)"),
        (
            {"when": {"min": "2024-01-01"}},
            r"c\.jsonl, line 1: column 'when' holds 'soon', and keep\.when asks for dates",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            texts(file, keep=keep)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_and_files_may_lack_what_others_have(tmp_path, suffix):
    """The same rows pass in one file and in two, whichever comes first."""
    lacking, having = [{"text": "a"}, {"text": "b"}], [{"text": "c", "url": "http://c", "lang": "en"}]
    for order in ((lacking, having), (having, lacking)):
        for number, rows in enumerate(order):
            write(tmp_path / f"{number}{suffix}", rows)
        source = Source(str(tmp_path / f"*{suffix}"), url_column="url")
        assert sorted((d.text, d.url) for d in source.documents()) == [("a", ""), ("b", ""), ("c", "http://c")]
        assert texts(tmp_path / f"*{suffix}", keep={"lang": "en"}) == "c"
    with pytest.raises(ValueError, match=r"no column 'urls'; it has: lang, text, url"):
        texts(tmp_path / f"*{suffix}", url_column="urls")


def test_bad_rows_can_be_passed_over(tmp_path):
    file = tmp_path / "c.jsonl"
    digits = "9" * 5000
    lines = ['{"text": "a"}', '{"text": ', "[1]", f'{{"text": "b", "n": {digits}}}', '{"text": 5}', '{"body": "x"}']
    file.write_bytes("\n".join([*lines, '{"text": "\udcff"}', '{"text": "z"}']).encode(errors="surrogateescape"))
    found = []
    source = Source(str(file))
    skipped: Counter[str] = Counter()
    [part] = source.parts()[0]
    assert [d.text for d in source.read(part, skipped, on_bad=found.append)] == ["a", "z"]
    assert [error.place for error in found] == [f"line {n}" for n in range(2, 8)]
    assert {error.file for error in found} == {str(file)}
    for error, reason in zip(
        found, ["not valid JSON", "a JSON object", "4,300 digits", "holds int", "'text'", "UTF-8"], strict=True
    ):
        assert reason in error.reason
    with pytest.raises(ValueError, match=r"c\.jsonl, line 2: not valid JSON"):
        list(source.read(part))
    file.write_text(f'{{"text": "a"}}\n{{"text": "b", "n": {digits}}}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl, line 2: a number of more than 4,300 digits"):
        texts(file)
    with pytest.raises(ValueError, match=r"column 'n' is of type int64, expected text"):
        texts(write(tmp_path / "n.parquet", [{"n": 1}]), text_column="n")


def test_text_columns_may_be_of_any_text_type(tmp_path):
    values = ["x", "y", None, "x"]
    types = {"dictionary": pa.dictionary(pa.int32(), pa.string()), "large": pa.large_string(), "nothing": pa.null()}
    table = pa.table(
        {name: pa.array([None] * 4 if name == "nothing" else values, kind) for name, kind in types.items()}
    )
    pq.write_table(table, tmp_path / "c.parquet")
    assert texts(tmp_path / "c.parquet", text_column="dictionary") == "xyx"
    assert texts(tmp_path / "c.parquet", text_column="large") == "xyx"
    assert texts(tmp_path / "c.parquet", text_column="nothing") == ""
