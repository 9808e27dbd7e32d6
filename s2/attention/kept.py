"""Tensors that outlive the call which made them: tables of rules, block lists, masks, counters.

They are made in a thread of their own (`apart`). So none of the caller's modes gets into them: under a FakeTensor mode
they would be fakes, under `torch.inference_mode` nothing could be trained with them. And their memory comes from no
pool of a CUDA graph, which `torch.compile(mode="reduce-overhead")` does not allow.

A captured CUDA graph goes on reading what it was captured with. So what a call uses while a stream is captured is never
freed, tables of rules (1 KB) never at all; other kept tensors are dropped, oldest first, once the device is done with
what it has been given. While a stream is captured nothing can be made: a call must have run with the same shapes
before, as torch's warm-up does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MOST_BYTES = 2 << 30


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def apart(make: Callable[[], T], device: torch.device) -> T:
    """What `make` returns, made in a thread of its own. Copies to a device must be such that the host waits for them.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    if is_capturing(device):
        raise RuntimeError(
            "s2_attention makes tables at its first call with a pattern and a shape, which a CUDA graph cannot "
            "capture: call it once with the same shapes before the capture"
        )
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(make())
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class Kept(Generic[T]):
    """Remembers what a function with a device as its last argument returns, by its arguments, as long as it all takes
    no more than `most_bytes`; the last result always. `tensors_of` names a result's tensors."""

    def __init__(
        self, make: Callable[..., T], tensors_of: Callable[[T], Iterable[Tensor]], most_bytes: int = MOST_BYTES
    ) -> None:
        self.make, self.tensors_of, self.most_bytes = make, tensors_of, most_bytes
        self.values: dict[tuple, tuple[T, int]] = {}  # and their bytes, oldest use first
        self.captured: set[tuple] = set()  # read by graphs: never dropped
        self.lock = threading.Lock()

    def __call__(self, *arguments) -> T:
        device = arguments[-1]
        with self.lock:
            found = self.values.pop(arguments, None)
            if found is None:
                value = apart(lambda: self.make(*arguments), device)
                found = value, sum(x.numel() * x.element_size() for x in self.tensors_of(value))
                self._drop(found[1], device)
            elif is_capturing(device):
                self.captured.add(arguments)
            self.values[arguments] = found
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
