"""The masks of torch's SDPA: a few rows at a time, no larger for longer sequences, with the same results."""

import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2.attention import Pattern, s2_attention, sdpa
from tests.attention.checks import Case, run

MOST = 1 << 16  # bytes of a mask in these tests
MASK = torch.rand(2, 25, 25, generator=torch.Generator().manual_seed(0)) < 0.4
MASK[:, 7] = MASK[0, 3:6] = False
PATTERNS = [
    Pattern.parse("dense", 16),
    Pattern.parse("W3", 16),
    Pattern.parse("L2V4+sink2", 16),
    Pattern.from_ranges(1, [(2, 4), (4, 9)], block_size=16, sinks=1),
    Pattern.from_ranges(2, [(2, 5), (3, None)], block_size=32),
    Pattern.per_head([Pattern.parse(spec, 16) for spec in ("dense", "L1V5+sink1")]),
    Pattern.from_mask(MASK, block_size=16),
    Pattern.from_mask(MASK[:1], block_size=16),
]
CASES: dict[str, dict] = {
    "whole": {"q_len": 390, "kv_len": 390, "batch": 2},
    "late": {"q_len": 150, "kv_len": 390},
    "one": {"q_len": 1, "kv_len": 333, "batch": 2},
    "packed": {"q_len": 400, "kv_len": 400, "cu_seqlens": (0, 5, 5, 250, 390)},
    "packed late": {
        "q_len": 200, "kv_len": 400, "cu_seqlens": (0, 5, 6, 155, 200), "cu_seqlens_k": (0, 5, 45, 341, 400),
    },
}  # fmt: skip


class Watched(TorchDispatchMode):
    """As selective checkpointing watches ops; notes the bytes of the largest tensor that one of them makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *map(bytes_of, tree_leaves(out))])
        return out


class Noted(TorchFunctionMode):
    """Notes the masks and the bytes of the largest tensor of all calls, unseen by the package."""

    def __init__(self):
        super().__init__()
        self.largest, self.masks = 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *map(bytes_of, tree_leaves((args, kwargs, out)))])
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.masks.append((kwargs or {}).get("attn_mask"))
        return out


def bytes_of(x):
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0


@contextmanager
def limits(rows=64, most=MOST, kept=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "ROWS", rows)
        patch.setattr(sdpa, "MOST_OF_A_MASK", most)
        patch.setattr(sdpa, "MOST_KEPT", kept)
        patch.setattr(sdpa.MASKS, "values", {})
        yield


def attend(case, inputs):
    """Output and gradients."""
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    borders, borders_k = (
        torch.tensor(x, dtype=torch.int32) if x else None for x in (case.cu_seqlens, case.cu_seqlens_k)
    )
    out = s2_attention(
        q, k, v, case.pattern, cu_seqlens=borders, cu_seqlens_k=borders_k, rotation=case.rotation, backend="sdpa"
    )
    return out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_pieces_give_what_the_definition_gives(name, pattern):
    case = Case(pattern, heads=4, kv_heads=2, head_dim=16, rotation=1, **CASES[name])
    inputs = case.inputs(torch.float64, "cpu", 0)
    wanted = run(case, [*inputs[:4], torch.zeros_like(inputs[4])], torch.float64, "reference")
    exact = [wanted[of] for of in ("out", "dq", "dk", "dv")]
    for way in ({}, {"kept": 1 << 24}, {"most": 1 << 14}, {"watch": Watched}):
        watch = way.pop("watch", nullcontext)
        with limits(**way), watch():
            found, again = attend(case, inputs), attend(case, inputs)
        for x, y, z, of in zip(found, again, exact, ("out", "dq", "dk", "dv"), strict=True):
            torch.testing.assert_close(x, z, msg=lambda m, of=of, way=(way, watch): f"{of}, {way}: {m}")
            assert torch.equal(x, y)


@pytest.mark.parametrize("pattern", PATTERNS[:6], ids=str)
@pytest.mark.parametrize("is_watched", [False, True])
def test_no_tensor_is_as_large_as_a_mask_of_all_rows(is_watched, pattern):
    """Whole prompts, late chunks and the backward; what is gathered of the keys is smaller than they are."""
    tokens = 1600
    q = torch.randn(1, tokens, 4, 8, requires_grad=True)
    k, v = (torch.randn(1, tokens, 2, 8, requires_grad=True) for _ in range(2))
    for late in (0, 1000):
        with limits(rows=256), Noted() as noted, Watched() if is_watched else nullcontext() as watched:
            s2_attention(q[:, late:], k, v, pattern).sum().backward()
        masks = [bytes_of(mask) * (4 if mask.dtype == torch.bool else 1) for mask in noted.masks if mask is not None]
        assert max(masks, default=0) <= MOST
        largest = watched.largest if is_watched else noted.largest
        assert largest <= max(MOST * 2, bytes_of(q)), "bytes, of an int64 where masks have a float32"
    assert len(masks) > 1 and bytes_of(q) * 10 < 4 * 2 * tokens**2


def test_training_at_length_saves_no_masks():
    pattern, saved = Pattern.parse("L2V4", 16), []
    q, k, v = (torch.randn(1, 1600, 2, 8, requires_grad=True) for _ in range(3))
    with limits(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = s2_attention(q, k, v, pattern)
    whole = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    assert sum(bytes_of(x) for x in saved if x.untyped_storage().data_ptr() not in whole) <= 2 * bytes_of(q)
    out.sum().backward()


def test_short_documents_share_the_first_rows(monkeypatch):
    made, make = [], sdpa._rows
    monkeypatch.setattr(sdpa, "_rows", lambda *key: made.append(key[1]) or make(*key))
    with limits(kept=1 << 22, most=1 << 20):
        for borders in ([0, 170, 300], [0, 40, 300], [0, 300]):
            q, k, v = (torch.randn(300, 2, 8) for _ in range(3))
            cu_seqlens = torch.tensor(borders, dtype=torch.int32)
            s2_attention(q, k, v, Pattern.parse("L2V4", 16), cu_seqlens=cu_seqlens)
        assert made == [0, 64, 128, 192, 256]


def test_kept_masks_take_no_more_than_they_may():
    q, k, v = (torch.randn(1, 500, 2, 8) for _ in range(3))
    assert sdpa.MASKS.most_bytes == sdpa.MOST_KEPT <= 64 << 20
    with limits(kept=sdpa.MOST_KEPT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa.MASKS, "most_bytes", 1 << 20)
        for stride in range(2, 9):
            s2_attention(q, k, v, Pattern.parse(f"L2V{stride}", 16))
        assert 1 << 18 < sum(size for _, size in sdpa.MASKS.values.values()) <= 1 << 20


def test_no_mask_where_all_is_seen():
    """By a whole sequence as far as the window of every head goes, and by the last query."""
    q, k, v = (torch.randn(1, 64, 2, 8) for _ in range(3))
    for spec, late in itertools.product(("dense", "W4", "L4V8+sink1"), (0, 63)):
        pattern = Pattern.parse(spec, 16)
        with Noted() as noted:
            out = s2_attention(q[:, late:], k, v, pattern)
        assert noted.masks == [None]
        torch.testing.assert_close(out, s2_attention(q[:, late:], k, v, pattern, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    q, k, v = (torch.randn(1, 300, heads, 16).to(dtype) for heads in (4, 2, 2))
    for pattern in PATTERNS:
        with limits(rows=32):
            out = s2_attention(q[:, 50:], k, v, pattern)
        wanted = s2_attention(*(x.float() for x in (q[:, 50:], k, v)), pattern, backend="reference")
        torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("pattern", PATTERNS[:7:3], ids=str)
@pytest.mark.parametrize("name", ["late", "packed", "packed late"])
def test_compiled_pieces_give_what_eager_gives(name, pattern):
    case = Case(pattern, heads=4, kv_heads=2, head_dim=16, **CASES[name])
    q, k, v, _, _ = case.inputs(torch.float32, "cpu", 0)
    of_q, of_k = (torch.tensor(x, dtype=torch.int32) if x else None for x in (case.cu_seqlens, case.cu_seqlens_k))

    def attend(q, k, v):
        return s2_attention(q, k, v, pattern, cu_seqlens=of_q, cu_seqlens_k=of_k, backend="sdpa")

    torch._dynamo.reset()
    with limits(most=1 << 17):
        masks = []

        def count(graph, inputs):
            masks.extend(node for node in graph.graph.nodes if "token_mask" in str(node.target))
            return graph.forward

        compiled = torch.compile(attend, fullgraph=True, backend=count)
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    assert len(masks) > 1


def test_compiled_lengths_share_graphs():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: s2_attention(q, k, v, PATTERNS[2], backend="sdpa"), fullgraph=True, backend=count, dynamic=True
    )
    for tokens in (100, 130, 200, 300):
        q, k, v = (torch.randn(1, tokens, 2, 8) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), s2_attention(q, k, v, PATTERNS[2], backend="reference"))
    assert len(graphs) == 1
