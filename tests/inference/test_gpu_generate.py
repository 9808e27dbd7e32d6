"""Generation on a GPU: captured decode steps give the logits of eager ones, and the host waits once a token."""

import warnings

import pytest
import torch

from s2.inference import DecodeGraph, DecodePool, KVCache, generate, stream
from s2.inference import graph as graphs
from s2.inference.graph import WARM_UP
from s2.model import ModelConfig, Transformer

pytestmark = pytest.mark.gpu

LENGTHS = [400, 7, 129]


def build(layout, dtype=torch.bfloat16):
    config = ModelConfig(
        vocab_size=128, hidden_size=512, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, attention_layout=layout, block_size=64,
        initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    return Transformer(config).to("cuda", dtype).eval()


@pytest.fixture(params=["dense", "L2V4+sink1-inter", "L1V2<4V4", "dense|W2"])
def model(request):
    return build(request.param)


def prefilled(model, lengths=LENGTHS, **options):
    cache = KVCache(model.config, len(lengths), 700, device="cuda", dtype=model.lm_head.weight.dtype, **options)
    ids = torch.randint(128, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        model(ids, cache=cache, lengths=lengths)
    return cache


def eager(model, cache, ids):
    with torch.inference_mode():
        return model(ids, cache=cache)


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("lengths", [LENGTHS, [130, 130]])
def test_replayed_logits_are_those_of_eager_steps(model, width, lengths):
    ours, theirs = prefilled(model, lengths), prefilled(model, lengths)
    step = DecodeGraph(model, ours, width)
    ids = torch.randint(128, (len(lengths), 264), device="cuda")
    for piece in ids.split(width, dim=1):  # over several blocks
        expected = eager(model, theirs, piece)
        assert torch.equal(step(piece), expected)
        assert ours.lengths == theirs.lengths == tuple(ours._lengths.tolist())
    assert step._replay is not None


def test_what_happens_to_the_cache_between_replays_counts():
    model = build("L2V4+sink1-inter")
    ours, theirs = (prefilled(model, slack=128) for _ in range(2))
    step = DecodeGraph(model, ours)
    ids = torch.randint(128, (3, 200), device="cuda")

    def both(begin, end):
        for at in range(begin, end):
            assert torch.equal(step(ids[:, at : at + 1]), eager(model, theirs, ids[:, at : at + 1]))

    both(0, 60)
    for cache in (ours, theirs):
        cache.truncate(410)
    both(60, 70)
    for cache in (ours, theirs):
        eager(model, cache, ids[:, 70:150])
    both(150, 160)
    for cache in (ours, theirs):
        cache.truncate(0)
        eager(model, cache, ids[:, :100])  # all of one length now
    both(160, 180)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}])
def test_generation_is_the_same_with_and_without_a_graph(model, options):
    prompts = [torch.randint(128, (length,), device="cuda") for length in LENGTHS]

    def new(graph, **more):
        generator = torch.Generator("cuda").manual_seed(3)
        return generate(model, prompts, 100, graph=graph, generator=generator, **options, **more)

    expected = new(False)
    assert torch.equal(new(True), expected) and torch.equal(new(None), expected)
    stop = expected[0, 40:42].tolist() + expected[1, 70:72].tolist()
    assert torch.equal(new(True, eos_token_id=stop), new(False, eos_token_id=stop))


def waits(call):
    """How often the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message).lower() for warning in seen)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_host_waits_once_a_token_where_rows_can_end_and_else_never(model, graph, temperature):
    prompts = [torch.randint(128, (length,), device="cuda") for length in LENGTHS]

    def steady(**options):
        steps = stream(model, prompts, 60, temperature, 0.9, graph=graph, **options)
        for _ in range(WARM_UP + 3):
            next(steps)
        return steps

    assert waits(lambda: 1) == 0 and waits(lambda: torch.ones(1, device="cuda").tolist()) == 1
    steps = steady()
    assert waits(lambda: [next(steps) for _ in range(10)]) == 0
    steps = steady(eos_token_id=200)  # which no row draws
    assert waits(lambda: [next(steps).ids for _ in range(10)]) == 10
    steps = steady(eos_token_id=200, is_enough=lambda new: [False] * len(new))
    assert waits(lambda: [next(steps) for _ in range(10)]) == 10


def test_a_graph_that_is_closed_early_gives_its_memory_back():
    model = build("L2V4+sink1-inter")
    prompts = [torch.randint(128, (length,), device="cuda") for length in LENGTHS]
    cache = prefilled(model)
    whole = generate(model, prompts, 60, graph=True)

    def some():
        steps = stream(model, prompts, 60, graph=True)
        tokens = [next(steps).tokens for _ in range(20)]
        steps.close()
        return torch.stack(tokens, dim=1)

    assert torch.equal(some(), whole[:, :20])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        some()
    assert torch.cuda.memory_allocated() <= before
    cache.truncate(0)
    steps = stream(model, prompts, 60, graph=True, cache=cache)
    for _ in range(20):
        last = next(steps)
    steps.close()
    assert torch.equal(generate(model, last.tokens[:, None], 40, cache=cache, graph=True), whole[:, 20:])


def test_memory_that_runs_out_in_a_capture_leaves_eager_steps_and_later_captures(monkeypatch):
    model = build("L2V4+sink1-inter")
    prompts = [torch.randint(128, (length,), device="cuda") for length in LENGTHS]
    expected, stream_before = generate(model, prompts, 60, graph=False), torch.cuda.current_stream()
    forward = model.model.blocks[2].mlp.forward

    def runs_out(x):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("full")
        return forward(x)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="memory ran out"):
        patch.setattr(model.model.blocks[2].mlp, "forward", runs_out)
        assert torch.equal(generate(model, prompts, 60, graph=True), expected)
    assert torch.cuda.current_stream() == stream_before
    with warnings.catch_warnings(action="error"):
        assert torch.equal(generate(model, prompts, 60, graph=True), expected)


def test_batches_of_a_pool_replay_the_graphs_of_those_before_and_are_as_without_it(monkeypatch):
    model, captured = build("L2V4+sink1-inter"), []
    capture = graphs._capture
    monkeypatch.setattr(graphs, "_capture", lambda *args, **options: captured.append(1) or capture(*args, **options))
    batches = [[400, 7, 129], [60, 380], [300, 40, 7], [200, 200, 200], [64, 1]]
    longest = [448, 448, 448, 256, 128]  # of the caches that are lent, on which the division of the work depends
    pool = DecodePool(model)
    options = {"graph": True, "temperature": 0.8}
    for seed, (lengths, most) in enumerate(zip(batches, longest, strict=True)):
        prompts = [torch.randint(128, (length,), device="cuda") for length in lengths]
        lone, pooled = (
            generate(model, prompts, 32, generator=torch.Generator("cuda").manual_seed(seed), **options, **more)
            for more in ({"cache": KVCache(model.config, len(prompts), most, device="cuda", dtype=torch.bfloat16)},
                         {"pool": pool})
        )  # fmt: skip
        assert torch.equal(pooled, lone)
    assert len(captured) == 5 + 4
    assert [cache.cache.max_length for cache in pool._kept._lent.values()] == [448, 448, 256, 128]


def test_layers_that_keep_everything_decode_eagerly():
    model = build("L2V4+sink1-inter")
    cache = prefilled(model, keep_all=True)
    with pytest.raises(ValueError, match=r"no CUDA graph: layers .* keep every token"):
        DecodeGraph(model, cache)
    cache.truncate(0)
    prompts = [torch.randint(128, (length,), device="cuda") for length in LENGTHS]
    with pytest.raises(ValueError, match="graph=True: layers"):
        generate(model, prompts, 60, cache=cache, graph=True)
    assert generate(model, prompts, 60, cache=cache).shape == (3, 60)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("graph", [False, True])
def test_another_gpu_than_the_current_one_generates_the_same(graph):
    model = build("L2V4+sink1-inter")
    prompts = [torch.randint(128, (length,), device="cuda") for length in LENGTHS]
    expected = generate(model, prompts, 60, graph=graph)
    model.to("cuda:1")
    assert torch.equal(
        generate(model, [prompt.to("cuda:1") for prompt in prompts], 60, graph=graph), expected.to("cuda:1")
    )
