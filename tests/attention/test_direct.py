"""Launches of Triton's kernels through the driver, recorded: what stands where the kernel looks for its parameters."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from s2.attention.kernels.hopper import cuda, direct
from tests.attention import standins

PTX = """
.visible .entry work(
	.param .align 64 .b8 work_param_0[128],
	.param .u32 work_param_1,
	.param .u32 work_param_2,
	.param .u64 work_param_3,
	.param .u64 work_param_4,
	.param .u64 .ptr .global .align 1 work_param_5,
	.param .f32 work_param_6,
	.param .u32 work_param_7,
	.param .u64 .ptr .global .align 1 work_param_8,
	.param .u64 .ptr .global .align 1 work_param_9,
	.param .u64 .ptr .global .align 1 work_param_10
)
.reqntid 512
{ .param .b64 not_a_parameter; }
"""  # as Triton 3.6 and 3.7 write it
TENSOR_MAP = None
KINDS = (
    TENSOR_MAP, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float,
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
)  # fmt: skip
STREAM = 5


def arguments_of(count: int, rows: int = 6):
    x, out, table = torch.zeros(rows, 128, dtype=torch.float16), torch.zeros(3), torch.zeros(2, dtype=torch.int32)
    layout = SimpleNamespace(swizzle_byte_width=128)
    descriptor = SimpleNamespace(base=x, shape=[rows, 128], strides=[128, 1], block_shape=[2, 128], layout=layout)
    return descriptor, out, 0.5, count, table


@pytest.fixture
def driver(monkeypatch):
    driver = standins.Driver()
    driver.read = []
    launch = driver.cuLaunchKernel

    def read(*arguments):
        result = launch(*arguments)
        if result[0] == driver.success:
            places = arguments[9]
            assert len(places) == len(KINDS)
            driver.read.append([
                address if kind is TENSOR_MAP else kind.from_address(address).value
                for kind, address in zip(KINDS, places, strict=True)
            ])  # fmt: skip
        return result

    driver.cuLaunchKernel, driver.CUfunction = read, lambda handle: f"function {handle}"
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "TensorMap", standins.TensorMap)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(direct, "_KERNELS", {})
    return driver


class Kernel:
    """Of Triton: compiled by the first call, which also runs it."""

    def __init__(self, ptx=PTX, scratch=0):
        sizes = {"global_scratch_size": scratch, "profile_scratch_size": 0}
        self.metadata = SimpleNamespace(num_warps=16, shared=1000, **sizes)
        self.asm, self.function, self.name = {"ptx": ptx}, 99, "work"
        self.first, self.later = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            (self.first if constants else self.later).append((grid, arguments, constants))
            return self

        return run


def test_parameters_are_where_the_kernel_looks_for_them(driver):
    kernel = Kernel()
    launch = direct.Launch(kernel, (7, 2, 1), {"BLOCK": 64, "D": 128}, ("kind",))
    launch(*arguments_of(3))
    assert kernel.first == [((7, 2, 1), kernel.first[0][1], {"BLOCK": 64, "D": 128, "num_warps": 4})]
    for count in (4, -5):
        descriptor, out, scale, _, table = arguments = arguments_of(count)
        launch(*arguments)
        tensor_map, *values = driver.read[-1]
        assert tensor_map % 64 == 0 and ctypes.c_uint64.from_address(tensor_map).value == descriptor.base.data_ptr()
        assert values == [6, 128, 128, 1, out.data_ptr(), scale, count, table.data_ptr(), None, None]
        assert driver.launches[-1][:9] == ("function 99", 7, 2, 1, 512, 1, 1, 1000, STREAM)
    assert len(kernel.first) == 1 and not kernel.later
    another = direct.Launch(kernel, (1, 1, 1), {"BLOCK": 64, "D": 128}, ("kind",))  # of the same kind: compiled before
    another(*arguments_of(8))
    assert len(kernel.first) == 1 and driver.read[-1][-4] == 8 and driver.launches[-1][1] == 1


def test_tensor_maps_have_the_boxes_that_the_swizzle_spans(driver):
    launch = direct.Direct(Kernel(), (1, 1, 1), arguments_of(1))
    ((_, tensor_map),) = launch.maps
    assert (tensor_map.shape, tensor_map.strides, tensor_map.box) == ([6, 128], [256], [2, 64])
    assert (tensor_map.swizzle, tensor_map.element) == (128, torch.float16)


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel(PTX.replace("u32 work_param_7", "u64 work_param_7")),
        Kernel(PTX.replace("\t.param .u64 .ptr .global .align 1 work_param_10\n", "")),
        Kernel(scratch=16),
    ],
    ids=["an-argument", "scratch-pointers", "scratch-memory"],
)
def test_what_is_laid_out_otherwise_triton_launches(driver, kernel):
    launch = direct.Launch(kernel, (7, 1, 1), {"BLOCK": 64}, ())
    launch(*arguments_of(3))
    arguments = arguments_of(4)
    launch(*arguments)
    assert kernel.later == [((7, 1, 1), (*arguments, 64), {})]
    assert not driver.launches
