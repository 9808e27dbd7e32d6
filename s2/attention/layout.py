"""Which layer has which pattern: the hybrid layout of a model as one string (see `grammar`), for example
`L4V24+dense10-22`: layers 10 to 22 (0-based, inclusive) dense, the others L4V24."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .grammar import Reader
from .pattern import Pattern


@dataclass(frozen=True)
class LayerLayout:
    """One pattern per layer. `layout[i]` is layer i's pattern.

    Attributes:
        spec: the string it was read from.
        patterns: one `Pattern` a layer.
        rotations: what layer i passes to `s2_attention(rotation=)`: its position among the layers of the same
            pattern, so that residues rotate through sparse layers without a gap at each dense one.
    """

    spec: str
    patterns: tuple[Pattern, ...]
    rotations: tuple[int, ...]

    @classmethod
    def parse(cls, spec: str, num_layers: int, block_size: int = 64) -> LayerLayout:
        """Read a layout string.

        Raises:
            ValueError: names the layout, and what is wrong at which character.
        """
        if not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers={num_layers!r} must be a positive whole number")
        reader = Reader(spec, "attention_layout")
        sparse = Pattern.read(reader, block_size)
        dense_layers = set(range(1, num_layers, 2)) if reader.take("-inter") else set()
        if reader.take(r"\+dense"):
            dense_layers |= _read_layers(reader, num_layers)
        reader.finish("'+sink<blocks>', '-inter', '+dense<layers>'")
        dense = Pattern.parse("dense", block_size)
        patterns = tuple(dense if i in dense_layers else sparse for i in range(num_layers))
        seen: dict[Pattern, int] = {}
        rotations = []
        for pattern in patterns:
            rotations.append(seen.get(pattern, 0))
            seen[pattern] = rotations[-1] + 1
        return cls(spec, patterns, tuple(rotations))

    def __str__(self) -> str:
        return self.spec

    def __getitem__(self, layer: int) -> Pattern:
        return self.patterns[layer]

    def __len__(self) -> int:
        return len(self.patterns)

    def __iter__(self) -> Iterator[Pattern]:
        return iter(self.patterns)

    def ruled_heads(self, num_kv_heads: int) -> int:
        """Heads that have a rule of their own: the KV heads, or as many as the layout spells out."""
        return max((len(pattern.heads) for pattern in self.patterns), default=0) or num_kv_heads

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """ValueError: the layout spells out heads, but not those of a model with so many query and KV heads."""
        heads = self.ruled_heads(num_kv_heads)
        if heads not in (num_heads, num_kv_heads):
            raise ValueError(
                f"attention_layout {self.spec!r} has rules for {heads} heads, but the model has {num_kv_heads} KV "
                f"heads and {num_heads} query heads"
            )

    def distinct_rotations(self, num_kv_heads: int) -> list[int]:
        """`rotations`, each as the first with the same rules: residues repeat, at once where there are as many heads
        as the stride."""
        heads = self.ruled_heads(num_kv_heads)
        pairs = zip(self.patterns, self.rotations, strict=True)
        return [pattern.first_alike(rotation, heads) for pattern, rotation in pairs]

    def density(self, seq_len: int, num_kv_heads: int) -> float:
        """Visible over causal pairs, averaged over layers and heads."""
        heads, pairs = self.ruled_heads(num_kv_heads), zip(self.patterns, self.rotations, strict=True)
        return sum(pattern.density(seq_len, heads, layer=rotation) for pattern, rotation in pairs) / len(self)


def _read_layers(reader: Reader, num_layers: int) -> set[int]:
    layers: set[int] = set()
    while True:
        at = reader.at
        match = reader.take(r"(\d+)(?:-(\d+))?")
        if match is None:
            raise reader.error("expected a layer or a range like 10-22 of dense layers")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise reader.error(f"the dense range {match[0]!r} runs backwards; write {last}-{first}", at)
        if last >= num_layers:
            raise reader.error(f"dense layer {last} does not exist; the model has layers 0 to {num_layers - 1}", at)
        layers |= set(range(first, last + 1))
        if not reader.take(","):
            return layers
