"""Documents of the packages' corpus, from a wheel made up here."""

import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as `python scripts/package_texts.py` has it

import package_texts


def test_a_folder_is_a_document_of_its_files_in_order(tmp_path):
    long = "x = 1\n" * 400
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in (
            "alone.py",
            "pkg/b.py",
            "pkg/a.py",
            "pkg/sub/c.py",
            "pkg/sub/d.md",
            "pkg/tests/t.py",
            "pkg-1.dist-info/e.txt",
        ):
            archive.writestr(name, f"{name} {long * 2}")
        archive.writestr("pkg/short.py", "y = 2")
        archive.writestr("pkg/data.bin", long)
    found = list(package_texts.documents(tmp_path / "a.whl"))
    assert [each["id"] for each in found] == [".:0", "pkg:0", "pkg/sub:0"]
    first = found[1]["text"]
    assert first.startswith("# pkg/a.py\n\npkg/a.py x = 1") and first.index("# pkg/b.py") > first.index("# pkg/a.py")
    assert "short" not in first and "# pkg/sub/d.md" in found[2]["text"]


def test_a_large_folder_is_divided_between_files(tmp_path, monkeypatch):
    monkeypatch.setattr(package_texts, "DOCUMENT_CHARS", range(100, 5_000))
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for letter in "abc":
            archive.writestr(f"pkg/{letter}.py", "x = 1\n" * 350)
    found = list(package_texts.documents(tmp_path / "a.whl"))
    assert [(each["id"], each["text"].count("# pkg/")) for each in found] == [("pkg:0", 2), ("pkg:1", 1)]


def test_a_damaged_wheel_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pkg/a.py", "".join(f"x_{i * 7919 % 1000} = {i}\n" for i in range(2000)))
    packed = (tmp_path / "a.whl").read_bytes()
    for damaged in (packed[:3000], packed[:1000] + b"!" * 50 + packed[1050:]):
        (tmp_path / "a.whl").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.whl: damaged"):
            list(package_texts.documents(tmp_path / "a.whl"))


def test_a_file_that_is_there_stays(tmp_path):
    (tmp_path / "out.jsonl.gz").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="there is one already"):
        package_texts.main(["--output", str(tmp_path / "out.jsonl.gz")])
    assert (tmp_path / "out.jsonl.gz").read_bytes() == b"mine"
