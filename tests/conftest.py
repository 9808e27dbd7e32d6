"""Runs before any test module: without a GPU the Triton kernels run in Triton's interpreter; draws are the same in
every run unless S2_SEED is another number than 0."""

import os
import resource
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The suite runs one process a core; without this Lightning gives every core to the first training run and all after it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

SEED = int(os.environ.get("S2_SEED", "0"))
settings.register_profile("fixed", derandomize=True)
if not SEED:
    settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's ZeRO-3 puts a function of its own over `F.linear` and leaves it there."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of a test's own draws."""
    return zlib.crc32(f"{SEED} {request.node.nodeid}".encode())


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process grows beyond 64 KiB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
