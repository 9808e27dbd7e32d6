"""Who sees what: the attention layout of a model as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from eval.report.figures import GRID, INK, PALE, new_figure
from s2.attention.pattern import HeadRule, Pattern
from s2.model.config import ModelConfig
from s2.model.layouts import ranges

_DENSE, _WINDOW, _STRIDE, _SINK = "#1f2933", "#0072b2", "#009e73", "#e69f00"
_KINDS = (_STRIDE, "#cc79a7", "#56b4e9", "#d55e00")  # of sparse layers, in the strip over depth
_HEADS, _COLUMNS = 4, 7  # drawn of a layer, in a line
_BLOCKS = (16, 56)  # drawn at least and at most
_UNION = tuple(f"#{v:02x}{v:02x}{v:02x}" for v in range(190, 39, -10))  # few to all heads


@dataclass(frozen=True)
class Kind:
    """Layers of one pattern. rotation: of the first of them."""

    pattern: Pattern
    layers: tuple[int, ...]
    rotation: int


def kinds(config: ModelConfig) -> list[Kind]:
    """The kinds of layers of a model, in the order of their first layers."""
    layout = config.layout
    found: dict[Pattern, list[int]] = {}
    for layer, pattern in enumerate(layout.patterns):
        found.setdefault(pattern, []).append(layer)
    return [Kind(pattern, tuple(layers), layout.rotations[layers[0]]) for pattern, layers in found.items()]


def draw(config: ModelConfig, name: str) -> Figure:
    """Layers over depth, and for each kind the blocks that a few of its heads see, and all of them together."""
    layout, shown = config.layout, kinds(config)
    heads = layout.ruled_heads(config.num_key_value_heads)
    num_blocks = _blocks_to_draw(shown, heads)
    places, rows_drawn = _places([(_panels(kind, heads, num_blocks), kind.pattern.is_dense) for kind in shown])
    width, top, row = 9.6, 0.86, 1.72
    height = top + row * rows_drawn
    side = (width - 0.24) / _COLUMNS
    figure = new_figure(width, height)

    def write(x: float, y: float, text: str, **how: Any) -> None:  # inches from the top left corner
        figure.text(x / width, 1 - y / height, text, va="top", parse_math=False, **how)

    write(0.12, 0.06, name, fontsize=11, fontweight="bold", color=INK)
    write(width - 0.12, 0.1, "layers, first to last; dense ones dark", fontsize=8, color=PALE, ha="right")
    colours = _colours(shown)
    _strip(figure, config, shown, colours, height)
    size = f", blocks of {config.block_size}, {heads} {'KV' if heads == config.num_key_value_heads else 'query'} heads"
    for kind, colour, (first, line, panels) in zip(shown, colours, places, strict=True):
        y = top + row * line
        what = f"layers {ranges(kind.layers)}: {kind.pattern}" + ("" if kind.pattern.is_dense else size)
        write(0.12 + first * side, y - 0.06, what, fontsize=8.5, color=colour, fontweight="bold")
        for column, (title, picture, cmap) in enumerate(panels, start=first):
            box = side - 0.14
            place = ((0.12 + column * side) / width, 1 - (y + 0.32 + box) / height, box / width, box / height)
            axes = figure.add_axes(place)
            axes.imshow(picture, cmap=cmap, vmin=0, vmax=cmap.N - 1, interpolation="nearest", aspect="equal")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(GRID)
            axes.set_title(title, fontsize=8, color=INK, pad=3, loc="left")
    return figure


def _places(kinds: list[tuple[list[Any], bool]]) -> tuple[list[tuple[int, int, list[Any]]], int]:
    """(first column, line, panels) of each kind, beside each other where there is room; number of lines."""
    places: list[tuple[int, int, list[Any]]] = []
    column = line = 0
    for panels, is_dense in kinds:
        if column and column + len(panels) > _COLUMNS:
            column, line = 0, line + 1
        places.append((column, line, panels))
        column += max(len(panels), 2 if is_dense else 3)  # the width of a heading
    return places, line + 1


def _blocks_to_draw(shown: list[Kind], heads: int) -> int:
    rules = [rule for kind in shown for rule in kind.pattern.rules(heads, layer=kind.rotation) if not rule.is_dense]
    wanted = max((2 * (r.local + max((level.stride for level in r.levels), default=0)) for r in rules), default=0)
    return int(np.clip(wanted, *_BLOCKS))


def _colours(shown: list[Kind]) -> list[str]:
    sparse = iter(_KINDS * len(shown))
    return [_DENSE if kind.pattern.is_dense else next(sparse) for kind in shown]


def _strip(figure: Figure, config: ModelConfig, shown: list[Kind], colours: list[str], height: float) -> None:
    layers = config.num_hidden_layers
    axes = figure.add_axes((0.0125, 1 - 0.58 / height, 0.975, 0.2 / height))
    for kind, colour in zip(shown, colours, strict=True):
        axes.bar(np.array(kind.layers) + 0.5, 1, width=0.9, color=colour)
        for layer in kind.layers if layers <= 48 else ():
            axes.text(layer + 0.5, 0.48, str(layer), ha="center", va="center", fontsize=6.5, color="white")
    axes.set_xlim(0, layers)
    axes.set_ylim(0, 1)
    axes.axis("off")


def _panels(kind: Kind, heads: int, num_blocks: int) -> list[tuple[str, np.ndarray, Any]]:
    """(title, colour index of each query (row) and key block, colours)"""
    rules = kind.pattern.rules(heads, layer=kind.rotation)
    drawn = [(rules.index(rule), rule) for rule in dict.fromkeys(rules)][:_HEADS]
    alone = len(set(rules)) == 1
    of_rule = ListedColormap(["white", "#eceef1", _WINDOW, _STRIDE, _SINK])
    of_union = ListedColormap(["white", "#eceef1", *_UNION])
    panels = [("every head" if alone else f"head {head}", _parts(rule, num_blocks), of_rule) for head, rule in drawn]
    if alone:
        return panels
    causal = np.tril(np.ones((num_blocks, num_blocks)))
    needed = kind.pattern.layers_to_cover(heads) or 1
    for count in (1, needed) if needed > 1 else (1,):
        masks = [r.mask(num_blocks) for i in range(count) for r in kind.pattern.rules(heads, layer=kind.rotation + i)]
        share = torch.stack(masks).float().mean(0).numpy()
        shade = np.where(share > 0, 2 + np.ceil(share * (len(_UNION) - 1)), causal)
        title = f"{heads} heads together" if count == 1 else f"over {count} layers"
        panels.append((title, shade * (causal > 0), of_union))
    return panels


def _parts(rule: HeadRule, num_blocks: int) -> np.ndarray:
    """0 behind the query, 1 not seen, 2 window, 3 stride, 4 sink."""
    block = torch.arange(num_blocks)
    distance = (block[:, None] - block).numpy()
    seen = rule.mask(num_blocks).numpy()
    strided = HeadRule(rule.local, rule.levels).mask(num_blocks).numpy()
    parts = np.where(seen, np.where(distance < rule.local, 2, np.where(strided, 3, 4)), 1)
    return np.where(distance >= 0, parts, 0)
