"""The host side of the Hopper kernels without a GPU: what each kernel would be launched with."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from s2.attention import Pattern
from s2.attention.kernels.hopper import launch


@pytest.fixture
def launches(monkeypatch):
    """Launches by kernel name, recorded instead of run."""
    seen = []
    monkeypatch.setattr(launch, "_PLANS", {})
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    monkeypatch.setattr(launch, "_counter", lambda device: torch.zeros(1, dtype=torch.int32))

    def record(self, *arguments):
        seen.append((self.function.fn.__name__, self, arguments))

    monkeypatch.setattr(launch._Launch, "__call__", record)
    return seen


def parameters(kernel) -> tuple[list[str], list[str], set[str]]:
    """Names of the arguments, of the constants, and of the integers that are compiled in by value."""
    signature = inspect.signature(kernel.function.fn).parameters
    constants = [name for name, p in signature.items() if "constexpr" in str(p.annotation)]
    passed = [name for name in signature if name not in constants]
    known = getattr(kernel.function, "params", [])  # Triton's interpreter has none
    return passed, constants, {p.name for p in known if not p.is_constexpr and not p.do_not_specialize}


def run(pattern, length=1000, heads=8, kv_heads=4, dim=128, batch=2, dlse=False, cu_seqlens=None):
    q = torch.randn(batch, length, heads, dim, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, length, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2))
    if cu_seqlens is not None:
        q, k, v = q[0], k[0], v[0]
    settings = (cu_seqlens, pattern, (0, 0, kv_heads), 0.1)
    out, lse = launch.run_forward(q, k, v, *settings)
    assert out.shape == q.shape
    assert lse.shape == ((batch, heads, length) if cu_seqlens is None else (heads, length))
    gradients = launch.run_backward(q, k, v, out, lse, out, lse if dlse else None, *settings)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    return q, k, v, out


@pytest.mark.parametrize("spec", ["L1V15", "L2V5+sink1", "W3", "dense"])
@pytest.mark.parametrize(("length", "dim", "dlse"), [(1000, 128, True), (1, 64, False), (20000, 128, False)])
@pytest.mark.parametrize(("block", "packed"), [(64, False), (64, True), (16, False), (128, True)])
def test_every_kernel_gets_the_arguments_it_names(launches, spec, length, dim, dlse, block, packed):
    borders = torch.tensor([0, length // 3, length], dtype=torch.int32) if packed else None
    run(Pattern.parse(spec, block), length=length, heads=16, dim=dim, batch=1, dlse=dlse, cu_seqlens=borders)
    names = [name for name, _, _ in launches if name != "attention_documents"]
    assert names[:3] == ["attention_forward", "attention_backward_q", "attention_backward_kv"]
    assert (len(names) < len(launches)) == packed
    for name, kernel, arguments in launches:
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
    constants = {name: kernel.constants for name, kernel, _ in launches}
    assert constants["attention_backward_q"]["HAS_DLSE"] is dlse
    assert constants["attention_backward_kv"]["GROUPED"] is True
    assert all(constants[name]["PACKED"] is packed for name in names[:3])


def test_descriptors_are_of_the_tensors_of_this_call(launches):
    pattern = Pattern.parse("L1V15")
    run(pattern)
    launches.clear()
    q, k, v, out = run(pattern)  # the plan is kept, the tensors are new
    assert len(launch._PLANS) == 1
    (_, kernel, arguments) = launches[0]
    values = dict(zip(parameters(kernel)[0], arguments, strict=True))
    for name, x in (("q_desc", q), ("k_desc", k), ("v_desc", v), ("o_desc", out)):
        descriptor = values[name]
        assert descriptor.base is x
        batch, length, heads, dim = x.shape
        assert descriptor.shape == [batch, heads, length, dim]
        assert descriptor.strides == [x.stride(0), x.stride(2), x.stride(1), 1]
        assert descriptor.block_shape == [1, 1, 64, dim]
    assert all(boxes.fields["base"] is None for plan in launch._PLANS.values() for boxes in (plan.q, plan.rows))


def test_small_blocks_come_in_boxes_of_several_heads(launches):
    run(Pattern.parse("L1V15", 16), length=1000, heads=16, batch=1)
    (_, kernel, arguments) = launches[0]
    values = dict(zip(parameters(kernel)[0], arguments, strict=True))
    assert values["q_desc"].block_shape == values["o_desc"].block_shape == [1, 4, 16, 128]
    assert values["k_desc"].block_shape == [1, 1, 16, 128]
    assert (values["tiles_per_head"], values["num_tiles"]) == (21, 21 * 4)  # 48 tokens of 4 heads a tile


def test_views_and_unaligned_gradients(launches):
    whole = torch.randn(1, 500, 3, 4, 128, dtype=torch.bfloat16)
    q, k, v = whole.unbind(2)  # strides of a fused projection
    settings = (None, Pattern.parse("L1V3"), (0, 0, 4), 0.1)
    out, lse = launch.run_forward(q, k, v, *settings)
    dout = torch.randn(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)  # 2 bytes off
    launch.run_backward(q, k, v, out, lse, dout, torch.ones(()).expand(lse.shape), *settings)
    values = dict(zip(parameters(launches[1][1])[0], launches[1][2], strict=True))
    assert values["q_desc"].strides == [q.stride(0), q.stride(2), q.stride(1), 1]
    assert values["do_desc"].base.data_ptr() % 16 == 0 and torch.equal(values["do_desc"].base, dout)
    assert values["dlse"].is_contiguous()


def test_plans_do_not_pile_up(launches, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_PLANS", 4)
    for length in range(1, 12):
        run(Pattern.parse("W3"), length=length)
        assert len(launch._PLANS) <= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the table's kernel in Triton's interpreter")
@pytest.mark.parametrize("spec", ["L1V15", "L2V5+sink1", "L1V3+sink40", "dense"])
@pytest.mark.parametrize("block", [16, 32, 64, 256])
@pytest.mark.parametrize("consumers", [3, 4])
def test_the_table_of_packed_work_has_room(spec, block, consumers):
    pattern = Pattern.parse(spec, block)
    for lengths in ([1] * 30, [64, 65, 63, 0, 0, 191, 193], [3000], [257, 1, 1, 700], [200] * 9):
        borders = torch.tensor([0, *lengths]).cumsum(0).int()
        q = torch.randn(1, sum(lengths), 4, 64, dtype=torch.bfloat16)
        rules = launch.schedule.rule_schedule(pattern.key, 4, 0, 0, 4, q.device)
        plan = SimpleNamespace(rules=rules, constants={"LEVELS": rules.num_levels, "BLOCK": block})
        documents = launch._Documents.of(q, plan, consumers, borders)
        num_tiles, num_pairs = documents.table[0, :2].tolist()
        box = min(block, 64)
        assert num_tiles == sum(-(-n // (consumers * box)) for n in lengths) <= documents.most_tiles
        assert 0 < num_pairs <= len(documents.table) - 1 - documents.most_tiles
        assert sum(-(-n // box) for n in lengths) <= documents.boxes
