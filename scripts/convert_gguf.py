"""A Llama checkpoint in a GGUF file, as a Hugging Face folder to start from: weights in fp32, config, tokenizer.

    python scripts/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m

What llama.cpp rounded stays rounded: the original folder, where it can be had, is the better start. Needs the `gguf`
package (`pip install gguf`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2 import ending, files
from s2.model.config import ModelConfig
from s2.model.hf import save_pretrained

_SCALED_ROPE = ("rope_freqs.weight", ".rope.scaling.factor")  # a tensor of Llama 3.1, a key of linear and yarn
_HEADER = 64 << 20  # bytes with all keys, the vocabulary among them, and the names of all tensors


def convert(source: Path, folder: Path) -> Path:
    """Write `folder` from a GGUF file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: `gguf` is not installed, the file is no GGUF, or it holds no model that can be taken, or one whose
            RoPE would be lost.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such GGUF file")
    with source.open("rb") as stream:
        header = stream.read(_HEADER)
    if scaled := [name for name in _SCALED_ROPE if name.encode() in header]:
        raise ValueError(
            f"{source}: its RoPE is scaled ({scaled[0]}), which transformers does not read from GGUF; take the original"
            " Hugging Face folder"
        )
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ImportError, ValueError, KeyError) as error:
        raise ValueError(f"{source}: {error}") from None
    values = model.config.to_dict()
    values.pop("quantization_config", None)  # the weights are not quantised any more
    config = ModelConfig.from_hf_dict(values, str(source))
    with files.temporary_folder() as beside:
        tokenizer.save_pretrained(beside)
        return save_pretrained(model.state_dict(), config, folder, beside / "tokenizer.json", dtype=torch.float32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("folder", type=Path, help="to write: new, empty, or of an earlier export")
    args = parser.parse_args(argv)
    print(f"{convert(args.source, args.folder)}: ready for model.init_from")


if __name__ == "__main__":
    ending.run(main)
