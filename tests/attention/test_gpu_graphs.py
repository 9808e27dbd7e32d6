"""CUDA graphs, captured by hand and by `torch.compile(mode="reduce-overhead")`, and what is kept beside them; torch's
dense kernels as the user has enabled them.
"""

import gc
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2.attention import Pattern, call, op, s2_attention, schedule
from s2.attention.kernels.hopper import problem, support
from s2.attention.schedule import LISTS
from tests.attention.checks import call_with

pytestmark = pytest.mark.gpu
hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 device"
)
MASK = Pattern.from_mask(torch.rand(2, 12, 12) < 0.6)
CALLS = [("triton", Pattern.parse("L1V3")), ("triton", MASK), ("sdpa", Pattern.parse("L1V3")),
         pytest.param("hopper", Pattern.parse("L1V3"), marks=hopper)]  # fmt: skip


def draw(tokens, packed=False, grad=True):
    shape = (tokens,) if packed else (1, tokens)
    return [torch.randn(*shape, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=grad) for h in (4, 2, 2)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("backend", "pattern"), CALLS)
def test_reduce_overhead_gives_what_eager_gives(backend, pattern, packed, monkeypatch):
    if packed and backend == "sdpa":
        pytest.skip("sdpa reads borders on the host")
    torch._dynamo.reset()
    monkeypatch.setattr(call, "CALLS", {})
    monkeypatch.setattr(op, "_CHECKED", {})
    monkeypatch.setattr(problem, "_COUNTERS", {})
    LISTS.values.clear()
    borders = torch.tensor([0, 130, 400], device="cuda", dtype=torch.int32) if packed else None

    def step(q, k, v):
        out = s2_attention(q * 2, k, v, pattern, cu_seqlens=borders, backend=backend)
        return s2_attention(out, k, v, pattern, cu_seqlens=borders, backend=backend).float().square().mean()

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for tokens in (400, 500):
        for _ in range(4):  # warm-up, recording, replays
            inputs = draw(tokens, packed)
            torch.compiler.cudagraph_mark_step_begin()
            loss = compiled(*inputs)
            found = [loss.detach().clone(), *(x.clone() for x in torch.autograd.grad(loss, inputs))]
            eager = step(*inputs)
            wanted = [eager.detach(), *torch.autograd.grad(eager, inputs)]
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize(("backend", "pattern"), CALLS)
def test_a_captured_graph_outlives_what_other_calls_evict(backend, pattern, monkeypatch):
    inputs = draw(600, grad=False)
    s2_attention(*inputs, pattern, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = s2_attention(*inputs, pattern, backend=backend).clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = s2_attention(*inputs, pattern, backend=backend)
    from s2.attention import sdpa

    for kept in (LISTS, sdpa.BLOCKS):
        monkeypatch.setattr(kept, "most_bytes", 0)
    call.CALLS.clear()
    op._CHECKED.clear()
    for tokens in range(64, 768, 64):  # other tables take the place of all that may go
        s2_attention(*draw(tokens, grad=False), pattern, backend=backend)
    gc.collect()
    torch.cuda.empty_cache()
    garbage = [torch.full((1 << 20,), 1 << 29, dtype=torch.int32, device="cuda") for _ in range(64)]
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, wanted) and len(garbage) == 64


@pytest.mark.parametrize("spec", ["L3V7+sink5", "L2V3<11V4"])
def test_tables_and_lists_do_not_wait_for_kernels(spec, monkeypatch):
    monkeypatch.setattr(schedule, "_TABLES", {})
    schedule._SCHEDULES.clear()
    LISTS.values.clear()
    own = call_with(Pattern.parse(spec), 2)

    def tables(device):
        if schedule.has_closed_form(own.pattern):
            return [schedule.rule_schedule(own, 2, device).table]
        return list(schedule.key_lists(own, 40, 2, device))

    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # two seconds
    launched = torch.cuda.Event()
    launched.record()
    made = tables(torch.device("cuda", torch.cuda.current_device()))
    assert not launched.query(), "the host has waited for a kernel"
    with torch.cuda.stream(torch.cuda.Stream()):  # any stream may read them at once
        found = [table.cpu() for table in made]
    assert not launched.query()
    assert all(map(torch.equal, found, tables(torch.device("cpu"))))


def test_a_capture_without_a_call_before_says_what_to_do():
    pattern = Pattern.from_mask(torch.rand(2, 11, 11) < 0.6)
    inputs = draw(600, grad=False)
    s2_attention(*inputs, Pattern.from_mask(torch.rand(2, 11, 11) < 0.6), backend="triton")  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="call it once with the same shapes before"), torch.cuda.graph(graph):
        s2_attention(*inputs, pattern, backend="triton")
    torch.cuda.synchronize()


@hopper
def test_strides_that_tma_does_not_read_fall_back_with_a_word(monkeypatch):
    monkeypatch.setattr(support, "_said", set())
    q, k, v = draw(300, grad=False)
    expanded = k[:, :, :1].expand(-1, -1, 2, -1)
    padded = torch.randn(1, 300, 2, 132, device="cuda", dtype=torch.bfloat16)[..., :128]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            out = s2_attention(q, expanded, v, Pattern.parse("L1V3"))
            s2_attention(q, k, padded, Pattern.parse("L1V3"))
    assert len(caught) == 2
    assert "strides of k" in str(caught[0].message) and "strides of v" in str(caught[1].message)
    wanted = s2_attention(q, expanded.contiguous(), v, Pattern.parse("L1V3"), backend="hopper")
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
    with pytest.raises(ValueError, match=r"strides of k.*\.contiguous\(\)"):
        s2_attention(q, expanded, v, Pattern.parse("L1V3"), backend="hopper")


def kernels_of(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages())


@hopper
def test_dense_layers_take_the_kernels_that_the_user_has_enabled():
    q, k, v = draw(512, grad=False)
    dense = Pattern.parse("dense")

    def run():
        return s2_attention(q, k, v, dense)

    def is_flash(names):
        return "flash" in names and "cudnn" not in names

    run()
    assert "cudnn" in kernels_of(run)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        assert is_flash(kernels_of(run))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], set_priority=True):
        assert is_flash(kernels_of(run)), "the user's order counts"
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert is_flash(kernels_of(run))
        assert is_flash(kernels_of(torch.compile(run, fullgraph=True)))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_dense_layers_repeat_with_deterministic_algorithms():
    inputs = [torch.randn(1, 4096, 8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    dout = torch.randn_like(inputs[0])
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(s2_attention(*inputs, Pattern.parse("dense")), inputs, dout) for _ in range(4)
        ]  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("spec", ["L1V3", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_changes_no_type(spec, dtype):
    q, k, v = (x.to(dtype) for x in draw(200, grad=False))
    for backend in (None, "triton", "sdpa", "reference"):
        with torch.autocast("cuda", torch.bfloat16):
            out = s2_attention(q, k, v, Pattern.parse(spec), backend=backend)
            _, lse = s2_attention(q, k, v, Pattern.parse(spec), backend=backend, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        assert torch.equal(out, s2_attention(q, k, v, Pattern.parse(spec), backend=backend))
