"""From corpora to token shards: `python -m data.prepare --recipe recipes/demo/pretrain.yaml`.

One pass over the sources writes `<output>/tokenizer.json`, `<output>/train/` and `<output>/heldout/`. A
finished output is left alone when the settings are the same, and is an error naming the differing key when
they are not; an interrupted one is made again from the start.
"""

import argparse
import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from data.schema import differences, from_mapping, whole_number
from data.shards import MANIFEST, ShardWriter, TokenShards, read_manifest
from data.sources import Document, Source
from data.tokenizer import TextTokenizer, TokenizerSpec, tokenizer_settings, train_tokenizer

_BATCH_BYTES = 8 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class PrepareSpec:
    """The `prepare` section of a recipe.

    output: folder to write. sources: see `data.sources.Source`; a bare string is its path.
    tokenizer: see `data.tokenizer.TokenizerSpec`.
    heldout_fraction, seed: a document is held out when a hash of (seed, its id) falls below the fraction;
        which documents those are does not depend on the order or number of sources. Fraction 0 writes no
        held-out folder.
    shard_tokens: a shard file is closed once it holds that many tokens.
    """

    output: str
    sources: tuple[Source, ...]
    tokenizer: TokenizerSpec
    heldout_fraction: float = 0.01
    seed: int = 0
    shard_tokens: int = 1 << 27

    @classmethod
    def parse(cls, values: Any, where: str = "prepare") -> "PrepareSpec":
        """Build from YAML; raises ValueError naming the wrong key."""
        spec = from_mapping(cls, values, where)
        if not isinstance(spec.sources, list | tuple) or not spec.sources:
            raise ValueError(f"{where}.sources: expected a list of at least one corpus, got {spec.sources!r}")
        sources = tuple(
            from_mapping(Source, {"path": entry} if isinstance(entry, str) else entry, f"{where}.sources[{i}]")
            for i, entry in enumerate(spec.sources)
        )
        tokenizer = from_mapping(TokenizerSpec, spec.tokenizer, f"{where}.tokenizer")
        if not 0 <= spec.heldout_fraction < 1:
            raise ValueError(f"{where}.heldout_fraction: {spec.heldout_fraction!r} is not in [0, 1)")
        shard_tokens = whole_number(spec.shard_tokens, f"{where}.shard_tokens", least=1)
        return replace(spec, sources=sources, tokenizer=tokenizer, shard_tokens=shard_tokens)

    @property
    def folders(self) -> dict[str, Path]:
        """Shard folders by split: `train`, and `heldout` unless the fraction is 0."""
        splits = ("train", "heldout") if self.heldout_fraction else ("train",)
        return {split: Path(self.output) / split for split in splits}

    def settings(self) -> dict[str, Any]:
        """All that decides the shards' content, as the manifest records it."""
        settings = asdict(self) | {"tokenizer": tokenizer_settings(self.tokenizer)}
        del settings["output"]
        return json.loads(json.dumps(settings))

    def is_heldout(self, document_id: str) -> bool:
        digest = hashlib.blake2b(f"{self.seed}:{document_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.heldout_fraction * 2**64


def is_prepared(spec: PrepareSpec) -> bool:
    """Whether the output is finished; raises ValueError where it was made with other settings."""
    for folder in spec.folders.values():
        if not (folder / MANIFEST).is_file():
            return False
        if lines := differences(read_manifest(folder)["settings"], spec.settings()):
            raise ValueError(
                f"{folder} was prepared with other settings ({'; '.join(lines[:3])}; there != asked)."
                " Choose another `output`, or delete that folder to prepare it again"
            )
    return True


def prepare(spec: PrepareSpec) -> None:
    """Make the shard folders of `spec` unless they are there.

    Raises FileNotFoundError / ValueError for anything wrong with the sources (all are looked up before work
    begins), and ValueError where no document fell into a split.
    """
    if is_prepared(spec):
        return
    settings = spec.settings()  # looks the tokenizer up
    for source in spec.sources:
        source.resolve()
    output = Path(spec.output)
    output.mkdir(parents=True, exist_ok=True)
    with _exclusive(output):
        if is_prepared(spec):  # another process was faster
            return
        for folder in spec.folders.values():
            (folder / MANIFEST).unlink(missing_ok=True)
        tokenizer = _make_tokenizer(spec, output / "tokenizer.json")
        _write_shards(spec, tokenizer, settings)


def _make_tokenizer(spec: PrepareSpec, file: Path) -> TextTokenizer:
    settings = spec.tokenizer
    if settings.path is not None:
        source = Path(settings.path)
        if source.resolve() != file.resolve():
            temporary = file.with_name("tokenizer.json.tmp")
            temporary.write_bytes(source.read_bytes())
            TextTokenizer(temporary, settings.bos, settings.eos)  # reject it before it takes the place
            temporary.replace(file)
    elif settings.train is not None:
        train_tokenizer(_sample(spec, settings.train["sample_bytes"]), settings.train["vocab_size"], file)
    return TextTokenizer(file, settings.bos, settings.eos)


def _sample(spec: PrepareSpec, sample_bytes: int) -> Iterator[str]:
    """The first training documents of each source, an equal share of bytes from each."""
    for source in spec.sources:
        left = sample_bytes / len(spec.sources)
        with tqdm(desc=f"tokenizer sample: {source.label}", unit="B", unit_scale=True, disable=None) as bar:
            for document in source.documents():
                if spec.is_heldout(document.id):
                    continue
                yield document.text
                size = len(document.text.encode())
                bar.update(size)
                left -= size
                if left <= 0:
                    break


def _write_shards(spec: PrepareSpec, tokenizer: TextTokenizer, settings: dict[str, Any]) -> None:
    writers = {
        split: ShardWriter(folder, tokenizer.dtype, tokenizer.vocab_size, spec.shard_tokens)
        for split, folder in spec.folders.items()
    }
    skipped: dict[str, Counter[str]] = {}
    try:
        for index, source in enumerate(spec.sources):
            reasons: Counter[str] = Counter()
            skipped[f"{index}:{source.label}"] = reasons
            with tqdm(desc=f"tokenize: {source.label}", unit="B", unit_scale=True, disable=None) as bar:
                for batch in _batches(source.documents(reasons)):
                    sizes = [len(document.text.encode()) for document in batch]
                    encoded = tokenizer.encode_documents([document.text for document in batch])
                    for split, writer in writers.items():
                        chosen = [i for i, d in enumerate(batch) if spec.is_heldout(d.id) == (split == "heldout")]
                        writer.add([encoded[i] for i in chosen], [sizes[i] for i in chosen])
                    bar.update(sum(sizes))
        for split, writer in writers.items():
            if not writer.counts.any():
                raise ValueError(
                    f"{spec.output}: no document fell into the {split} split"
                    f" with heldout_fraction {spec.heldout_fraction}; change the fraction or the seed"
                )
        # Training data last: whoever finds its manifest finds everything.
        for split in reversed(writers):
            writers[split].finish(
                tokenizer={**tokenizer.describe(), "file": "../tokenizer.json"},
                split={"name": split, "heldout_fraction": spec.heldout_fraction, "seed": spec.seed},
                skipped={name: dict(reasons) for name, reasons in skipped.items()},
                settings=settings,
            )
    finally:
        for writer in writers.values():
            writer.abort()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Hold the output folder's lock, so that two runs of one recipe do not write into each other's files."""
    with (output / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def describe(folder: str | Path) -> str:
    """One line about a shard folder."""
    manifest = read_manifest(folder)
    skipped = sum((Counter(reasons) for reasons in manifest["skipped"].values()), Counter())
    note = f"; skipped {', '.join(f'{n:,} {why}' for why, n in skipped.items())}" if skipped else ""
    return (
        f"{folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens,"
        f" {manifest['bytes']:,} bytes of text, vocabulary {manifest['tokenizer']['vocab_size']:,}{note}"
    )


def prepare_section(recipe: str | Path) -> list[PrepareSpec]:
    """The `prepare` settings of a training recipe (one mapping or a list of them), below `data`."""
    file = Path(recipe)
    if not file.is_file():
        raise FileNotFoundError(f"recipe {str(recipe)!r}: no such file")
    data = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("data") or {}
    section = data.get("init_args", data).get("prepare")
    if not section:
        raise ValueError(f"{recipe}: no data.init_args.prepare section, so there is nothing to prepare")
    return parse_sections(section, f"{recipe}: data.init_args.prepare")


def parse_sections(section: Any, where: str = "prepare") -> list[PrepareSpec]:
    """One `prepare` mapping or a list of them, as specs."""
    if isinstance(section, list):
        return [PrepareSpec.parse(values, f"{where}[{i}]") for i, values in enumerate(section)]
    return [PrepareSpec.parse(section, where)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="recipe YAML with a data.init_args.prepare section")
    what.add_argument("--sources", nargs="+", metavar="PATH", help="files, globs, folders, hf://..., python-env")
    what.add_argument("--verify", metavar="FOLDER", help="compare a shard folder with its checksums")
    parser.add_argument("--output", help="folder to write (with --sources)")
    parser.add_argument("--tokenizer", help="an existing tokenizer.json; else one is trained")
    parser.add_argument("--vocab-size", type=int, default=32768, help="of the trained tokenizer")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--heldout-fraction", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.verify:
        TokenShards(args.verify).verify()
        print(f"{describe(args.verify)}: checksums match")
        return
    if args.recipe:
        specs = prepare_section(args.recipe)
    else:
        if not args.output:
            parser.error("--sources needs --output")
        path_or_train = {"path": args.tokenizer} if args.tokenizer else {"train": {"vocab_size": args.vocab_size}}
        specs = parse_sections(
            {
                "output": args.output,
                "sources": [{"path": path, "text_column": args.text_column} for path in args.sources],
                "tokenizer": path_or_train,
                "heldout_fraction": args.heldout_fraction,
                "seed": args.seed,
            },
            "command line",
        )
    for spec in specs:
        prepare(spec)
        for folder in spec.folders.values():
            print(describe(folder))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
