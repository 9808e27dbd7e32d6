"""Kernels of Triton and Gluon, compiled by Triton and launched through the driver as those in CUDA C++ are (`cuda`):
with TMA descriptors among the arguments Triton's own launch costs the host 60 us and more. Triton's launch hooks
(Proton's) do not see these launches."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuda

_WARPS = 4  # of the producer partition in Gluon, and of the kernels in Triton
_WARP = 32
_SCRATCH = 2  # pointers after a kernel's own arguments: global and profiling scratch memory, null if there is none
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes as Triton counts them
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[bfsu](\d+)\b[^,\[\n)]*(?:\[(\d+)\])?")


_KERNELS: dict[tuple, Any] = {}


class Launch:
    """A kernel on a grid with fixed constants. The first call of its kind (constants, and `kind`: what the types of the
    arguments depend on) compiles and keeps the kernel; later ones hand the arguments straight to it: everything else
    that Triton would specialize on is excluded from specialization, or aligned to 16 bytes."""

    def __init__(self, function: Any, grid: tuple[int, int, int], constants: dict[str, Any], kind: tuple) -> None:
        self.function, self.grid = function, grid
        self.constants, self.values = constants, tuple(constants.values())
        self.key = (function, self.values, kind)
        self.run: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Tensors, numbers, and descriptors with the same boxes at every call."""
        if self.run is None:
            kernel = _KERNELS.get(self.key)
            if kernel is None:
                _KERNELS[self.key] = self.function[self.grid](*arguments, **self.constants, num_warps=_WARPS)
                return
            self.run = self._runner(kernel, arguments)
        self.run(*arguments)

    def _runner(self, kernel: Any, arguments: Sequence[Any]) -> Callable[..., None]:
        if Direct.knows(kernel, arguments):
            return Direct(kernel, self.grid, arguments)
        run = kernel[self.grid]  # Triton's own, whatever it has changed
        return lambda *arguments: run(*arguments, *self.values)


def _is_descriptor(argument: Any) -> bool:
    return hasattr(argument, "base")


def sizes_of(arguments: Sequence[Any]) -> list[int]:
    """Bytes of each parameter of a kernel with these arguments: a descriptor is a tensor map, its shape and strides."""
    sizes = []
    for argument in arguments:
        if _is_descriptor(argument):
            rank = len(argument.shape)
            sizes += [128, *[4] * rank, *[8] * rank]
        else:
            sizes.append(8 if isinstance(argument, Tensor) else 4)
    return sizes + [8] * _SCRATCH


def declared_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel in a text of PTX."""
    _, _, entry = ptx.partition(".entry")
    declarations, _, _ = entry.partition("{")
    return [int(bits) // 8 * int(count or 1) for bits, count in _PARAM.findall(declarations)]


def box_of(descriptor: Any) -> list[int]:
    """Of a descriptor's tensor map: one row of it is at most as wide as the swizzle spans."""
    *outer, columns = descriptor.block_shape
    swizzle = descriptor.layout.swizzle_byte_width
    return [*outer, min(columns, swizzle // descriptor.base.element_size()) if swizzle else columns]


class Direct:
    """A compiled kernel with its parameters, in which a call replaces numbers and addresses."""

    @staticmethod
    def knows(kernel: Any, arguments: Sequence[Any]) -> bool:
        """Whether Triton would launch the kernel in the way that is known here."""
        metadata = kernel.metadata
        is_plain = metadata.num_ctas == 1 and not metadata.launch_cooperative_grid and not metadata.launch_pdl
        uses_scratch = metadata.global_scratch_size or metadata.profile_scratch_size
        own = [
            (box_of(x), x.base.element_size(), _SWIZZLES[x.layout.swizzle_byte_width])
            for x in arguments
            if _is_descriptor(x)
        ]
        theirs = [
            (list(x["block_size"]), x["elem_size"], x["swizzle"])
            for x in getattr(metadata, "tensordesc_meta", None) or ()
        ]
        ptx = kernel.asm.get("ptx", "")  # Triton may have been told not to keep it
        return is_plain and not uses_scratch and own == theirs and declared_sizes(ptx) == sizes_of(arguments)

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        descriptors = [i for i, x in enumerate(arguments) if _is_descriptor(x)]
        self.pointers = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        self.floats = [i for i, x in enumerate(arguments) if isinstance(x, float)]
        others = {*descriptors, *self.pointers, *self.floats}
        self.integers = [i for i in range(len(arguments)) if i not in others]
        ranks = [len(arguments[i].shape) for i in descriptors]
        fields: list[tuple[str, Any]] = [(f"map{i}", cuda.MAP) for i in descriptors]
        fields += [("pointers", ctypes.c_uint64 * (len(self.pointers) + _SCRATCH))]
        fields += [(f"strides{i}", ctypes.c_int64 * rank) for i, rank in zip(descriptors, ranks, strict=True)]
        fields += [(f"shape{i}", ctypes.c_int32 * rank) for i, rank in zip(descriptors, ranks, strict=True)]
        fields += [("integers", ctypes.c_int32 * len(self.integers)), ("floats", ctypes.c_float * len(self.floats))]
        structure = type("Parameters", (ctypes.Structure,), {"_fields_": fields})
        params: Any = cuda.allocate(structure)
        self.params = params
        self.maps = {i: self._map(i, arguments[i]) for i in descriptors}
        self.shapes = {i: arguments[i].shape for i in descriptors}
        self._order(len(arguments))
        metadata = kernel.metadata
        self.kernel, self.function = kernel, cuda.function_at(kernel.function)
        self.size = (*grid, metadata.num_warps * _WARP, metadata.shared)
        self.lock = threading.Lock()  # one call at a time changes the parameters

    def _map(self, i: int, descriptor: Any) -> cuda.TensorMap:
        """Of the i-th argument; sets its shape and strides too."""
        base = descriptor.base
        strides = [base.element_size() * stride for stride in descriptor.strides[:-1]]
        getattr(self.params, f"shape{i}")[:] = descriptor.shape
        getattr(self.params, f"strides{i}")[:] = descriptor.strides
        return cuda.TensorMap(
            self.params, f"map{i}", base.data_ptr(), base.dtype, descriptor.shape, strides, box_of(descriptor),
            descriptor.layout.swizzle_byte_width,
        )  # fmt: skip

    def _order(self, count: int) -> None:
        """Tells the driver where each parameter is, in the kernel's order."""
        base, kind = ctypes.addressof(self.params), type(self.params)

        def places(field: str, size: int, number: int) -> list[int]:
            begin = base + getattr(kind, field).offset
            return [begin + size * n for n in range(number)]

        *pointers, scratch, profile = places("pointers", 8, len(self.pointers) + _SCRATCH)
        own = dict(zip(self.pointers, pointers, strict=True))
        own |= zip(self.integers, places("integers", 4, len(self.integers)), strict=True)
        own |= zip(self.floats, places("floats", 4, len(self.floats)), strict=True)
        addresses = []
        for i in range(count):
            if i in own:
                addresses.append(own[i])
                continue
            rank = len(getattr(self.params, f"shape{i}"))
            addresses += [*places(f"map{i}", 128, 1), *places(f"shape{i}", 4, rank), *places(f"strides{i}", 8, rank)]
        addresses += [scratch, profile]
        self.params.kernel_params = (ctypes.c_void_p * len(addresses))(*addresses)

    def __call__(self, *arguments: Any) -> None:
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        with self.lock:
            params = self.params
            for i, tensor_map in self.maps.items():
                descriptor = arguments[i]
                if descriptor.shape is self.shapes[i]:  # most calls': `launch._Boxes` keeps it
                    tensor_map.move(descriptor.base.data_ptr())
                else:
                    self.maps[i], self.shapes[i] = self._map(i, descriptor), descriptor.shape
            params.pointers[: len(self.pointers)] = [arguments[i].data_ptr() for i in self.pointers]
            params.integers[:] = [arguments[i] for i in self.integers]
            params.floats[:] = [arguments[i] for i in self.floats]
            cuda.launch(self.function, self.size, params, stream, self.kernel.name)
