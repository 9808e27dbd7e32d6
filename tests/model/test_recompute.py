"""Activation checkpointing and compilation: gradients stay, what is kept and recomputed, and in what pieces."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s2.model import recompute
from s2.model.compiling import compile_whole
from s2.model.layers import MLP
from tests.model.test_transformer import borders, build, tokens


def gradients(model, cu_seqlens=None):
    model.zero_grad()
    ids = tokens(2, 64)
    loss, count = model(ids, labels=ids.roll(-1, 1), cu_seqlens=cu_seqlens)
    (loss / count).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_changes_no_gradient(mode, packed):
    model = build()
    cu_seqlens = borders(0, 20, 64, 128) if packed else None
    loss, expected = gradients(model, cu_seqlens)
    model.set_activation_checkpointing(mode)
    again, recomputed = gradients(model, cu_seqlens)
    assert torch.equal(loss, again)
    # selective watches ops: on a CPU attention masks then instead of gathering; full sums a norm's gradient first
    rounds = 16 if mode == "full" else 4 * packed
    for name, gradient in expected.items():
        rounding = rounds * torch.finfo().eps * gradient.abs().max().item()
        torch.testing.assert_close(recomputed[name], gradient, atol=rounding, rtol=0, msg=name)


def calls_in_backward(mode):
    """How often each op of interest runs from the backward on, for a model of three dense layers."""
    model = build("dense")
    model.set_activation_checkpointing(mode)
    ids = tokens(1, 64)
    loss, _ = model(ids, labels=ids)
    seen = {"attention": 0, "mm": 0, "silu": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            seen["attention"] += name.startswith("aten::_scaled_dot_product") and "backward" not in name
            seen["mm"] += name == "aten::mm"
            seen["silu"] += name == "aten::silu"
            return func(*args, **(kwargs or {}))

    with Count():
        loss.backward()
    return seen


def test_what_each_mode_recomputes():
    none, selective, full = (calls_in_backward(mode) for mode in ("none", "selective", "full"))
    assert (none["attention"], none["silu"]) == (0, 0)
    # gate and up are recomputed in every layer, attention and its projections are not
    assert selective == {"attention": 0, "mm": none["mm"] + 3 * 2, "silu": 3}
    # all but down_proj, whose output no gradient needs
    assert full == {"attention": 3, "mm": none["mm"] + 3 * 6, "silu": 3}


def test_unknown_checkpointing_mode_is_an_error():
    with pytest.raises(ValueError, match=r"activation_checkpointing='some'.*selective"):
        build().set_activation_checkpointing("some")


def assert_compiled_is_the_same(model, mode, backend):
    names = list(model.state_dict())
    loss, expected = gradients(model)
    model.set_activation_checkpointing(mode)
    torch._dynamo.reset()
    model.compile_blocks(backend=backend)
    compiled_loss, compiled = gradients(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_blocks_are_captured_whole(mode):
    assert_compiled_is_the_same(build("dense"), mode, "aot_eager")


def test_a_block_that_cannot_be_captured_whole_is_an_error_and_not_eager_code(monkeypatch):
    original = MLP.forward

    def forward(self, x):
        torch._dynamo.graph_break()
        return original(self, x)

    monkeypatch.setattr(MLP, "forward", forward)
    model = build("dense")
    model.compile_blocks(backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(tokens(1, 64))


def test_hooks_on_a_block_run_outside_of_what_is_compiled_or_recomputed():
    model, calls = build("dense", num_hidden_layers=1), []
    block = model.model.blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    for mode, compiled in (("full", False), ("selective", False), ("full", True)):
        model.set_activation_checkpointing(mode)
        if compiled:
            torch._dynamo.reset()
            model.compile_blocks(backend="aot_eager")
        calls.clear()
        gradients(model)
        assert calls == [False]


def test_compiled_blocks_change_no_gradient():
    assert_compiled_is_the_same(build("dense", num_hidden_layers=2), "selective", "inductor")


# -------------------------------------------------------------------- the MLP some rows at a time


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [16, 24, 128])  # of 128: tiles of one length, a shorter one at the end, one tile
def test_tiles_change_no_gradient(monkeypatch, rows, compiled):
    model = build()
    packed = borders(0, 20, 64, 128)
    loss, expected = gradients(model, packed)
    monkeypatch.setattr(recompute, "tile_rows", lambda *_: rows)
    model.set_activation_checkpointing("full")
    if compiled:
        torch._dynamo.reset()
        model.compile_blocks(backend="aot_eager")
    again, recomputed = gradients(model, packed)
    torch.testing.assert_close(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    with torch.no_grad():
        ids = tokens(2, 64)
        torch.testing.assert_close(model(ids, labels=ids.roll(-1, 1), cu_seqlens=packed)[0], loss)


@given(st.integers(1, 10_000), st.integers(1, 600))
def test_tiles_are_all_rows_and_no_more_than_fit(rows, width):
    most = 2**12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "TILE_ELEMENTS", most)
        size = recompute.tile_rows(rows, width)
    assert 1 <= size <= max(-(-most // width // 128) * 128, 128)
    if rows * width <= most:
        assert size >= rows
    if rows % 128 == 0 and (rows // 128) & (rows // 128 - 1) == 0 and width <= most // 128:
        assert rows % size == 0  # a power of two of tokens: tiles of one length


def test_the_recipe_of_7b_at_128k_takes_sixteen_equal_tiles():
    assert recompute.tile_rows(131_072, 11_008) == 8192


class Widest(TorchDispatchMode):
    """Most rows of tensors that are `width` wide, of those that ops return."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return out


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_no_hidden_layer_of_the_whole_sequence_exists(monkeypatch, precision):
    """But for weights, which are `[96, 48]` and `[48, 96]`."""
    monkeypatch.setattr(recompute, "TILE_ELEMENTS", 64 * 96)
    model, ids = build("dense"), tokens(2, 128)
    widest = {}
    for mode in ("none", "full"):
        model.set_activation_checkpointing(mode)
        with Widest(96) as seen, torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss, count = model(ids, labels=ids.roll(-1, 1))
            (loss / count).backward()
        widest[mode] = seen.rows
    assert widest == {"none": 256, "full": 64}


def test_nothing_but_the_inputs_of_blocks_is_kept():
    model, ids = build("dense", num_hidden_layers=4), tokens(2, 64)
    model.set_activation_checkpointing("full")
    kept = []
    hidden = model.model.embed_tokens(ids).detach().requires_grad_()
    cos, sin = (torch.randn(1, 64, 4) for _ in "ab")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        for block in model.model.blocks:
            hidden = block(hidden, cos, sin)
    assert [tuple(tensor.shape) for tensor in kept] == [
        tuple(tensor.shape) for tensor in (ids[..., None].expand(2, 64, 48), cos, sin)
    ] * 4


def test_recomputation_computes_in_the_precision_of_the_forward():
    """bf16 under autocast, although the backward runs outside of it."""
    model, ids = build(), tokens(2, 64)
    losses, grads = {}, {}
    for mode in ("none", "full"):
        model.set_activation_checkpointing(mode)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, count = model(ids, labels=ids.roll(-1, 1))
        (loss / count).backward()
        losses[mode], grads[mode] = loss, {name: p.grad.clone() for name, p in model.named_parameters()}
    assert torch.equal(losses["none"], losses["full"])
    for name, gradient in grads["none"].items():
        assert grads["full"][name].dtype == gradient.dtype == torch.float32
        torch.testing.assert_close(grads["full"][name], gradient, atol=0.004 * gradient.abs().max().item(), rtol=0)


def test_hooks_on_gradients_run_once_a_micro_batch_with_the_whole_gradient(monkeypatch):
    monkeypatch.setattr(recompute, "tile_rows", lambda *_: 16)
    model = build()
    _, expected = gradients(model)
    model.set_activation_checkpointing("full")
    model.zero_grad()
    seen = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad.clone()))
    ids = tokens(2, 64)
    for _ in range(2):
        loss, count = model(ids, labels=ids.roll(-1, 1))
        (loss / count).backward()
    assert seen.keys() == expected.keys()
    for name, parameter in model.named_parameters():
        assert len(seen[name]) == 2
        torch.testing.assert_close(seen[name][1], expected[name], atol=1e-6, rtol=1e-5, msg=name)
        torch.testing.assert_close(parameter.grad, 2 * expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_frozen_weights_get_no_gradient_and_change_none(monkeypatch):
    monkeypatch.setattr(recompute, "tile_rows", lambda *_: 16)
    model = build()
    _, expected = gradients(model)
    frozen = {name for i, (name, _) in enumerate(model.named_parameters()) if i % 2 == 0 or "down" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.set_activation_checkpointing("full")
    model.zero_grad()
    ids = tokens(2, 64)
    loss, count = model(ids, labels=ids.roll(-1, 1))
    (loss / count).backward()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5, msg=name)


# -------------------------------------------------------------------- compiled on other threads


def scaled(x, by):
    return x * len(by)


@pytest.mark.parametrize("in_thread", [False, True])
def test_as_many_graphs_as_were_asked_for_on_any_thread(in_thread):
    """Autograd runs the backward of a GPU on a thread of its own, and dynamo's limits are of one."""
    torch._dynamo.reset()
    function, found = compile_whole(scaled, 40, backend="eager"), []

    def run():
        found.extend(function(torch.ones(2), "s" * n).tolist() for n in range(1, 41))

    if in_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert found == [[float(n)] * 2 for n in range(1, 41)]
