"""What calls keep and carry: keys of patterns in other processes, tables that modes do not get into, memory that is
given back, and one plan for all layers with the same rules.
"""

import gc
import io
import math
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from s2.attention import Pattern, call, kept, op, pattern, s2_attention, schedule, sdpa
from s2.attention.pattern import pattern_from_key

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = [
    Pattern.parse("L8V16+sink1"),
    Pattern.parse("W3", 16),
    Pattern.parse("dense", 256),
    Pattern.from_ranges(2, [(2, 5), (4, None)]),
    Pattern.from_ranges(1, [(3, 7)], block_size=32, sinks=2),
    Pattern.per_head([Pattern.parse(s) for s in ("dense", "W2", "L1V4+sink1")]),
    Pattern.per_head([Pattern.parse("L1V4")]),
    Pattern.from_mask(torch.rand(3, 37, 37, generator=torch.Generator().manual_seed(0)) < 0.3, block_size=128),
]


@pytest.fixture
def new_process(monkeypatch):
    """As far as patterns and what is kept go."""

    def forget():
        monkeypatch.setattr(pattern, "_PATTERNS", weakref.WeakValueDictionary())
        monkeypatch.setattr(call, "CALLS", {})
        monkeypatch.setattr(op, "_CHECKED", {})
        schedule._SCHEDULES.clear()
        schedule.LISTS.values.clear()
        for each in (sdpa.MASKS, sdpa.BLOCKS):
            each.values.clear()

    forget()
    return forget


def draw(tokens=48, heads=2, kv_heads=1, dim=16, grad=False):
    return [torch.randn(1, tokens, h, dim, device=DEVICE, requires_grad=grad) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("original", PATTERNS, ids=str)
def test_a_key_is_the_pattern_in_any_process(original, new_process):
    read = pattern_from_key(original.key)
    assert read == original and read is not original
    heads = len(original.heads) or (3 if original.mask is not None else 8)
    assert torch.equal(read.block_mask(20, heads, layer=1), original.block_mask(20, heads, layer=1))
    if original.mask is None:
        assert Pattern.parse(str(original), original.block_size) == original


def test_keys_of_different_patterns_differ():
    assert len({p.key for p in PATTERNS}) == len(PATTERNS)
    assert Pattern.per_head([Pattern.parse("L1V4")]) != Pattern.parse("L1V4"), "it is for one head alone"


@pytest.mark.parametrize("key", ["", "L1V4", "L0V4/64", "L1V4/65", "mask:64:2x2:????", "heads:"])
def test_other_texts_are_no_keys(key):
    with pytest.raises(ValueError, match="is not the key of a pattern"):
        pattern_from_key(key)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_exported_programs_run_in_a_new_process(backend, new_process):
    for own in (Pattern.parse("L1V2+sink1", 16), Pattern.from_mask(torch.rand(1, 3, 3) < 0.7, block_size=16)):

        class Attention(torch.nn.Module):
            def __init__(self, pattern):
                super().__init__()
                self.pattern = pattern

            def forward(self, q, k, v):
                return s2_attention(q, k, v, self.pattern, backend=backend)

        inputs = draw()
        wanted = s2_attention(*inputs, own, backend=backend)
        file = io.BytesIO()
        torch.export.save(torch.export.export(Attention(own), tuple(inputs)), file)
        file.seek(0)
        new_process()
        assert torch.equal(torch.export.load(file).module()(*inputs), wanted)


@pytest.mark.parametrize("backend", ["sdpa", "triton", "reference"])
@pytest.mark.parametrize(
    "mode", [FakeTensorMode, torch.inference_mode, lambda: torch.device("meta"), lambda: torch.autocast(DEVICE)]
)
def test_what_is_made_under_a_mode_does_not_stay(backend, mode, new_process):
    own = Pattern.parse("L1V2+sink1", 16)
    with mode() as entered:
        inputs = [torch.empty(1, 48, h, 16, device=DEVICE) for h in (2, 1, 1)]
        assert s2_attention(*inputs, own, backend=backend).shape == (1, 48, 2, 16), entered
    inputs = draw(grad=True)
    out = s2_attention(*inputs, own, backend=backend)
    assert type(out) is torch.Tensor
    wanted = s2_attention(*inputs, own, backend="reference")
    gradients = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_masks_that_nobody_has_any_more_are_given_back(new_process):
    own = Pattern.from_mask(torch.rand(1, 3, 3) < 0.7, block_size=16)
    gone = weakref.ref(own.mask)
    for backend in ("triton", "sdpa"):
        s2_attention(*draw(), own, backend=backend)
    del own
    gc.collect()
    assert gone() is None


def test_layers_with_the_same_rules_share_what_is_kept(new_process):
    heads = 2
    for own in [*PATTERNS[:5], Pattern.parse("L1V3"), Pattern.parse("L2V24")]:
        alike = [own.first_alike(layer, heads) for layer in range(60)]
        for layer, first in enumerate(alike):
            assert first <= layer and own.rules(heads, layer=first) == own.rules(heads, layer=layer)
        assert len(set(alike)) == len({own.rules(heads, layer=layer) for layer in range(60)})
    mixed = Pattern.per_head([Pattern.parse("L1V3"), Pattern.parse("L1V5")])
    assert len({mixed.first_alike(layer, 2) for layer in range(60)}) == math.lcm(3, 5)


def test_many_layers_make_lists_once(new_process, monkeypatch):
    made, make = [], schedule._make_lists
    monkeypatch.setattr(schedule, "_make_lists", lambda *key, **way: made.append(key) or make(*key, **way))
    odd = Pattern.from_ranges(1, [(2, 3), (3, None)], block_size=16)  # lists: 3 is no multiple of 2
    for _ in range(2):
        for own, distinct in ((odd, 3), (Pattern.from_mask(torch.ones(1, 3, 3, dtype=torch.bool), block_size=16), 1)):
            made.clear()
            for layer in range(9):
                s2_attention(*draw(20), own, rotation=layer, backend="triton")
            assert len(made) in (distinct, 0), "made again"
    assert not made, "the second round made lists again"


def test_lists_of_a_chunk_are_of_its_queries_alone(new_process, monkeypatch):
    """Of the queries before it there are none, and of those that see a key only where gradients are asked for."""
    made, make = [], schedule._make_lists
    monkeypatch.setattr(schedule, "_make_lists", lambda *key, **way: made.append(make(*key, **way)) or made[-1])
    odd = Pattern.from_ranges(2, [(2, 40), (3, None)], block_size=16)
    q, k, v = draw(16 * 99, grad=True)
    out = s2_attention(q[:, -30:], k, v, odd, backend="triton")
    torch.testing.assert_close(out, s2_attention(q[:, -30:], k, v, odd, backend="reference"), atol=1e-4, rtol=1e-4)
    mask = odd.block_mask(99, 1)[:, 97:]
    assert [len(lists.blocks) for lists in made] == [mask.sum()]
    out.sum().backward()
    assert [len(lists.blocks) for lists in made] == [mask.sum()] * 2


def test_kept_tensors_take_no_more_than_they_may(monkeypatch):
    made, capturing = [], []
    monkeypatch.setattr(kept, "is_capturing", lambda device: bool(capturing))
    store, cpu = kept.Kept(lambda x: (x,), 100), torch.device("cpu")

    def take(n):
        return store.get(n, cpu, lambda: made.append(n) or torch.zeros(n, dtype=torch.uint8))

    for n in (40, 41, 40, 42):  # the oldest use goes first
        assert len(take(n)) == n
    assert made == [40, 41, 42] and [key[0] for key in store.values] == [40, 42]
    capturing.append(True)
    take(40)  # read by a graph from now on
    with pytest.raises(RuntimeError, match="call it once with the same shapes before"):
        take(43)
    capturing.clear()
    for n in (90, 91, 200):
        take(n)
        assert [key[0] for key in store.values] == [40, n]


def test_errors_of_making_reach_the_caller(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        kept.Kept(lambda x: ()).get(0, torch.device("cpu"), lambda: 1 // 0)


@pytest.mark.parametrize("backend", ["sdpa", "triton", "reference", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_no_type(backend, dtype):
    inputs = [x.to(dtype) for x in draw()]
    own = Pattern.parse("L1V2", 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, lse = s2_attention(*inputs, own, backend=backend, return_lse=True)
        alone = s2_attention(*inputs, own, backend=backend)
        dense = s2_attention(*inputs, Pattern.parse("dense", 16), backend=backend)
    assert (out.dtype, alone.dtype, dense.dtype, lse.dtype) == (dtype, dtype, dtype, torch.float32)
    assert torch.equal(alone, s2_attention(*inputs, own, backend=backend))


def test_double_stays_double():
    inputs = [x.double() for x in draw()]
    for backend in ("sdpa", "reference"):
        out, lse = s2_attention(*inputs, Pattern.parse("L1V2", 16), backend=backend, return_lse=True)
        assert out.dtype == lse.dtype == torch.float64
