"""Kernels of Triton and Gluon, compiled by Triton and launched through the driver as those in CUDA C++ are (`driver`):
Triton's own launch encodes every TMA descriptor among the arguments again at each call. Its launch hooks (Proton's) do
not see these launches."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import driver

_WARPS = 4  # of the producer partition in Gluon, and of the kernels in Triton
_WARP = 32
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes as Triton counts them
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[bfsu](\d+)\b[^,\[\n)]*(?:\[(\d+)\])?")


_KERNELS: dict[tuple, Any] = {}


class Launch:
    """A kernel on a grid with fixed constants. The first call of its kind (constants, and `kind`: what the types of the
    arguments depend on) compiles and keeps the kernel; later ones hand the arguments straight to it: everything else
    that Triton would specialize on is excluded from specialization, or aligned to 16 bytes. `descriptors` makes those
    of the tensors that the kernel reads through TMA, by name of its parameter; such tensors have the same shape and
    strides at every call."""

    def __init__(
        self,
        function: Any,
        grid: tuple[int, int, int],
        constants: dict[str, Any],
        kind: tuple,
        descriptors: Mapping[str, Callable[[Tensor], Any]] | None = None,
    ) -> None:
        self.function, self.grid = function, grid
        self.constants, self.values = constants, tuple(constants.values())
        self.key = (function, self.values, kind)
        self.descriptors = {function.arg_names.index(name): make for name, make in (descriptors or {}).items()}
        self.run: Callable[..., None] | None = None

    def __call__(self, stream: int, *arguments: Any) -> None:
        """On torch's current stream, whose handle is `stream`. Tensors first, then numbers."""
        if self.run is None:
            described = self.described(arguments)
            kernel = _KERNELS.get(self.key)
            if kernel is None:
                _KERNELS[self.key] = self.function[self.grid](*described, **self.constants, num_warps=_WARPS)
                return
            self.run = self._runner(kernel, described)
        self.run(stream, *arguments)

    def described(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments as Triton wants them."""
        return [self.descriptors[i](x) if i in self.descriptors else x for i, x in enumerate(arguments)]

    def _runner(self, kernel: Any, described: Sequence[Any]) -> Callable[..., None]:
        if Direct.knows(kernel, described):
            direct = Direct(kernel, self.grid, described)
            if direct.can_move:
                return direct
        run = kernel[self.grid]  # Triton's own, whatever it has changed
        return lambda stream, *arguments: run(*self.described(arguments), *self.values)


def _is_descriptor(argument: Any) -> bool:
    return hasattr(argument, "base")


def parameters_of(arguments: Sequence[Any]) -> list[tuple[str, Any]]:
    """Name and type of each parameter of a kernel with these arguments, in its order: a descriptor is a tensor map, its
    shape and its strides, and pointers to global and profiling scratch memory come last, null where there is none."""
    parameters: list[tuple[str, Any]] = []
    for i, argument in enumerate(arguments):
        if _is_descriptor(argument):
            dims = range(len(argument.shape))
            parameters.append((f"map{i}", driver.MAP))
            parameters += [(f"size{i}_{dim}", ctypes.c_int32) for dim in dims]
            parameters += [(f"stride{i}_{dim}", ctypes.c_int64) for dim in dims]
        elif isinstance(argument, Tensor):
            parameters.append((f"value{i}", ctypes.c_void_p))
        else:
            parameters.append((f"value{i}", ctypes.c_float if isinstance(argument, float) else ctypes.c_int32))
    return [*parameters, ("scratch", ctypes.c_void_p), ("profile", ctypes.c_void_p)]


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
    """A compiled kernel with its parameters, in which a call replaces addresses, and numbers where they differ from the
    last call's."""

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
        sizes = [ctypes.sizeof(kind) for _, kind in parameters_of(arguments)]
        return is_plain and not uses_scratch and own == theirs and declared_sizes(ptx) == sizes

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        parameters = parameters_of(arguments)
        fields = sorted(parameters, key=lambda field: -ctypes.sizeof(field[1]))  # maps first: at multiples of 64
        structure: Any = type("Parameters", (ctypes.Structure,), {"_fields_": fields})
        self.params: Any = driver.allocate(structure)
        base = ctypes.addressof(self.params)
        places = [base + getattr(structure, name).offset for name, _ in parameters]
        self.params.kernel_params = (ctypes.c_void_p * len(places))(*places)
        self.words = (ctypes.c_uint64 * (ctypes.sizeof(structure) // 8)).from_address(base)
        self.places: list[int] = []  # of the tensors' addresses among the words
        self.can_move = True  # whether those of maps are there
        for i, argument in enumerate(arguments):
            if _is_descriptor(argument):
                name = f"map{i}"
                self.can_move &= self._fill_map(i, argument).begins_with_address
            elif isinstance(argument, Tensor):
                name = f"value{i}"
            else:
                break
            self.places.append(getattr(structure, name).offset // 8)
        self.names = [f"value{i}" for i in range(len(self.places), len(arguments))]
        self.numbers: tuple[Any, ...] = ()  # that the parameters have
        self.kernel, self.function = kernel, driver.function_at(kernel.function)
        self.size = (*grid, kernel.metadata.num_warps * _WARP, kernel.metadata.shared)
        self.lock = threading.Lock()  # one call at a time changes the parameters

    def _fill_map(self, i: int, descriptor: Any) -> driver.TensorMap:
        """Of the i-th argument, with its shape and strides."""
        base = descriptor.base
        strides = [base.element_size() * stride for stride in descriptor.strides[:-1]]
        for dim, (size, stride) in enumerate(zip(descriptor.shape, descriptor.strides, strict=True)):
            setattr(self.params, f"size{i}_{dim}", size)
            setattr(self.params, f"stride{i}_{dim}", stride)
        return driver.TensorMap(
            self.params, f"map{i}", base.data_ptr(), base.dtype, descriptor.shape, strides, box_of(descriptor),
            descriptor.layout.swizzle_byte_width,
        )  # fmt: skip

    def __call__(self, stream: int, *arguments: Any) -> None:
        """ValueError: a tensor is not at a multiple of 16 bytes."""
        numbers, bits = arguments[len(self.places) :], 0
        with self.lock:
            words = self.words
            for place, x in zip(self.places, arguments, strict=False):  # without the numbers
                words[place] = address = x.data_ptr()
                bits |= address
            if bits % driver.ADDRESS_ALIGNMENT:
                raise ValueError(f"{self.kernel.name}: an argument is not at a multiple of 16 bytes")
            if numbers != self.numbers:
                self.numbers = ()  # until all are set
                for name, number in zip(self.names, numbers, strict=True):
                    setattr(self.params, name, number)
                self.numbers = numbers
            driver.launch(self.function, self.size, self.params, stream, self.kernel.name)
