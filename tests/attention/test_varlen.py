"""Packed documents: borders of every form, rows of no document, and independence of what stands next door."""

import itertools

import pytest
import torch

from s2.attention import Pattern, s2_attention
from tests.attention.checks import Case, assert_correct, call_with

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


def results(q, k, v, dout, pattern, cu_seqlens, backend, dlse=True, cu_seqlens_k=None):
    """By name; "sdpa" has no log-sum-exp of its own."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    how = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "backend": backend}
    if backend == "sdpa":
        out = s2_attention(q, k, v, pattern, **how)
        values = [out, out.detach().sum(-1).mT.clone(), *torch.autograd.grad(out, (q, k, v), dout)]
    else:
        out, lse = s2_attention(q, k, v, pattern, **how, return_lse=True)
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
        out, lse = launch.run_forward(*tensors[:3], borders, None, call)
        launch.run_backward(*tensors[:3], out, lse, tensors[3], None, borders, None, call)
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


# ---------------------------------------------------------------- queries at the end of longer keys

QUERIES = [5, 0, 18, 1, 0, 3]  # of documents
KEYS = [5, 10, 49, 36, 0, 3]
LATE_PATTERNS = [PATTERNS[0], PATTERNS[2], pytest.param(PATTERNS[1], marks=pytest.mark.nightly)]


def draw_late(more_queries=0, more_keys=0, **shape):
    """q, k, v and the gradient of the output, with tokens behind the last border."""
    tokens, keys = sum(QUERIES) + more_queries, sum(KEYS) + more_keys
    q, k, v, dout = draw(max(tokens, keys), **shape)
    return [q[:tokens], k[:keys], v[:keys], dout[:tokens]]


def late_results(tensors, pattern, backend):
    device = tensors[0].device
    return results(
        *tensors, pattern, borders_of(QUERIES, device), backend, cu_seqlens_k=borders_of(KEYS, device)
    )  # fmt: skip


def documents(found, queries=QUERIES, keys=KEYS):
    """Of each document by name, tokens first."""
    parts = {}
    for name, x in found.items():
        lengths = keys if name in ("dk", "dv") else queries
        x = x.T if name == "lse" else x
        parts[name] = x[: sum(lengths)].split(lengths)
    return [{name: parts[name][n] for name in parts} for n in range(len(queries))]


@pytest.mark.parametrize("pattern", LATE_PATTERNS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_with_longer_keys_are_as_each_alone(backend, pattern):
    """Also where tokens behind the borders, and keys of documents without queries, are NaN; their gradients are 0."""
    padding = 9
    tensors = draw_late(padding, padding + 8)
    q, k, v, dout = tensors
    for x in (q, dout):
        x[-padding:] = float("nan")
    for x in (k, v):
        x[-padding - 8 :] = float("nan")
        x[KEYS[0] : KEYS[0] + KEYS[1]] = float("nan")
    found = late_results(tensors, pattern, backend)
    for name, x in found.items():
        behind = (x.T if name == "lse" else x)[-padding:]
        assert (behind == (float("-inf") if name == "lse" and backend != "sdpa" else 0)).all(), name
    begin = first = 0
    for queries, keys, own in zip(QUERIES, KEYS, documents(found), strict=True):
        rows, columns = slice(begin, begin + queries), slice(first, first + keys)
        alone = [q[None, rows], k[None, columns], v[None, columns], dout[None, rows]]
        begin, first = begin + queries, first + keys
        if not queries:
            assert not own["dk"].any() and not own["dv"].any()
            continue
        for name, wanted in results(*alone, pattern, None, backend).items():
            torch.testing.assert_close(own[name], wanted[0].mT if name == "lse" else wanted[0], msg=name)


@pytest.mark.parametrize(
    ("spec", "block", "group", "dtype"),
    [
        ("L1V2<3V4+sink1", 16, 4, torch.float16),
        ("W1", 32, 1, torch.float32),
        pytest.param("dense", 128, 2, torch.float16, marks=pytest.mark.nightly),
        pytest.param("L1V3", 16, 3, torch.float32, marks=pytest.mark.nightly),
    ],
)
def test_longer_keys_match_the_definition(spec, block, group, dtype, seed):
    borders, borders_k = (tuple(borders_of(lengths).tolist()) for lengths in ([18, 7], [90, 7]))
    case = Case(Pattern.parse(spec, block), borders[-1], borders_k[-1], group, 1, 32, cu_seqlens=borders,
                cu_seqlens_k=borders_k)  # fmt: skip
    assert_correct(case, dtype, device=DEVICE, seed=seed)


@pytest.mark.parametrize("pattern", LATE_PATTERNS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_with_longer_keys_do_not_see_nan_next_door(backend, pattern):
    tensors, nth, bad = draw_late(), 2, float("nan" if pattern.mask is None else "inf")
    before = documents(late_results(tensors, pattern, backend))
    for x, lengths in zip(tensors, (QUERIES, KEYS, KEYS, QUERIES), strict=True):
        x[sum(lengths[:nth]) : sum(lengths[: nth + 1])] = bad
    after = documents(late_results(tensors, pattern, backend))
    for n, name in itertools.product(range(len(QUERIES)), NAMES):
        assert n == nth or torch.equal(after[n][name], before[n][name]), (n, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_borders_of_keys_of_every_form_are_read_alike(backend):
    tensors, borders, borders_k = draw_late(), borders_of(QUERIES), borders_of(KEYS)
    table = torch.stack([borders_k, borders_k + 7], 1)
    wanted = late_results(tensors, PATTERNS[0], backend)
    for own in (table[:, 0], borders_k.long().cpu()):
        found = results(*tensors, PATTERNS[0], borders, backend, cu_seqlens_k=own)
        assert all(torch.equal(found[name], wanted[name]) for name in NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_borders_of_keys_that_are_those_of_queries_change_nothing(backend):
    (q, k, v, dout), borders, end = draw(30), borders_of([5, 0, 18]), 23
    wanted = results(q, k, v, dout, PATTERNS[0], borders, backend)
    for tensors, own in (((q, k, v, dout), borders), ((q[:end], k, v, dout[:end]), borders)):
        found = results(*tensors, PATTERNS[0], borders, backend, cu_seqlens_k=own)
        for name in NAMES:
            a, b = (x[name].mT if name == "lse" else x[name] for x in (found, wanted))
            torch.testing.assert_close(a, b[: len(a)], msg=name)


LATE_MISFITS = [
    *(([0, 10, 90], borders, "cu_seqlens_k must begin with 0") for borders in MISFITS if len(borders) == 3),
    *((borders, [0, 60, 100], "cu_seqlens must begin with 0") for borders in ([0, 10, 101], [1, 2, 3], [0, 5, 4])),
    ([0, 41, 90], [0, 40, 100], "document 0 has 41 queries, which cannot be the last of its 40 keys"),
    ([0, 30, 60], [0, 71, 100], "document 1 has 30 queries, which cannot be the last of its 29 keys"),
]


@pytest.mark.parametrize(("borders", "borders_k", "text"), LATE_MISFITS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_borders_of_keys_that_do_not_fit_are_refused_where_they_can_be_read(backend, borders, borders_k, text):
    borders, borders_k = (torch.tensor(x, dtype=torch.int64) for x in (borders, borders_k))
    tensors = draw(100)[:3]
    if DEVICE == "cpu":
        s2_attention(*tensors, PATTERNS[0], cu_seqlens=borders * 0, cu_seqlens_k=borders_k * 0, backend=backend)
    with pytest.raises(ValueError, match=text):  # not only where the call is new
        s2_attention(*tensors, PATTERNS[0], cu_seqlens=borders, cu_seqlens_k=borders_k, backend=backend)


@pytest.mark.parametrize(("borders", "borders_k", "text"), LATE_MISFITS, ids=str)
def test_borders_of_keys_that_do_not_fit_give_nan_where_they_cannot_be_read(borders, borders_k, text):
    q, k, v, dout = draw(100)
    borders, borders_k = (
        torch.tensor(x, dtype=torch.int64, device=DEVICE).clamp(-1, 101).int() for x in (borders, borders_k)
    )
    settings = (borders, PATTERNS[0].key, 0, 0, 1, 0.1, "triton", borders_k)
    out, lse = torch.ops.s2.attention_forward(q, k, v, *settings)
    gradients = torch.ops.s2.attention_backward(q, k, v, out, lse, dout, None, *settings)
    assert all(x.isnan().all() for x in (out, lse, *gradients)), text


@pytest.mark.parametrize("pattern", PATTERNS[::2], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys", "more_keys"), [([], [], 12), ([0], [0], 0), ([0, 0], [7, 9], 3)])
def test_no_document_with_queries_at_all(backend, pattern, queries, keys, more_keys):
    q, k, v, dout = draw(20)
    k, v = (x[: sum(keys) + more_keys] for x in (k, v))
    found = results(q, k, v, dout, pattern, borders_of(queries), backend, cu_seqlens_k=borders_of(keys))
    assert all((found[name] == 0).all() for name in ("out", "dq", "dk", "dv"))
    assert backend == "sdpa" or (found["lse"] == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_without_queries_may_exceed_a_mask(backend):
    mask = Pattern.from_mask(torch.ones(1, 2, 2, dtype=torch.bool), block_size=16)
    q, k, v, dout = draw(120)
    borders, borders_k = borders_of([0, 3, 0]), borders_of([50, 20, 50])
    found = results(q[:3], k, v, dout[:3], mask, borders, backend, cu_seqlens_k=borders_k)
    wanted = results(q[None, :3], *(x[None, 50:70] for x in (k, v)), dout[None, :3], mask, None, backend)
    torch.testing.assert_close(found["out"], wanted["out"][0])
    torch.testing.assert_close(found["dk"][50:70], wanted["dk"][0])
    assert not found["dk"][:50].any() and not found["dk"][70:].any()
    with pytest.raises(ValueError, match="block mask covers 2 blocks but"):
        s2_attention(q[:3], k, v, mask, cu_seqlens=borders_of([1, 1, 1]), cu_seqlens_k=borders_k, backend=backend)


@pytest.mark.parametrize("pattern", LATE_PATTERNS[::2], ids=str)
def test_compiled_documents_with_longer_keys_keep_to_themselves(pattern):
    def run(q, k, v, cu_seqlens, cu_seqlens_k):
        return s2_attention(q, k, v, pattern, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, backend="sdpa")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for more_keys in (0, 23):  # without any, rows behind the last border see no key
        tensors = draw_late(13, more_keys, heads=4, kv_heads=2)
        wanted = late_results(tensors, pattern, "sdpa")
        bad = sum(QUERIES[:3]), sum(KEYS[:3])  # the document of one query
        tensors[0][bad[0]] = float("nan")
        tensors[1][bad[1] : bad[1] + KEYS[3]] = float("nan")
        tensors[2][KEYS[0] : KEYS[0] + KEYS[1]] = float("nan")  # of a document without queries
        q, k, v, dout = tensors
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = compiled(*inputs, borders_of(QUERIES), borders_of(KEYS))
        assert out[bad[0]].isnan().all()
        gradients = torch.autograd.grad(out, inputs, dout)
        found = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))
        for n, name in itertools.product((0, 1, 2, 4, 5), found):
            own, exact = (documents({name: x[name]})[n][name] for x in (found, wanted))
            torch.testing.assert_close(own, exact, msg=f"{name} of document {n}")
        assert not found["out"][-13:].any() and not found["dq"][-13:].any()
        assert not found["dk"][sum(KEYS) :].any() and not found["dv"][sum(KEYS) :].any()
    inputs = draw(100)[:3]
    for borders, borders_k, text in LATE_MISFITS:
        misfits = (torch.tensor(x, device=DEVICE) for x in (borders, borders_k))
        assert compiled(*inputs, *misfits).isnan().all(), text
