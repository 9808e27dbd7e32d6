"""The command `python -m data.prepare`: a recipe's corpora, or sources named on the command line, to token shards."""

import argparse
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.corpus.sources import Source
from data.corpus.tokenizer import TextTokenizer
from data.prepare.output import TOKENIZER
from data.prepare.run import changed_note, changed_sources, check, is_prepared, prepare
from data.prepare.spec import PrepareSpec
from data.section import parse_arguments, prepare_section
from data.shards.reader import read_manifest, splits_of

_OF_SOURCES = ("text_column", "id_column", "url_column")
_OF_TRAINING = {"vocab_size": 32768, "sample_bytes": 100_000_000}


def main(argv: list[str] | None = None) -> None:
    """The command; raises what `prepare` raises, and ValueError where a finished output's sources have changed."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__.split("\n")[0],
        usage="%(prog)s [options] (--recipe RECIPE [key=value ...] | --sources PATH ... | --verify FOLDER)",
        epilog="With --recipe, key=value arguments override keys of the recipe: data.prepare.heldout_fraction=0.02",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="recipe YAML with a data.init_args.prepare section")
    what.add_argument("--sources", nargs="+", metavar="PATH", help="files, globs, folders, hf://..., python-env")
    what.add_argument(
        "--verify",
        metavar="FOLDER",
        help="compare shards, of a folder or of its train/ and heldout/, with their checksums",
    )
    parser.add_argument("--only-tokenizer", action="store_true", help="stop after <output>/tokenizer.json")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    plain = parser.add_argument_group("with --sources", argument_default=argparse.SUPPRESS)
    add = plain.add_argument
    options = [
        add("--output", help="folder to write"),
        add("--tokenizer", help="tokenizer.json, SentencePiece model or folder with one; else one is trained"),
        add("--vocab-size", type=int, help="of the trained tokenizer (default: 32768)"),
        add("--sample-bytes", type=int, help="of text that the tokenizer is trained on (default: 100 MB)"),
        add("--bos", metavar="TOKEN", help="that opens each document, or none"),
        add("--eos", metavar="TOKEN", help="that ends each document"),
        add("--text-column"),
        add("--id-column"),
        add("--url-column"),
        add("--deduplicate", choices=["exact", "near"]),
        add("--heldout-fraction", type=float, help="of the documents (default: 0.01); 0 holds out none"),
        add("--on-bad-row", choices=["stop", "skip"], help="(default: stop)"),
        add("--part-bytes", type=int, help="of the sources that a worker reads in one go"),
        add("--seed", type=int),
    ]
    args, overrides = parse_arguments(parser, argv)
    given = {option.dest: getattr(args, option.dest) for option in options if hasattr(args, option.dest)}
    if args.verify:
        for shards in splits_of(Path(args.verify)).values():
            shards.verify()
            print(f"{describe(shards.folder)}: checksums match")
        return
    if args.recipe and given:
        option = f"--{next(iter(given)).replace('_', '-')}"
        parser.error(f"{option} goes with --sources; a recipe says it in its prepare section")
    if args.sources and "output" not in given:
        parser.error("--sources needs --output")
    specs = prepare_section(args.recipe, overrides) if args.recipe else [_spec(args.sources, given)]
    check(specs)
    for spec in specs:
        _prepare(replace(spec, workers=spec.workers if args.workers is None else args.workers), args.only_tokenizer)


def _spec(paths: list[str], given: dict[str, Any]) -> PrepareSpec:
    """What the command line asks for."""
    places = Counter(path if "://" in path else os.path.realpath(os.path.expanduser(path)) for path in paths)
    if twice := [path for path, count in places.items() if count > 1]:
        raise ValueError(
            f"--sources: {twice[0]} is named {places[twice[0]]} times, and so its documents would be there"
        )
    labels = [Source(path=path).label for path in paths]
    names = [label if labels.count(label) == 1 else path for label, path in zip(labels, paths, strict=True)]
    columns = {key: given.pop(key) for key in _OF_SOURCES if key in given}
    tokenizer: dict[str, Any] = {key: given.pop(key) for key in ("bos", "eos") if key in given}
    training = {key: given.pop(key, default) for key, default in _OF_TRAINING.items()}
    tokenizer |= {"path": given.pop("tokenizer")} if "tokenizer" in given else {"train": training}
    sources = [{"path": path, "name": name, **columns} for path, name in zip(paths, names, strict=True)]
    return PrepareSpec.parse({"sources": sources, "tokenizer": tokenizer, **given}, "command line")


def _prepare(spec: PrepareSpec, only_tokenizer: bool) -> None:
    folders = list(spec.folders.values())
    if is_prepared(spec) and (changed := changed_sources(spec)):
        raise ValueError(
            f"{changed_note(spec, changed)}. To prepare them as they are now, choose another `output` or delete"
            f" {' and '.join(map(str, folders))}; training goes on with the shards that are there"
        )
    prepare(spec, only_tokenizer=only_tokenizer)
    if only_tokenizer:
        TextTokenizer(Path(spec.output) / TOKENIZER, spec.tokenizer.bos, spec.tokenizer.eos)  # it may be gone
        folders = []
        print(Path(spec.output) / TOKENIZER)
    for folder in folders:
        print(describe(folder))


def describe(folder: str | Path) -> str:
    """One line about a shard folder."""
    manifest = read_manifest(folder)
    skipped = sum((Counter(source["skipped"]) for source in manifest["sources"]), Counter())
    note = f"; skipped {', '.join(f'{n:,} {why}' for why, n in skipped.items())}" if skipped else ""
    return (
        f"{folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens,"
        f" {manifest['bytes']:,} bytes of text, vocabulary {manifest['tokenizer']['vocab_size']:,}{note}"
    )
