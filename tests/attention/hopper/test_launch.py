"""The host side of the Hopper kernels without a GPU: what each kernel would be launched with."""

import inspect
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from s2.attention import Pattern, call, kept, op, s2_attention
from s2.attention.kernels.hopper import driver as cuda_driver
from s2.attention.kernels.hopper import launch, problem, support, triton_launcher
from s2.attention.kernels.hopper import one_pass as backward
from s2.attention.kernels.hopper import params as structs
from s2.attention.kernels.hopper.forward import Forward
from s2.attention.kernels.hopper.problem import Problem
from s2.attention.kernels.hopper.two_pass import TwoPass
from s2.attention.kernels.hopper.varlen import Documents
from s2.attention.kernels.triton.documents import unowned
from s2.attention.schedule import rule_schedule
from tests.attention.checks import call_with, plans_kept
from tests.attention.hopper import standins

K = TypeVar("K")


@dataclass
class Launches:
    """Recorded instead of run: Gluon and Triton kernels by name; those in CUDA C++ with their parameters at that time,
    the forward, dQ, and by name the backward in one pass."""

    gluon: list[tuple[str, Any, tuple]]
    forward: list[tuple[structs.Forward, tuple]]
    query: list[tuple[structs.BackwardQ, tuple]]
    one_pass: list[tuple[str, Any, tuple]]


class Driver(standins.Driver):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.seen = launches

    def cuLaunchKernel(self, *arguments):  # noqa: N802
        result = super().cuLaunchKernel(*arguments)
        if result[0] == self.success:
            entry = arguments[0].split()[0]
            params = standins.copy_of(PARAMS.get(entry, structs.PrePost), arguments)
            if entry == "attention_forward":
                self.seen.forward.append((params, arguments))
            elif entry == "attention_backward_q":
                self.seen.query.append((params, arguments))
            else:
                self.seen.one_pass.append((entry, params, arguments))
        return result


STREAM = 77
SHARED_BYTES = 1000
PARAMS = {
    "attention_forward": structs.Forward,
    "attention_backward_q": structs.BackwardQ,
    "attention_backward": structs.Backward,
}


@pytest.fixture
def launches(monkeypatch):
    seen = Launches([], [], [], [])
    driver = Driver(seen)
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "_FUNCTIONS", {})
    monkeypatch.setattr(cuda_driver, "TensorMap", standins.TensorMap)
    monkeypatch.setattr(cuda_driver, "compile_kernel", lambda *what: b"")
    monkeypatch.setattr(cuda_driver, "shared_bytes_of", lambda cubin: SHARED_BYTES)
    monkeypatch.setattr(cuda_driver, "current_stream", lambda index: STREAM)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(call, "CALLS", {})
    monkeypatch.setattr(op, "_CHECKED", {})
    monkeypatch.setattr(backward, "is_taken", lambda *call: False)
    monkeypatch.setattr(problem, "num_sms", lambda device: 132)

    def record(self, stream, *arguments):
        assert stream == STREAM
        seen.gluon.append((self.function.fn.__name__, self, arguments))

    monkeypatch.setattr(triton_launcher.Launch, "__call__", record)
    return seen


@pytest.fixture
def one_pass(monkeypatch, launches):
    monkeypatch.setattr(backward, "is_taken", lambda *call: True)
    return launches


def last(kind: type[K]) -> K:
    """The kernel that the last new shape has used."""
    *_, kept = plans_kept()
    return kept.kernels[kind]


def parameters(kernel) -> tuple[list[str], list[str], set[str]]:
    """Names of the arguments, of the constants, and of the integers that are compiled in by value."""
    signature = inspect.signature(kernel.function.fn).parameters
    constants = [name for name, p in signature.items() if "constexpr" in str(p.annotation)]
    passed = [name for name in signature if name not in constants]
    known = getattr(kernel.function, "params", [])  # Triton's interpreter has none
    return passed, constants, {p.name for p in known if not p.is_constexpr and not p.do_not_specialize}


def described(launches: Launches) -> dict[str, Any]:
    """The arguments of the kernel of dK and dV by name, as Triton would get them."""
    ((kernel, arguments),) = [call for name, *call in launches.gluon if name == "attention_backward_kv"]
    return dict(zip(parameters(kernel)[0], kernel.described(arguments), strict=True))


def run(pattern, length=1000, heads=8, kv_heads=4, dim=128, batch=2, dlse=False, cu_seqlens=None):
    q = torch.randn(batch, length, heads, dim, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, length, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2))
    if cu_seqlens is not None:
        q, k, v = q[0], k[0], v[0]
    settings = (cu_seqlens, call_with(pattern, kv_heads))
    out, lse = launch.run_forward(q, k, v, cu_seqlens, None, settings[1])
    assert out.shape == q.shape
    assert lse.shape == ((batch, heads, length) if cu_seqlens is None else (heads, length))
    gradients = launch.run_backward(q, k, v, out, lse, out, lse if dlse else None, *settings)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert all(x.is_contiguous() for x in (out, *gradients))
    return q, k, v, out


@pytest.mark.parametrize("spec", ["L2V5+sink1", "W3"])
@pytest.mark.parametrize(("length", "dim", "dlse"), [(1, 64, False), (20000, 128, True)])
@pytest.mark.parametrize(("block", "packed"), [(64, True), (16, False)])
def test_every_kernel_gets_the_arguments_it_names(launches, spec, length, dim, dlse, block, packed):
    borders = torch.tensor([0, length // 3, length], dtype=torch.int32) if packed else None
    run(Pattern.parse(spec, block), length=length, heads=16, dim=dim, batch=1, dlse=dlse, cu_seqlens=borders)
    assert len(launches.forward) == len(launches.query) == 1
    names = [name for name, _, _ in launches.gluon if name != "attention_documents"]
    assert names[0] == "attention_backward_kv"
    assert (len(names) < len(launches.gluon)) == packed
    for name, kernel, arguments in launches.gluon:
        passed, constants, specialized = parameters(kernel)
        assert len(arguments) == len(passed), name
        # the kept kernel is called with the constants after the arguments, so they must be last and in this order
        assert list(inspect.signature(kernel.function.fn).parameters) == passed + list(kernel.constants), name
        assert constants == list(kernel.constants), name
        values = dict(zip(passed, arguments, strict=True))
        baked = [x for x in specialized if isinstance(values[x], int)]
        assert not baked, f"{name} would be compiled for these values: {baked}"
        if "length" in values:
            assert values["length"] == length
    constants = {name: kernel.constants for name, kernel, _ in launches.gluon}
    assert constants["attention_backward_kv"]["GROUPED"] is True
    assert constants["attention_backward_kv"]["PACKED"] is last(TwoPass).q.kernel.constants["PACKED"] is packed
    assert bool(launches.query[0][0].dlse) is dlse


def test_a_kept_kernel_always_gets_tensors_of_the_types_that_it_was_compiled_for(launches):
    borders = torch.tensor([0, 300, 1000], dtype=torch.int32)
    for dim in (64, 128):
        run(Pattern.parse("L1V3"), dim=dim, batch=1, cu_seqlens=borders)
    types = {}
    for name, kernel, arguments in launches.gluon:
        for it in ((name, *kernel.key[1:]), id(kernel)):
            these = tuple(x.dtype for x in arguments if isinstance(x, torch.Tensor))
            assert types.setdefault(it, these) == these, name
    assert sum(name == "attention_documents" for name, *_ in launches.gluon) == 4


def test_descriptors_are_of_the_tensors_of_this_call(launches):
    pattern = Pattern.parse("L1V15")
    run(pattern)
    launches.gluon.clear()
    q, k, v, out = run(pattern)  # the plan is kept, the tensors are new
    values = described(launches)
    read = (("q_desc", q), ("k_desc", k), ("v_desc", v), ("do_desc", out))
    assert all(values[name].base is x for name, x in read)
    written = (("dk_desc", values["dk"], k), ("dv_desc", values["dv"], v))
    assert all(values[name].base.data_ptr() == x.data_ptr() for name, x, _ in written)
    for name, x in (*read, *((name, like) for name, _, like in written)):
        batch, length, heads, dim = x.shape
        assert values[name].shape == [batch, heads, length, dim]
        assert values[name].strides == [x.stride(0), x.stride(2), x.stride(1), 1]
        assert values[name].block_shape == [1, 1, 64, dim]
    params, _ = launches.query[-1]
    assert values["stats_desc"].base.data_ptr() == params.stats
    assert [params.q[0], params.k[0], params.v[0]] == [x.data_ptr() for x in (q, k, v)]
    assert params.out == params.dout[0] == out.data_ptr()
    maps = last(TwoPass).q.maps
    for own, x in ((maps.q, q), (maps.k, k), (maps.v, v), (maps.other, out)):
        assert own.shape == [x.shape[0], x.shape[2], x.shape[1], x.shape[3]] and own.box == [1, 1, 64, 64]
        assert own.strides == [2 * x.stride(0), 2 * x.stride(2), 2 * x.stride(1)]


def test_statistics_are_of_as_many_rows_as_documents_need(launches):
    made = {}
    for count in (2, 1000, 3, 1000):
        launches.gluon.clear()
        borders = torch.linspace(0, 3000, count + 1).int()
        run(Pattern.parse("L1V15"), length=3000, batch=1, cu_seqlens=borders)
        descriptor = described(launches)["stats_desc"]
        stats, params = descriptor.base, launches.query[-1][0]
        assert params.stats == stats.data_ptr() and stats.dtype == torch.float32
        assert descriptor.shape == [len(stats), 128] and descriptor.block_shape == [1, 128]
        assert len(stats) == 8 * params.m_blocks and params.m_blocks >= 3000 // 64 + count
        ((kernel, _),) = [call for name, *call in launches.gluon if name == "attention_backward_kv"]
        assert made.setdefault(len(stats), kernel) is kernel, "prepared again"
    assert len(made) == 2


def test_small_blocks_come_in_boxes_of_several_heads(launches):
    run(Pattern.parse("L1V15", 16), length=1000, heads=16, batch=1)
    values = described(launches)
    assert values["q_desc"].block_shape == values["do_desc"].block_shape == [1, 4, 16, 128]
    assert values["k_desc"].block_shape == [1, 1, 16, 128]
    for maps, ((params, _),) in ((last(Forward).maps, launches.forward), (last(TwoPass).q.maps, launches.query)):
        assert maps.q.box == maps.other.box == [1, 4, 16, 64] and maps.k.box == maps.v.box == [1, 1, 16, 64]
        # 48 tokens of 4 heads a tile
        assert (params.problem.tiles_per_head, params.problem.num_tiles) == (21, 21 * 4)


def test_views_and_unaligned_gradients(launches):
    whole = torch.randn(1, 500, 3, 4, 128, dtype=torch.bfloat16)
    q, k, v = whole.unbind(2)  # strides of a fused projection
    k = torch.randn(1, 4, 500, 128, dtype=torch.bfloat16).transpose(1, 2)  # heads first
    v = torch.randn(v.numel() + 1, dtype=v.dtype)[1:].view(v.shape)  # 2 bytes off
    settings = (None, call_with(Pattern.parse("L1V3"), 4))
    out, lse = launch.run_forward(q, k, v, None, *settings)
    dout = torch.randn(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)  # 2 bytes off
    gradients = launch.run_backward(q, k, v, out, lse, dout, torch.ones(()).expand(lse.shape), *settings)
    assert all(x.is_contiguous() for x in (out, *gradients))
    with pytest.raises(ValueError, match="lse must be float32"):
        launch.run_backward(q, k, v, out, lse.bfloat16(), dout, None, *settings)
    values = described(launches)
    assert values["q_desc"].strides == [q.stride(0), q.stride(2), q.stride(1), 1]
    assert values["k_desc"].strides == [k.stride(0), k.stride(2), k.stride(1), 1]
    rows = [values[name].strides for name in ("do_desc", "dk_desc", "dv_desc")]
    assert rows == 3 * [[500 * 4 * 128, 128, 4 * 128, 1]], "gradients are contiguous"
    assert values["v_desc"].base.data_ptr() % 16 == 0 and torch.equal(values["v_desc"].base, v)
    assert values["do_desc"].base.data_ptr() % 16 == 0 and torch.equal(values["do_desc"].base, dout)
    params, _ = launches.query[-1]
    assert [params.q[0], params.k[0], params.v[0], params.dout[0]] == [
        values[name].base.data_ptr() for name in ("q_desc", "k_desc", "v_desc", "do_desc")
    ]


# ---------------------------------------------------------------- the forward in CUDA C++


@pytest.mark.parametrize(
    ("dim", "block", "dtype"), [(64, 32, torch.float16), (128, 64, torch.bfloat16), (128, 256, torch.float16)]
)
def test_the_forward_gets_its_problem(launches, dim, block, dtype):
    batch, length, heads, kv_heads = 2, 1000, 8, 4
    whole = torch.randn(batch, length, 2, kv_heads, dim, dtype=dtype)
    q, (k, v) = torch.randn(batch, length, heads, dim, dtype=dtype), whole.unbind(2)
    pattern = Pattern.parse("L2V5+sink1", block)
    out, lse = launch.run_forward(q, k, v, None, None, call_with(pattern, kv_heads))
    forward = last(Forward)
    ((params, arguments),) = launches.forward
    a_box, tokens = max(64 // block, 1), min(block, 64)
    constants = forward.kernel.constants
    assert (constants["D"], constants["BLOCK"], constants["LEVELS"], constants["SINKS"]) == (dim, block, 1, True)
    assert (constants["PACKED"], constants["BF16"]) == (False, dtype == torch.bfloat16)
    assert arguments[4:9] == (128 * (constants["CONSUMERS"] + 1), 1, 1, SHARED_BYTES, STREAM)
    shape = params.problem
    (kept,) = plans_kept()
    assert shape.table == kept.problem.rules.table.data_ptr()
    assert shape.counter == problem.counter_of(q.device, STREAM).data_ptr()
    assert (shape.length, shape.kv_heads, shape.group) == (length, kv_heads, heads // kv_heads)
    assert shape.num_tiles == shape.tiles_per_head * kv_heads * batch and arguments[1] == min(shape.num_tiles, 132)
    rows = length * heads // kv_heads  # that a KV head's tiles hold
    assert rows <= shape.tiles_per_head * constants["CONSUMERS"] * 64 < rows + 1024
    assert (params.out_rows, params.lse) == (out.data_ptr(), lse.data_ptr())
    assert params.scale_log2 == pytest.approx(0.1 / 0.6931471805599453)
    for field, x, box in (("q", q, a_box), ("k", k, 1), ("v", v, 1), ("out", out, a_box)):
        own = getattr(forward.maps, "other" if field == "out" else field)
        assert getattr(params, field)[0] == x.data_ptr()
        assert own.shape == [batch, x.shape[2], length, dim] and own.box == [1, box, tokens, 64]
        assert own.strides == [2 * x.stride(0), 2 * x.stride(2), 2 * x.stride(1)]
        assert (own.swizzle, own.element) == (128, dtype)


@pytest.mark.parametrize(("dim", "block", "group"), [(64, 32, 4), (128, 64, 1), (128, 256, 3), (64, 16, 8)])
@pytest.mark.parametrize("before", [1, 63, 64, 1000])
def test_tiles_of_queries_at_the_end_of_longer_keys(launches, dim, block, group, before):
    """They begin with the m_block of the first query and end with that of the last."""
    length, kv_heads = 300, 2
    q, k = torch.randn(1, length, kv_heads * group, dim).half(), torch.randn(1, before + length, kv_heads, dim).half()
    launch.run_forward(q, k, k, None, None, call_with(Pattern.parse("L2V5+sink1", block), kv_heads))
    forward, ((params, _),) = last(Forward), launches.forward
    tokens, consumers, shape = min(block, 64), forward.kernel.constants["CONSUMERS"], params.problem
    assert forward.kernel.constants["LATE"] and (shape.length, shape.offset) == (length, before)
    assert [each.shape[2] for each in (forward.maps.q, forward.maps.k, forward.maps.v)] == [
        length,
        *[before + length] * 2,
    ]
    share = group // max(64 // block, 1)  # m_blocks of the same rows
    held = range(shape.first_m_block, shape.first_m_block + shape.tiles_per_head * consumers)
    rows = [m_block // share * tokens for m_block in held]
    assert rows[0] <= before < rows[0] + tokens and held[0] % share == 0
    assert rows[-1] + tokens >= before + length > rows[-consumers]


def test_packed_calls_pass_their_documents(launches):
    pattern = Pattern.parse("L1V15")
    for borders in ([0, 300, 1000], [0, *range(1, 1001)], [0, 1000]):
        cu_seqlens = torch.tensor(borders, dtype=torch.int32)
        run(pattern, length=1000, heads=8, batch=1, cu_seqlens=cu_seqlens)
        assert len(plans_kept()) == 1
        params, arguments = launches.forward[-1]
        # the table is that of the forward: it is made first
        name, kernel, own = launches.gluon[0]
        own = dict(zip(parameters(kernel)[0], own, strict=True))
        _, table, other = next(call for call in launches.gluon[1:] if call[0] == "attention_documents")
        other = dict(zip(parameters(table)[0], other, strict=True))
        assert launches.query[-1][0].problem.documents == other["documents"].data_ptr()
        assert (table.constants["M_BLOCKS"], table.constants["PACK_GQA"]) == (3, 2)
        launches.gluon.clear()
        count, most_tiles = own["num_documents"], own["most_tiles"]
        assert (name, count) == ("attention_documents", len(borders) - 1)
        assert kernel.grid[0] > count, "nobody fills rows of no document"
        assert (own["num_tokens"], own["width0"], own["width1"], own["num_heads"]) == (1000, 8 * 128, 0, 8)
        assert (own["rows0"].data_ptr(), own["lse"].data_ptr()) == (params.out_rows, params.lse)
        assert params.problem.documents == own["documents"].data_ptr()
        assert 1 <= params.problem.together <= 4 and most_tiles > 0
        assert arguments[1] == 132 and last(Forward).kernel.constants["PACKED"] is True


def test_a_packed_call_prepares_no_launch_that_another_one_has(launches):
    made = {}
    for borders in ([0, 300, 1000], [0, 500, 1000], [0, 7, 500, 1000], [0, 300, 1000]):
        launches.gluon.clear()
        cu_seqlens = torch.tensor(borders, dtype=torch.int32)
        run(Pattern.parse("L1V15"), length=1000, heads=8, batch=1, cu_seqlens=cu_seqlens)
        tables = [launch for name, launch, _ in launches.gluon if name == "attention_documents"]
        assert len(tables) == 2  # of the forward and the backward
        made.setdefault(len(borders), tables)
        assert all(a is b for a, b in zip(made[len(borders)], tables, strict=True))


def test_threads_do_not_mix_their_calls(launches, monkeypatch):
    """Of one shape, so that they share the parameters."""
    q, k, v, _ = run(Pattern.parse("W3"))
    launches.forward.clear()
    move = standins.TensorMap.move
    monkeypatch.setattr(standins.TensorMap, "move", lambda self, address: (time.sleep(0.001), move(self, address)))
    calls = []

    def call():
        own = [x.clone() for x in (q, k, v)]
        for _ in range(5):
            out, lse = launch.run_forward(*own, None, None, call_with(Pattern.parse("W3"), 4))
            calls.append((*(x.data_ptr() for x in (*own, out)), out, lse))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launched = [tuple(getattr(p, name)[0] for name in ("q", "k", "v", "out")) for p, _ in launches.forward]
    assert len(launched) == 20 and set(launched) == {call[:4] for call in calls}
    assert all(p.out_rows == p.out[0] for p, _ in launches.forward)


# ---------------------------------------------------------------- the backward in one pass


@pytest.mark.parametrize("spec", ["L2V5+sink1", "W3"])
@pytest.mark.parametrize(("block", "packed", "dlse"), [(64, False, True), (16, False, False), (64, True, False)])
def test_one_pass_gets_its_problem(one_pass, spec, block, packed, dlse, length=20000):
    borders = torch.tensor([0, 300, length], dtype=torch.int32) if packed else None
    for _ in range(2):  # the second call has the first one's plan and tensors of its own
        one_pass.one_pass.clear()
        one_pass.gluon.clear()
        q, k, v, out = run(Pattern.parse(spec, block), length, 16, 4, batch=1, dlse=dlse, cu_seqlens=borders)
    (first, rows, first_launch), (second, params, second_launch), (third, rounded, _) = one_pass.one_pass
    assert (first, second, third) == ("attention_preprocess", "attention_backward", "attention_postprocess")
    sets, tokens = 16 // (64 // min(block, 64)), min(block, 64)
    boxes = params.m_blocks
    assert boxes >= -(-length // tokens) and rows.m_blocks == boxes
    # parameters are changed in place: those of the two passes over rows are the same at any time
    assert rows.out == rows.dout == out.data_ptr() == params.dout[0] and bool(rows.dlse) == dlse
    assert (rows.length, rows.heads, rows.stats, rows.dq_accum) == (length, 16, params.stats, params.dq_accum)
    assert rounded.dq == rows.dq and rows.dq not in (params.dk, params.dv)
    assert (params.q[0], params.k[0], params.v[0]) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert (params.length, params.kv_heads, params.group, params.groups) == (length, 4, 4, 4)
    assert params.scale == rows.scale == pytest.approx(0.1)
    assert first_launch[1] == sets * rows.blocks and first_launch[4] == 256
    assert second_launch[1] % 2 == 0 and second_launch[1] <= 132 and second_launch[4] == 384
    names = [name for name, *_ in one_pass.gluon]
    if packed:
        assert names == ["attention_documents"] * 2 and second_launch[1] == 132
        _, kernel, own = one_pass.gluon[-1]
        own = dict(zip(parameters(kernel)[0], own, strict=True))
        assert own["segment_rows"] == 0, "the one pass does not divide documents"
        assert (kernel.constants["N_BLOCKS"], kernel.constants["M_BLOCKS"], own["num_documents"]) == (4, 3, 2)
        assert [own[f"rows{i}"].data_ptr() for i in range(3)] == [rows.dq, params.dk, params.dv]
        assert [own[f"width{i}"] for i in range(3)] == [16 * 128, 4 * 128, 4 * 128] and own["num_heads"] == 0
        assert params.documents == rows.documents == own["documents"].data_ptr()
        assert params.most_tiles == rows.blocks == own["most_tiles"]
        return
    columns = params.columns
    segments = zip(columns.tiles, columns.segments, strict=True)
    assert columns.num_partials == sum(4 * tiles for tiles, count in segments if count > 1)
    assert second_launch[1] == 2 * min(params.num_items, 66)
    assert names == ["attention_combine"] * (columns.num_partials > 0)
    for _, kernel, arguments in one_pass.gluon:
        assert kernel.constants["N_BLOCKS"] == 4 and kernel.grid == (4 * columns.num_partials * 4, 1, 1)
        assert arguments[0].data_ptr() == params.partials
        assert list(inspect.signature(kernel.function.fn).parameters)[-len(kernel.constants) :] == [*kernel.constants]


def problem_of(spec: str, length: int = 4, heads: int = 8, dim: int = 128) -> Problem:
    rules = rule_schedule(call_with(Pattern.parse(spec), 8), 8, torch.device("cpu"))
    return Problem(rules, 64, 0.1, 1, length, heads, 8, dim, torch.bfloat16, torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("spec", "length", "settings", "wanted"),
    [
        ("dense", 512, {}, False),
        ("dense", 65536, {}, True),
        ("L1V15", 131072, {}, True),
        ("W1", 1 << 20, {}, False),
        ("dense", 65536, {"dim": 64}, False),
    ],
)
def test_one_pass_is_taken_where_queries_see_many_keys(spec, length, settings, wanted):
    assert backward.is_taken(problem_of(spec, length, **settings), None) is wanted
    three = torch.tensor([0, 5, 9, 3 * length], dtype=torch.int32)
    packed = problem_of(spec, 3 * length, **settings)
    assert backward.is_taken(packed, three) is wanted  # of packed documents the mean length counts


def test_deterministic_algorithms_take_two_passes():
    own = problem_of("dense", 65536)
    assert backward.is_taken(own, None)
    torch.use_deterministic_algorithms(True)
    try:
        assert not backward.is_taken(own, None)
    finally:
        torch.use_deterministic_algorithms(False)


def test_streams_and_graphs_have_their_own_counters(monkeypatch):
    monkeypatch.setattr(problem, "_COUNTERS", {})
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cpu")
    first = problem.counter_of(device, 1)
    assert problem.counter_of(device, 1) is first and problem.counter_of(device, 2) is not first
    capturing = True
    assert problem.counter_of(device, 1) is not first and len(problem._COUNTERS) == 2


def no_library():
    raise RuntimeError("libnvrtc.so.13 was not found")


@pytest.mark.parametrize(
    ("version", "missing", "reason"),
    [
        (None, "cuda-bindings", "cuda"),
        (no_library, "nvidia-cuda-nvrtc", "libnvrtc.so.13 was not found"),
        (lambda: (0, 12, 8), "nvidia-cuda-nvrtc", "found is NVRTC 12.8"),
    ],
)
def test_without_nvrtc_no_call_is_taken_and_one_warning_says_why(version, missing, reason, monkeypatch):
    bindings = version and SimpleNamespace(driver=None, nvrtc=SimpleNamespace(nvrtcVersion=version))
    monkeypatch.setitem(sys.modules, "cuda", version and SimpleNamespace(bindings=bindings))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(support, "on_hopper", lambda x: True)
    q = torch.empty(1, 100, 2, 128, dtype=torch.bfloat16)
    support._finds_nvrtc.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert not support.supports(q, q, q, Pattern.parse("W3"), False)
    finally:
        support._finds_nvrtc.cache_clear()
    (warning,) = caught
    assert f"need the package {missing}" in str(warning.message) and reason in str(warning.message)


# ---------------------------------------------------------------- plans


def test_plans_do_not_pile_up(launches, monkeypatch):
    """The oldest goes: lengths that are in use stay."""
    monkeypatch.setattr(kept, "MOST_REMEMBERED", 4)
    for length in range(1, 12):
        run(Pattern.parse("W3"), length=length)
        assert [plan.problem.length for plan in plans_kept()] == list(range(max(length - 3, 1), length + 1))


def test_layers_with_the_same_rules_share_a_plan(launches, monkeypatch):
    monkeypatch.setattr(op, "_default_backend", lambda q: "triton")
    monkeypatch.setattr(support, "on_hopper", lambda x: True)
    monkeypatch.setattr(support, "_can_compile", lambda: True)
    q = torch.randn(1, 100, 8, 128, dtype=torch.bfloat16)
    for spec, distinct in (("L1V8", 1), ("W3", 1), ("L1V24", 3)):
        call.CALLS.clear()
        for layer in range(32):
            s2_attention(q, q, q, Pattern.parse(spec), rotation=layer)
        assert len(plans_kept()) == distinct


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the table's kernel in Triton's interpreter")
@pytest.mark.parametrize(
    ("spec", "block", "consumers", "share"),
    [
        pytest.param("L1V15", 16, 3, 1, marks=pytest.mark.nightly),
        ("L1V3+sink40", 64, 4, 8),
        pytest.param("L2V5+sink1", 32, 4, 8, marks=pytest.mark.nightly),
        pytest.param("dense", 256, 3, 1, marks=pytest.mark.nightly),
    ],
)
def test_the_table_of_packed_work_has_room(spec, block, consumers, share):
    pattern = Pattern.parse(spec, block)
    for lengths in ([1] * 30, [64, 65, 63, 0, 0, 191, 193], [3000], [257, 1, 1, 700], [200] * 9):
        borders = torch.tensor([0, *lengths]).cumsum(0).int()
        q = torch.randn(1, sum(lengths), 4, 64, dtype=torch.bfloat16)
        own = Problem.of(q, q, call_with(pattern, 4), packed=True)
        documents = Documents.of(STREAM, own, consumers, borders, unowned(q[0]), share)
        num_tiles, num_pairs = documents.table[0, :2].tolist()
        box = min(block, 64)
        assert num_tiles == sum(-(-(-(-n // box) * share) // consumers) for n in lengths) <= documents.most_tiles
        assert 0 < num_pairs <= len(documents.table) - 1 - documents.most_tiles
        assert sum(-(-n // box) for n in lengths) <= documents.m_blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the table's kernel in Triton's interpreter")
@pytest.mark.parametrize(("block", "consumers", "share"), [(16, 3, 1), (64, 4, 8), (256, 3, 2), (32, 4, 3)])
def test_the_table_of_documents_with_longer_keys(block, consumers, share):
    queries, keys = [1, 0, 64, 65, 0, 200, 2, 1], [1000, 70, 64, 640, 0, 301, 129, 1]
    tokens, num_tokens, num_keys = min(block, 64), sum(queries) + 9, sum(keys) + 5
    borders, borders_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
    q, k = (torch.randn(1, n, 4, 64, dtype=torch.bfloat16) for n in (num_tokens, num_keys))
    own = Problem.of(q, k, call_with(Pattern.parse("L1V15", block), 4), packed=True, late=True)
    fill = unowned(q[0], lse=torch.zeros(4, num_tokens))
    wanted = []
    for n, length, begin, first in zip(queries, keys, borders.tolist(), borders_k.tolist(), strict=False):
        before = length - n
        m_blocks = range(before // tokens * share, -(-length // tokens) * share if n else 0)
        wanted += [[m_block, first, length, begin - before, before] for m_block in m_blocks[::consumers]]
    documents = Documents.late(STREAM, own, consumers, borders, borders_k, num_keys, fill, share)
    assert documents.table[0] == len(wanted) <= documents.most_tiles
    assert documents.table[4 : 4 + 5 * len(wanted)].view(-1, 5).tolist() == wanted
    assert not q[0, -9:].any() and q[0, :-9].any()
    for misfit, misfit_k in ((borders, borders_k.flip(0)), (borders_k, borders), (borders, borders_k + 6)):
        table = Documents.late(STREAM, own, consumers, misfit, misfit_k, num_keys, fill, share).table
        assert table[0] == 0 and q.isnan().all()
        q.zero_()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the table's kernel in Triton's interpreter")
@pytest.mark.parametrize(("block", "consumers", "share"), [(16, 3, 1), (64, 4, 8)])
def test_the_table_of_documents_with_longer_keys_has_room(block, consumers, share):
    for queries, before in ([[1] * 30, [63] * 30], [[2] * 30, [63] * 30], [[66] * 9, [127] * 9], [[700], [13]]):
        keys = [n + more for n, more in zip(queries, before, strict=True)]
        borders, borders_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
        q, k = (torch.randn(1, sum(lengths), 1, 64, dtype=torch.bfloat16) for lengths in (queries, keys))
        own = Problem.of(q, k, call_with(Pattern.parse("W3", block), 1), packed=True, late=True)
        documents = Documents.late(STREAM, own, consumers, borders, borders_k, sum(keys), unowned(q[0]), share)
        assert 0 < documents.table[0] <= documents.most_tiles
        assert len(documents.table) == 4 + 5 * documents.most_tiles


def test_documents_with_longer_keys_reach_the_forward(launches):
    q, k = torch.randn(400, 8, 128, dtype=torch.bfloat16), torch.randn(1000, 4, 128, dtype=torch.bfloat16)
    settings = call_with(Pattern.parse("L1V15"), 4)
    for keys, lengths in ((k, [0, 300, 1000]), (k[:400], [0, 100, 400])):  # as many keys do not make it another kernel
        borders, borders_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 100, 400], lengths))
        launch.run_forward(q, keys, keys, borders, borders_k, settings)
        (name, kernel, own), (params, arguments) = launches.gluon[-1], launches.forward[-1]
        own = dict(zip(parameters(kernel)[0], own, strict=True))
        assert name == "late_documents" and kernel.grid[0] > own["num_documents"] == 2
        assert (own["num_tokens"], own["num_keys"], own["width0"], own["num_heads"]) == (400, len(keys), 8 * 128, 8)
        assert (own["cu_seqlens"].tolist(), own["cu_seqlens_k"].tolist()) == ([0, 100, 400], lengths)
        assert (own["rows0"].data_ptr(), own["lse"].data_ptr()) == (params.out_rows, params.lse)
        assert params.problem.documents == own["documents"].data_ptr() and params.problem.length == 400
        constants = last(Forward).kernel.constants
        assert constants["PACKED"] and constants["LATE"] and arguments[1] == 132
        assert [each.shape[2] for each in (last(Forward).maps.q, last(Forward).maps.k)] == [400, len(keys)]
    launch.run_forward(q, k[:400], k[:400], borders, None, settings)
    assert not last(Forward).kernel.constants["LATE"] and launches.gluon[-1][0] == "attention_documents"
