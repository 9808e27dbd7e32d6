"""Launches of Triton's kernels through the driver, recorded: what stands where the kernel looks for its parameters."""

import ctypes
import threading
import time
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
	.param .align 64 .b8 work_param_7[128],
	.param .u32 work_param_8,
	.param .u64 work_param_9,
	.param .u32 work_param_10,
	.param .u64 .ptr .global .align 1 work_param_11,
	.param .u64 .ptr .global .align 1 work_param_12,
	.param .u64 .ptr .global .align 1 work_param_13
)
.reqntid 512
{ .param .b64 not_a_parameter; }
"""  # as Triton 3.6 and 3.7 write it
TENSOR_MAP = None
KINDS = (
    TENSOR_MAP, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float,
    TENSOR_MAP, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
)  # fmt: skip
BOXES = [
    {"block_size": [2, 64], "elem_size": 2, "swizzle": 3},  # a row of 128 columns takes two
    {"block_size": [32], "elem_size": 4, "swizzle": 0},
]
SHAPES: dict[int, list[int]] = {}
DEVICE, STREAM = 2, 5


def descriptor_of(x, shape, strides, box, swizzle):
    layout = SimpleNamespace(swizzle_byte_width=swizzle)
    return SimpleNamespace(base=x, shape=shape, strides=strides, block_shape=box, layout=layout)


def arguments_of(count: int, rows: int = 6):
    x, out, table = torch.zeros(rows, 128, dtype=torch.float16), torch.zeros(3), torch.zeros(2, dtype=torch.int32)
    shape = SHAPES.setdefault(rows, [rows, 128])  # one object, as `_Boxes` has
    row = SHAPES.setdefault(0, [64])
    return (
        descriptor_of(x, shape, [128, 1], [2, 128], 128), out, 0.5,
        descriptor_of(torch.zeros(64), row, [1], [32], 0), count, table,
    )  # fmt: skip


@pytest.fixture
def driver(monkeypatch):
    driver = standins.Driver()
    driver.context, driver.read = 1, []
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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    streams = {DEVICE: STREAM}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)
    monkeypatch.setattr(direct, "_KERNELS", {})
    return driver


class Kernel:
    """Of Triton: compiled by the first call, which also runs it."""

    def __init__(self, ptx=PTX, **metadata):
        known = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": 0,
                 "profile_scratch_size": 0, "tensordesc_meta": BOXES}  # fmt: skip
        self.metadata = SimpleNamespace(num_warps=16, shared=1000, **known | metadata)
        self.asm, self.function, self.name = {} if ptx is None else {"ptx": ptx}, 99, "work"
        self.first, self.later = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            (self.first if constants else self.later).append((grid, arguments, constants))
            return self

        return run


def word_at(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def test_parameters_are_where_the_kernel_looks_for_them(driver):
    kernel = Kernel()
    launch = direct.Launch(kernel, (7, 2, 1), {"BLOCK": 64, "D": 128}, ("kind",))
    launch(*arguments_of(3))
    assert kernel.first == [((7, 2, 1), kernel.first[0][1], {"BLOCK": 64, "D": 128, "num_warps": 4})]
    for count in (4, -5):
        x, out, scale, y, _, table = arguments = arguments_of(count)
        launch(*arguments)
        first, *shape, stored, factor, second, size, stride, number, pointer, scratch, profile = driver.read[-1]
        assert first % 64 == second % 64 == 0
        assert (word_at(first), word_at(second)) == (x.base.data_ptr(), y.base.data_ptr())
        assert (shape, size, stride) == ([6, 128, 128, 1], 64, 1)
        assert (stored, factor, number, pointer) == (out.data_ptr(), scale, count, table.data_ptr())
        assert scratch is profile is None
        assert driver.launches[-1][:9] == ("function 99", 7, 2, 1, 512, 1, 1, 1000, STREAM)
    assert len(kernel.first) == 1 and not kernel.later


def test_a_kernel_is_compiled_once_for_its_constants_and_kind(driver):
    kernel = Kernel()
    for constants, kind, compiled in (({"BLOCK": 64}, "a", 1), ({"BLOCK": 64}, "a", 1), ({"BLOCK": 16}, "a", 2),
                                      ({"BLOCK": 64}, "b", 3), ({"BLOCK": 16}, "a", 3)):  # fmt: skip
        direct.Launch(kernel, (1, 1, 1), constants, (kind,))(*arguments_of(8))
        assert len(kernel.first) == compiled
    assert len(driver.launches) == 2, "those that found a kernel"


def test_tensor_maps_have_the_boxes_that_the_swizzle_spans(driver):
    first, second = direct.Direct(Kernel(), (1, 1, 1), arguments_of(1)).maps.values()
    assert (first.shape, first.strides, first.box, first.swizzle) == ([6, 128], [256], [2, 64], 128)
    assert (second.shape, second.strides, second.box, second.swizzle) == ([64], [], [32], 0)
    assert (first.element, second.element) == (torch.float16, torch.float32)


def test_a_descriptor_of_another_shape_gets_its_map_and_its_numbers(driver):
    launch = direct.Launch(Kernel(), (1, 1, 1), {"BLOCK": 64}, ())
    launch(*arguments_of(0))
    for rows in (6, 50, 50, 6):  # as statistics of more packed documents have
        x, *_ = arguments = arguments_of(1, rows)
        launch(*arguments)
        assert launch.run.maps[0].shape == [rows, 128]
        assert driver.read[-1][1:3] == [rows, 128] and word_at(driver.read[-1][0]) == x.base.data_ptr()


def test_threads_do_not_mix_their_parameters(driver, monkeypatch):
    launch = direct.Launch(Kernel(), (1, 1, 1), {"BLOCK": 64}, ())
    for _ in range(2):
        launch(*arguments_of(0))
    driver.read.clear()
    move = standins.TensorMap.move
    monkeypatch.setattr(standins.TensorMap, "move", lambda self, address: (time.sleep(0.001), move(self, address)))
    wanted = []

    def call(number):
        for _ in range(5):
            arguments = arguments_of(number)
            wanted.append((arguments[1].data_ptr(), number, arguments))
            launch(*arguments)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((read[5], read[10]) for read in driver.read) == sorted(pair[:2] for pair in wanted)


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel(PTX.replace("u32 work_param_10", "u64 work_param_10")),
        Kernel(PTX.replace("\t.param .u64 .ptr .global .align 1 work_param_13\n", "")),
        Kernel(ptx=None),
        Kernel(ptx="nothing that is known"),
        Kernel(global_scratch_size=16),
        Kernel(profile_scratch_size=16),
        Kernel(num_ctas=2),
        Kernel(launch_cooperative_grid=True),
        Kernel(launch_pdl=True),
        Kernel(tensordesc_meta=[BOXES[0] | {"block_size": [2, 128]}, BOXES[1]]),
        Kernel(tensordesc_meta=[BOXES[0] | {"swizzle": 2}, BOXES[1]]),
        Kernel(tensordesc_meta=[BOXES[0] | {"elem_size": 4}, BOXES[1]]),
        Kernel(tensordesc_meta=None),
    ],
    ids=["argument", "scratch pointers", "no PTX", "other PTX", "scratch", "profile", "cluster", "cooperative", "pdl",
         "box", "swizzle", "element", "no boxes"],
)  # fmt: skip
def test_what_triton_would_launch_otherwise_it_launches(driver, kernel):
    launch = direct.Launch(kernel, (7, 1, 1), {"BLOCK": 64}, ())
    launch(*arguments_of(3))
    arguments = arguments_of(4)
    launch(*arguments)
    assert kernel.later == [((7, 1, 1), (*arguments, 64), {})]
    assert not driver.launches
