"""FineWeb's schema from a hub to shards: a flaky network changes nothing, a dead one is named and taken up later."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.corpus import remote
from data.corpus.remote import Retries, SourceError
from data.corpus.tokenizer import TextTokenizer
from data.prepare import part, prepare
from data.prepare.spec import PrepareSpec
from data.shards import TokenShards
from tests.data.hub_stand_in import HubStandIn, write_fineweb

COLUMNS = ["text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count"]


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory):
    return write_fineweb(tmp_path_factory.mktemp("fineweb"))


@pytest.fixture
def hub(fineweb, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRIES", Retries(attempts=3, first_wait=0.01))
    with HubStandIn({"owner/fineweb": fineweb}) as hub:
        hub.patch(monkeypatch, tmp_path / "home", timeout=1.0)
        yield hub


def settings(path, output, **overrides):
    source = {"path": path, "name": "fineweb", "id_column": "id", "url_column": "url"}
    return {
        "output": str(output),
        "sources": [source | overrides],
        "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 20_000}},
        "heldout_fraction": 0.1,
        "part_bytes": 20_000,
        "workers": 1,
    }


def rows_of(output):
    """Id -> (url, text) of all documents, both splits."""
    tokenizer = TextTokenizer(output / "tokenizer.json")
    found = {}
    for split in ("train", "heldout"):
        shards = TokenShards(output / split)
        for i, (begin, end) in enumerate(zip(shards.offsets, shards.offsets[1:], strict=False)):
            name, url = shards.origin(i)
            found[name] = (url, tokenizer.decode(shards.read(int(begin) + 1, int(end) - 1)))
    return found


def local_rows(fineweb):
    import pyarrow.parquet as pq

    tables = [pq.read_table(file) for file in sorted((fineweb / "data").rglob("*.parquet"))]
    assert tables[0].column_names == COLUMNS
    return [row for table in tables for row in table.to_pylist()]


def test_a_flaky_hub_gives_the_very_documents(hub, fineweb, tmp_path):
    rows = local_rows(fineweb)
    hub.fail(r"resolve/.*000_00000", 503, times=2)
    hub.fail(r"resolve/.*000_00001", "drop", times=2)
    prepare(PrepareSpec.parse(settings("hf://owner/fineweb", tmp_path / "out")))
    assert hub.pending_faults() == 0
    assert rows_of(tmp_path / "out") == {f"fineweb/{row['id']}": (row["url"], row["text"]) for row in rows}
    [source] = TokenShards(tmp_path / "out" / "train").manifest["sources"]
    assert (source["revision"], source["files"], source["documents"]) == (hub.sha["owner/fineweb"], 2, len(rows))
    prepare(PrepareSpec.parse(settings(str(fineweb / "data" / "*" / "*.parquet"), tmp_path / "local")))
    for split in ("train", "heldout"):
        assert TokenShards(tmp_path / "local" / split).identity == TokenShards(tmp_path / "out" / split).identity


def test_filters_apply_to_hub_rows(hub, fineweb, tmp_path):
    keep = {"language": "en", "language_score": {"min": 0.8}}
    rows = [row for row in local_rows(fineweb) if row["language"] == "en" and row["language_score"] >= 0.8]
    assert 0 < len(rows) < len(local_rows(fineweb))
    prepare(PrepareSpec.parse(settings("hf://owner/fineweb", tmp_path / "out", keep=keep)))
    assert set(rows_of(tmp_path / "out")) == {f"fineweb/{row['id']}" for row in rows}


def test_a_hub_that_dies_is_named_and_the_work_goes_on_later_at_the_same_revision(fineweb, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRIES", Retries(attempts=3, first_wait=0.01))
    asked = PrepareSpec.parse(settings("hf://owner/fineweb", tmp_path / "out"))
    with HubStandIn({"owner/fineweb": fineweb}) as hub:
        hub.patch(monkeypatch, tmp_path / "home", timeout=1.0)
        encode, begun = part._encode, []

        def dies_after_three_parts(task):
            begun.append(task.name)
            if len(begun) == 4:
                hub.fail(r"resolve/", 503, times=10_000)
            return encode(task)

        with (
            monkeypatch.context() as patch,
            pytest.raises(SourceError, match=r"hf://datasets/owner/fineweb@.*\.parquet"),
        ):
            patch.setattr(part, "_encode", dies_after_three_parts)
            prepare(asked)
    done = sorted(file.name for file in (tmp_path / "out" / "work").glob("0*.json"))
    assert done == [f"{name}.json" for name in begun[:3]]
    with HubStandIn({"owner/fineweb": fineweb}) as hub:
        hub.patch(monkeypatch, tmp_path / "home", timeout=1.0)
        again = []
        monkeypatch.setattr(part, "_encode", lambda task: again.append(task.name) or encode(task))
        prepare(asked)
        assert again and not set(again) & set(begun[:3])
        assert not hub.bytes_sent("README"), "the dataset should not be looked up again"
    prepare(PrepareSpec.parse(settings(str(fineweb / "data" / "*" / "*.parquet"), tmp_path / "local")))
    for split in ("train", "heldout"):
        assert TokenShards(tmp_path / "local" / split).identity == TokenShards(tmp_path / "out" / split).identity


def test_the_command_line_reads_a_hub_with_several_workers(fineweb, tmp_path):
    with HubStandIn({"owner/fineweb": fineweb}) as hub:
        command = [sys.executable, "-m", "data.prepare", "--output", str(tmp_path / "out"), "--vocab-size", "300"]
        command += ["--workers", "2", "--part-bytes", "20000", "--id-column", "id", "--url-column", "url"]
        result = subprocess.run(
            [*command, "--sources", "hf://owner/fineweb"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr
    rows = local_rows(fineweb)
    assert len(rows_of(tmp_path / "out")) == len(rows)
