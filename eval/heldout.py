"""Held-out documents of a recipe as text: read by held-out perplexity and, as a haystack, by the needle."""

from collections.abc import Iterator
from pathlib import Path

from data.corpus.sources import Source
from data.shards import TokenShards
from s2.model.tokenizer_files import read_tokenizer


def find_heldout(checkpoint: str | Path) -> Path:
    """The held-out shards of a run's checkpoint: runs/<recipe>/data/heldout for runs/<recipe>/<stage>/hf.

    Raises FileNotFoundError where there are none.
    """
    folder = Path(checkpoint).resolve()
    for parent in folder.parents[:3]:
        if (parent / "data" / "heldout" / "manifest.json").is_file():
            return parent / "data" / "heldout"
    raise FileNotFoundError(
        f"checkpoint {checkpoint} has no held-out shards near it (expected {folder.parent.parent}/data/heldout); name"
        " documents to read (text, jsonl, parquet or a shard folder): --heldout FILE for s2_heldout, --haystack FILE"
        " for the needle"
    )


def read_texts(path: str | Path, text_column: str = "text") -> Iterator[str]:
    """Documents of a shard folder, decoded with its own tokenizer, or of any corpus `data.corpus.sources` reads.

    Those are .txt, .md, .jsonl (.gz and .zst too), .parquet, a folder of text files or a glob pattern.

    Raises FileNotFoundError for a path that does not exist, ValueError for a file without that column.
    """
    if (Path(path) / "manifest.json").is_file():
        yield from _shard_texts(Path(path))
    else:
        for document in Source(path=str(path), text_column=text_column).documents():
            yield document.text


def _shard_texts(folder: Path) -> Iterator[str]:
    shards = TokenShards(folder)
    tokenizer = read_tokenizer(shards.tokenizer_file)
    frame = {shards.manifest["tokenizer"][key] for key in ("bos_id", "eos_id")}
    for start, stop in zip(shards.offsets[:-1], shards.offsets[1:], strict=True):
        tokens = shards.read(int(start), int(stop)).tolist()
        if tokens and tokens[0] in frame:
            tokens = tokens[1:]
        if tokens and tokens[-1] in frame:
            tokens = tokens[:-1]
        yield tokenizer.decode(tokens, skip_special_tokens=False)
