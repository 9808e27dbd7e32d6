"""Source code and documentation of pinned Python packages as a corpus, where neither FineWeb nor a hub can be reached.

    python scripts/package_texts.py --output runs/experiments/packages.jsonl.gz

One document for each folder of a package, its files joined in the order of their names under a comment with the path,
so that a name stands far from its definition. Wheels of pinned versions for one platform: the lines are the same on
every machine (their SHA-256 is printed). `pip` downloads them from the index that it is set up for; nothing is
installed or run.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from s2 import ending, files

PACKAGES = [
    "astropy==8.0.2",
    "biopython==1.88",
    "dask==2026.8.0",
    "distributed==2026.8.0",
    "django==6.1.3",
    "matplotlib==3.11.2",
    "mercurial==7.2.4",
    "networkx==3.7",
    "nltk==3.10.4",
    "numpy==2.5.5",
    "pandas==3.1.1",
    "qiskit==2.6.2",
    "scikit-learn==1.9.1",
    "scipy==1.18.1",
    "spacy==3.8.18",
    "sphinx==9.1.1",
    "sqlalchemy==2.1.9",
    "statsmodels==0.15.0",
    "sympy==1.14.0",
    "twisted==26.10.0",
    "xarray==2026.9.0",
]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "any")
SUFFIXES = (".py", ".rst", ".md", ".txt")
FILE_BYTES = range(1_000, 300_000)  # shorter ones say nothing, longer ones are tables
DOCUMENT_CHARS = range(4_000, 400_000)


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """The wheels of `packages`, sorted by name. Raises `FailureError` with pip's last line."""
    platforms = [word for each in PLATFORMS for word in ("--platform", each)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    done = subprocess.run(
        [*command, "--python-version", "3.12", "--dest", folder, *packages], capture_output=True, text=True
    )
    if done.returncode:
        raise ending.FailureError(f"pip download: {done.stderr.strip().splitlines()[-1]}")
    return sorted(folder.glob("*.whl"))


def documents(wheel: Path) -> Iterator[dict[str, str]]:
    """The folders of one wheel: `text`, and `id`, the folder's path, numbered where it makes several documents. Raises
    ValueError for a damaged one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted((each.filename for each in archive.infolist() if _is_text(each)), key=_place)
            for folder, group in itertools.groupby(names, key=lambda name: _place(name)[0]):
                for number, text in enumerate(_joined(archive, group)):
                    if len(text) in DOCUMENT_CHARS:
                        yield {"id": f"{folder}:{number}", "text": text}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{wheel}: damaged ({error})") from None


def _is_text(entry: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(entry.filename)
    left_out = {"test", "tests", "_vendor"} & set(path.parts) or any(p.endswith(".dist-info") for p in path.parts)
    return path.suffix in SUFFIXES and entry.file_size in FILE_BYTES and not left_out


def _place(name: str) -> tuple[PurePosixPath, str]:
    path = PurePosixPath(name)
    return path.parent, path.name


def _joined(archive: zipfile.ZipFile, names: Iterator[str]) -> Iterator[str]:
    """Files one behind the other, a new text begun before one that would make it longer than a document may be."""
    text = ""
    for name in names:
        part = f"# {name}\n\n{archive.read(name).decode('utf-8', errors='replace').strip()}\n\n"
        if text and len(text) + len(part) >= DOCUMENT_CHARS.stop:
            yield text
            text = ""
        text += part
    yield text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl.gz")
    output = parser.parse_args(argv).output
    if output.exists():
        raise FileExistsError(f"--output {output}: there is one already")
    digest, count = hashlib.sha256(), 0
    with files.temporary_folder() as folder, files.whole(output) as file:
        wheels = download(PACKAGES, folder)
        with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
            for document in itertools.chain.from_iterable(map(documents, wheels)):
                line = f"{json.dumps(document)}\n".encode()
                packed.write(line)
                digest.update(line)
                count += 1
    print(f"{output}: {count:,} documents, SHA-256 of the lines {digest.hexdigest()}")
    return ending.DONE


if __name__ == "__main__":
    ending.run(main)
