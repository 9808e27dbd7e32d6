"""The host side of CUDA C++ kernels: compiling and its cache, parameters, tensor maps, launches. Compiling needs NVRTC
but no GPU; launches are recorded where there is none."""

import ctypes
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from s2.attention.kernels.hopper import driver
from tests.attention.hopper.standins import Driver

HEADER = """
struct Params {
    alignas(64) unsigned long long map[16];
    float* out;
    int row, column;
};
"""
# ROWS x 32 floats from (row, column) on, a thread each
SOURCE = """
#include "params.cuh"
#ifndef SHARED
#define SHARED (128 * ROWS)
#endif
extern "C" __device__ int shared_bytes = SHARED;

extern "C" __global__ void __launch_bounds__(32 * ROWS) copy_box(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) float tile[];
    __shared__ alignas(8) unsigned long long barrier;
    unsigned arrived = __cvta_generic_to_shared(&barrier), done = 0;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived));
        asm volatile("fence.mbarrier_init.release.cluster;");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived), "r"(128 * ROWS));
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%2, %3}], [%4];"
            ::"r"((unsigned)__cvta_generic_to_shared(tile)), "l"(p.map), "r"(p.column), "r"(p.row), "r"(arrived)
            : "memory");
    }
    __syncthreads();
    // more
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(arrived) : "memory");
    p.out[threadIdx.x] = tile[threadIdx.x];
}
"""
MANY_VALUES = """
    float x[64];
    #pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = p.out[threadIdx.x + 256 * i];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; ++i) p.out[threadIdx.x + 256 * i] = x[63 - i];
"""
CONSTANTS = {"ROWS": 8}


class Params(ctypes.Structure):
    _fields_ = (
        ("map", ctypes.c_uint64 * 16),
        ("out", ctypes.c_void_p),
        ("row", ctypes.c_int),
        ("column", ctypes.c_int),
    )


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """The kernel's file, with an empty cache."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is needed")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC is needed: {error}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "_FUNCTIONS", {})
    path = tmp_path / "source" / "copy.cu"
    path.parent.mkdir()
    path.write_text(SOURCE)
    (path.parent / "params.cuh").write_text(HEADER)
    return path


@pytest.fixture
def builds(monkeypatch) -> list[dict]:
    """The constants of everything that is compiled."""
    seen: list[dict] = []
    build = driver.build

    def record(source, constants, headers):
        seen.append(dict(constants))
        return build(source, constants, headers)

    monkeypatch.setattr(driver, "build", record)
    return seen


# ---------------------------------------------------------------- compiling


def test_a_kernel_is_compiled_once(source, builds):
    first = driver.compile_kernel(source, CONSTANTS)
    assert first.startswith(b"\x7fELF") and b"copy_box" in first
    assert driver.compile_kernel(source, CONSTANTS) == first
    assert builds == [CONSTANTS]


def test_a_change_of_a_header_or_a_constant_is_compiled(source, builds):
    first = driver.compile_kernel(source, CONSTANTS)
    assert driver.compile_kernel(source, {"ROWS": 4}) != first
    (source.parent / "params.cuh").write_text(HEADER.replace("float* out;", "int unused[2]; float* out;"))
    assert driver.compile_kernel(source, CONSTANTS) != first
    source.write_text(SOURCE.replace("= tile[", "= 2 * tile["))
    assert driver.compile_kernel(source, CONSTANTS) != first
    assert builds == [CONSTANTS, {"ROWS": 4}, CONSTANTS, CONSTANTS]


def test_kernels_compiled_at_once_are_all_whole(source, builds):
    with ThreadPoolExecutor(4) as pool:
        cubins = list(pool.map(lambda _: driver.compile_kernel(source, CONSTANTS), range(8)))
    assert len(set(cubins)) == 1
    assert driver.compile_kernel(source, CONSTANTS) == cubins[0]
    files = [name for _, _, names in os.walk(os.environ["TRITON_CACHE_DIR"]) for name in names]
    assert files == ["copy.cubin"]


def test_an_error_names_file_constants_and_cause(source):
    with pytest.raises(RuntimeError, match=r"copy\.cu does not compile with \{'ROWS': 'many'\}") as error:
        driver.compile_kernel(source, {"ROWS": "many"})
    assert 'identifier "many" is undefined' in str(error.value)


def test_a_file_that_the_cache_does_not_know_is_not_included(source):
    (source.parent / "params.h").write_text(HEADER)
    source.write_text(SOURCE.replace("params.cuh", "params.h"))
    with pytest.raises(RuntimeError, match=r"could not open source file \"params\.h\""):
        driver.compile_kernel(source, CONSTANTS)


def test_the_log_tells_registers_spills_and_warnings(source):
    driver.compile_kernel(source, CONSTANTS)
    _, log = driver.build(source, CONSTANTS)  # although it is cached
    assert re.search(r"Compiling entry function 'copy_box' for 'sm_90a'", log)
    assert re.search(r"Used \d+ registers", log)
    assert re.search(r"\b0 bytes spill stores", log)
    source.write_text(SOURCE.replace("__launch_bounds__(32 * ROWS)", "__maxnreg__(24)").replace("// more", MANY_VALUES))
    spills = re.search(r"(\d+) bytes spill stores", driver.build(source, CONSTANTS)[1])
    assert spills and int(spills[1]) > 0
    source.write_text(SOURCE.replace("// more", 'asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");'))
    assert "(C7508)" in driver.build(source, CONSTANTS)[1]  # ignored: the kernel may use any number of registers


# ---------------------------------------------------------------- parameters and launches


def extended(name: str, *fields: tuple) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def test_parameters_lie_where_the_driver_wants_tensor_maps():
    for extra in range(1, 40):
        params = driver.allocate(extended("Longer", *Params._fields_, ("x", ctypes.c_char * extra)))
        assert ctypes.addressof(params) % 64 == 0
        assert params.kernel_params[0] == ctypes.addressof(params)
        memory = (ctypes.c_char * (-(-ctypes.sizeof(params) // 64) * 64)).from_address(params.kernel_params[0])
        assert not any(memory.raw)


def test_a_tensor_map_at_a_bad_place_or_of_a_bad_rank_stops():
    late = driver.allocate(extended("Late", ("n", ctypes.c_int), *Params._fields_))
    with pytest.raises(ValueError, match="map of Late is not at a multiple of 64 bytes"):
        driver.TensorMap(late, "map", 0, torch.bfloat16, [10, 64], [128], [8, 64])
    with pytest.raises(ValueError, match="needs 1 strides and 2 sizes"):
        driver.TensorMap(driver.allocate(Params), "map", 0, torch.bfloat16, [10, 64], [128, 2], [8, 64])


@pytest.fixture
def recorded(monkeypatch) -> Driver:
    stand_in = Driver()
    monkeypatch.setattr(driver, "_driver", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return stand_in


def test_equal_kernels_are_loaded_once_and_launched_in_a_thread_without_context_too(source, recorded):
    params = driver.allocate(Params)
    for _ in range(2):
        recorded.context = 0
        driver.Kernel(source, "copy_box", CONSTANTS, 256).launch(132, params, 77)
        assert recorded.context == 103
    assert recorded.loads == [driver.compile_kernel(source, CONSTANTS)]
    assert recorded.launches == 2 * [
        ("copy_box of module", 132, 1, 1, 256, 1, 1, 1024, 77, params.kernel_params, 0),
    ]


@pytest.mark.parametrize("begins_with_address", [True, False])
def test_a_map_is_moved_by_its_first_word_or_by_the_driver(recorded, begins_with_address):
    params, asked = driver.allocate(Params), []
    recorded.cuTensorMapReplaceAddress = lambda *what: (asked.append(what) or recorded.success,)
    boxes = object.__new__(driver.TensorMap)  # made where there is no driver
    boxes.field, boxes.words, boxes.map, boxes.begins_with_address = "map", params.map, "a map", begins_with_address
    boxes.move(0x1230)
    assert (params.map[0], asked) == ((0x1230, []) if begins_with_address else (0, [("a map", 0x1230)]))
    with pytest.raises(ValueError, match="map: a tensor map cannot begin at 0x1238"):
        boxes.move(0x1238)


@pytest.mark.gpu
def test_a_box_is_read_where_the_tensor_map_was_moved(source):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    first, second = torch.randn(2, 10, 64, device="cuda")
    out = torch.empty(8, 32, device="cuda")
    params = driver.allocate(Params)
    params.out, params.row, params.column = out.data_ptr(), 5, 32
    boxes = driver.TensorMap(params, "map", first.data_ptr(), torch.float32, [10, 64], [256], [8, 32], swizzle=0)
    kernel = driver.Kernel(source, "copy_box", CONSTANTS, 256)

    def expected(x):
        return torch.cat([x[5:, 32:], x.new_zeros(3, 32)])  # three rows out of bounds

    def run(x):
        boxes.move(x.data_ptr())
        kernel.launch(1, params, torch.cuda.current_stream().cuda_stream)

    for x in (first, second):
        run(x)
        assert torch.equal(out, expected(x))
    thread = threading.Thread(target=run, args=(first,))  # it has no context
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(out, expected(first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(second)
    boxes.move(first.data_ptr())  # the graph has its own parameters
    graph.replay()
    assert torch.equal(out, expected(second))
    with pytest.raises(ValueError, match="map: a tensor map cannot begin at 0x"):
        boxes.move(first.data_ptr() + 4)
    boxes.move(second.data_ptr())
    moved = list(params.map)
    boxes.move(first.data_ptr())
    theirs = driver._driver().CUtensorMap(_ptr=ctypes.addressof(params))
    assert not driver._driver().cuTensorMapReplaceAddress(theirs, second.data_ptr())[0]
    assert list(params.map) == moved
    with pytest.raises(RuntimeError, match=r"cuFuncSetAttribute of copy_box .*CUDA_ERROR"):
        driver.Kernel(source, "copy_box", CONSTANTS | {"SHARED": 1 << 20}, 256).launch(1, params, 0)
