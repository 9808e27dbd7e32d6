"""The cache on a GPU: logits as of whole passes, also of prompts that begin alike, no step that waits for the device,
and a kernel that writes what plain torch writes, also captured and beyond 2^31 elements."""

import pytest
import torch

from s2.attention import Pattern, store
from s2.attention.regions import lay_out
from s2.inference import KVCache, PrefixCache, generate
from s2.model import ModelConfig, Transformer
from tests.attention.test_write import part_of, step_of, write_both_ways
from tests.inference.test_prefix import prompts

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["dense", "L2V4+sink1-inter", "L1V2<4V4", "dense|W2"])
def model(request):
    config = ModelConfig(
        vocab_size=128, hidden_size=512, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, attention_layout=request.param,
        block_size=64, initializer_range=0.05,
    )  # fmt: skip
    return Transformer(config).to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("pieces", [[1000] + [1] * 100, [300, 1, 500, 8, 3, 200]], ids=["decode", "chunks"])
def test_cached_forward_equals_full_forward(model, pieces):
    ids = torch.randint(128, (2, sum(pieces)), device="cuda")
    cache = KVCache(model.config, 2, ids.shape[1], device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
        expected = model(ids)
        exact = model.float()(ids)
    assert (logits - exact).norm() < 2 * (expected - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("chunk", [1 << 15, 256])
def test_prompts_that_begin_alike_have_the_logits_of_whole_passes(model, chunk):
    """What is shared is computed once, in a cache that drops keys and goes back to where prompts part."""
    leaves = [200, 640, 1500]
    batches = [batch.cuda() for batch in prompts(2, 1900, leaves)]
    cached = PrefixCache(model, 2, 1900, chunk)
    found = [cached(batch, 8, *batches[i + 1 : i + 2]) for i, batch in enumerate(batches)]
    assert cached.computed == 1900 + (1900 - leaves[0]) + (1900 - leaves[1])
    with torch.inference_mode():
        expected = [model(batch, logits_to_keep=8) for batch in batches]
        exact = [model.float()(batch, logits_to_keep=8) for batch in batches]
    for logits, rounded, wide in zip(found, expected, exact, strict=True):
        assert (logits - wide).norm() < 2 * (rounded - wide).norm() + 1e-3 * wide.norm()


def test_a_decode_step_does_not_wait_for_the_device(model):
    ids = torch.randint(128, (3, 400), device="cuda")
    cache = KVCache(model.config, 3, 420, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        model(ids, cache=cache, lengths=[400, 7, 129])
        model(ids[:, :1], cache=cache)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(ids[:, :1], cache=cache, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_layers_of_a_kind_share_the_plan_of_a_step(model, monkeypatch):
    planned = []
    plan = store.decode_shares
    monkeypatch.setattr(store, "decode_shares", lambda *args, **way: planned.append(args[2]) or plan(*args, **way))
    ids = torch.randint(128, (2, 300), device="cuda")
    cache = KVCache(model.config, 2, 320, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        model(ids, cache=cache)
        for _ in range(3):
            planned.clear()
            model(ids[:, :1], cache=cache)
            tables = {table.data_ptr() for table in planned}
            assert len(planned) == len(tables) < len(model.model.blocks), "each table once"


def test_rows_of_several_lengths_are_generated(model):
    prompts = [torch.randint(128, (length,), device="cuda") for length in (700, 64, 333)]
    new = generate(model, prompts, 20, prefill_chunk=256)
    assert new.shape == (3, 20) and new.is_cuda


def test_the_kernel_writes_what_plain_torch_writes(model, monkeypatch):
    """Prompts, chunks and steps of rows with several lengths, and after tokens have been taken back."""
    monkeypatch.setattr(store._Part, "write", write_both_ways)
    ids = torch.randint(128, (3, 700), device="cuda")
    cache = KVCache(model.config, 3, 1200, device="cuda", dtype=torch.bfloat16, slack=64)
    with torch.inference_mode():
        for counts in ([700, 7, 129], [1, 1, 1], [250, 0, 64], [8, 8, 8], [3, 130, 1]):
            model(ids[:, : max(counts)], cache=cache, lengths=counts)
        cache.truncate(cache.length - 60)
        for width in (1, 5, 1):
            model(ids[:, :width], cache=cache)


def written_case(spec, num_blocks, batch, tokens):
    """Slots for blocks of 64, all zero, and keys and values of new tokens."""
    (group,) = lay_out(Pattern.parse(spec, 64), 8, 1, num_blocks)
    given = {"device": "cuda", "dtype": torch.bfloat16}
    part = part_of(group, torch.zeros(2, batch, 8, group.num_blocks * 64, 128, **given), 64)
    return part, torch.randn(2, batch, tokens, 8, 128, **given)


@pytest.mark.parametrize("spec", ["dense", "L2V4+sink1", "L1V2<4V4"])
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_a_captured_write_replays_with_other_lengths(spec, tokens):
    part, new = written_case(spec, 40, 3, tokens)
    captured = step_of([0] * 3, [0] * 3, tokens)
    part.write(captured, *new)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part.write(captured, *new)
    for before, counts in (
        ([0, 0, 0], [tokens] * 3), ([1700, 64, 63], [tokens] * 3), ([130, 2000, 5], [tokens, 0, 1]),
        ([64 * 40 - tokens, 0, 777], [tokens, tokens // 2, tokens]), ([0, 9, 0], [0, 0, 0]),
    ):  # fmt: skip
        step = step_of(before, [sum(pair) for pair in zip(before, counts, strict=True)], tokens)
        captured.before.copy_(step.before)
        captured.after.copy_(step.after)
        for x in (part.k, part.v, new):
            x.normal_()
        old = part.k.clone(), part.v.clone()
        graph.replay()
        found = part.k.clone(), part.v.clone()
        for x, y in ((part.k, old[0]), (part.v, old[1])):
            x.copy_(y)
        part.write_by_torch(step, *new)
        assert torch.equal(found[0], part.k) and torch.equal(found[1], part.v), (before, counts)
        assert torch.equal(found[0], old[0]) != any(counts)


def test_slots_beyond_two_to_the_31_elements():
    part, new = written_case("dense", 11_250, 3, 100)
    assert part.k.numel() > 2**31
    before = [0, 500_000, 719_900]
    part.write(step_of(before, [begin + 100 for begin in before], 100), *new)
    for row, begin in enumerate(before):
        for kept, side in zip((part.k, part.v), new, strict=True):
            slots = kept[row, :, begin : begin + 100]
            assert torch.equal(slots, side[row].transpose(0, 1)), row
            slots.zero_()
    assert not part.k.any() and not part.v.any()
