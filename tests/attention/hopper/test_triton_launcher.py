"""Launches of Triton's kernels through the driver, recorded: what stands where the kernel looks for its parameters."""

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from s2.attention.kernels.hopper import driver as cuda_driver
from s2.attention.kernels.hopper import triton_launcher
from tests.attention.hopper import standins

PTX = """
.visible .entry work(
	.param .align 64 .b8 work_param_0[128],
	.param .u32 work_param_1,
	.param .u32 work_param_2,
	.param .u64 work_param_3,
	.param .u64 work_param_4,
	.param .u64 .ptr .global .align 1 work_param_5,
	.param .align 64 .b8 work_param_6[128],
	.param .u32 work_param_7,
	.param .u64 work_param_8,
	.param .u64 .ptr .global .align 1 work_param_9,
	.param .f32 work_param_10,
	.param .u32 work_param_11,
	.param .u64 .ptr .global .align 1 work_param_12,
	.param .u64 .ptr .global .align 1 work_param_13
)
.reqntid 512
{ .param .b64 not_a_parameter; }
"""  # as Triton 3.6 and 3.7 write it
TENSOR_MAP = None
KINDS = (
    TENSOR_MAP, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, TENSOR_MAP,
    ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p,
)  # fmt: skip
BOXES = [
    {"block_size": [2, 64], "elem_size": 2, "swizzle": 3},  # a row of 128 columns takes two
    {"block_size": [32], "elem_size": 4, "swizzle": 0},
]
STREAM = 5


def descriptor_of(x, shape, strides, box, swizzle):
    layout = SimpleNamespace(swizzle_byte_width=swizzle)
    return SimpleNamespace(base=x, shape=shape, strides=strides, block_shape=box, layout=layout)


DESCRIPTORS = {
    "x": lambda x: descriptor_of(x, [6, 128], [128, 1], [2, 128], 128),
    "row": lambda row: descriptor_of(row, [64], [1], [32], 0),
}


def arguments_of(count: int, scale: float = 0.5):
    x, out, table = torch.zeros(6, 128, dtype=torch.float16), torch.zeros(3), torch.zeros(2, dtype=torch.int32)
    return x, out, torch.zeros(64), table, scale, count


def launch_of(kernel, grid=(7, 2, 1), constants=None, kind=()):
    return triton_launcher.Launch(kernel, grid, constants or {"BLOCK": 64}, kind, DESCRIPTORS)


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
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "TensorMap", standins.TensorMap)
    monkeypatch.setattr(triton_launcher, "_KERNELS", {})
    return driver


class Kernel:
    """Of Triton: compiled by the first call, which also runs it."""

    arg_names = ("x", "out", "row", "table", "scale", "count", "BLOCK", "D")

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
    launch = launch_of(kernel, constants={"BLOCK": 64, "D": 128})
    launch(STREAM, *arguments_of(3))
    ((grid, (x, _, row, *_), constants),) = kernel.first
    assert (grid, constants) == ((7, 2, 1), {"BLOCK": 64, "D": 128, "num_warps": 4})
    assert (x.block_shape, row.block_shape) == ([2, 128], [32])
    for count, factor in ((4, 0.5), (4, 0.5), (-5, 0.5), (-5, 2.0)):
        x, out, row, table, *_ = arguments = arguments_of(count, factor)
        launch(STREAM, *arguments)
        first, *shape, stored, second, size, stride, pointer, scale, number, scratch, profile = driver.read[-1]
        assert first % 64 == second % 64 == 0
        assert (word_at(first), word_at(second)) == (x.data_ptr(), row.data_ptr())
        assert (shape, size, stride) == ([6, 128, 128, 1], 64, 1)
        assert (stored, pointer, scale, number) == (out.data_ptr(), table.data_ptr(), factor, count)
        assert scratch is profile is None
        assert driver.launches[-1][:9] == ("function 99", 7, 2, 1, 512, 1, 1, 1000, STREAM)
    assert len(kernel.first) == 1 and not kernel.later


def test_a_kernel_is_compiled_once_for_its_constants_and_kind(driver):
    kernel = Kernel()
    for constants, kind, compiled in (({"BLOCK": 64}, "a", 1), ({"BLOCK": 64}, "a", 1), ({"BLOCK": 16}, "a", 2),
                                      ({"BLOCK": 64}, "b", 3), ({"BLOCK": 16}, "a", 3)):  # fmt: skip
        launch_of(kernel, constants=constants, kind=(kind,))(STREAM, *arguments_of(8))
        assert len(kernel.first) == compiled
    assert len(driver.launches) == 2, "those that found a kernel"


def test_tensor_maps_have_the_boxes_that_the_swizzle_spans(driver, monkeypatch):
    made = []

    def make(*facts):
        made.append(standins.TensorMap(*facts))
        return made[-1]

    monkeypatch.setattr(cuda_driver, "TensorMap", make)
    triton_launcher.Direct(Kernel(), (1, 1, 1), launch_of(Kernel()).described(arguments_of(1)))
    first, second = made
    assert (first.shape, first.strides, first.box, first.swizzle) == ([6, 128], [256], [2, 64], 128)
    assert (second.shape, second.strides, second.box, second.swizzle) == ([64], [], [32], 0)
    assert (first.element, second.element) == (torch.float16, torch.float32)


def test_threads_do_not_mix_their_parameters(driver, monkeypatch):
    launch = launch_of(Kernel())
    for _ in range(2):
        launch(STREAM, *arguments_of(0))
    driver.read.clear()
    run = cuda_driver.launch
    monkeypatch.setattr(cuda_driver, "launch", lambda *settings: (time.sleep(0.001), run(*settings)))
    wanted = []

    def call(number):
        for _ in range(5):
            arguments = arguments_of(number)
            wanted.append((arguments[1].data_ptr(), number, arguments))
            launch(STREAM, *arguments)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((read[5], read[11]) for read in driver.read) == sorted(pair[:2] for pair in wanted)


def test_a_number_that_is_none_leaves_nothing_behind(driver):
    launch = launch_of(Kernel())
    for _ in range(2):
        launch(STREAM, *arguments_of(3))
    with pytest.raises(TypeError):
        launch(STREAM, *arguments_of("four", scale=2.0))  # after the first number has been set
    launch(STREAM, *arguments_of(3))
    assert driver.read[-1][10:12] == [0.5, 3]


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_tensors_at_odd_addresses_stop(driver, which):
    launch = launch_of(Kernel())
    for _ in range(2):
        launch(STREAM, *arguments_of(3))
    arguments = list(arguments_of(3))
    x = arguments[which]
    arguments[which] = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    with pytest.raises(ValueError, match="work: an argument is not at a multiple of 16 bytes"):
        launch(STREAM, *arguments)
    assert len(driver.launches) == 1


def test_maps_that_do_not_begin_with_their_address_are_left_to_triton(driver, monkeypatch):
    monkeypatch.setattr(standins.TensorMap, "begins_with_address", False)
    kernel = Kernel()
    launch = launch_of(kernel)
    for _ in range(2):
        launch(STREAM, *arguments_of(3))
    assert (len(kernel.first), len(kernel.later), driver.launches) == (1, 1, [])


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel(PTX.replace("u32 work_param_11", "u64 work_param_11")),
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
    launch = launch_of(kernel, (7, 1, 1))
    launch(STREAM, *arguments_of(3))
    arguments = arguments_of(4)
    launch(STREAM, *arguments)
    (((grid, (x, out, row, *rest), constants)),) = kernel.later
    assert (grid, constants) == ((7, 1, 1), {})
    assert (x.base, out, row.base) == arguments[:3] and tuple(rest) == (*arguments[3:], 64)
    assert not driver.launches
