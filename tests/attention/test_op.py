"""The custom op: opcheck, torch.compile in one graph, activation checkpointing, and argument errors."""

from types import BuiltinMethodType

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from s2.attention import Pattern, modes, op, s2_attention, sdpa
from s2.attention.call import Call, call_of
from s2.attention.layout import LayerLayout
from s2.attention.op import attention_backward, attention_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERN = Pattern.parse("L1V2", 16)
SETTINGS = (PATTERN.key, 0, 0, 1, 0.2, "triton")


def make(tokens=40, heads=2, kv_heads=1, dim=32, grad=True, packed=False):
    shape = (lambda h: (tokens, h, dim)) if packed else (lambda h: (1, tokens, h, dim))
    return [torch.randn(shape(h), device=DEVICE, requires_grad=grad) for h in (heads, kv_heads, kv_heads)]


def make_documents(kind):
    """q, k, v and the borders of queries and of keys: not packed, packed, or queries at the end of longer keys."""
    q, k, v = make(packed=kind != "unpacked")
    borders, late = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 7, 40], [0, 3, 25]))
    if kind == "late":
        return q.detach()[:25].requires_grad_(), k, v, late, borders
    return q, k, v, borders if kind == "packed" else None, None


KINDS = ["unpacked", "packed", "late"]


@pytest.mark.parametrize("kind", ["unpacked", pytest.param("packed", marks=pytest.mark.nightly), "late"])
def test_opcheck(kind):
    q, k, v, borders, borders_k = make_documents(kind)
    settings = (
        borders,
        *SETTINGS,
        *([] if borders_k is None else [borders_k]),
    )  # programs of before have no such argument
    torch.library.opcheck(attention_forward, (q, k, v, *settings))
    out, lse = attention_forward(q, k, v, *settings)
    inputs = [x.detach() for x in (q, k, v, out, lse, out)]
    torch.library.opcheck(attention_backward, (*inputs, None, *settings))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph_and_gives_the_same_gradients(kind):
    q, k, v, borders, borders_k = make_documents(kind)

    def loss(q, k, v):
        how = {"cu_seqlens": borders, "cu_seqlens_k": borders_k, "backend": "triton"}
        out, lse = s2_attention(q * 2, k, v, PATTERN, return_lse=True, **how)
        return out.square().sum() + lse.sum()

    eager = torch.autograd.grad(loss(q, k, v), (q, k, v))
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(q, k, v), (q, k, v))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", ["L1V3+sink1", "1*L1V3|1*W2", "dense"])
def test_the_hopper_kernels_are_chosen_while_compiling(spec, monkeypatch):
    from s2.attention import op
    from s2.attention.kernels.hopper import launch, support

    calls = []
    monkeypatch.setattr(op, "_default_backend", lambda q: "triton")
    monkeypatch.setattr(support, "on_hopper", lambda x: True)
    monkeypatch.setattr(launch, "run_forward", lambda q, *rest: calls.append(rest) or (q * 2, q[..., 0].mT.float()))
    pattern = LayerLayout.parse(spec, 1)[0]
    q = torch.randn(1, 100, 2, 128, device=DEVICE, dtype=torch.bfloat16)
    run = torch.compile(lambda q: s2_attention(q, q, q, pattern), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(run(q), q * 2)
    assert len(calls) == 3
    assert support.supports(q, q, q, pattern, False) and support.supports(q[0], q[0], q[0], pattern, True)
    assert not support.supports(q.float(), q, q, pattern, False)
    assert not support.supports(q, q, q, Pattern.parse("L1V3", 32), False)
    assert not support.supports(q[:, -4:], q, q, pattern, False)  # fewer queries than keys
    many = torch.empty(300, 2, 128, device=DEVICE, dtype=torch.bfloat16)
    assert support.supports(many, many, many, pattern, True, late=True)
    assert not support.supports(many[:100], many, many, pattern, True, late=True)
    assert not support.supports(q.expand(3, -1, -1, -1), q, q, pattern, False)  # TMA does not read stride 0


@pytest.mark.parametrize("late", [False, True])
def test_gradients_of_queries_at_the_end_of_longer_keys_are_triton_s(late, monkeypatch):
    from s2.attention.kernels.hopper import launch

    monkeypatch.setattr(launch, "run_forward", lambda *inputs: op.run_forward(*inputs))
    monkeypatch.setattr(launch, "run_backward", lambda q, k, v, *rest: (q * 0 + 7, k, v))
    q, k, v, borders, _ = make_documents("packed")  # as many queries as keys, with those behind the last border
    out, _ = attention_forward(q, k, v, borders // 2, *SETTINGS[:-1], "hopper", borders if late else None)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert (dq == 7).all() != late


@pytest.mark.parametrize("spec", ["L1V3+sink1", "dense"])
def test_packed_sdpa_compiles_to_one_graph_for_all_borders(spec):
    pattern, graphs = Pattern.parse(spec, 16), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(q, k, v, borders):
        out = s2_attention(q, k, v, pattern, cu_seqlens=borders, backend="sdpa")
        return (out * torch.linspace(0, 1, out.shape[0], device=DEVICE)[:, None, None]).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=count, dynamic=True)
    inputs = make(300, heads=4, kv_heads=2, packed=True)
    for borders in ([0, 300], [0, 1, 64, 64, 270, 300, 300], [0, 150, 300]):
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=DEVICE)
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        expected = torch.autograd.grad(loss(*inputs, cu_seqlens), inputs)
        for a, b in zip(torch.autograd.grad(compiled(*inputs, cu_seqlens), inputs), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("spec", ["L1V3+sink1", "dense"])
def test_sdpa_compiles_in_one_graph(spec):
    pattern = Pattern.parse(spec, 16)

    def loss(q, k, v):
        return s2_attention(q, k, v, pattern, backend="sdpa").square().sum()

    inputs = make(70, heads=4, kv_heads=2)
    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_with_dynamic_lengths():
    run = torch.compile(lambda q, k, v: s2_attention(q, k, v, PATTERN, backend="triton"), fullgraph=True, dynamic=True,
                        backend="aot_eager")  # fmt: skip
    for tokens in (33, 50, 64):
        q, k, v = make(tokens, grad=False)
        torch.testing.assert_close(run(q, k, v), s2_attention(q, k, v, PATTERN, backend="triton"))


def test_selective_checkpointing_can_save_the_output(monkeypatch):
    from s2.attention import op

    calls = []
    original = op.run_forward
    monkeypatch.setattr(op, "run_forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    saved = {torch.ops.s2.attention_forward.default}

    def policy(ctx, function, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if function in saved else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return s2_attention(q.sin(), k.sin(), v.sin(), PATTERN, backend="triton").square().sum()

    q, k, v = make()
    plain = torch.autograd.grad(block(q, k, v), (q, k, v))
    calls.clear()
    out = checkpoint(block, q, k, v, use_reentrant=False,
                     context_fn=lambda: create_selective_checkpoint_contexts(policy))  # fmt: skip
    selective = torch.autograd.grad(out, (q, k, v))
    assert len(calls) == 1, "the attention output was recomputed although the policy saves it"
    calls.clear()
    full = torch.autograd.grad(checkpoint(block, q, k, v, use_reentrant=False), (q, k, v))
    assert len(calls) == 2
    for a, b, c in zip(plain, selective, full, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_gradient_through_lse_alone():
    q, k, v = make()
    _, lse = s2_attention(q, k, v, PATTERN, return_lse=True, backend="triton")
    dq, dk = torch.autograd.grad(lse.sum(), (q, k), allow_unused=True)
    _, exact = s2_attention(q, k, v, PATTERN, return_lse=True, backend="reference")
    wanted = torch.autograd.grad(exact.sum(), (q, k))
    torch.testing.assert_close(dq, wanted[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dk, wanted[1], atol=1e-5, rtol=1e-4)


def test_empty_inputs():
    q, k, v = make(tokens=0)
    out, lse = s2_attention(q, k, v, PATTERN, backend="triton", return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 2, 0)
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def shaped(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


BORDERS = torch.tensor([0, 4, 8], dtype=torch.int32)


def late_call(cu_seqlens, cu_seqlens_k=BORDERS):
    s2_attention(shaped(8, 2, 16), *[shaped(9, 2, 16)] * 2, PATTERN, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: s2_attention(shaped(8, 2, 16), shaped(8, 2, 16), shaped(8, 2, 16), PATTERN), "[8, 2, 16]"),
        (lambda: s2_attention(shaped(1, 8, 3, 16), *[shaped(1, 8, 2, 16)] * 2, PATTERN), "3 query heads"),
        (lambda: s2_attention(shaped(1, 8, 2, 16), *[shaped(1, 4, 2, 16)] * 2, PATTERN), "8 queries"),
        (lambda: s2_attention(shaped(2, 8, 2, 16), *[shaped(1, 8, 2, 16)] * 2, PATTERN), "batch 2"),
        (lambda: s2_attention(shaped(1, 8, 2, 16), *[shaped(1, 8, 2, 32)] * 2, PATTERN), "dimension 16"),
        (
            lambda: s2_attention(*[shaped(1, 8, 2, 16)] * 2, shaped(1, 8, 2, 16, dtype=torch.float16), PATTERN),
            "float16",
        ),
        (lambda: s2_attention(*[shaped(1, 8, 2, 16)] * 3, "L1V2"), "str"),
        (lambda: s2_attention(*[shaped(1, 8, 2, 16)] * 3, PATTERN, backend="flash"), "'flash'"),
        (lambda: s2_attention(*[shaped(1, 8, 2, 16)] * 3, PATTERN, backend="dense"), "'dense'"),
        (lambda: s2_attention(*[shaped(1, 8, 2, 16)] * 3, PATTERN, head_offset=2), "total_kv_heads"),
        (lambda: s2_attention(*[shaped(1, 8, 2, 16)] * 3, PATTERN, rotation=-1), "rotation=-1"),
        (lambda: s2_attention(*[shaped(8, 2, 16)] * 3, PATTERN, cu_seqlens=[0, 8]), "list"),
        (lambda: s2_attention(*[shaped(1, 8, 2, 16).int()] * 3, PATTERN), "int32"),
        (lambda: s2_attention(*[shaped(1, 8, 2, 16)] * 3, PATTERN, softmax_scale=-1.0), "softmax_scale=-1.0"),
        (
            lambda: s2_attention(*[shaped(1, 8, 2, 16)] * 3, PATTERN, head_offset=3, total_kv_heads=4),
            "3 to 4",
        ),
        (lambda: s2_attention(*[shaped(7, 2, 16)] * 3, PATTERN, cu_seqlens=BORDERS), "at 7 tokens"),
        (lambda: s2_attention(*[shaped(9, 2, 16)] * 3, PATTERN, cu_seqlens=BORDERS + 1), "begin with 0"),
        (lambda: s2_attention(*[shaped(9, 2, 16)] * 3, PATTERN, cu_seqlens=BORDERS[:0]), "[n + 1]"),
        (lambda: s2_attention(*[shaped(8, 2, 16)] * 3, PATTERN, cu_seqlens=BORDERS.flip(0)), "[8, 4, 0]"),
        (lambda: s2_attention(*[shaped(8, 2, 16)] * 3, PATTERN, cu_seqlens=torch.tensor([0, 5, 3, 8])), "[0, 5, 3, 8]"),
        (lambda: s2_attention(*[shaped(8, 2, 16)] * 3, PATTERN, cu_seqlens=BORDERS.float()), "float32"),
        (lambda: s2_attention(shaped(8, 2, 16), *[shaped(9, 2, 16)] * 2, PATTERN, cu_seqlens=BORDERS), "cu_seqlens_k"),
        (lambda: late_call(None), "cu_seqlens_k needs cu_seqlens"),
        (lambda: late_call(BORDERS, cu_seqlens_k=[0, 4, 9]), "cu_seqlens_k must be an int32 tensor"),
        (lambda: late_call(BORDERS, cu_seqlens_k=BORDERS.float()), "cu_seqlens_k must be int32 [n + 1]"),
        (lambda: late_call(BORDERS, cu_seqlens_k=BORDERS[:2]), "cu_seqlens has 2 documents but cu_seqlens_k has 1"),
        (lambda: late_call(BORDERS, cu_seqlens_k=BORDERS + 1), "cu_seqlens_k must begin with 0"),
        (lambda: late_call(BORDERS, cu_seqlens_k=BORDERS // 2), "document 0 has 4 queries"),
        (lambda: s2_attention(*[shaped(1, 8, 2, 12)] * 3, PATTERN, backend="triton"), "head_dim=12"),
        (
            lambda: s2_attention(*[shaped(1, 8, 2, 16, dtype=torch.float64)] * 3, PATTERN, backend="triton"),
            "float64",
        ),
        (
            lambda: s2_attention(
                *[shaped(1, 80, 2, 16)] * 3,
                Pattern.from_mask(torch.ones(2, 2, 2, dtype=torch.bool), block_size=16),
                backend="triton",
            ),
            "2 blocks",
        ),
        (
            lambda: s2_attention(
                *[shaped(80, 2, 16)] * 3,
                Pattern.from_mask(torch.ones(2, 2, 2, dtype=torch.bool), block_size=16),
                cu_seqlens=torch.tensor([0, 80], dtype=torch.int32),
                backend="triton",
            ),
            "a document has 5",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, names):
    with pytest.raises(ValueError) as error:
        call()
    assert names in str(error.value)


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Not on the current one, where they would read foreign addresses."""
    entered = []

    class Device:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            monkeypatch.setattr(op, "_is_elsewhere", lambda x: False)

        def __exit__(self, *error):
            monkeypatch.setattr(op, "_is_elsewhere", lambda x: True)

    monkeypatch.setattr(op, "_is_elsewhere", lambda x: True)
    monkeypatch.setattr(torch.cuda, "device", Device)
    q, k, v = make()
    out = s2_attention(q, k, v, PATTERN, backend="triton")
    torch.autograd.grad(out.sum(), (q, k, v))
    assert entered == [q.device, q.device]


def test_traces_with_symbolic_sizes():
    """Whose shapes are no keys of a dictionary."""
    q, k, v = make(grad=False)
    graph = make_fx(lambda q, k, v: s2_attention(q, k, v, PATTERN, backend="triton"), tracing_mode="symbolic")(q, k, v)
    torch.testing.assert_close(graph(q, k, v), s2_attention(q, k, v, PATTERN, backend="triton"))


def test_layer_is_the_old_name_of_rotation():
    q, k, v = make(heads=1, grad=False)
    pattern = Pattern.parse("L1V3", 16)
    with pytest.warns(DeprecationWarning, match="rotation"):
        old = s2_attention(q, k, v, pattern, layer=1)
    assert torch.equal(old, s2_attention(q, k, v, pattern, rotation=1))
    assert not torch.equal(old, s2_attention(q, k, v, pattern))
    with pytest.raises(ValueError, match="rotation=2 and layer=1"):
        s2_attention(q, k, v, pattern, rotation=2, layer=1)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("packed", [False, True])
def test_calls_are_checked_once(backend, packed, monkeypatch):
    """Packed ones, the recipes' default, too: with other borders, other numbers of documents and other tensors."""
    checked, check = [], op._check
    monkeypatch.setattr(op, "_check", lambda *arguments: checked.append(1) or check(*arguments))
    monkeypatch.setattr(op, "_CHECKED", {})
    for borders in ([0, 7, 40], [0, 40], [0, 1, 2, 39]):
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=DEVICE) if packed else None
        q, k, v = make(packed=packed)
        out = s2_attention(q, k, v, Pattern.parse("L1V2", 16), cu_seqlens=cu_seqlens, backend=backend)
        wanted = s2_attention(q, k, v, PATTERN, cu_seqlens=cu_seqlens, backend="reference", rotation=2)
        torch.testing.assert_close(out, wanted)
    assert len(checked) == 2  # of `backend`, and of the reference with a rotation
    if packed and DEVICE == "cpu":
        with pytest.raises(ValueError, match="never fall"):
            s2_attention(q, k, v, PATTERN, cu_seqlens=cu_seqlens.flip(0), backend=backend)
        how = {"cu_seqlens": cu_seqlens, "backend": backend}
        s2_attention(q, k, v, PATTERN, cu_seqlens_k=cu_seqlens.clone(), **how)
        number = len(checked)
        s2_attention(q, k, v, PATTERN, cu_seqlens_k=cu_seqlens.clone(), **how)
        assert len(checked) == number
        with pytest.raises(ValueError, match="cannot be the last of its 0 keys"):
            s2_attention(q, k, v, PATTERN, cu_seqlens_k=cu_seqlens * 0, **how)
        with pytest.raises(ValueError, match="has 3 documents but cu_seqlens_k has 2"):
            s2_attention(q, k, v, PATTERN, cu_seqlens_k=cu_seqlens[:-1], **how)
    with pytest.raises(ValueError, match="softmax_scale"):
        s2_attention(q, k, v, PATTERN, cu_seqlens=cu_seqlens, backend=backend, softmax_scale=0.0)


def test_a_call_through_the_op_is_the_call_of_its_settings():
    own = Call(Pattern.parse("L2V3+sink1", 32), 4, 2, 6, 0.25, "triton")
    shared = call_of(*own.settings)
    assert shared is call_of(*own.settings)
    assert shared.rules(3) == own.rules(3) == own.pattern.rules(6, layer=4)[2:5]
    assert torch.equal(shared.block_mask(9, 3), own.pattern.block_mask(9, 6, layer=4)[2:5])
    masks = Call(Pattern.from_mask(torch.rand(2, 3, 3) < 0.5), 0, 0, 2, 0.25, "triton")
    assert call_of(*masks.settings) == masks and call_of(*masks.settings).pattern is masks.pattern


# ---------------------------------------------------------------- torch's private names


def test_this_torch_has_the_private_names_that_make_calls_fast():
    for name in ("_dispatch_modes", "_functorch_level", "sdp_order"):
        assert getattr(modes, name).__module__ != modes.__name__, f"{name} is the fallback"
    assert isinstance(modes.apply_function(op._Attention), BuiltinMethodType), "Python stands before it"


def test_calls_are_right_without_torchs_private_names(monkeypatch):
    q, k, v = make()
    out = s2_attention(q, k, v, PATTERN, backend="triton")
    wanted = torch.autograd.grad(out.sum(), (q, k, v))
    assert modes.private("_C._no_such_name", len) is len
    monkeypatch.setattr(modes, "_dispatch_modes", lambda: 1)
    monkeypatch.setattr(modes, "_functorch_level", lambda: 1)
    assert not modes.is_plain(q)
    again = s2_attention(q, k, v, PATTERN, backend="triton")
    assert torch.equal(again, out)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again.sum(), (q, k, v)), wanted, strict=True))
    monkeypatch.setattr(sdpa, "_ORDER_OF_TORCH", None)
    assert sdpa._chosen_backends() == [], "without torch's order of kernels it is not known whether the user has one"
