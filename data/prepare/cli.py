"""The command `python -m data.prepare`: a recipe's corpora, or sources named on the command line, to token shards."""

import argparse
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from data.corpus.sources import PART_BYTES, Source
from data.corpus.tokenizer import TextTokenizer
from data.prepare.output import TOKENIZER
from data.prepare.run import changed_note, changed_sources, is_prepared, prepare
from data.prepare.spec import is_override, parse_sections, prepare_section
from data.shards.reader import TokenShards, read_manifest

_PLAIN_KEYS = ("deduplicate", "heldout_fraction", "on_bad_row", "part_bytes", "seed")


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
    what.add_argument("--verify", metavar="FOLDER", help="compare a shard folder with its checksums")
    parser.add_argument("--only-tokenizer", action="store_true", help="stop after <output>/tokenizer.json")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    plain = parser.add_argument_group("with --sources")
    plain.add_argument("--output", help="folder to write")
    plain.add_argument(
        "--tokenizer", help="a tokenizer.json, a SentencePiece model or a folder with one of them; else one is trained"
    )
    plain.add_argument("--vocab-size", type=int, default=32768, help="of the trained tokenizer")
    plain.add_argument("--sample-bytes", type=int, default=100_000_000, help="of text that the tokenizer is trained on")
    plain.add_argument("--bos", default="auto", metavar="TOKEN", help="that opens each document, or none")
    plain.add_argument("--eos", default="auto", metavar="TOKEN", help="that ends each document")
    plain.add_argument("--text-column", default="text")
    plain.add_argument("--id-column")
    plain.add_argument("--url-column")
    plain.add_argument("--deduplicate", choices=["exact", "near"])
    plain.add_argument("--heldout-fraction", type=float, default=0.01, help="of the documents; 0 holds out none")
    plain.add_argument("--on-bad-row", choices=["stop", "skip"], default="stop")
    plain.add_argument(
        "--part-bytes", type=int, default=PART_BYTES, help="of the sources that a worker reads in one go"
    )
    plain.add_argument("--seed", type=int, default=0)
    args, overrides = parser.parse_known_args(argv)
    if strange := [text for text in overrides if not is_override(text)]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if overrides and not args.recipe:
        parser.error(f"{overrides[0]}: key=value arguments override keys of a --recipe")
    if args.verify:
        TokenShards(args.verify).verify()
        print(f"{describe(args.verify)}: checksums match")
        return
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    if args.recipe:
        for action in plain._group_actions:
            if getattr(args, action.dest) != action.default:
                parser.error(f"{action.option_strings[0]} goes with --sources; a recipe says it in its prepare section")
        specs = prepare_section(args.recipe, overrides)
    else:
        if not args.output:
            parser.error("--sources needs --output")
        given = Counter(path if "://" in path else os.path.realpath(os.path.expanduser(path)) for path in args.sources)
        if twice := [path for path, count in given.items() if count > 1]:
            raise ValueError(
                f"--sources: {twice[0]} is named {given[twice[0]]} times, and so its documents would be there"
            )
        trained = {"train": {"vocab_size": args.vocab_size, "sample_bytes": args.sample_bytes}}
        columns = {key: getattr(args, key) for key in ("text_column", "id_column", "url_column")}
        specs = parse_sections(
            {
                "output": args.output,
                "sources": [{"path": path, "name": _name(path, args.sources), **columns} for path in args.sources],
                "tokenizer": {
                    **({"path": args.tokenizer} if args.tokenizer else trained),
                    **{"bos": args.bos, "eos": args.eos},
                },
                **{key: getattr(args, key) for key in _PLAIN_KEYS},
            },
            "command line",
        )
    for spec in specs:
        if is_prepared(spec) and (changed := changed_sources(spec)):
            folders = " and ".join(map(str, spec.folders.values()))
            raise ValueError(
                f"{changed_note(spec, changed)}. To prepare them as they are now, choose another `output` or delete"
                f" {folders}; training goes on with the shards that are there"
            )
        prepare(replace(spec, workers=args.workers or spec.workers), only_tokenizer=args.only_tokenizer)
        if args.only_tokenizer:
            TextTokenizer(Path(spec.output) / TOKENIZER, spec.tokenizer.bos, spec.tokenizer.eos)  # it may be gone
            print(Path(spec.output) / TOKENIZER)
            continue
        for folder in spec.folders.values():
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


def _name(path: str, every: list[str]) -> str:
    """A source's name on the command line: its usual one where that is its alone, else its path."""
    names = [Source(path=other).label for other in every]
    label = Source(path=path).label
    return label if names.count(label) == 1 else path
