"""The two thread blocks of a cluster of the Hopper backward come to their end with all of dQ, however fast each warp
and each copy is (in a model, see `cluster.py`)."""

import random

import pytest
import torch

from tests.attention.hopper.cluster import CHUNKS, FAULTS, Cluster, Item, ProtocolError

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a model of the kernel's barriers: on machines without a GPU"
)


def draw_item(rng: random.Random, most: int) -> Item:
    """Chunks that do not exist, that all steps see, and that some see; together they see the first and the last."""
    steps = rng.choice((1, 2, 3, rng.randint(1, most)))
    runs: list[tuple[int, int] | None] = []
    for _ in range(CHUNKS):
        first = rng.randrange(steps)
        runs.append(rng.choice((None, (0, steps), (first, rng.randint(first + 1, steps)))))
    low, high = rng.randrange(CHUNKS), rng.randrange(CHUNKS)
    runs[low] = (0, (runs[low] or (0, rng.randint(1, steps)))[1])
    runs[high] = ((runs[high] or (rng.randrange(steps), steps))[0], steps)
    return Item(steps, tuple(runs))


def draw_cluster(rng: random.Random, packed: bool, faults: frozenset[str] = frozenset()) -> Cluster:
    """Draws have several items, or of packed documents one; those without any have nothing to do."""
    counts = (0, 1, 1, 1) if packed else (0, 1, 1, 1, 4)
    draws = [[draw_item(rng, 7) for _ in range(rng.choice(counts))] for _ in range(rng.randint(0, 5))]
    return Cluster(draws, packed, rng, faults)


@pytest.mark.parametrize("packed", [False, True])
def test_a_cluster_comes_to_its_end_with_all_of_dq(packed):
    for _ in range(250):
        rng = random.Random(seed := random.SystemRandom().randrange(1 << 30))
        cluster = draw_cluster(rng, packed)
        try:
            cluster.run()
        except ProtocolError as error:
            raise AssertionError(f"{seed=}, {packed=}, {cluster.draws}") from error


@pytest.mark.parametrize("draws", [[], [[]], [[], [], []]])
def test_a_cluster_without_work_comes_to_its_end(draws):
    for seed in range(20):
        Cluster(draws, False, random.Random(seed)).run()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_notices_what_a_cluster_lacks(fault):
    with pytest.raises(ProtocolError):
        for seed in range(100):
            draw_cluster(random.Random(seed), False, frozenset((fault,))).run()
