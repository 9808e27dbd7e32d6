"""Host side of kernels written in CUDA C++ for sm_90a: compiled by NVRTC when first used, launched through the driver;
`triton_launcher.py` launches Triton's in the same way.

A kernel takes one struct by value (`const __grid_constant__ Params`), which the host keeps as a `ctypes.Structure` at a
fixed address (`allocate`) and changes in place: pointers and numbers by assignment, TMA descriptors by
`TensorMap.move`. A launch copies the struct, so it may be changed for the next one at once, also while a graph is
captured; but two threads must not share one. `cuda.bindings` is imported when first needed, and compiling needs no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

SOURCES = Path(__file__).with_name("cu")
_OPTIONS = (
    "--gpu-architecture=sm_90a",
    "--std=c++17",
    "--no-source-include",  # only what the cache's key knows: the texts that are handed over
    "--ptxas-options=-v",
    "--no-cache",  # NVRTC's own, whose results come without a log
)
_ALIGNMENT = 64  # of a tensor map, in host memory too
ADDRESS_ALIGNMENT = 16  # of what TMA reads and writes
MAP = ctypes.c_uint64 * 16  # a field for a tensor map
_ELEMENTS = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT32", torch.int32: "INT32"}

Constants = Mapping[str, int | str]
Headers = Mapping[str, str]  # texts by name
NO_HEADERS: Headers = {}
S = TypeVar("S", bound=ctypes.Structure)

# ---------------------------------------------------------------- compiling


def compile_kernel(source: Path, constants: Constants, headers: Headers = NO_HEADERS) -> bytes:
    """Cubin of a .cu file, from Triton's cache if nothing that goes into it has changed; see `build`. Processes that
    find it missing together each compile it, and one of the equal results stays."""
    from cuda.bindings import nvrtc
    from triton.runtime.cache import get_cache_manager

    _, *version = nvrtc.nvrtcVersion()
    facts = (source.name, _texts(source, headers), _definitions(constants), _OPTIONS, version)
    cache = get_cache_manager(hashlib.sha256(repr(facts).encode()).hexdigest())
    path = cache.get_file(f"{source.stem}.cubin")
    if path is not None:
        return Path(path).read_bytes()
    cubin, _ = build(source, constants, headers)
    cache.put(cubin, f"{source.stem}.cubin")
    return cubin


def build(source: Path, constants: Constants, headers: Headers = NO_HEADERS) -> tuple[bytes, str]:
    """Compiles a .cu file, which may include `headers`, and .cu and .cuh files of its folder (no others), with
    constants defined as macros. Returns the cubin and the log: warnings, and registers and spills of every kernel.
    RuntimeError with the log: it does not compile."""
    from cuda.bindings import nvrtc

    texts = _texts(source, headers)
    included = [[text.encode() for text in texts.values()], [name.encode() for name in texts]]
    options = [option.encode() for option in (*_OPTIONS, *_definitions(constants))]
    what = f"{source} with {dict(constants)}"

    def succeed(result: tuple[Any, ...]) -> Any:
        if result[0]:
            raise RuntimeError(f"{what}: {result[0].name}")
        return result[-1]

    text = texts[source.name].encode()
    program = succeed(nvrtc.nvrtcCreateProgram(text, str(source).encode(), len(texts), *included))
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = bytearray(succeed(nvrtc.nvrtcGetProgramLogSize(program)))
        succeed(nvrtc.nvrtcGetProgramLog(program, log))
        messages = log.rstrip(b"\0").decode()
        if code:
            raise RuntimeError(f"{source} does not compile with {dict(constants)}: {code.name}\n{messages}")
        cubin = bytearray(succeed(nvrtc.nvrtcGetCUBINSize(program)))
        succeed(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin), messages


def _texts(source: Path, headers: Headers) -> dict[str, str]:
    """Of a .cu file and all that it may include, by name."""
    files = [path for path in sorted(source.parent.iterdir()) if path.suffix in (".cu", ".cuh")]
    return {path.name: path.read_text() for path in files} | dict(headers)


def _definitions(constants: Constants) -> list[str]:
    values = {name: value if isinstance(value, str) else int(value) for name, value in sorted(constants.items())}
    return [f"--define-macro={name}={value}" for name, value in values.items()]


def shared_bytes_of(cubin: bytes) -> int:
    """Dynamic shared memory that a kernel needs: the value of its file's variable `shared_bytes`, 0 without one."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)  # of ELF64: e_shoff, then e_shentsize and e_shnum
    size, count = struct.unpack_from("<2H", cubin, 58)
    headers = [struct.unpack_from("<2I4QI", cubin, sections + size * i) for i in range(count)]
    for _, kind, _, _, begin, length, strings in headers:
        for at in range(begin, begin + length if kind == 2 else 0, 24):  # SHT_SYMTAB
            name, _, _, section, value, _ = struct.unpack_from("<I2BH2Q", cubin, at)
            if cubin.startswith(b"shared_bytes\0", headers[strings][4] + name):
                return struct.unpack_from("<i", cubin, headers[section][4] + value)[0]
    return 0


# ---------------------------------------------------------------- the driver


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    """What a driver call returned besides its code. RuntimeError: the code is an error."""
    code = result[0]
    if code:
        name, text = (f(code)[1].decode() for f in (_driver().cuGetErrorName, _driver().cuGetErrorString))
        raise RuntimeError(f"{call}: {name}, {text}")
    return result[-1]


def _ensure_context() -> None:
    """Makes the primary context of torch's device current, as torch leaves it after calling the CUDA runtime. A new
    thread, such as autograd's, may get here without: memory from torch's cache takes no such call."""
    driver = _driver()
    if not int(_checked("cuCtxGetCurrent", driver.cuCtxGetCurrent())):
        context = _checked("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(torch.cuda.current_device()))
        _checked("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))


# ---------------------------------------------------------------- parameters


def allocate(structure: type[S]) -> S:
    """Zeroed parameters of a kernel at a multiple of 64 bytes, as the driver wants of tensor maps in it: fields
    `ctypes.c_uint64 * 16` at offsets of multiples of 64. Memory goes on to the next multiple, where C++ ends a struct
    with such members: the driver reads that far."""
    size = -(-ctypes.sizeof(structure) // _ALIGNMENT) * _ALIGNMENT
    memory = (ctypes.c_char * (size + _ALIGNMENT))()
    params = structure.from_buffer(memory, -ctypes.addressof(memory) % _ALIGNMENT)
    params.kernel_params = (ctypes.c_void_p * 1)(ctypes.addressof(params))  # as cuLaunchKernel wants them
    return params


class TensorMap:
    """The TMA descriptor in a field of allocated parameters, of a tensor `shape` at `address`, read and written in
    boxes. All sizes are outermost first and in elements, `strides` in bytes and of all dimensions but the innermost,
    which is dense. Elements out of bounds are read as zero and not written; but a box that is written must not begin
    before the tensor, which is an illegal instruction. `swizzle` (0 or 128) is in bytes. `begins_with_address`: whether
    the address is the map's first word (`words`), as it is on sm_90; then writing it there is what
    cuTensorMapReplaceAddress does, in a tenth of its time. RuntimeError: the driver does not take it."""

    def __init__(
        self,
        params: ctypes.Structure,
        field: str,
        address: int,
        element: torch.dtype,
        shape: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle: int = 128,
    ) -> None:
        rank = len(shape)
        if len(strides) != rank - 1 or len(box) != rank:
            raise ValueError(f"{field}: shape {shape} needs {rank - 1} strides and {rank} sizes, got {strides}, {box}")
        place = ctypes.addressof(params) + getattr(type(params), field).offset
        if place % _ALIGNMENT:
            raise ValueError(f"{field} of {type(params).__name__} is not at a multiple of {_ALIGNMENT} bytes")
        driver = _driver()
        _ensure_context()
        settings = (
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{f'{swizzle}B' if swizzle else 'NONE'}"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        # not the function of cuda.bindings, which encodes into memory of its own that is not aligned
        code = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
            ctypes.c_void_p(place),
            int(getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_ELEMENTS[element]}")),
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*reversed(shape)),
            (ctypes.c_uint64 * rank)(*reversed(strides)),
            (ctypes.c_uint32 * rank)(*reversed(box)),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            *map(int, settings),
        )
        call = f"cuTensorMapEncodeTiled of {field} at {address:#x}, {element}, {shape=}, {strides=}, {box=}, {swizzle=}"
        _checked(call, (driver.CUresult(code),))
        self.field, self.words = field, getattr(params, field)  # shares and keeps the memory
        self.map = driver.CUtensorMap(_ptr=place)
        self.begins_with_address = self.words[0] == address

    def move(self, address: int) -> None:
        """To another tensor of the same shape and strides. ValueError: it is not at a multiple of 16 bytes."""
        if address % ADDRESS_ALIGNMENT:
            raise ValueError(f"{self.field}: a tensor map cannot begin at {address:#x}, no multiple of 16 bytes")
        if self.begins_with_address:
            self.words[0] = address
            return
        _ensure_context()
        call = f"cuTensorMapReplaceAddress of {self.field} by {address:#x}"
        _checked(call, _driver().cuTensorMapReplaceAddress(self.map, address))


# ---------------------------------------------------------------- kernels


def launch(
    function: Any, size: tuple[int, int, int, int, int], params: ctypes.Structure, stream: int, name: str
) -> None:
    """Launches a function with parameters from `allocate`. `size`: the grid, threads of a block and bytes of its
    dynamic shared memory. RuntimeError with `name`: the driver does not."""
    x, y, z, threads, shared_bytes = size
    run = _driver().cuLaunchKernel
    arguments = (function, x, y, z, threads, 1, 1, shared_bytes, stream, params.kernel_params, 0)
    if run(*arguments)[0]:
        _ensure_context()  # a launch that failed did nothing
        _checked(f"cuLaunchKernel of {name}", run(*arguments))


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a device, without a `torch.cuda.Stream` around it."""
    return torch._C._cuda_getCurrentRawStream(device)


def function_at(handle: int) -> Any:
    """A function that somebody else has loaded."""
    return _driver().CUfunction(handle)


_FUNCTIONS: dict[tuple, dict[int, tuple[Any, int]]] = {}  # of equal kernels, by device; never unloaded


class Kernel:
    """An entry (`extern "C"`) of a .cu file compiled with constants, for blocks of `threads` threads and as many bytes
    of dynamic shared memory as the file's variable `shared_bytes` says (none: 0). The first launch on a device compiles
    and loads it: captured in a graph it must have run before. Equal kernels are loaded once in a process."""

    def __init__(
        self, source: Path, entry: str, constants: Constants, threads: int, headers: Headers = NO_HEADERS
    ) -> None:
        self.source, self.entry, self.constants = source, entry, dict(constants)
        self.threads, self.headers = threads, headers
        self.functions = _FUNCTIONS.setdefault((source, entry, tuple(sorted(constants.items()))), {})

    def launch(self, grid: int, params: ctypes.Structure, stream: int) -> None:
        """On torch's device, with parameters from `allocate`, on a stream's handle. RuntimeError: it cannot be
        compiled, loaded or launched."""
        device = torch.cuda.current_device()
        function, shared_bytes = self.functions.get(device) or self._load(device)
        size = (grid, 1, 1, self.threads, shared_bytes)
        launch(function, size, params, stream, f"{self.entry} in {self.source}")

    def _load(self, device: int) -> tuple[Any, int]:
        driver = _driver()
        cubin = compile_kernel(self.source, self.constants, self.headers)
        shared_bytes = shared_bytes_of(cubin)
        _ensure_context()
        where = f"of {self.entry} in {self.source}"
        module = _checked(f"cuModuleLoadData {where}", driver.cuModuleLoadData(cubin))
        function = _checked(f"cuModuleGetFunction {where}", driver.cuModuleGetFunction(module, self.entry.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        result = driver.cuFuncSetAttribute(function, limit, shared_bytes)
        _checked(f"cuFuncSetAttribute {where}: {shared_bytes} bytes of shared memory", result)
        self.functions[device] = function, shared_bytes
        return function, shared_bytes
