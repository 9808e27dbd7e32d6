"""How patterns and layouts are spelled: what `Pattern.parse` and `LayerLayout.parse` read and `str` prints.

Of each head, in blocks:

    dense               all tokens up to the query's own
    W16                 the last 16 blocks, the query's own included
    L8V16               the last 8, and every 16th before them ("local 8, vertical stride 16")
    L8V4<64V16          the last 8, every 4th up to block distance 64 (63 is the last), every 16th beyond
    L8V4<64             the same, and nothing beyond
    L8V16+sink2         also the first 2 (any of the above)

Heads that differ, in the order of the heads; there must be as many as a layer has KV heads (or query heads):

    dense|W16|L8V16     one head each
    2*dense|6*L8V16     2 heads dense, 6 of L8V16

Layers that differ, behind any of the above:

    ...-inter           every second layer dense, starting with a sparse one
    ...+dense0,10-22    layers 0 and 10 to 22 (0-based, inclusive) dense

Where a shell reads them `<`, `|` and `*` need quotes. Block masks (`Pattern.from_mask`) have no spelling.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

UNBOUNDED = 1 << 30  # a distance no context reaches, in blocks
_MOST_HEADS = 1 << 16  # that one rule is written for

_RULE = re.compile(r"dense|W(?P<window>\d+)|L(?P<local>\d+)")
_RANGE = re.compile(r"V(\d+)(?:<(\d+))?")


class Rule(NamedTuple):
    """A window of `local` blocks (`UNBOUNDED`: dense), `(stride, end)` by block distance, and leading blocks that are
    always kept."""

    local: int = UNBOUNDED
    ranges: tuple[tuple[int, int], ...] = ()
    sinks: int = 0

    @classmethod
    def checked(cls, local: int, ranges: Iterable[tuple[int, int | None]], sinks: int) -> Rule:
        """In the one form that rules which keep the same blocks share. `end` None: to the beginning.

        Raises:
            ValueError: numbers that make no rule.
        """
        if not isinstance(local, int) or local < 1:
            raise ValueError(f"the local window is {local!r} blocks, but must be at least 1")
        if not isinstance(sinks, int) or not 0 <= sinks < UNBOUNDED:
            raise ValueError(f"sinks={sinks!r} must be a number of blocks, 0 or more")
        checked: list[tuple[int, int]] = []
        begin = local
        for stride, end in ranges:
            end = UNBOUNDED if end is None else end
            if not isinstance(stride, int) or not isinstance(end, int):
                raise ValueError(f"the range ({stride!r}, {end!r}) must be two whole numbers of blocks")
            if not 1 <= stride < UNBOUNDED:
                raise ValueError(f"stride {stride} must be at least 1, and less than 2**30")
            if end <= begin:
                raise ValueError(f"the range up to distance {end} must reach beyond {begin} blocks")
            end = min(end, UNBOUNDED)
            if stride == 1:  # every block is kept: the window simply reaches further
                if checked:
                    raise ValueError(f"stride 1 beyond stride {checked[-1][0]} is not a sparse pattern")
                local = end
            else:
                checked.append((stride, end))
            begin = end
        return cls() if local >= UNBOUNDED else cls(local, tuple(checked), sinks)

    def __str__(self) -> str:
        if self.local >= UNBOUNDED:
            return "dense"
        ranges = "".join(f"V{stride}" + (f"<{end}" if end < UNBOUNDED else "") for stride, end in self.ranges)
        return f"{'L' if ranges else 'W'}{self.local}{ranges}" + (f"+sink{self.sinks}" if self.sinks else "")


def spell_heads(heads: Sequence[object]) -> str:
    """Rules one a head, equal neighbours together."""
    groups = [(text, len(list(same))) for text, same in itertools.groupby(map(str, heads))]
    counted = len(groups) == 1  # without a number it would be the rule of all heads, however many there are
    return "|".join(f"{count}*{text}" if count > 1 or counted else text for text, count in groups)


class Reader:
    """Reads a spelling from left to right. `what` it is called in errors."""

    def __init__(self, spec: str, what: str) -> None:
        if not isinstance(spec, str):
            raise ValueError(f"{what} must be a string such as 'L8V16', got {spec!r}")
        self.spec, self.what, self.at = spec, what, 0

    def take(self, expression: str | re.Pattern[str]) -> re.Match[str] | None:
        """The next characters, if they match."""
        match = re.compile(expression).match(self.spec, self.at)
        if match is not None:
            self.at = match.end()
        return match

    def error(self, text: str, at: int | None = None) -> ValueError:
        """`at`: index of the character that is wrong, by default the next one."""
        at = self.at if at is None else at
        place = f"character {at + 1} ({self.spec[at:]!r})" if at < len(self.spec) else "its end"
        return ValueError(f"{self.what} {self.spec!r}: {text}, at {place}")

    def finish(self, wanted: str) -> None:
        if self.at < len(self.spec):
            raise self.error(f"expected {wanted} or the end")

    def rules(self) -> tuple[list[Rule], bool]:
        """The rules of heads, and whether they are one a head, else one for all."""
        rules: list[Rule] = []
        one_a_head = False
        while True:
            at = self.at
            count = self.take(r"(\d+)\*")
            if count is not None and not 1 <= int(count[1]) <= _MOST_HEADS:
                raise self.error(f"a number of heads must be at least 1, and at most {_MOST_HEADS}", at)
            rules += [self._rule()] * (int(count[1]) if count is not None else 1)
            more = self.take(r"\|") is not None
            one_a_head |= count is not None or more
            if not more:
                return rules, one_a_head

    def _rule(self) -> Rule:
        at = self.at
        match = self.take(_RULE)
        if match is None:
            masks = "; masks have no spelling" if self.spec.startswith("mask") else ""
            raise self.error(f"expected 'dense', 'W<blocks>' or 'L<blocks>V<stride>'{masks}")
        ranges: list[tuple[int, int | None]] = []
        while match["local"] and (found := self.take(_RANGE)) is not None:
            ranges.append((int(found[1]), int(found[2]) if found[2] else None))
        if match["local"] and not ranges:
            raise self.error("expected 'V<stride>'")
        sinks = self.take(r"\+sink(\d+)")
        local = match["local"] or match["window"] or UNBOUNDED
        try:
            return Rule.checked(int(local), ranges, int(sinks[1]) if sinks is not None else 0)
        except ValueError as error:
            raise self.error(str(error), at) from None
