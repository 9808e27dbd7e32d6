"""The modeling file's own reading of a layout and its plain attention, against ours: any layout, any sizes."""

import random

import pytest
import torch

from s2.attention import LayerLayout, grammar, s2_attention
from s2.attention.pattern import BLOCK_SIZES
from s2.integrations import plain_s2_llama as plain
from s2.model import ModelConfig, rope

CASES = 60


def random_rule(draw: random.Random) -> str:
    kind = draw.choice(["dense", "window", "strided", "strided", "strided"])
    local = draw.randint(1, 5)
    if kind == "window":
        text = f"W{local}"
    elif kind == "strided":
        text, reach = f"L{local}", local
        for _ in range(draw.randint(0, 2)):
            reach += draw.randint(1, 6)
            text += f"V{draw.choice([2, 3, 4, 6])}<{reach}"
        text += draw.choice(["", f"V{draw.choice([2, 3, 5, 8, 16])}"]) if "V" in text else f"V{draw.randint(1, 16)}"
    else:
        text = "dense"
    return text + draw.choice(["", "", f"+sink{draw.randint(0, 3)}"])


def random_case(draw: random.Random) -> tuple[str, int, int, int]:
    """A layout and a model's layers, query heads and KV heads."""
    layers, kv_heads, group = draw.randint(1, 7), draw.choice([1, 2, 3, 4, 6]), draw.choice([1, 2])
    text = random_rule(draw)
    if draw.random() < 0.5:
        left, parts = draw.choice([kv_heads, kv_heads * group]), []
        while left:
            count = draw.randint(1, left)
            left -= count
            parts.append(draw.choice([f"{count}*{random_rule(draw)}", *([random_rule(draw)] if count == 1 else [])]))
        text = "|".join(parts)
    text += draw.choice(["", "", "-inter"])
    if draw.random() < 0.5:
        first = draw.randrange(layers)
        text += f"+dense{draw.choice([f'{first}', f'{first}-{layers - 1}', f'0,{first}'])}"
    return text, layers, kv_heads * group, kv_heads


@pytest.mark.parametrize("case", range(CASES))
def test_every_layer_of_any_layout_sees_what_its_pattern_says(case, seed):
    spec, layers, heads, kv_heads = random_case(random.Random(seed + case))
    layout = LayerLayout.parse(spec, layers)
    layout.check_heads(heads, kv_heads)
    found = plain.layout_rules(spec, layers, heads, kv_heads)
    blocks = torch.arange(40)
    assert len(found) == layers
    for rules, pattern, rotation in zip(found, layout.patterns, layout.rotations, strict=True):
        expected = pattern.block_mask(40, len(pattern.heads) or kv_heads, layer=rotation)
        got = plain.block_mask(rules, blocks, blocks)
        assert torch.equal(got.expand_as(expected), expected), (spec, kv_heads, rotation)
        assert (set(rules) == {plain.DENSE}) == pattern.is_dense


@pytest.mark.parametrize("case", range(20))
def test_plain_attention_is_the_reference_forward_and_backward(case, seed, monkeypatch):
    draw = random.Random(seed + case)
    spec, layers, heads, kv_heads = random_case(draw)
    size, kv_len, batch = draw.choice([16, 32]), draw.randint(1, 300), draw.choice([1, 2])
    q_len = draw.choice([kv_len, 1, draw.randint(1, kv_len)])
    monkeypatch.setattr(plain, "MOST_SCORES", draw.choice([1, heads * kv_len * batch * 37, 1 << 26]))
    layer, scale = draw.randrange(layers), 0.3
    layout = LayerLayout.parse(spec, layers, size)
    rules = plain.layout_rules(spec, layers, heads, kv_heads)[layer]
    shapes = (batch, q_len, heads, 8), (batch, kv_len, kv_heads, 8), (batch, kv_len, kv_heads, 8)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = s2_attention(
        *inputs, layout[layer], rotation=layout.rotations[layer], softmax_scale=scale, backend="reference"
    )
    got = plain.plain_attention(*inputs, rules, size, scale)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-8)
    direction = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(x, inputs, direction) for x in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("grad", [False, True])
def test_plain_attention_never_holds_the_scores_of_all_queries(grad, monkeypatch):
    monkeypatch.setattr(plain, "MOST_SCORES", 2 * 512 * 64)
    largest, kept = 0, {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    q, k, v = (torch.randn(1, 512, 2, 16, requires_grad=grad) for _ in range(3))
    rules = plain.layout_rules("L2V4+sink1", 1, 2, 2)[0]
    with Watch(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = plain.plain_attention(q, k, v, rules, 16, 0.25)
        if grad:
            out.sum().backward()
    assert largest <= 2 * 512 * 64
    assert sum(kept.values()) < 2 * 512 * 512 / 2  # bytes; scores and masks would be more


@pytest.mark.parametrize(
    "spec",
    ["", "L8", "L8V16x", "W0", "L2V0", "L4V8<4", "L2V4V8", "L2V4<8V1", "0*dense", "L2V4+dense9", "L2V4+dense3-1",
     "L2V4+dense", "L2V4+dense0-inter", "dense|L2V4|W1"],
)  # fmt: skip
def test_what_is_no_layout_is_refused_as_the_package_does(spec):
    with pytest.raises(ValueError):
        LayerLayout.parse(spec, 4).check_heads(4, 2)
    with pytest.raises(ValueError, match="attention_layout="):
        plain.layout_rules(spec, 4, 4, 2)


def test_the_sizes_of_blocks_are_the_packages():
    assert plain.BLOCK_SIZES == BLOCK_SIZES


def test_the_bounds_and_ropes_that_are_written_twice_are_the_packages():
    assert (grammar._MOST_HEADS, rope._LARGEST) == (plain.MOST_HEADS, plain.MOST)
    assert plain.ROPES.keys() == {"default", *rope._KEYS}
    for kind, (needed, more) in rope._KEYS.items():
        theirs = plain.ROPES[kind]
        assert theirs[0] | theirs[1] == needed | more
        assert theirs[0] == needed - {plain._LENGTH}  # which transformers fills in
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 1}
    assert ModelConfig(**sizes, num_hidden_layers=plain.MOST_LAYERS).num_hidden_layers == plain.MOST_LAYERS
    for count in (0, plain.MOST_LAYERS + 1):
        with pytest.raises(ValueError, match="num_hidden_layers"):
            ModelConfig(**sizes, num_hidden_layers=count)
        with pytest.raises(ValueError, match="num_hidden_layers"):
            plain.layout_rules("dense", count, 1, 1)
