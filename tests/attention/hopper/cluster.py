"""A model of one cluster of the Hopper backward (`backward.cu`): who waits for whom, and what is in shared memory then.

Every warp that has a part is a generator, which stops wherever another may go on; copies and arrivals from one thread
block at the other are events that happen some time later; a schedule is drawn at random. Places in shared memory hold
tags that say of what step or item their contents are, and who reads them knows which it needs. Barriers count arrivals,
expected copies and phases; who waits for a parity says which phase it means. So a schedule ends in `ProtocolError` if
somebody waits for good, passes a barrier in a wrong phase, reads what is not there yet or not any more, or leaves a
copy in flight.

Not modelled: numbers, orders of memory operations (scopes, proxies and their fences), several clusters, lanes of a
warp, and registers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

RANKS, CONSUMERS, STAGES, ITEMS = 2, 2, 2, 2  # of backward.cu
CHUNKS = RANKS * CONSUMERS
WARPS = 4  # of a consumer
WORD = 4  # bytes

# What a cluster may lack, to show that it is noticed. Short of an arrival a barrier counts on one less than it gets.
FAULTS = (
    "the release of dS at the other thread block",
    "the wait for other_full",
    "the wait until dQ has been read",
    "the zeros of chunks that do not exist",
    "an arrival at queries_empty",
    "an arrival at gradients_empty",
    "an arrival at dscores_full",
    "an arrival at dscores_empty",
    "an arrival at sums_full",
    "an arrival at keys_done",
    "an arrival at item_empty",
)


class ProtocolError(Exception):
    """The thread blocks do not work together as they should."""


class Barrier:
    """An mbarrier. A phase is complete when all have arrived and all copies that they expect have come."""

    def __init__(self, name: str, arrivals: int) -> None:
        self.name, self.arrivals = name, arrivals
        self.pending = arrivals
        self.expected = 0  # below 0: came before they were expected
        self.completed = 0  # phases

    def arrive(self, expected: int = 0) -> None:
        if self.pending == 0:
            raise ProtocolError(f"{self.name}: an arrival too many in phase {self.completed}")
        self.pending -= 1
        self.expected += expected
        self.check()

    def receive(self, count: int = 1) -> None:
        self.expected -= count
        self.check()

    def check(self) -> None:
        if self.pending == 0 and self.expected == 0:
            self.completed += 1
            self.pending = self.arrivals

    def wait(self, parity: int, completed: int) -> Agent:
        """Waits for the phase of that parity to complete; so many should be complete then."""
        while self.completed % 2 == parity:
            if self.completed > completed:
                raise ProtocolError(f"{self.name}: missed phase {completed}, {self.completed} are complete")
            yield self
        if self.completed != completed:
            raise ProtocolError(f"{self.name}: passed after {self.completed} phases instead of {completed}")
        yield None


Agent = Iterator[Barrier | None]  # yields what it waits for, or None where another may go on


@dataclass
class Position:
    """An index into a ring and the parity of its phase (`hopper.cuh`)."""

    size: int
    index: int = 0
    phase: int = 0

    def advance(self) -> None:
        self.index += 1
        if self.index == self.size:
            self.index = 0
            self.phase ^= 1


@dataclass(frozen=True)
class Item:
    """A work item: its steps (boxes of rows, times sets of heads), and by chunk the first of them that sees it and the
    first that does not any more; None: no such chunk."""

    steps: int
    runs: tuple[tuple[int, int] | None, ...]

    def seen(self, nth: int) -> frozenset[int]:
        """The chunks that a step sees."""
        return frozenset(chunk for chunk, run in enumerate(self.runs) if run and run[0] <= nth < run[1])


@dataclass(frozen=True)
class Plan:
    """What a slot of `Shared::items` holds: an item, which of the cluster's it is, and the number of its first step."""

    item: Item
    number: int
    begin: int


class Shared:
    """The shared memory of a thread block, as tags: numbers of steps, or of items for keys. None: being written."""

    def __init__(self, rank: int, faults: frozenset[str]) -> None:
        def barrier(name: str, arrivals: int) -> Barrier:
            return Barrier(f"{name} of thread block {rank}", arrivals - (f"an arrival at {name}" in faults))

        def barriers(name: str, arrivals: int, size: int = STAGES) -> list[Barrier]:
            return [barrier(name, arrivals) for _ in range(size)]

        warps = CONSUMERS * WARPS
        self.keys: list[int | None] = [None] * CHUNKS  # with the values; then other_keys
        self.queries: list[int | None] = [None] * STAGES  # with lse
        self.gradients: list[int | None] = [None] * STAGES  # with delta
        self.sums: list[tuple | None] = [None] * WARPS  # the step, and the chunks of which its dQ is made
        # by stage and chunk, the own ones first, what each warp left: ("dS", step) or ("zeros", item)
        self.dscores = [[[None] * WARPS for _ in range(CHUNKS)] for _ in range(STAGES)]
        self.items: list[Plan | None] = [None] * ITEMS  # when full: None after the last
        self.drawn = 0
        self.rows_full = barriers("rows_full", 1)
        self.queries_empty = barriers("queries_empty", warps)
        self.gradients_empty = barriers("gradients_empty", warps)
        self.dscores_full = barriers("dscores_full", warps)
        self.other_full = barriers("other_full", 1)
        releases = RANKS - ("the release of dS at the other thread block" in faults)
        self.dscores_empty = barriers("dscores_empty", WARPS * releases)
        self.sums_full = barrier("sums_full", WARPS)
        self.sums_empty = barrier("sums_empty", 1)
        self.keys_full = barrier("keys_full", 1)
        self.keys_done = barrier("keys_done", warps)
        self.item_full = barriers("item_full", 1, ITEMS)
        self.item_empty = barriers("item_empty", 2 + warps, ITEMS)
        self.drawn_full = barrier("drawn_full", 1)
        self.drawn_empty = barrier("drawn_empty", 1)
        # no mbarriers in the kernel: a mover waits for its bulk operation, the warps of a consumer for each other
        self.sums_read = barrier("the read of dQ", 1)
        self.products = [barrier(f"the products of consumer {consumer}", WARPS) for consumer in range(CONSUMERS)]

    def planned(self, slot: Position, number: int) -> Generator[Barrier | None, None, Plan | None]:
        """Waits for an item; None after the last."""
        yield from self.item_full[slot.index].wait(slot.phase, number // ITEMS + 1)
        plan = self.items[slot.index]
        if plan is not None and plan.number != number:
            raise ProtocolError(f"item {plan.number} is planned as item {number}")
        return plan

    def keep_item(self, slot: Position, plan: Plan) -> None:
        """The item is read: it has to be there still."""
        if self.items[slot.index] is not plan:
            raise ProtocolError(f"item {plan.number} is gone while it is read")

    def leave_item(self, slot: Position, plan: Plan) -> None:
        """It is not read any more."""
        self.keep_item(slot, plan)
        self.item_empty[slot.index].arrive()


@dataclass
class Thread:
    """A warp in a schedule."""

    name: str
    agent: Agent
    speed: float = 1.0
    waits: Barrier | None = None
    waited: int = 0  # phases of that barrier that were complete

    def is_ready(self) -> bool:
        return self.waits is None or self.waits.completed != self.waited

    def advance(self, most: int) -> bool:
        """Goes on until it waits, or for a while; False at its end."""
        for _ in range(most):
            try:
                self.waits = next(self.agent)
            except StopIteration:
                return False
            if self.waits is not None:
                self.waited = self.waits.completed
                break
        return True


class Cluster:
    """Two thread blocks and their work: the items of each draw of the first, of packed documents or not."""

    def __init__(
        self, draws: list[list[Item]], packed: bool, rng: random.Random, faults: frozenset[str] = frozenset()
    ) -> None:
        self.draws, self.packed, self.rng, self.faults = draws, packed, rng, faults
        self.blocks = [Shared(rank, faults) for rank in range(RANKS)]
        self.sums: list[dict[int, frozenset[int]]] = [{} for _ in range(RANKS)]  # by step, of half the columns each
        self.copies: list[Callable[[], None]] = []  # in flight
        self.arrivals: list[Callable[[], None]] = []  # at the other thread block, likewise
        # whether products begin only when all warps of a consumer have come to them, which is not laid down
        self.coupled = rng.random() < 0.5

    def run(self) -> None:
        """Follows a schedule to its end, where every dQ has to be there, made once of exactly the chunks its rows see.
        Raises ProtocolError."""
        threads, rng = self.threads(), self.rng
        landing = rng.choice((0.05, 0.3, 0.75, 0.97))  # how often something in flight comes first
        most = rng.choice((1, 1, 3, 20))  # switches that a warp does not take
        change = rng.choice((20, 200, 1 << 30))  # of speeds, in turns
        for turn in itertools.count():
            if turn % change == 0:
                for thread in threads:
                    thread.speed = rng.choice((1, 1, 1, 0.02, 10))
            ready = [thread for thread in threads if thread.is_ready()]
            if (self.copies or self.arrivals) and threads and (not ready or rng.random() < landing):
                flying = rng.choice([events for events in (self.copies, self.arrivals) if events])
                flying.pop(rng.randrange(len(flying)))()
            elif ready:
                [thread] = rng.choices(ready, [thread.speed for thread in ready])
                if not thread.advance(most):
                    threads.remove(thread)
            elif threads:
                waits = {thread.name: (thread.waits.name, thread.waited) for thread in threads}
                raise ProtocolError(f"all wait: {waits}")
            else:
                break
        # `cluster_sync` at the end waits for the arrivals, but not for copies
        for arrival in self.arrivals:
            arrival()
        if self.copies:
            raise ProtocolError(f"{len(self.copies)} copies are in flight at the end")
        items = itertools.chain(*self.draws)
        wanted = dict(enumerate(item.seen(nth) for item in items for nth in range(item.steps)))
        for rank, made in enumerate(self.sums):
            if made != wanted:
                raise ProtocolError(f"dQ of thread block {rank} is made of {made} instead of {wanted}")

    def threads(self) -> list[Thread]:
        threads = []
        for rank in range(RANKS):
            for function in (self.plan_items, self.load_rows, self.move_sums, self.load_items):
                threads.append(Thread(f"{function.__name__} of thread block {rank}", function(rank)))
            for consumer, warp in itertools.product(range(CONSUMERS), range(WARPS)):
                consuming = ConsumerWarp(self, rank, consumer, warp)
                threads.append(Thread(consuming.name, consuming.consume()))
        return threads

    def load(self, place: list, index: int, tag: int, full: Barrier) -> None:
        """A copy from memory to a place in shared memory."""
        place[index] = None

        def land() -> None:
            place[index] = tag
            full.receive()

        self.copies.append(land)

    def send(self, source: list, target: list, full: Barrier) -> None:
        """A copy from shared memory to that of the other thread block."""
        tags = list(source)
        target[:] = [None] * len(target)

        def land() -> None:
            if source != tags:
                raise ProtocolError(f"{tags} became {source} while they were sent")
            target[:] = tags
            full.receive()

        self.copies.append(land)

    def plan_items(self, rank: int) -> Agent:
        """The warp of `plan_items`."""
        block, other = self.blocks[rank], self.blocks[rank ^ 1]
        slot, phase = Position(ITEMS), 0
        draw = number = begin = 0
        while draw < len(self.draws):
            for item in self.draws[draw]:
                block.items[slot.index] = Plan(item, number, begin)
                block.item_full[slot.index].arrive()
                yield None
                number += 1
                begin += item.steps
                slot.advance()
                yield from block.item_empty[slot.index].wait(slot.phase ^ 1, number // ITEMS)
            draws = draw + 1
            if rank == 0:
                yield from block.drawn_empty.wait(phase ^ 1, draw)
                self.copies.append(lambda drawn=draws: self.tell(other, drawn))
                draw = draws
            else:
                block.drawn_full.arrive(WORD)
                yield from block.drawn_full.wait(phase, draws)
                draw = block.drawn
                yield None
                self.arrivals.append(other.drawn_empty.arrive)
            phase ^= 1
        block.items[slot.index] = None
        block.item_full[slot.index].arrive()

    def tell(self, block: Shared, drawn: int) -> None:
        block.drawn = drawn
        block.drawn_full.receive(WORD)

    def load_rows(self, rank: int) -> Agent:
        """The warp of `load_rows`: queries with lse2, dO with delta, each as one copy."""
        block = self.blocks[rank]
        slot, stage = Position(ITEMS), Position(STAGES)
        for number in itertools.count():
            plan = yield from block.planned(slot, number)
            if plan is None:
                return
            for step in range(plan.begin, plan.begin + plan.item.steps):
                full = block.rows_full[stage.index]
                yield from block.gradients_empty[stage.index].wait(stage.phase ^ 1, step // STAGES)
                full.arrive(2)
                self.load(block.gradients, stage.index, step, full)
                yield from block.queries_empty[stage.index].wait(stage.phase ^ 1, step // STAGES)
                self.load(block.queries, stage.index, step, full)
                yield None
                stage.advance()
            block.leave_item(slot, plan)
            yield None
            slot.advance()

    def move_sums(self, rank: int) -> Agent:
        """The warp of `move_sums`: dS goes as one copy for each chunk."""
        block, other = self.blocks[rank], self.blocks[rank ^ 1]
        slot, stage = Position(ITEMS), Position(STAGES)
        phase = 0  # of the sums

        def add(step: int) -> Agent:
            nonlocal phase
            yield from block.sums_full.wait(phase, step + 1)
            self.copies.append(lambda: self.add_sums(rank, step))
            yield None
            if "the wait until dQ has been read" not in self.faults:
                yield from block.sums_read.wait(phase, step + 1)
            block.sums_empty.arrive()
            yield None
            phase ^= 1

        for number in itertools.count():
            plan = yield from block.planned(slot, number)
            if plan is None:
                return
            end = plan.begin + plan.item.steps
            for step in range(plan.begin, end):
                block.other_full[stage.index].arrive(CONSUMERS)
                yield None
                yield from block.dscores_full[stage.index].wait(stage.phase, step // STAGES + 1)
                for consumer in range(CONSUMERS):
                    source = block.dscores[stage.index][consumer]
                    target = other.dscores[stage.index][CONSUMERS + consumer]
                    self.send(source, target, other.other_full[stage.index])
                yield None
                if step > plan.begin:
                    yield from add(step - 1)
                stage.advance()
            yield from add(end - 1)
            block.leave_item(slot, plan)
            yield None
            slot.advance()

    def add_sums(self, rank: int, step: int) -> None:
        """A bulk operation has read dQ."""
        block = self.blocks[rank]
        chunks = {sums and sums[1] for sums in block.sums}
        if any(sums is None or sums[0] != step for sums in block.sums) or len(chunks) > 1:
            raise ProtocolError(f"{block.sums} are added as dQ of step {step}")
        if step in self.sums[rank]:
            raise ProtocolError(f"dQ of step {step} is added again")
        [self.sums[rank][step]] = chunks
        block.sums_read.arrive()

    def load_items(self, rank: int) -> Agent:
        """The warp of `load_items`: keys with values, then the keys of the other thread block's chunks, by chunk."""
        block = self.blocks[rank]
        slot, phase = Position(ITEMS), 1
        for number in itertools.count():
            plan = yield from block.planned(slot, number)
            if plan is None:
                return
            yield from block.keys_done.wait(phase, number)
            block.keep_item(slot, plan)
            block.keys_full.arrive(CHUNKS)
            for chunk in range(CHUNKS):
                self.load(block.keys, chunk, number, block.keys_full)
            yield None
            phase ^= 1
            slot.advance()


class ConsumerWarp:
    """A warp of `consume`, of whose lambdas the methods have their names. Steps have a number in their item, `nth`, and
    one in all, `step`."""

    def __init__(self, cluster: Cluster, rank: int, consumer: int, warp: int) -> None:
        self.name = f"warp {warp} of consumer {consumer} of thread block {rank}"
        self.cluster, self.consumer, self.warp = cluster, consumer, warp
        self.shared, self.other = cluster.blocks[rank], cluster.blocks[rank ^ 1]
        own, others = rank * CONSUMERS, (rank ^ 1) * CONSUMERS
        self.order = [*range(own, own + CONSUMERS), *range(others, others + CONSUMERS)]  # of chunks in the thread block
        self.ring = Position(STAGES)
        self.sums: tuple | None = None  # dQ in registers, to be handed over
        self.multiplied = 0  # times that products have been begun

    def consume(self) -> Agent:
        shared = self.shared
        slot, phase_of_keys = Position(ITEMS), 0
        for number in itertools.count():
            plan = yield from shared.planned(slot, number)
            if plan is None:
                return
            self.plan_item(plan)
            yield from shared.keys_full.wait(phase_of_keys, number + 1)
            first, end = self.runs[self.consumer]
            yield from self.idle(0, first)
            if end > first:
                yield from self.work(first, end)
            yield from self.idle(end, plan.item.steps)
            yield from self.finish(plan.item.steps - 1)
            shared.keys_done.arrive()
            yield None
            shared.leave_item(slot, plan)
            yield None
            slot.advance()
            phase_of_keys ^= 1

    def plan_item(self, plan: Plan) -> None:
        """What `plan_items` says of an item, in the order of the thread block's chunks."""
        self.plan = plan
        runs = [plan.item.runs[chunk] for chunk in self.order]
        nothing = (plan.item.steps, plan.item.steps)
        self.exists = [run is not None for run in runs]
        self.runs = [run or nothing for run in runs]
        self.all_step = max(0 if run is None and not self.cluster.packed else (run or nothing)[0] for run in runs)
        self.until_step = min(end for _, end in self.runs)

    def require(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            raise ProtocolError(f"{self.name} reads {what} of {found} instead of {wanted}")

    def multiply(self, reads: Callable[[], None]) -> Agent:
        """Products that have been waited for. What they read has to be there from their begin to their end."""
        reads()
        if self.cluster.coupled:
            products = self.shared.products[self.consumer]
            products.arrive()
            yield from products.wait(self.multiplied % 2, self.multiplied + 1)
            self.multiplied += 1
        else:
            yield None
        reads()

    def hand_over(self, tag: tuple | None, stage: int, parity: int, step: int) -> Agent:
        """Leaves dS of a step, or zeros, or what is there."""
        yield from self.shared.dscores_empty[stage].wait(parity, step // STAGES)
        if tag is not None:
            self.shared.dscores[stage][self.consumer][self.warp] = tag
        yield None
        self.shared.dscores_full[stage].arrive()

    def receive(self, phase: int, step: int) -> Agent:
        yield from self.shared.dscores_full[self.consumer].wait(phase, step // STAGES + 1)
        if "the wait for other_full" not in self.cluster.faults:
            yield from self.shared.other_full[self.consumer].wait(phase, step // STAGES + 1)

    def read_scores(self, chunks: list[int], step: int) -> None:
        """dS and keys of chunks. Of one that does not exist zeros, which are multiplied with keys that are none."""
        for c in chunks:
            tag = ("dS", step) if self.exists[c] else ("zeros", self.plan.number)
            self.require(f"dS of chunk {c}", self.shared.dscores[self.consumer][c], [tag] * WARPS)
            self.require(f"keys of chunk {c}", self.shared.keys[c], self.plan.number)

    def multiply_all(self, nth: int) -> Agent:
        chunks = list(range(CHUNKS))
        yield from self.multiply(lambda: self.read_scores(chunks, self.plan.begin + nth))
        self.sums = (nth, frozenset(self.order[c] for c in chunks if self.exists[c]))

    def multiply_some(self, nth: int) -> Agent:
        chunks = [c for c, (first, end) in enumerate(self.runs) if first <= nth < end]
        for c in chunks:
            yield from self.multiply(lambda c=c: self.read_scores([c], self.plan.begin + nth))
        self.sums = (nth, frozenset(self.order[c] for c in chunks))

    def release(self) -> Agent:
        self.shared.dscores_empty[self.consumer].arrive()
        if "the release of dS at the other thread block" not in self.cluster.faults:
            self.cluster.arrivals.append(self.other.dscores_empty[self.consumer].arrive)
        yield None

    def add(self) -> Agent:
        nth, chunks = self.sums
        step = self.plan.begin + nth
        yield from self.shared.sums_empty.wait(self.consumer ^ 1, step)
        self.shared.sums[self.warp] = (step, chunks)
        self.sums = None
        yield None
        self.shared.sums_full.arrive()
        yield None

    def finish(self, nth: int) -> Agent:
        stage = self.ring.index ^ 1
        if stage != self.consumer:
            return
        yield from self.receive(self.ring.phase if self.ring.index else self.ring.phase ^ 1, self.plan.begin + nth)
        yield from self.multiply_some(nth)
        yield from self.release()
        yield from self.add()

    def idle(self, begin: int, end: int) -> Agent:
        """Steps in which the consumer's chunk is not seen."""
        shared, ring = self.shared, self.ring
        for nth in range(begin, end):
            step = self.plan.begin + nth
            yield from shared.rows_full[ring.index].wait(ring.phase, step // STAGES + 1)
            shared.queries_empty[ring.index].arrive()
            yield None
            shared.gradients_empty[ring.index].arrive()
            yield None
            zeros = not self.cluster.packed and nth < STAGES and not self.exists[self.consumer]
            zeros = zeros and "the zeros of chunks that do not exist" not in self.cluster.faults
            yield from self.hand_over(("zeros", self.plan.number) if zeros else None, ring.index, ring.phase ^ 1, step)
            if nth > 0:
                yield from self.finish(nth - 1)
            ring.advance()

    def work(self, first: int, end: int) -> Agent:
        """Steps in which it is seen."""
        stage, phase = self.ring.index, self.ring.phase
        for nth in range(first, end):
            yield from self.step(nth, nth == first, stage, phase)
            phase ^= stage
            stage ^= 1
        self.ring.index = (self.ring.index + end - first) % STAGES
        self.ring.phase = phase
        before, step = self.ring.index ^ 1, self.plan.begin + end - 1
        if self.sums is not None:
            yield from self.add()
        yield from self.multiply(lambda: self.require("queries", self.shared.queries[before], step))
        self.shared.queries_empty[before].arrive()
        yield None

    def step(self, nth: int, is_first: bool, stage: int, phase: int) -> Agent:
        """A step, and dQ of the step before if it is the consumer's turn."""
        shared, before, step = self.shared, stage ^ 1, self.plan.begin + nth

        def read_queries() -> None:
            self.require("queries", shared.queries[stage], step)
            self.require("keys", shared.keys[self.consumer], self.plan.number)

        def read_gradients() -> None:
            self.require("dO", shared.gradients[stage], step)

        def read_all() -> None:
            read_queries()
            read_gradients()
            if not is_first:  # what its product reads is not used
                self.require("queries of the step before", shared.queries[before], step - 1)

        yield from shared.rows_full[stage].wait(phase, step // STAGES + 1)
        read_queries()  # the scores are begun
        if self.sums is not None:
            yield from self.add()
        yield from self.multiply(read_all)
        if not is_first:
            shared.queries_empty[before].arrive()
        yield None
        read_queries()  # lse
        read_gradients()  # delta, and the product of dV is begun
        yield from self.hand_over(("dS", step), stage, phase ^ 1, step)
        if nth > 0 and before == self.consumer:
            yield from self.receive(phase ^ before, step - 1)
            if self.all_step < nth <= self.until_step:
                yield from self.multiply_all(nth - 1)
            else:
                yield from self.multiply(read_gradients)
                yield from self.multiply_some(nth - 1)
            yield from self.release()
        else:
            yield from self.multiply(read_gradients)
        read_gradients()  # by the product of dV, which is done now
        shared.gradients_empty[stage].arrive()
        yield None
