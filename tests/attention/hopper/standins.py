"""Stand-ins for the CUDA driver, so that the host side of CUDA C++ kernels runs on a machine without a GPU."""

import ctypes
from types import SimpleNamespace


class Driver:
    """Records in place of `cuda.bindings.driver`."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    success, invalid = 0, 201

    def __init__(self) -> None:
        self.context = 0
        self.loads: list[bytes] = []
        self.launches: list[tuple] = []

    def cuCtxGetCurrent(self):  # noqa: N802
        return self.success, self.context

    def cuDevicePrimaryCtxRetain(self, device):  # noqa: N802
        return self.success, 100 + device

    def cuCtxSetCurrent(self, context):  # noqa: N802
        self.context = context
        return (self.success,)

    def cuModuleLoadData(self, cubin):  # noqa: N802
        self.loads.append(cubin)
        return self.success, "module"

    def cuModuleGetFunction(self, module, name):  # noqa: N802
        return self.success, f"{name.decode()} of {module}"

    def cuFuncSetAttribute(self, function, attribute, value):  # noqa: N802
        return (self.success,)

    def cuLaunchKernel(self, *arguments):  # noqa: N802
        if not self.context:
            return (self.invalid,)
        self.launches.append(arguments)
        return (self.success,)


class TensorMap:
    """Keeps what a `cuda.TensorMap` is made of, and the address as its first word."""

    begins_with_address = True

    def __init__(self, params, field, address, element, shape, strides, box, swizzle=128) -> None:
        self.element, self.shape, self.strides, self.box, self.swizzle = element, shape, strides, box, swizzle
        self.words = getattr(params, field)  # shares the memory
        self.move(address)

    def move(self, address: int) -> None:
        self.words[0] = address


def copy_of(structure: type[ctypes.Structure], arguments: tuple) -> ctypes.Structure:
    """The parameters of a recorded launch, to be taken while they are what was launched with."""
    (address,) = arguments[9]
    return structure.from_buffer_copy((ctypes.c_char * ctypes.sizeof(structure)).from_address(address))
