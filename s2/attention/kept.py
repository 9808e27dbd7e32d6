"""What outlives the call that made it: memos, and tensors such as tables of rules, block lists, masks and counters.

Tensors are made in a thread of their own (`apart`). So none of the caller's modes gets into them: under a FakeTensor
mode they would be fakes, under `torch.inference_mode` nothing could be trained with them. And their memory comes from
no pool of a CUDA graph, which `torch.compile(mode="reduce-overhead")` does not allow. On a GPU they are made on a
stream of its own, so that the host waits for their copies alone, not for the kernels that have been launched before.

A captured CUDA graph goes on reading what it was captured with. So what a call uses while a stream is captured is never
freed, tables of rules (1 KB) never at all; other kept tensors are dropped, oldest first, once the device is done with
what it has been given. While a stream is captured nothing can be made: a call must have run with the same shapes
before, as torch's warm-up does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")
T = TypeVar("T")
MOST_BYTES = 2 << 30
MOST_REMEMBERED = 512


def remember(memo: dict[K, T], key: K, value: T) -> T:
    """Adds to a memo of at most `MOST_REMEMBERED` values, of which the oldest goes first."""
    if len(memo) >= MOST_REMEMBERED:
        memo.pop(next(iter(memo)), None)
    return memo.setdefault(key, value)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def apart(make: Callable[[], T], device: torch.device) -> T:
    """What `make` returns, made in a thread and on a stream of its own, and complete.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    if is_capturing(device):
        raise RuntimeError(
            "s2_attention makes tables at its first call with a pattern and a shape, which a CUDA graph cannot "
            "capture: call it once with the same shapes before the capture"
        )
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_make_aside, make, device).result()


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _make_aside(make: Callable[[], T], device: torch.device) -> T:
    if device.type != "cuda":
        return make()
    if device not in _STREAMS:  # of high priority, since torch hands out the same few streams to all who ask
        _STREAMS[device] = torch.cuda.Stream(device, priority=-1)
    with torch.cuda.stream(_STREAMS[device]):
        made = make()
    _STREAMS[device].synchronize()
    return made


class Kept(Generic[T]):
    """Remembers by key what takes memory on a device, as long as it all takes no more than `most_bytes`; the last
    always. `tensors_of` names the tensors of a value."""

    def __init__(self, tensors_of: Callable[[T], Iterable[Tensor]], most_bytes: int = MOST_BYTES) -> None:
        self.tensors_of, self.most_bytes = tensors_of, most_bytes
        self.values: dict[Hashable, tuple[T, int]] = {}  # and their bytes, oldest use first
        self.captured: set[Hashable] = set()  # read by graphs: never dropped
        self.lock = threading.Lock()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """The value of `key` on `device`; `make` makes it if there is none (`apart`)."""
        key = (key, device)
        with self.lock:
            found = self.values.pop(key, None)
            if found is None:
                value = apart(make, device)
                found = value, sum(x.numel() * x.element_size() for x in self.tensors_of(value))
                self._drop(found[1], device)
            elif is_capturing(device):
                self.captured.add(key)
            self.values[key] = found
            return found[0]

    def _drop(self, coming: int, device: torch.device) -> None:
        """Makes room for so many bytes."""
        total = coming + sum(size for _, size in self.values.values())
        droppable = [key for key in self.values if key not in self.captured]
        if total > self.most_bytes and droppable and device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels of any stream may still read them
        for key in droppable:
            if total <= self.most_bytes:
                return
            total -= self.values.pop(key)[1]
