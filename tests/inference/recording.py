"""What a CUDA graph does, on a CPU: the operations of one call, done again on the same memory.

Values that the host put into the call (numbers, shapes, slices) stay those of the recording, as in a graph.
"""

from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def _storages(values):
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor)}


class Recording:
    """A `s2.inference.graph.Capture` that counts its captures and replays. A capture changes no memory of `keep`, as
    nothing runs while a graph is captured."""

    def __init__(self, *keep: Tensor):
        self.keep, self.captured, self.replayed = keep, 0, 0

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1
        before = [x.clone() for x in self.keep]
        with _Recorder() as recorder:
            result = call()
        for x, old in zip(self.keep, before, strict=True):
            x.copy_(old)

        def replay() -> Tensor:
            self.replayed += 1
            for func, args, kwargs, out in recorder.calls:
                if any(arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments):
                    func(*args, **kwargs)
                elif not _storages(out) & _storages((args, kwargs)):  # a view needs nothing
                    for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                        if isinstance(old, Tensor):
                            old.copy_(new)
            return result

        return replay
