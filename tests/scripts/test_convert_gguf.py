"""GGUF checkpoints become folders to start from; what reads the file itself is transformers' own and needs `gguf`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from s2.model.hf import load_pretrained

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import convert_gguf
from convert_gguf import convert


def test_a_model_read_from_gguf_is_written_whole_and_not_quantised(tmp_path: Path, monkeypatch) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.config.quantization_config = {"quant_method": "gguf"}
    vocabulary = {"<s>": 0, "</s>": 1, "word": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="word"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages }}"
    asked = []
    for name, answer in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        stand_in = type(name, (), {"from_pretrained": lambda answer=answer, **given: asked.append(given) or answer})
        monkeypatch.setattr(convert_gguf, name, stand_in)
    source = tmp_path / "small.gguf"
    source.write_bytes(b"GGUF")
    folder = convert(source, tmp_path / "hf")
    assert all(given["gguf_file"] == "small.gguf" for given in asked) and len(asked) == 2
    ids = torch.arange(30)[None]
    torch.testing.assert_close(load_pretrained(folder)(ids), model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() == vocabulary
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.gguf: no such GGUF file"):
        convert(tmp_path / "none.gguf", tmp_path / "hf")
    (tmp_path / "wrong.gguf").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"wrong.gguf: "):  # without the package, that it is missing
        convert(tmp_path / "wrong.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["rope_freqs.weight", "llama.rope.scaling.factor"])
def test_rope_that_would_be_lost_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "scaled.gguf").write_bytes(b"GGUF" + 5000 * b"0" + name.encode())
    with pytest.raises(ValueError, match=r"scaled.gguf: its RoPE is scaled"):
        convert(tmp_path / "scaled.gguf", tmp_path / "hf")
