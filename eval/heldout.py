"""Held-out documents of a recipe as text: the `s2_heldout` task of lm-eval, and the needle's haystack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpus.sources import Source
from data.shards import TokenShards
from s2.model.tokenizer_files import read_tokenizer

GIVEN = "--heldout FILE (make: HELDOUT=FILE)"  # to s2_heldout
CHARS_A_TOKEN = 64  # a token has seldom more than 16 characters: so many are enough for as many tokens as are wanted


def find_heldout(checkpoint: str | Path, how: str) -> Path:
    """The held-out shards of a run's checkpoint: runs/<recipe>/data/heldout for runs/<recipe>/<stage>/hf.

    Raises FileNotFoundError where there are none, saying how other documents are given: by an option, make's setting.
    """
    folder = Path(checkpoint).resolve()
    for parent in folder.parents[:3]:
        if (parent / "data" / "heldout" / "manifest.json").is_file():
            return parent / "data" / "heldout"
    raise FileNotFoundError(
        f"checkpoint {checkpoint} has no held-out shards near it (a folder data/heldout beside its run, as a recipe"
        f" makes it); name text, jsonl, parquet or a shard folder with {how}"
    )


def read_texts(path: str | Path, text_column: str = "text", source: str | None = None) -> Iterator[str]:
    """Documents of a shard folder, decoded with its own tokenizer, or of any corpus `data.corpus.sources` reads (.txt,
    .md, .jsonl, .parquet, a folder of text files, a glob pattern).

    source: of a shard folder, only documents of that source.

    Raises FileNotFoundError for a path that does not exist, ValueError for a file without that column, and for a source
    that is not there.
    """
    if not (Path(path) / "manifest.json").is_file():
        if source is not None:
            raise ValueError(f"--source {source}: {path} is no shard folder, and only those know sources of documents")
        yield from (document.text for document in Source(path=str(path), text_column=text_column).documents())
        return
    shards = TokenShards(Path(path))
    tokenizer = read_tokenizer(shards.tokenizer_file)
    frame = {shards.manifest["tokenizer"][key] for key in ("bos_id", "eos_id")}
    for document in shards.documents_of(source, "--source"):
        start, stop = shards.offsets[document : document + 2]
        tokens = shards.read(int(start), int(stop)).tolist()
        tokens = tokens[1:] if tokens and tokens[0] in frame else tokens
        tokens = tokens[:-1] if tokens and tokens[-1] in frame else tokens
        yield tokenizer.decode(tokens, skip_special_tokens=False)


def load(pretrained: str, heldout: str | None = None, **_: Any) -> dict[str, Any]:
    """Rows {text} for `s2_heldout`, of `heldout` (default: the held-out shards of the run that `pretrained` is of).

    Raises FileNotFoundError where there are none, ValueError for documents without any text.
    """
    import datasets

    source = heldout or find_heldout(pretrained, GIVEN)
    rows = [{"text": text} for text in read_texts(source) if text.strip()]
    if not rows:
        raise ValueError(f"s2_heldout: {source} has no document with text in it")
    return {"test": datasets.Dataset.from_list(rows)}


def text(document: dict[str, str]) -> str:
    # A function, because a template would read a document that looks like a list or a number as one.
    return document["text"]
