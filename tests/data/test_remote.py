"""Remote corpora: a flaky or dead hub never changes a byte, costs little more than what is wanted, and is reported."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import zstandard

from data.corpus import remote
from data.corpus.remote import Retries, SourceError, hub_files, open_remote, remote_size
from data.corpus.sources import Source
from tests.data.hub_stand_in import HubStandIn, fineweb_rows, write_fineweb

FIRST = "data/CC-MAIN-2024-10/000_00000.parquet"
SECOND = "data/CC-MAIN-2024-10/000_00001.parquet"
FILE = r"resolve/.*000_00000"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    fineweb = write_fineweb(tmp_path_factory.mktemp("fineweb"))
    lines = "".join(json.dumps(row) + "\n" for row in fineweb_rows(300)).encode()
    logs = tmp_path_factory.mktemp("logs")
    (logs / "train.jsonl.gz").write_bytes(gzip.compress(lines))
    (logs / "test.jsonl.zst").write_bytes(zstandard.compress(lines[:100000]) + zstandard.compress(lines[100000:]))
    (logs / "empty.txt").touch()
    return {"owner/fineweb": fineweb, "owner/logs": logs}


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRIES", Retries(attempts=4, first_wait=0.01))
    with HubStandIn(repositories) as hub:
        hub.patch(monkeypatch, tmp_path / "home", timeout=1.0)
        yield hub


def url(hub: HubStandIn, path: str, name: str = "owner/fineweb") -> str:
    return f"hf://datasets/{name}@{hub.sha[name]}/{path}"


def test_a_path_may_go_on_into_the_dataset(hub):
    """`hf://owner/name/data` is the folder of it, `hf://owner/name/sample/*/*.parquet` what matches."""
    first, second = url(hub, FIRST), url(hub, SECOND)

    def files(path, **settings):
        source = Source(path, **settings)
        return source.label, [file for part in source.parts()[0] for file, *_ in part.files]

    sample = [url(hub, "sample/10BT/000_00000.parquet")]
    assert files("hf://owner/fineweb/sample/*/*.parquet") == ("owner/fineweb/sample", sample)
    assert files("hf://datasets/owner/fineweb/data/CC-MAIN-2024-10") == (
        "owner/fineweb/data/CC-MAIN-2024-10",
        [first, second],
    )
    assert files("hf://owner/fineweb", data_dir="data")[1] == [first, second]
    with pytest.raises(ValueError, match="names a place in the dataset, and so does data_dir"):
        files("hf://owner/fineweb/data", data_dir="sample")
    with pytest.raises(FileNotFoundError, match="owner/fineweb"):
        files("hf://owner/fineweb/nothing/*.parquet")


def test_subsets_and_splits_resolve_to_urls_at_a_commit(hub):
    sha = hub.sha["owner/fineweb"]
    both = hub_files("owner/fineweb", None, "train", None)
    assert both == ([url(hub, FIRST), url(hub, SECOND)], sha)
    assert hub_files("owner/fineweb", "default", "train", "main") == both
    sample = hub_files("owner/fineweb", "sample-10BT", "train", sha)
    assert sample[0] == [url(hub, "sample/10BT/000_00000.parquet")]
    logs = [hub_files("owner/logs", None, split, None)[0] for split in ("train", "test")]
    assert logs == [[url(hub, f, "owner/logs")] for f in ("train.jsonl.gz", "test.jsonl.zst")]
    assert not hub.bytes_sent("parquet|jsonl"), "files were opened only to be listed"


def test_a_local_folder_is_opened_like_a_repository(repositories, monkeypatch):
    folder = repositories["owner/fineweb"]
    monkeypatch.chdir(folder.parent)
    for name in (str(folder), folder.name):
        local = hub_files(name, None, "train", None)
        assert local == ([str(folder / FIRST), str(folder / SECOND)], None)
    with pytest.raises(ValueError, match="no subset 'nope'; it has: default, sample-10BT"):
        hub_files(str(folder), "nope", "train", None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("owner/nope", None, "train", None), FileNotFoundError, "there is no hub dataset 'owner/nope'"),
        (("a/b/c", None, "train", None), ValueError, "hub dataset 'a/b/c': .*namespace/repo_name"),
        (("owner/fineweb", None, "train", "v9"), FileNotFoundError, "'owner/fineweb' has no branch.* 'v9'"),
        (("owner/fineweb", "xl", "train", None), ValueError, "'owner/fineweb' has no subset 'xl'; .* sample-10BT"),
        (("owner/fineweb", None, "dev", None), ValueError, "'owner/fineweb' has no split 'dev'; it has: train"),
    ],
)
def test_unknown_names_say_what_there_is(hub, arguments, error, message, capsys):
    with pytest.raises(error, match=message) as caught:
        hub_files(*arguments)
    assert "\n" not in str(caught.value) and "trying again" not in capsys.readouterr().err


def test_a_dataset_whose_card_names_no_default_asks_for_a_subset(repositories, tmp_path, hub):
    card = (repositories["owner/fineweb"] / "README.md").read_text().replace("config_name: default", "config_name: all")
    for file in (FIRST, "sample/10BT/000_00000.parquet"):
        (tmp_path / "own" / file).parent.mkdir(parents=True)
        (tmp_path / "own" / file).write_bytes((repositories["owner/fineweb"] / file).read_bytes())
    (tmp_path / "own" / "README.md").write_text(card)
    with pytest.raises(ValueError, match="has several subsets, choose one; it has: all, sample-10BT"):
        hub_files(str(tmp_path / "own"), None, "train", None)


def test_resolution_outlives_a_flaky_hub_and_reports_a_dead_one(hub, monkeypatch, capsys):
    monkeypatch.setattr(remote, "SILENCE", 1.0)
    hub.fail("/api/datasets/owner/fineweb.expand=sha", 503, times=2)
    hub.fail("/api/datasets/owner/fineweb.expand=sha", "drop")
    hub.fail("/api/datasets/owner/fineweb/revision/", 503)  # inside `datasets`
    hub.fail("/tree/", "hang")  # the libraries would wait for ever
    assert len(hub_files("owner/fineweb", None, "train", None)[0]) == 2
    assert not hub.pending_faults()
    said = [line for line in capsys.readouterr().err.split("\n") if line.startswith("hf://datasets/owner/fineweb: ")]
    silent = sum("timed out" in line for line in said)  # a newer huggingface_hub asks again itself after a hang
    assert len(said) - silent == 4 and silent <= 1
    hub.stop()
    with pytest.raises(SourceError, match=r"hf://datasets/owner/fineweb: gave up .* after 4 attempts"):
        hub_files("owner/fineweb", None, "train", None)


def test_parquet_rows_are_the_same_through_503_drops_and_a_hang(hub, repositories, capsys):
    expected = pq.read_table(repositories["owner/fineweb"] / FIRST).to_pylist()
    for number, kind in enumerate((503, "drop", "hang", "whole", 429, "drop")):
        hub.fail(FILE, kind, times=1 + (number == 0))
    rows = []
    with open_remote(url(hub, FIRST)) as stream:
        table = pq.ParquetFile(stream, pre_buffer=False)
        for group in range(table.num_row_groups):
            rows += table.read_row_group(group).to_pylist()
    assert rows == expected and list(rows[0]) == [*fineweb_rows(1)[0]]
    assert not hub.pending_faults()
    lines = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert len(lines) == 7 and all(line.startswith(url(hub, FIRST) + ": ") and "at offset" in line for line in lines)


def test_only_the_wanted_columns_and_row_groups_are_fetched(hub, repositories):
    size = (repositories["owner/fineweb"] / FIRST).stat().st_size
    assert remote_size(url(hub, FIRST)) == size and not hub.bytes_sent(FILE)
    with open_remote(url(hub, FIRST)) as stream:
        table = pq.ParquetFile(stream)
        ids = table.read_row_group(2, columns=["id"])["id"].to_pylist()
        assert ids == [row["id"] for row in fineweb_rows(400, seed=1)[200:300]]
        assert hub.bytes_sent(FILE) < size / 6
        text = table.metadata.row_group(2).column(0).total_compressed_size
        table.read_row_group(2, columns=["text"])
        assert hub.bytes_sent(FILE) < size / 6 + text + 1000
    assert len(hub.ranges(FILE)) == 3


def test_a_dead_hub_ends_the_read_in_a_source_error(hub):
    with open_remote(url(hub, FIRST)) as stream:
        table = pq.ParquetFile(stream)
        first = table.read_row_group(0, columns=["text"])
        assert first["text"][0].as_py() == fineweb_rows(1, seed=1)[0]["text"]
        hub.stop()
        with pytest.raises(
            SourceError, match=r"000_00000.parquet: gave up at offset .* after 4 attempts .*Connect.*on disk"
        ):
            table.read_row_group(3, columns=["text"])
    with pytest.raises(SourceError, match="after 4 attempts"):
        open_remote(url(hub, FIRST).replace(hub.sha["owner/fineweb"], "other"))


def test_compressed_lines_stream_through_drops(hub, repositories, monkeypatch):
    monkeypatch.setattr(remote, "MOST_BLOCK", 1 << 17)
    for name in ("train.jsonl.gz", "test.jsonl.zst"):
        file = repositories["owner/logs"] / name
        hub.fail(name, "drop", times=2)
        hub.fail(name, 500)
        with open_remote(url(hub, name, "owner/logs")) as stream:
            if name.endswith("gz"):
                lines = gzip.GzipFile(fileobj=stream).readlines()
            else:
                reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True, closefd=True)
                lines = list(io.BufferedReader(reader))
        assert [json.loads(line) for line in lines] == fineweb_rows(300)
        assert hub.bytes_sent(name) == file.stat().st_size, "a broken read begins where it broke off"
        assert not hub.pending_faults()


def test_attempts_count_anew_after_every_byte_gained(hub, repositories):
    hub.fail(FILE, "drop", times=10)  # more than the attempts, each with half of what was missing
    with open_remote(url(hub, FIRST)) as stream:
        assert stream.read() == (repositories["owner/fineweb"] / FIRST).read_bytes()
    hub.fail(FILE, 503, times=4)
    with open_remote(url(hub, FIRST)) as stream, pytest.raises(SourceError, match=r"offset 0 after 4 .*503"):
        stream.read()


def test_what_will_not_pass_is_not_tried_again(hub, capsys):
    with pytest.raises(FileNotFoundError, match=r"nope.parquet"):
        open_remote(url(hub, "data/nope.parquet"))
    with pytest.raises(FileNotFoundError, match=r"nope.parquet"):
        remote_size(hub.url("owner/fineweb", "nope.parquet"))
    for status, error in ((404, FileNotFoundError), (401, PermissionError), (403, PermissionError)):
        hub.requests.clear()
        hub.fail(FILE, status)
        with open_remote(url(hub, FIRST)) as stream, pytest.raises(error, match=f"000_00000.parquet: .*{status}"):
            stream.read()
        assert len(hub.ranges(".") + [r for r in hub.requests if r.status == status]) == 1
    with pytest.raises(ValueError, match="nothing"):
        open_remote("nothing://x")
    assert "trying again" not in capsys.readouterr().err


def test_a_rate_limit_is_waited_out(hub, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    hub.fail(FILE, 429, headers={"Retry-After": "7"})
    hub.fail(FILE, 429, headers={"RateLimit": '"resolvers";r=0;t=211'})
    hub.fail(FILE, 503)
    with open_remote(url(hub, FIRST)) as stream:
        stream.read(1)
    assert waits[:2] == [7, 211] and waits[2] < 1


def test_waits_double_up_to_the_longest(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    monkeypatch.setattr(remote, "_connect", lambda url: (_ for _ in ()).throw(ConnectionResetError("reset")))
    with pytest.raises(
        SourceError, match=r"s3://a/b: gave up at offset 0 after 8 attempts \(ConnectionResetError: res"
    ):
        remote_size("s3://a/b")
    assert all(0.75 * 2**n <= wait <= min(1.25 * 2**n, 60) for n, wait in enumerate(waits)) and len(waits) == 7


def test_the_file_behaves_like_a_local_one(hub, repositories, monkeypatch):
    monkeypatch.setattr(remote, "LEAST_BLOCK", 700)
    monkeypatch.setattr(remote, "MOST_BLOCK", 5000)
    content = (repositories["owner/fineweb"] / FIRST).read_bytes()[:20000]
    (repositories["owner/logs"] / "part.bin").write_bytes(content)
    rng, local = random.Random(0), io.BytesIO(content)
    with io.BufferedReader(open_remote(hub.url("owner/logs", "part.bin")), 1000) as stream:
        for _ in range(150):
            action, size = rng.choice(("read", "seek", "readline", "readinto", "read1")), rng.randint(0, 3000)
            if action == "seek":
                place = (size, rng.choice((0, 1))) if rng.random() < 0.8 else (-size, 2)
                assert stream.seek(*place) == local.seek(*place)
            elif action == "readinto":
                ours, theirs = bytearray(size), bytearray(size)
                assert stream.readinto(ours) == local.readinto(theirs) and ours == theirs
            elif action == "read1":
                part = stream.read1(size)
                assert part == local.read(len(part)) and (part or not size or not local.read(1))
            else:
                assert getattr(stream, action)(size) == getattr(local, action)(size)
            assert stream.tell() == local.tell()
        assert stream.seek(0) == local.seek(0) and list(stream) == list(local)
        with pytest.raises(ValueError, match="before start"):
            stream.raw.seek(-1)
    with pytest.raises(ValueError, match="closed file"):
        stream.read(1)
    with open_remote(hub.url("owner/logs", "empty.txt")) as empty:
        assert empty.read() == empty.readline() == b"" and remote_size(empty.path) == 0


def test_other_protocols_go_through_fsspec(monkeypatch):
    files = fsspec.filesystem("memory")
    content = os.urandom(300_000)
    files.pipe_file("/corpus/a.bin", content)
    answers: list[object] = [ConnectionResetError("reset"), 10, TimeoutError()]
    whole = type(files).cat_file

    def cat_file(self, path, start=None, end=None):
        match answers.pop(0) if answers else None:
            case int(size):
                return whole(self, path, start, start + size)
            case Exception() as error:
                raise error
        return whole(self, path, start, end)

    monkeypatch.setattr(type(files), "cat_file", cat_file)
    monkeypatch.setattr(remote, "RETRIES", Retries(attempts=2, first_wait=0.01))
    assert remote_size("memory://corpus/a.bin") == len(content)
    with open_remote("memory://corpus/a.bin") as stream:
        assert stream.read() == content and not answers
    with pytest.raises(IsADirectoryError):
        open_remote("memory://corpus")
    with pytest.raises(FileNotFoundError):
        open_remote("memory://corpus/b.bin")


def test_a_new_process_needs_only_the_environment_and_no_torch(hub, tmp_path):
    """But for what the libraries bring: datasets 4 imports torch."""
    program = (
        "import sys, datasets; torch = 'torch' in sys.modules\n"
        "from data.corpus.remote import hub_files, open_remote\n"
        "files = hub_files('owner/fineweb', 'sample-10BT', 'train', None)[0]\n"
        "print(len(open_remote(files[0]).read()), 'torch' in sys.modules and not torch)"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [str(hub.bytes_sent("sample/10BT/.*parquet")), "False"], done.stderr
