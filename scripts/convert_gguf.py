"""A Llama checkpoint in a GGUF file, as a Hugging Face folder to start from: weights in fp32, config, tokenizer.

    python scripts/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m

What llama.cpp rounded stays rounded: the original folder, where it can be had, is the better start. Needs the `gguf`
package (`pip install gguf`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2 import ending, files
from s2.model.config import ModelConfig
from s2.model.hf import save_pretrained

try:
    from gguf import GGUFReader
except ImportError:  # optional; `convert` says so
    GGUFReader = None  # type: ignore[assignment, misc]

# Tensors of a layer behind "blk.N.", by the architecture whose models are ours, and their sizes: of the embedding (E),
# the feed-forward (F), all query heads (Q), all key heads (K), one head (D).
_LAYER = {
    "attn_norm.weight": "E", "attn_q.weight": "QE", "attn_k.weight": "KE", "attn_v.weight": "KE",
    "attn_output.weight": "EQ", "ffn_norm.weight": "E", "ffn_gate.weight": "FE", "ffn_up.weight": "FE",
    "ffn_down.weight": "EF",
}  # fmt: skip
_TENSORS = {
    "llama": _LAYER,
    "qwen2": {**_LAYER, "attn_q.bias": "Q", "attn_k.bias": "K", "attn_v.bias": "K"},
    "qwen3": {**_LAYER, "attn_q_norm.weight": "D", "attn_k_norm.weight": "D"},
}
# Keys behind "<architecture>." and the field of ModelConfig that each must have become.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "vocab_size": "vocab_size",
}
_OPTIONAL = ("rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length", "vocab_size")
# Keys that change nothing with these values, by llama.cpp's reading of them.
_WITHOUT_EFFECT: dict[str, Callable[[Any], bool]] = {
    "expert_count": lambda value: value == 0,
    "expert_used_count": lambda value: value == 0,
    "attention.causal": lambda value: value is True,
    "rope.scale_linear": lambda value: value in (0, 1),
    "rope.scaling.type": lambda value: value == "none",
    "rope.scaling.factor": lambda value: value in (0, 1),
    "rope.scaling.attn_factor": lambda value: value == 1,
    "rope.scaling.finetuned": lambda value: isinstance(value, bool),
    "rope.scaling.original_context_length": lambda value: True,  # of the scaling that the other keys rule out
    "tensor_data_layout": lambda value: isinstance(value, str),  # of files of 2023; transformers reads both
}
_ELSEWHERE = "; take the original Hugging Face folder"


def convert(source: Path, folder: Path) -> Path:
    """Write `folder` from a GGUF file of a Llama, Qwen2 or Qwen3 model.

    Every key and tensor that says what the model computes is accounted for; a file with others is refused, since
    transformers, which reads it, leaves out what it does not know and draws what it does not find.

    Raises:
        FileNotFoundError: no such file.
        ValueError: `gguf` is not installed, the file is no GGUF or cut off, or the model is another than
            transformers would read from it.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such GGUF file")
    if GGUFReader is None:
        raise ValueError(f"{source}: reading it needs the gguf package (pip install gguf)")
    said = _read_keys(source)
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of whatever its readers stumble over
        raise ValueError(f"{source}: transformers does not read it ({type(error).__name__}: {error})") from error
    values = model.config.to_dict()
    values.pop("quantization_config", None)  # the weights are not quantised any more
    config = ModelConfig.from_hf_dict(values, str(source))
    for key, value in said.items():
        taken = getattr(config, _FIELDS[key])
        if not math.isclose(taken, value, rel_tol=1e-6):  # floats are of 32 bits in the file
            raise ValueError(f"{source}: {key} is {value:g}, and transformers takes {taken} from it{_ELSEWHERE}")
    for problem in ("missing", "unexpected", "mismatched"):  # of sizes: (name, in the file, in the model)
        if keys := loading[f"{problem}_keys"]:
            raise ValueError(f"{source}: transformers reads it with {problem} weights: {sorted(keys)[0]}")
    with files.temporary_folder() as beside:
        tokenizer.save_pretrained(beside)
        return save_pretrained(model.state_dict(), config, folder, beside / "tokenizer.json", dtype=torch.float32)


def _read_keys(source: Path) -> dict[str, float]:
    """The values of _FIELDS, those that the file leaves out as llama.cpp takes them; all else is checked."""
    try:
        reader = GGUFReader(source)
        keys = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # it checks neither lengths nor types: struct, index, overflow and other errors
        raise ValueError(f"{source}: no GGUF file, or cut off ({error})") from None
    architecture = keys.get("general.architecture")
    if architecture not in _TENSORS:
        raise ValueError(f"{source}: general.architecture is {architecture!r}; taken are {', '.join(_TENSORS)}")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(prefix)}
    for key, value in own.items():
        if key not in _FIELDS and not _WITHOUT_EFFECT.get(key, lambda _: False)(value):
            what = "its RoPE is scaled, which" if key.startswith("rope.scal") else "it has a key that"
            raise ValueError(
                f"{source}: {what} transformers does not read from GGUF ({architecture}.{key}: {value!r}){_ELSEWHERE}"
            )
    for key in _FIELDS:
        if key not in own and key not in _OPTIONAL:
            raise ValueError(f"{source}: it has no key {architecture}.{key}")
        if key in own and (isinstance(own[key], bool) or not isinstance(own[key], int | float)):
            raise ValueError(f"{source}: {architecture}.{key} is {own[key]!r}, and one number for all layers is taken")
    if own["attention.head_count"] < 1:
        raise ValueError(f"{source}: {architecture}.attention.head_count is {own['attention.head_count']}")
    said = {key: own[key] for key in _FIELDS if key in own}
    width = own["embedding_length"] / own["attention.head_count"]
    said = {"rope.freq_base": 10_000.0, "rope.dimension_count": own.get("attention.key_length", width)} | said
    shapes = {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in reader.tensors}
    _check_tensors(source, shapes, architecture, said)
    return said


def _check_tensors(
    source: Path, found: Mapping[str, Sequence[int]], architecture: str, said: Mapping[str, float]
) -> None:
    if "rope_freqs.weight" in found:
        raise ValueError(
            f"{source}: its RoPE is scaled, which transformers does not read from GGUF (rope_freqs.weight){_ELSEWHERE}"
        )
    head = said["rope.dimension_count"]
    sizes = {"E": said["embedding_length"], "F": said["feed_forward_length"], "D": head}
    sizes |= {"Q": head * said["attention.head_count"], "K": head * said["attention.head_count_kv"]}
    known = {"output.weight"}  # left out where it is the embedding's
    for name, shape in _expected(architecture, said["block_count"]):
        if name not in found:  # at once, however many layers a broken file says
            raise ValueError(f"{source}: it has no tensor {name} (a part of a split file? llama-gguf-split joins them)")
        known.add(name)
        wanted = [sizes.get(letter) for letter in shape]  # None: as many tokens as there are
        if len(found[name]) != len(wanted) or any(
            size not in (None, have) for have, size in zip(found[name], wanted, strict=True)
        ):
            made = " x ".join("tokens" if size is None else f"{size:g}" for size in wanted)
            raise ValueError(
                f"{source}: tensor {name} has shape {list(found[name])}, and by the file's keys it is {made}"
            )
    if left := sorted(found.keys() - known):
        raise ValueError(
            f"{source}: a {architecture} model has no tensor {left[0]}, and transformers would leave it out{_ELSEWHERE}"
        )


def _expected(architecture: str, num_layers: float) -> Iterator[tuple[str, str]]:
    yield from (("token_embd.weight", "VE"), ("output_norm.weight", "E"))
    for layer in range(int(num_layers)):
        yield from ((f"blk.{layer}.{name}", shape) for name, shape in _TENSORS[architecture].items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("folder", type=Path, help="to write: new, empty, or of an earlier export")
    args = parser.parse_args(argv)
    print(f"{convert(args.source, args.folder)}: ready for model.init_from")


if __name__ == "__main__":
    ending.run(main)
