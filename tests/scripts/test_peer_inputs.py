"""What peers of inference are compared on: drawn inputs, files of a layer, and the script that writes those."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as `python scripts/attention_tensors.py` has it

import attention_tensors
import peer_inputs

from s2.attention import s2_attention
from s2.inference import ModelFolder
from tests.eval.small_checkpoint import make_checkpoint, prose


def test_drawn_scores_are_heavy_tailed():
    x = peer_inputs.draw(2048, 4, 2, 0, "cpu", torch.float32, 64)
    assert x.q.shape == (2048, 4, 64) and x.k.shape == x.v.shape == (2048, 2, 64)
    scores = torch.einsum("hd,shd->hs", x.q[-1, ::2], x.k) * 64**-0.5
    probs = scores.softmax(-1)
    assert (probs[:, 0] > 20 / 2048).all(), "the sink"
    assert (probs[:, 1:].sort(descending=True)[0][:, :256].sum(1) / probs[:, 1:].sum(1) > 0.8).all()
    again = peer_inputs.draw(2048, 4, 2, 0, "cpu", torch.float32, 64, queries=1)
    assert torch.equal(again.k, x.k) and again.q.shape == (1, 4, 64)


def test_a_file_keeps_its_scores_with_larger_heads(tmp_path):
    q, k, v = torch.randn(40, 4, 64), torch.randn(40, 2, 64), torch.randn(40, 2, 64)
    path = tmp_path / "x.safetensors"
    save_file({"q": q, "k": k, "v": v}, path, {"source": "layer 3"})
    x, source = peer_inputs.load(path, "cpu", torch.float32)
    assert source == "layer 3" and x.q.shape == (40, 4, 128)
    at = torch.tensor([0, 17, 39])
    torch.testing.assert_close(
        peer_inputs.full_attention(x.q[at], x.k, x.v, at)[..., :64], peer_inputs.full_attention(q[at], k, v, at)
    )
    heads = (x.transpose(0, 1) for x in (q, k, v))
    causal = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1)
    torch.testing.assert_close(peer_inputs.full_attention(q[at], k, v, at), causal[at])


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"q": (8, 4, 64), "k": (8, 2, 64)}, "has no tensor 'v'"),
        ({"q": (8, 4, 64), "k": (8, 3, 64), "v": (8, 3, 64)}, r"q \[8, 4, 64\] must be"),
        ({"q": (8, 4, 256), "k": (8, 2, 256), "v": (8, 2, 256)}, "heads of 256 are larger than 128"),
    ],
)
def test_wrong_files_are_named(tensors, named, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=f"{path}: {named}"):
        peer_inputs.load(path, "cpu", torch.float32)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        peer_inputs.load(path, "cpu", torch.float32)


def test_a_layer_of_a_checkpoint_is_what_its_attention_gets(tmp_path, monkeypatch, capsys):
    folder, text, path = make_checkpoint(tmp_path / "hf"), tmp_path / "book.txt", tmp_path / "out.safetensors"
    text.write_text(prose(400, 3))
    attention_tensors.main([str(folder), str(text), str(path), "--layer", "1", "--length", "96"])
    assert "layer 1 of hf, 96 tokens of book.txt" in capsys.readouterr().out
    opened = ModelFolder.load(folder)
    seen = []

    def record(q, k, v, *args, **options):
        seen.append((q, k, v))
        return s2_attention(q, k, v, *args, **options)

    monkeypatch.setattr("s2.model.layers.s2_attention", record)
    ids = opened.tokenizer.encode(text.read_text(), add_special_tokens=False).ids[:96]
    with torch.inference_mode():
        opened.model(torch.tensor([ids]))
    for name, wanted in zip("qkv", seen[1], strict=True):
        torch.testing.assert_close(load_file(path)[name], wanted[0].bfloat16())
    peer_inputs.load(path, "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"--layer 99: .*hf has layers 0 to"):
        attention_tensors.main([str(folder), str(text), str(path), "--layer", "99", "--length", "96"])
    for other in (text, tmp_path / "hf" / "model.safetensors"):
        before = other.read_bytes()
        with pytest.raises(ValueError, match=f"{other} was not written by this program"):
            attention_tensors.main([str(folder), str(text), str(other), "--layer", "1", "--length", "96"])
        assert other.read_bytes() == before
    text.write_text("short")
    with pytest.raises(ValueError, match="fewer than --length 96"):
        attention_tensors.main([str(folder), str(text), str(path), "--length", "96"])
