"""Files that carry results between machines, and those beside them: what is damaged is refused whole, and what others
have made stays."""

from __future__ import annotations

import gzip
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402
import results_page  # noqa: E402
import results_speed  # noqa: E402
from results_pack import pack, unpack  # noqa: E402
from results_plan import Plan, load_plan  # noqa: E402

from s2.files import NotOursError, write_json  # noqa: E402


@pytest.fixture
def plan_file(tmp_path) -> Path:
    """A plan of one stage and two arms, which have run as far as their files tell."""
    stage = {"name": "work", "command": ["true"], "leaves": ["{arm}/out"]}
    plan = {"name": "test", "root": str(tmp_path / "runs"), "stages": [stage], "arms": [{"name": "a"}, {"name": "b"}]}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    for arm in ("a", "b"):
        attempt = {"began": "2026-01-02T03:04:05+0000", "pid": 1, "gpu": None, "seconds": 60.0, "exit_code": 0}
        record = {"arm": arm, "stage": "work", "root": plan["root"], "command": ["true"], "recipe": None}
        record |= {
            "launched": "results.py",
            "commit": "abc",
            "versions": {"torch": "9"},
            "device": "the CPU",
            "data": {},
        }
        record |= {"exit_code": 0, "seconds": 60.0, "attempts": [attempt]}
        write_json(tmp_path / "runs" / arm / "work.run.json", record)
        (tmp_path / "runs" / arm / "out").write_text("\n".join(str(i * 7919 % 1000) for i in range(2000)))
    return path


@pytest.fixture
def carried(plan_file, tmp_path) -> Path:
    """The plan's results in a tar file."""
    pack(load_plan(str(plan_file)), tmp_path / "x.tar.gz")
    return tmp_path / "x.tar.gz"


def elsewhere(plan_file: Path) -> Plan:
    return load_plan(str(plan_file), [f"root={plan_file.parent}/there"])


def end_early(packed: bytes) -> bytes:
    return packed[: len(packed) // 2]


def flip_bits(packed: bytes) -> bytes:
    middle = len(packed) // 2
    return packed[:middle] + bytes(byte ^ 0x5A for byte in packed[middle : middle + 20]) + packed[middle + 20 :]


def change_a_letter(packed: bytes) -> bytes:
    """Of one file; sizes, headers and the checksum stay as they were."""
    content = gzip.decompress(packed)
    other = gzip.compress(content.replace(b"919", b"818", 1), mtime=0)
    return other[:-8] + packed[-8:]


def change_a_header(packed: bytes) -> bytes:
    """Of the second arm, in a tar that is not packed: tarfile takes that for the end."""
    content = gzip.decompress(packed)
    return content.replace(b"b/out\0", b"b/our\0", 1)


def lose_the_end(packed: bytes) -> bytes:
    """At the border of two files of a tar that is not packed."""
    content = gzip.decompress(packed)
    return content[: content.index(b"b/out\0")]


@pytest.mark.parametrize("damage", [end_early, flip_bits, change_a_letter, change_a_header, lose_the_end])
def test_a_damaged_file_of_results_is_refused_and_nothing_of_it_taken(plan_file, carried, damage):
    packed = carried.read_bytes()
    carried.write_bytes(damage(packed))
    assert carried.read_bytes() != packed
    with pytest.raises(ValueError, match=r"x\.tar\.gz: .*damaged"):
        results.main([str(plan_file), "--import", str(carried), f"root={plan_file.parent}/there"])
    assert not list((plan_file.parent / "there").glob("[ab]"))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_results_are_taken_from_whatever_tar_packs(plan_file, tmp_path, mode):
    with tarfile.open(tmp_path / "x", mode) as tar:
        tar.add(tmp_path / "runs" / "a", "./a")
    assert sorted(unpack(elsewhere(plan_file), tmp_path / "x")) == ["a/out", "a/work.run.json"]
    assert (tmp_path / "there/a/out").read_bytes() == (tmp_path / "runs/a/out").read_bytes()


def foreign_tar(file: Path) -> None:
    """Of files that lie as results do."""
    with tarfile.open(file, "w:gz") as tar:
        tar.add(__file__, "a/work.run.json")


@pytest.mark.parametrize("write", [lambda file: file.write_text("my notes"), lambda file: file.touch(), foreign_tar])
def test_an_export_takes_the_place_of_no_file_but_an_earlier_one(plan_file, tmp_path, write):
    file = tmp_path / "notes.tar.gz"
    write(file)
    before = file.read_bytes()
    with pytest.raises(NotOursError, match=r"notes\.tar\.gz was not written by this program; name another file"):
        results.main([str(plan_file), "--export", str(file)])
    assert file.read_bytes() == before
    file.unlink()
    for _ in range(2):
        assert results.main([str(plan_file), "--export", str(file)]) == 0
    assert unpack(elsewhere(plan_file), file)


def test_a_page_goes_into_no_folder_of_others(plan_file, tmp_path):
    (page := tmp_path / "page").mkdir()
    (page / "results.json").write_text("mine")
    with pytest.raises(NotOursError, match=r"page holds files of others \(results\.json\)"):
        results.main([str(plan_file), "--page", "--output", str(page)])
    assert [path.read_text() for path in page.iterdir()] == ["mine"]


def test_a_page_that_was_killed_while_it_was_written_is_written_again(plan_file, tmp_path, monkeypatch):
    command = [str(plan_file), "--page", "--output", str(tmp_path / "page")]
    with monkeypatch.context() as patch:
        patch.setattr(results_page, "text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            results.main(command)
    assert (tmp_path / "page/results.json").is_file()
    assert results.main(command) == 0 and "# test" in (tmp_path / "page/README.md").read_text()


def test_figures_of_speed_take_the_place_of_no_file_of_others(tmp_path, monkeypatch):
    row = {"attention_layout": "dense", "kv_bytes_per_token": 4}
    monkeypatch.setattr(results_speed, "measure", lambda *_: row)
    monkeypatch.setattr(results_speed, "load_config", lambda folder: None)
    file = tmp_path / "speed.json"
    for _ in range(2):
        results_speed.main(["--config", "hf", "--output", str(file)])
    for text in ("notes", "{}", "[]"):
        file.write_text(text)
        with pytest.raises(NotOursError, match=r"--output .*speed\.json: another file"):
            results_speed.main(["--config", "hf", "--output", str(file)])
        assert file.read_text() == text


def broken(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Texts in a record's place, and what is said of each."""
    yield "{", "not valid JSON"
    yield "[]", r"not a record of a stage \(expected a mapping, got \[\]\)"
    for key in ("seconds", "attempts", "command", "versions"):
        yield json.dumps({k: v for k, v in record.items() if k != key}), rf"missing key '{key}'"
    yield json.dumps(record | {"seconds": "1"}), "seconds: expected a number, got '1'"
    yield json.dumps(record | {"attempts": []}), "attempts: expected one or more"
    yield json.dumps(record | {"attempts": [{"began": "noon", "pid": 1}]}), r"attempts\[0\].began: expected a time like"
    yield json.dumps(record | {"attempts": [{"began": record["attempts"][0]["began"]}]}), r"missing key 'pid'"


def test_a_record_that_is_none_is_named_by_whatever_reads_it(plan_file, tmp_path):
    file = tmp_path / "runs/b/work.run.json"
    for text, said in broken(json.loads(file.read_text())):
        file.write_text(text)
        for option in ("--status", "--page"):
            with pytest.raises(ValueError, match=rf"runs/b/work\.run\.json.*{said}"):
                results.main([str(plan_file), option, "--output", str(tmp_path / "page")])
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(tmp_path / "runs" / "a", "a")
            tar.add(tmp_path / "runs" / "b", "b")
        with pytest.raises(ValueError, match=rf"x\.tar: b/work\.run\.json.*{said}"):
            unpack(elsewhere(plan_file), tmp_path / "x.tar")
    assert not (tmp_path / "there").exists() and not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("work/results/needle.json", {"kind": "needle", "summary": {"exact": {}}, "settings": {}}),
        ("work/results/needle.json", {"kind": "needle", "summary": [], "samples": []}),
        ("work/results/positions.json", {"kind": "positions", "summary": {}}),
        ("work/results/lm.json", {"results": {"piqa": 1}, "s2": {}}),
        ("speed.json", {"kind": "speed", "decode_ms": 1.0}),
        ("speed.json", []),
    ],
)
def test_results_that_lack_what_a_page_reads_are_named(plan_file, tmp_path, name, content):
    write_json(tmp_path / "runs/a" / name, content)
    with pytest.raises(ValueError, match=rf"{name}: not as it was written"):
        results.main([str(plan_file), "--page", "--output", str(tmp_path / "page")])
