"""The captured decode step: on the device nothing depends on what the host knew at the capture, and the host counts
along as in an eager step. `tests/inference/test_gpu_generate.py` runs real graphs."""

import contextlib
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2.inference import DecodeGraph, KVCache, generate
from s2.inference.graph import _CAPTURES, LEAST_TOKENS, WARM_UP, _capture, decode_step, obstacle
from tests.inference.recording import Recording
from tests.inference.test_generate import build, tokens

LAYOUTS = ["dense", "L2V4+dense1", "L1V2<4V4+sink1", "W2"]


def prefilled(model, lengths, max_length=150, **options):
    cache = KVCache(model.config, len(lengths), max_length, **options)
    with torch.inference_mode():
        model(tokens(len(lengths), max(lengths)), cache=cache, lengths=lengths)
    return cache


def fails(*args):
    raise torch.OutOfMemoryError("full")


def recorded(model, cache, num_tokens=1):
    recording = Recording(cache._lengths)
    return DecodeGraph(model, cache, num_tokens, capture=recording), recording


def eager(model, cache, ids):
    with torch.inference_mode():
        return model(ids, cache=cache)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("lengths", "width"), [([40, 9, 66], 1), ([33, 33], 1), ([20, 47], 3)])
def test_replayed_steps_give_the_logits_of_eager_ones(layout, lengths, width):
    model = build(layout)
    ours, theirs = (prefilled(model, lengths) for _ in range(2))
    step, recording = recorded(model, ours, width)
    ids = torch.randint(61, (len(lengths), 36), generator=torch.Generator().manual_seed(5))
    for count, piece in enumerate(ids.split(width, dim=1), 1):
        expected = eager(model, theirs, piece)
        torch.testing.assert_close(step(piece), expected, atol=1e-6, rtol=1e-5)
        assert ours.lengths == theirs.lengths == tuple(ours._lengths.tolist())
        assert recording.replayed == max(0, count - WARM_UP)
        assert ours.oldest_length == theirs.oldest_length
    assert recording.captured == 1


@pytest.mark.parametrize("lengths", [[40, 9], [40, 40]], ids=["several", "one"])
def test_what_happens_to_the_cache_between_steps_counts(lengths):
    """Rows of one length at the capture may have several later."""
    model = build("L2V4+dense1")
    ours, theirs = (prefilled(model, lengths, slack=64) for _ in range(2))
    step, recording = recorded(model, ours)
    ids = torch.randint(61, (2, 80), generator=torch.Generator().manual_seed(5))

    def both(begin, end):
        for at in range(begin, end):
            torch.testing.assert_close(step(ids[:, at : at + 1]), eager(model, theirs, ids[:, at : at + 1]))

    both(0, 10)
    for cache in (ours, theirs):
        cache.truncate(45)
    assert ours.lengths == (45, min(45, lengths[1] + 10))
    both(10, 14)
    for cache in (ours, theirs):  # a prompt of another length for each row
        eager(model, cache, ids[:, 20:40])
    both(40, 44)
    for cache in (ours, theirs):
        cache.truncate(0)
        with torch.inference_mode():
            model(ids[:, :30], cache=cache, lengths=[12, 30])
    both(44, 54)
    assert recording.captured == 1 and recording.replayed == 28 - WARM_UP
    assert ours.lengths == theirs.lengths == (22, 40)


def test_a_replay_asks_nothing_of_the_device():
    """Between the tokens going in and the replay being launched there is one copy."""
    model = build()
    cache = prefilled(model, [40, 9])
    logits, ops = torch.zeros(2, 1, 61), []
    step = DecodeGraph(model, cache, capture=lambda call: lambda: logits)
    step._warm = WARM_UP
    ids = tokens(2, 1)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        assert step(ids) is logits
    assert [op.overloadpacket for op in ops] == [torch.ops.aten.copy_]
    assert cache.lengths == (41, 10)


def test_a_step_that_does_not_fit_is_refused_before_it_runs():
    model = build()
    cache = prefilled(model, [40, 9], max_length=43)
    step, recording = recorded(model, cache)
    for at in range(3):
        step(tokens(2, 3)[:, at : at + 1])
    with pytest.raises(ValueError, match=r"44 tokens do not fit in a cache of max_length=43"):
        step(tokens(2, 1))
    assert cache.lengths == (43, 12) == tuple(cache._lengths.tolist()) and recording.replayed == 1
    with pytest.raises(ValueError, match=r"tokens \[2, 2\] must be \[2, 1\]"):
        step(tokens(2, 2))
    cache.truncate(0)
    with pytest.raises(ValueError, match=r"the cache is empty: feed the prompts"):
        step(tokens(2, 1))
    for num_tokens in (0, 9):
        with pytest.raises(ValueError, match=rf"num_tokens={num_tokens} must be 1 to 8"):
            recorded(model, cache, num_tokens)


def test_a_step_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    model = build("L2V4+dense1")
    ours, theirs = (prefilled(model, [40, 9]) for _ in range(2))
    step, _ = recorded(model, ours)
    ids = tokens(2, 6)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(model.model.blocks[2].mlp, "forward", fails)
        step(ids[:, :1])
    assert ours.lengths == (40, 9) == tuple(ours._lengths.tolist())
    for at in range(6):
        torch.testing.assert_close(step(ids[:, at : at + 1]), eager(model, theirs, ids[:, at : at + 1]))


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["replay", "commit"])
def test_an_interrupt_behind_a_replay_leaves_the_cache_as_it_was(monkeypatch, at):
    """Ctrl-C is raised as the call that replays returns: the device has advanced by then."""
    model = build("L2V4+dense1")
    ours, theirs = (prefilled(model, [40, 9]) for _ in range(2))
    step, recording = recorded(model, ours)
    ids = tokens(2, 12)
    for piece in ids[:, :4].split(1, dim=1):
        torch.testing.assert_close(step(piece), eager(model, theirs, piece))
    replay = step._replay
    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if at == "replay":
                patch.setattr(step, "_replay", lambda: (replay(), interrupted()))
            else:
                patch.setattr(ours, "commit", interrupted)
            step(ids[:, 4:5])
    assert ours.lengths == (44, 13) == tuple(ours._lengths.tolist()) and recording.replayed == 5
    for piece in ids[:, 4:].split(1, dim=1):
        torch.testing.assert_close(step(piece), eager(model, theirs, piece))


def test_an_interrupt_in_the_last_moment_of_a_pass_leaves_the_cache_as_it_was(monkeypatch):
    model = build("L2V4+dense1")
    ours, theirs = (prefilled(model, [40, 9]) for _ in range(2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ours, "commit", interrupted)
        eager(model, ours, tokens(2, 3))
    assert ours.lengths == (40, 9) == tuple(ours._lengths.tolist())
    torch.testing.assert_close(eager(model, ours, tokens(2, 5)), eager(model, theirs, tokens(2, 5)))


@pytest.mark.parametrize("adds", [False, True], ids=["memory", "and another error behind it"])
def test_a_capture_that_memory_runs_out_in_leaves_steps_that_run_eagerly(monkeypatch, adds):
    """What it had allocated is free before the step runs once more."""
    model = build("L2V4+dense1")
    ours, theirs = (prefilled(model, [40, 9]) for _ in range(2))
    recording, held = Recording(ours._lengths), []

    def capture(call):
        try:
            recording(call)
        except torch.OutOfMemoryError:
            if adds:
                raise RuntimeError("operation failed due to a previous error during capture") from None
            raise

    def runs_out(x):
        mine = x + 1
        held.append(weakref.ref(mine))
        raise torch.OutOfMemoryError("full")

    def runs(x, forward=model.model.blocks[2].mlp.forward):
        assert held[0]() is None, "the memory of the capture is still taken"
        return forward(x)

    step = DecodeGraph(model, ours, capture=capture)
    ids = tokens(2, WARM_UP + 6)
    for at in range(WARM_UP):
        torch.testing.assert_close(step(ids[:, at : at + 1]), eager(model, theirs, ids[:, at : at + 1]))
    mlp = model.model.blocks[2].mlp
    expected = eager(model, theirs, ids[:, WARM_UP : WARM_UP + 1])
    calls = iter([runs_out])
    monkeypatch.setattr(mlp, "forward", lambda x: next(calls, runs)(x))
    with pytest.warns(UserWarning, match="memory ran out while the decode step of 2 sequences was captured") as said:
        torch.testing.assert_close(step(ids[:, WARM_UP : WARM_UP + 1]), expected)
    assert len(said) == 1
    for at in range(WARM_UP + 1, WARM_UP + 6):
        torch.testing.assert_close(step(ids[:, at : at + 1]), eager(model, theirs, ids[:, at : at + 1]))
    assert recording.captured == 1 and ours.lengths == theirs.lengths == tuple(ours._lengths.tolist())


def test_another_error_in_a_capture_is_raised_and_so_is_memory_that_eager_steps_lack(monkeypatch):
    model = build()

    def breaks(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    step = DecodeGraph(model, prefilled(model, [40, 9]), capture=breaks)
    step._warm = WARM_UP
    with pytest.raises(RuntimeError, match="not permitted"):
        step(tokens(2, 1))
    try:
        fails()
    except torch.OutOfMemoryError:  # a larger batch before
        with pytest.raises(RuntimeError, match="not permitted"):
            step(tokens(2, 1))
    step = DecodeGraph(model, prefilled(model, [40, 9]), capture=fails)
    step._warm = WARM_UP
    monkeypatch.setattr(model.model.blocks[2].mlp, "forward", fails)
    with pytest.warns(UserWarning, match="memory ran out"), pytest.raises(torch.OutOfMemoryError):
        step(tokens(2, 1))


def test_where_no_graph_is_possible_it_is_said_or_none_is_taken():
    model = build()
    cache, whole = KVCache(model.config, 2, 50), KVCache(model.config, 2, 50, keep_all=True)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert obstacle(cuda, cache) is None
    assert "the model is on cpu" in obstacle(cpu, cache)
    assert "layers 0,2 keep every token" in obstacle(cuda, whole)
    with pytest.raises(ValueError, match="no CUDA graph: the model is on cpu"):
        DecodeGraph(model, cache)
    with pytest.raises(ValueError, match="graph=True: the model is on cpu"):
        generate(model, tokens(2, 5), 3, graph=True)
    assert torch.equal(generate(model, tokens(2, 5), 3, graph=False), generate(model, tokens(2, 5), 3))


def test_a_graph_is_taken_for_enough_tokens(monkeypatch):
    """As if there were a GPU."""
    model = build()
    cache, made = KVCache(model.config, 2, 50), []
    monkeypatch.setattr("s2.inference.graph.obstacle", lambda device, cache: None)
    monkeypatch.setattr("s2.inference.graph.DecodeGraph", lambda *args: made.append(args) or "graph")
    for count, graph, is_taken in [
        (LEAST_TOKENS, None, True), (LEAST_TOKENS - 1, None, False), (1, True, True), (LEAST_TOKENS, False, False),
    ]:  # fmt: skip
        assert (decode_step(model, cache, count, graph) == "graph") == is_taken
    assert made == [(model, cache)] * 2


def test_captures_for_one_stream_share_a_stream(monkeypatch):
    """cuBLAS would keep a workspace for each: 32 MiB a graph on Hopper. As if there were a GPU."""
    streams, current, captured = iter(range(100)), ["a"], []

    class Capturing(contextlib.nullcontext):
        def __init__(self, graph, pool, stream, capture_error_mode):
            super().__init__()
            assert _CAPTURES.locked()
            captured.append(stream)

    monkeypatch.setattr("s2.inference.graph._STREAMS", {})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream {next(streams)} of {device}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (current[-1], device))
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    for name, device in (("a", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 0), ("a", 0)):
        current.append(name)
        _capture(lambda: None, device, memory=None)
    assert [captured.index(stream) for stream in captured] == [0, 0, 2, 3, 2, 0]
    assert [stream[-1] for stream in captured] == ["0", "0", "0", "1", "0", "0"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_by_replays_is_generation(monkeypatch, temperature):
    model, recordings = build("L1V2<4V4+sink1"), []
    prompts = [tokens(1, length)[0] for length in (33, 70, 5)]

    def step(model, cache, new_tokens, graph):
        step, recording = recorded(model, cache)
        recordings.append(recording)
        return step

    def new():
        return generate(model, prompts, 25, temperature, generator=torch.Generator().manual_seed(1))

    expected = new()
    monkeypatch.setattr(sys.modules["s2.inference.generate"], "decode_step", step)  # the package has such a function
    assert torch.equal(new(), expected)
    assert recordings[0].replayed == 24 - WARM_UP


@pytest.mark.parametrize("layout", ["dense", "L2V4+dense1", "dense|W1"])
def test_the_size_of_a_cache_is_known_without_making_it(layout):
    config = build(layout).config
    for dtype in (torch.float32, torch.bfloat16):
        size = KVCache.bytes_for(config, 3, 77, dtype)
        assert size == KVCache(config, 3, 77, dtype=dtype).num_bytes
