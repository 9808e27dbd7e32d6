"""What is in the data, as a page to look at: `python -m data.report --recipe recipes/demo/pretrain.yaml`.

Writes `report/report.md` and its plots beside the shards: totals, sources, lengths, packing, random documents; for a
recipe (`key=value` arguments change it) also what its mixture makes of them.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from tokenizers import Tokenizer

from data.section import DataSection, data_section, parse_arguments
from data.shards.mixture import Curriculum
from data.shards.packing import pack
from data.shards.reader import TokenShards, splits_of
from s2 import ending, files, tables
from s2.settings import read

KIND = "data report"
SAMPLES = 20
MIXTURE_SAMPLES = 10_000
_EXCERPT = 240  # characters of a sample's beginning and of its end
_WINDOWS = (2048, 8192, 32768, 131072)


def folder_report(output: str | Path, seed: int = 0) -> Path:
    """Write `<output>/report/report.md` about the shard folders below `output`, and return its path.

    Raises FileNotFoundError where there are none, `s2.files.NotOursError` where `report/` is somebody else's.
    """
    output = Path(output)
    splits = splits_of(output)
    folder = files.make_folder(output / "report", KIND)
    return _write(folder, [f"# {output}", *_folder_sections(folder, "", splits, seed)])


def recipe_report(recipe: str | Path, seed: int = 0, overrides: Sequence[str] = ()) -> Path:
    """The same for the data of a recipe, with its mixture: beside the shards it prepares, or else beside the first ones
    it mixes. Raises what opening them raises.

    overrides: `key=value` arguments, see `s2.recipe`.
    """
    section = data_section(Path(recipe), overrides)
    read(DataSection, section, f"{recipe}: data")
    from data.datamodule import PackedDataModule  # Lightning takes seconds to import

    data = PackedDataModule(**section)
    outputs = data.prepared or [Path(data.components[0].path).parent]
    rows = data.rows
    folder = files.make_folder(outputs[0] / "report", KIND)
    lines = [f"# {recipe}", *_mixture_sections(folder, rows)]
    for number, output in enumerate(outputs):
        suffix = f"-{number}" if number else ""
        lines += [f"## {output}", *_folder_sections(folder, suffix, splits_of(output), seed)]
    return _write(folder, lines)


def _write(folder: Path, lines: Sequence[str]) -> Path:
    file = folder / "report.md"
    files.write_text(file, "\n\n".join(lines) + "\n")
    return file


# --- A prepared folder


def _folder_sections(folder: Path, suffix: str, splits: dict[str, TokenShards], seed: int) -> list[str]:
    train = splits.get("train") or next(iter(splits.values()))
    manifest = train.manifest
    tokenizer, sources = manifest["tokenizer"], manifest["sources"]
    in_all = sum(source["tokens"] for source in sources)  # of all splits
    lengths = np.diff(train.offsets)
    by_source = {source: lengths[train.documents_of(source)] for source in train.sources}
    curves = {"documents": (lengths, np.ones(len(lengths))), "tokens": (lengths, lengths)}
    if len(by_source) > 1:
        curves |= {f"tokens, {source}": (each, each) for source, each in by_source.items()}
    plot_lengths(folder / f"lengths{suffix}.png", curves)
    return [
        f"Tokenizer: {tokenizer['vocab_size']:,} tokens, SHA-256 `{tokenizer['sha256'][:12]}`.",
        _table(
            {
                "split": name,
                **{key: shards.manifest[key] for key in ("documents", "tokens")},
                "bytes of text": shards.manifest["bytes"],
                "bytes a token": f"{shards.manifest['bytes'] / shards.manifest['tokens']:.2f}",
                "longest document": f"{np.diff(shards.offsets).max():,} tokens",
            }
            for name, shards in splits.items()
        ),
        "### Sources",
        _table(_source_row(source, in_all) for source in sources),
        *_bad_rows(sources),
        "### Lengths",
        "Training documents by length in tokens: how many there are, and how many tokens they hold"
        + (", in all and by source." if len(by_source) > 1 else "."),
        f"![lengths](lengths{suffix}.png)",
        _table([_length_row(lengths)]),
        "### Packing",
        "Best-fit packing of all training documents into windows; empty is the share of places without a token, cut the"
        " share of documents that are longer than a window.",
        _table(_packing_row(lengths, seq_len) for seq_len in _WINDOWS),
        f"### {SAMPLES} random training documents",
        *_samples(train, seed),
    ]


def _source_row(source: dict[str, Any], total: int) -> dict[str, Any]:
    return {
        "source": source["name"],
        "path": f"`{source['path']}`" + (f" at `{source['revision'][:12]}`" if source["revision"] else ""),
        **{key: source[key] for key in ("files", "documents", "tokens")},
        "share of tokens": f"{source['tokens'] / total:.2%}",
        "bytes a token": f"{source['bytes'] / source['tokens']:.2f}",
        "left out": ", ".join(f"{n:,} {why}" for why, n in source["skipped"].items()) or "-",
    }


def _bad_rows(sources: Sequence[dict[str, Any]]) -> list[str]:
    """The first rows of each source that were skipped as bad, in the words of the reader."""
    examples = [f"- {_plain(row)}" for source in sources for row in source.get("bad_rows", ())]
    return ["Bad rows that were skipped, the first of each source:", "\n".join(examples)] if examples else []


def _length_row(lengths: np.ndarray) -> dict[str, Any]:
    quantiles = {f"{q:.0%}": f"{np.quantile(lengths, q):,.0f}" for q in (0.01, 0.1, 0.5, 0.9, 0.99)}
    shares = {bound: lengths[lengths >= bound].sum() / lengths.sum() for bound in _WINDOWS}
    of_tokens = {f"tokens in documents >= {bound:,}": f"{share:.1%}" for bound, share in shares.items()}
    return {"": "document length", **quantiles, **of_tokens}


def _packing_row(lengths: np.ndarray, seq_len: int) -> dict[str, Any]:
    packing = pack(lengths, seq_len)
    cut = (lengths > seq_len + 1).mean()
    return {"window": seq_len, "windows": packing.num_windows, "empty": f"{packing.waste:.3%}", "cut": f"{cut:.3%}"}


def _samples(shards: TokenShards, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    count = len(shards.offsets) - 1
    chosen = np.sort(rng.choice(count, size=min(SAMPLES, count), replace=False))
    tokenizer = Tokenizer.from_file(str(shards.tokenizer_file)) if shards.tokenizer_file.is_file() else None
    lines = []
    for document in chosen.tolist():
        begin, end = int(shards.offsets[document]), int(shards.offsets[document + 1])
        name, url = shards.origin(document)
        size = int(shards.byte_offsets[document + 1] - shards.byte_offsets[document])
        lines.append(f"**{_plain(name)}** {_plain(url)} ({end - begin:,} tokens, {size:,} bytes)".replace("  ", " "))
        if tokenizer is not None:
            lines.append(_fenced(_excerpt(tokenizer, shards, begin, end)))
    return lines


def _excerpt(tokenizer: Tokenizer, shards: TokenShards, begin: int, end: int) -> str:
    """The text of a document, or its beginning and its end."""
    is_short = end - begin <= 2 * _EXCERPT
    spans = [(begin, end)] if is_short else [(begin, begin + _EXCERPT), (end - _EXCERPT, end)]
    texts = [tokenizer.decode(shards.read(*span).tolist(), skip_special_tokens=False) for span in spans]
    if is_short and len(texts[0]) <= 2 * _EXCERPT:
        return texts[0]
    return f"{texts[0][:_EXCERPT]}\n[...]\n{texts[-1][-_EXCERPT:]}"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _plain(text: str) -> str:
    return "".join("\\" + c if c in "\\`*_<>[]|" else c for c in text)


# --- A mixture


def _mixture_sections(folder: Path, rows: Curriculum) -> list[str]:
    mixture = rows.mixtures[-1]
    shares = mixture.quotas / mixture.quotas.sum()
    drawn = mixture.drawn(MIXTURE_SAMPLES) / MIXTURE_SAMPLES
    lengths = [np.diff(stream.shards.offsets)[stream.documents] for stream in mixture.streams]
    components = [
        {
            "component": f"`{stream.shards.folder}`" + (f", {stream.source}" if stream.source else ""),
            "document lengths": f"{each.min():,} to {each.max():,}",
            "documents": len(stream.documents),
            "tokens": stream.num_tokens,
            "share asked": f"{share:.1%}",
            f"share of the first {MIXTURE_SAMPLES:,} samples": f"{found:.2%}",
            "empty": f"{stream.packing.waste:.3%}",
            "seen once after tokens": f"{stream.num_windows / share * stream.seq_len:,.0f}",
        }
        for stream, each, share, found in zip(mixture.streams, lengths, shares, drawn, strict=True)
    ]
    phases = [
        {
            "window": phase.streams[0].seq_len,
            "from token": begin * rows.seq_len,
            "to token": "-" if end is None else end * rows.seq_len,
            "empty": f"{sum(w * stream.packing.waste for w, stream in zip(shares, phase.streams, strict=True)):.3%}",
        }
        for phase, begin, end in zip(rows.mixtures, rows.begins, [*rows.begins[1:], None], strict=True)
    ]
    folders = {stream.shards.folder: stream.shards for stream in mixture.streams}
    before = np.concatenate([np.diff(shards.offsets) for shards in folders.values()])
    mixed = np.concatenate([share * each / each.sum() for share, each in zip(shares, lengths, strict=True)])
    after = (np.concatenate(lengths), mixed)
    plot_lengths(folder / "mixture.png", {"tokens before mixing": (before, before), "tokens after mixing": after})
    curriculum = ["### Curriculum", _table(phases)] if len(phases) > 1 else []
    picture = "![lengths before and after mixing](mixture.png)"
    return ["## Mixture", _table(components), *curriculum, picture]


# --- Tables and plots


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown; whole numbers get their commas."""
    rows = list(rows)
    cells = [[f"{value:,}" if isinstance(value, int) else value for value in row.values()] for row in rows]
    return tables.markdown(list(rows[0]), cells)


def plot_lengths(file: Path, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw a step line for each curve: its documents' lengths in bins that double, weighed by what each counts for."""
    shares = {
        label: np.bincount(np.log2(lengths).astype(int), weights, 40) for label, (lengths, weights) in curves.items()
    }
    used = np.flatnonzero(sum(shares.values()))
    first, last = int(used[0]), int(used[-1]) + 1
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    edges = 2.0 ** np.arange(first, last + 1)
    for label, share in shares.items():
        axes.stairs(100 * share[first:last] / share.sum(), edges, label=label, linewidth=1.8)
    axes.set_xscale("log", base=2)
    ticks = [2**k for k in range(first, last + 1)]
    axes.set_xticks(ticks, [_short(tick) for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("document length (tokens)")
    axes.set_ylabel("share (%)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    with files.whole(file) as stream:
        figure.savefig(stream, format="png", dpi=150)


def _short(tick: int) -> str:
    return f"{tick >> 20}M" if tick >= 1 << 20 else f"{tick >> 10}k" if tick >= 1 << 10 else str(tick)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.report",
        description=__doc__.split("\n")[0],
        usage="%(prog)s [--seed SEED] (--recipe RECIPE [key=value ...] | --output FOLDER)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="recipe YAML whose data to describe, with its mixture")
    what.add_argument("--output", help="folder of prepared shards")
    parser.add_argument("--seed", type=int, default=0, help="of the random documents")
    args, overrides = parse_arguments(parser, argv)
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: expected at least 0")
    print(recipe_report(args.recipe, args.seed, overrides) if args.recipe else folder_report(args.output, args.seed))


if __name__ == "__main__":
    ending.run(main)
