"""Files that carry results between machines: what is damaged is refused whole."""

from __future__ import annotations

import gzip
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402
from results_pack import pack, unpack  # noqa: E402
from results_plan import Plan, load_plan  # noqa: E402

from s2.files import write_json  # noqa: E402


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
