"""Packed documents: borders of every form, rows of no document, and independence of what stands next door."""

import itertools

import pytest
import torch

from s2.attention import Pattern, s2_attention
from tests.attention.checks import call_with

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "sdpa", "triton")
NAMES = ("out", "lse", "dq", "dk", "dv")
PATTERNS = [
    Pattern.parse("L1V2+sink1", 16),
    Pattern.parse("W2", 64),
    Pattern.from_mask(torch.ones(1, 8, 8, dtype=torch.bool), block_size=16),
]


def draw(tokens, heads=2, kv_heads=1, dim=32, dtype=torch.float32, device=DEVICE):
    """q, k, v and the gradient of the output."""
    return [torch.randn(tokens, h, dim, dtype=dtype, device=device) for h in (heads, kv_heads, kv_heads, heads)]


def borders_of(lengths, device=DEVICE):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def results(q, k, v, dout, pattern, cu_seqlens, backend, dlse=True):
    """By name; "sdpa" has no log-sum-exp of its own."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    if backend == "sdpa":
        out = s2_attention(q, k, v, pattern, cu_seqlens=cu_seqlens, backend=backend)
        values = [out, out.detach().sum(-1).T.clone(), *torch.autograd.grad(out, (q, k, v), dout)]
    else:
        out, lse = s2_attention(q, k, v, pattern, cu_seqlens=cu_seqlens, backend=backend, return_lse=True)
        roots, seeds = ([out, lse], [dout, torch.ones_like(lse)]) if dlse else ([out], [dout])
        values = [out, lse, *torch.autograd.grad(roots, (q, k, v), seeds)]
    return dict(zip(NAMES, (x.detach() for x in values), strict=True))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_behind_the_last_border_are_zero_and_nobody_reads_them(backend, pattern):
    lengths, padding = [37, 0, 61], 29
    tensors = draw(sum(lengths) + padding)
    for x in tensors:
        x[-padding:] = float("nan")
    padded = results(*tensors, pattern, borders_of(lengths), backend)
    exact = results(*(x[:-padding] for x in tensors), pattern, borders_of(lengths), backend)
    for name in NAMES:
        own = padded[name].T if name == "lse" else padded[name]
        wanted = exact[name].T if name == "lse" else exact[name]
        assert torch.equal(own[:-padding], wanted), name
        empty = float("-inf") if name == "lse" and backend != "sdpa" else 0.0
        assert (own[-padding:] == empty).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_tokens_of_no_document_at_all(backend, lengths):
    padded = results(*draw(40), PATTERNS[0], borders_of(lengths), backend)
    assert all((padded[name] == 0).all() for name in ("out", "dq", "dk", "dv"))
    assert results(*draw(0), PATTERNS[0], borders_of(lengths), backend)["out"].shape == (0, 2, 32)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_documents_do_not_see_nan_next_door(backend, pattern, bad):
    lengths = [37, 45, 5]
    tensors = draw(sum(lengths))
    before = results(*tensors, pattern, borders_of(lengths), backend)
    for x in tensors:
        x[37:82] = bad
    after = results(*tensors, pattern, borders_of(lengths), backend)
    for name in NAMES:
        a, b = (x[name].T if name == "lse" else x[name] for x in (before, after))
        assert torch.equal(a[:37], b[:37]) and torch.equal(a[82:], b[82:]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_borders_of_every_form_are_read_alike(backend):
    lengths = [17, 11, 22]
    borders = borders_of(lengths)
    table = torch.full((len(borders), 3), 7, dtype=torch.int32, device=DEVICE)
    table[:, 1] = borders
    shifted = torch.cat([borders[:1], borders])[1:]  # not at a multiple of 16 bytes
    tensors = draw(50)
    wanted = results(*tensors, PATTERNS[0], borders, backend)
    for other in (table[:, 1], borders.long(), table.long()[:, 1], borders.cpu(), shifted):
        found = results(*tensors, PATTERNS[0], other, backend)
        assert all(torch.equal(found[name], wanted[name]) for name in NAMES)


MISFITS = [[0, 10, 101], [0, 60, 50, 100], [1, 50, 100], [0, -5, 100], [0, 50, 1 << 30], [0, 2**32 + 50, 100]]


@pytest.mark.parametrize("borders", MISFITS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_borders_that_do_not_fit_are_refused_where_they_can_be_read(backend, borders):
    cu_seqlens = torch.tensor(borders, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seqlens must begin with 0, never fall and end at 100 tokens or before"):
        s2_attention(*draw(100)[:3], PATTERNS[0], cu_seqlens=cu_seqlens, backend=backend)


@pytest.mark.parametrize("borders", MISFITS, ids=str)
def test_borders_that_do_not_fit_give_nan_where_they_cannot_be_read(borders):
    """As on a GPU: the kernels find out, and touch nothing that is not theirs."""
    q, k, v, dout = draw(100)
    cu_seqlens = torch.tensor(borders, dtype=torch.int64, device=DEVICE).clamp(-1, 101).int()
    settings = (cu_seqlens, PATTERNS[0].key, 0, 0, 1, 0.1, "triton")
    out, lse = torch.ops.s2.attention_forward(q, k, v, *settings)
    gradients = torch.ops.s2.attention_backward(q, k, v, out, lse, dout, None, *settings)
    assert all(x.isnan().all() for x in (out, lse, *gradients))


def test_layers_with_gradients_in_some_inputs_only():
    q, k, v, dout = draw(50)
    wanted = results(q, k, v, dout, PATTERNS[0], borders_of([50]), "triton", dlse=False)
    for needs in ("q", "k", "v"):
        leaves = {name: x.clone().requires_grad_(name == needs) for name, x in (("q", q), ("k", k), ("v", v))}
        out = s2_attention(*leaves.values(), PATTERNS[0], cu_seqlens=borders_of([50]), backend="triton")
        out.backward(dout)
        assert torch.equal(leaves[needs].grad, wanted["d" + needs])
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != needs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make", [lambda x: x.sum(), lambda x: x.mT.contiguous().mT.sum(1).sum(), lambda x: x[::2].sum()]
)
def test_gradients_of_any_strides(backend, make):
    """Expanded ones of a sum, transposed, with holes."""
    inputs = [x.requires_grad_() for x in draw(60)[:3]]
    out = s2_attention(*inputs, PATTERNS[0], cu_seqlens=borders_of([25, 30]), backend=backend)
    (dout,) = torch.autograd.grad(make(out), out, retain_graph=True)
    wanted = torch.autograd.grad(out, inputs, dout.contiguous(), retain_graph=True)
    for a, b in zip(torch.autograd.grad(make(out), inputs), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 20), (2, 0)])
def test_empty_batches_and_sequences(backend, shape):
    q, k, v = (torch.randn(*shape, h, 32, device=DEVICE, requires_grad=True) for h in (2, 1, 1))
    out = s2_attention(q, k, v, PATTERNS[0], backend=backend)
    assert out.shape == q.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_launches_have_room_for_any_sizes(monkeypatch):
    """Of a grid's dimensions only the first takes more than 65,535."""
    from s2.attention.kernels.triton import backward, forward, launch

    grids = {}
    for module in (forward, backward):
        for name in list(vars(module)):
            if name.startswith("attention_"):

                class Recorded:
                    def __init__(self, name):
                        self.name = name

                    def __getitem__(self, grid):
                        grids[self.name] = grid
                        return lambda *arguments, **constants: None

                monkeypatch.setattr(module, name, Recorded(name))
    q, k, v, dout = draw(100)
    for borders in (None, borders_of([50, 50])):
        tensors = [x if borders is not None else x[None] for x in (q, k, v, dout)]
        call = call_with(PATTERNS[0], 1)
        out, lse = launch.run_forward(*tensors[:3], borders, call)
        launch.run_backward(*tensors[:3], out, lse, tensors[3], None, borders, call)
        assert len(grids) == 4 and all(len(grid) == 1 for grid in grids.values()), grids
        grids.clear()


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_compiled_documents_keep_to_themselves(pattern):
    """On the backend that has one mask for all of them then."""

    def run(q, k, v, cu_seqlens):
        return s2_attention(q, k, v, pattern, cu_seqlens=cu_seqlens, backend="sdpa")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    lengths, padding = [17, 0, 25, 9], 13
    q, k, v, dout = draw(sum(lengths) + padding)
    wanted = results(q, k, v, dout, pattern, borders_of(lengths), "sdpa")
    for x in (q, k, v):
        x[17:42] = x[-padding:] = float("nan")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = compiled(*inputs, borders_of(lengths))
    assert out[17:42].isnan().all()
    for name, x in zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, inputs, dout)), strict=True):
        for rows in (slice(0, 17), slice(42, 51), slice(51, 64)):
            torch.testing.assert_close(x[rows], wanted[name][rows])
    for borders in MISFITS:
        assert compiled(*inputs, torch.tensor(borders, device=DEVICE)).isnan().all()
