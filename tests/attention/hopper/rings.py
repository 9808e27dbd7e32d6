"""A model of the forward's rings (`rows.cuh`, `forward.cu`) on tiles with real plans: who waits for whom, without time.
It tells whether a thread block that is given these tiles comes to its end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

PLANNED, ROW_SLOTS = 2, 2  # of rows.cuh


@dataclass(frozen=True)
class Tile:
    edges: int
    fulls: int
    seen: tuple[tuple[int, ...], ...]  # by consumer: the edges that it sees


class Rings:
    """Positions count from the first key tile of the first tile on. What each agent has done is how far it has come."""

    def __init__(self, tiles: list[Tile], consumers: int, stages: int) -> None:
        self.tiles, self.consumers, self.stages = tiles, consumers, stages
        self.begin = list(itertools.accumulate((tile.edges + tile.fulls for tile in tiles), initial=0))
        self.planned = 0  # tiles
        self.loaded = {"keys": 0, "values": 0}  # positions
        self.released = {ring: [0] * consumers for ring in self.loaded}
        self.edges_done = [0] * consumers  # tiles
        self.plans_read = {"keys": 0, "values": 0, "rows": 0}
        self.rows_loaded = [0] * consumers
        self.rows_done = [0] * consumers

    def halt(self) -> dict[str, str] | None:
        """Where everybody waits for good; None if all comes to its end."""
        agents = {"planner": self.plan(), "keys": self.load("keys"), "values": self.load("values"), "rows": self.move()}
        agents |= {f"consumer {c}": self.consume(c) for c in range(self.consumers)}
        while agents:
            before, waits = self.progress(len(agents)), {}
            for name, agent in list(agents.items()):
                wait = next(agent, None)
                if wait is None:
                    del agents[name]
                else:
                    waits[name] = wait
            if self.progress(len(agents)) == before:
                return waits
        return None

    def progress(self, agents: int) -> str:
        state = {name: value for name, value in vars(self).items() if name not in ("tiles", "begin")}
        return f"{agents} {state}"

    def plan(self) -> Iterator[str]:
        for n in range(len(self.tiles) + 1):
            while min(*self.edges_done, *self.plans_read.values()) < n + 1 - PLANNED:
                yield f"the place of plan {n}"
            self.planned = n + 1

    def load(self, ring: str) -> Iterator[str]:
        for n in range(len(self.tiles)):
            while self.planned <= n:
                yield f"plan {n}"
            for position in range(self.begin[n], self.begin[n + 1]):
                while min(self.released[ring]) <= position - self.stages:
                    yield f"the place of {ring} {position}"
                self.loaded[ring] = position + 1
            self.plans_read[ring] = n + 1

    def move(self) -> Iterator[str]:
        count = len(self.tiles)
        for n in range(count + ROW_SLOTS):
            while n <= count and self.planned <= n:
                yield f"plan {n}"
            self.plans_read["rows"] = max(self.plans_read["rows"], min(n + 1, count + 1))
            for c in range(self.consumers):
                while n >= ROW_SLOTS and self.rows_done[c] <= n - ROW_SLOTS:
                    yield f"rows {n - ROW_SLOTS} of consumer {c}"
                self.rows_loaded[c] = max(self.rows_loaded[c], min(n + 1, count))

    def walk(self, ring: str, c: int, until: int) -> Iterator[str]:
        for position in range(self.released[ring][c], until):
            while self.loaded[ring] <= position:
                yield f"{ring} {position}, walking to {until}"
            self.released[ring][c] = position + 1

    def consume(self, c: int) -> Iterator[str]:
        held = None  # the position whose values are to be added, its tile, and whether it is the last of its rows
        for n, tile in enumerate(self.tiles):
            while self.planned <= n:
                yield f"plan {n}"
            edges = [self.begin[n] + edge for edge in tile.seen[c]]
            visits = edges + list(range(self.begin[n] + tile.edges, self.begin[n + 1]))
            for position in visits:
                yield from self.walk("keys", c, position)
                while self.rows_loaded[c] <= n:
                    yield f"rows {n}"
                while self.loaded["keys"] <= position:
                    yield f"keys {position}"
                of_values = held[0] if held else 0
                while self.loaded["values"] <= of_values:
                    yield f"values {of_values}, before keys {position} are scored"
                self.released["keys"][c] = position + 1
                if held:
                    self.released["values"][c] = of_values + 1
                    if held[2]:
                        self.rows_done[c] = held[1] + 1
                yield from self.walk("values", c, position)
                if position == edges[-1]:
                    self.edges_done[c] = n + 1
                held = position, n, position == visits[-1]
        while self.planned <= len(self.tiles):
            yield "the end"
        while held and self.loaded["values"] <= held[0]:
            yield f"the last values, {held[0]}"
        self.rows_done[c] = len(self.tiles)
