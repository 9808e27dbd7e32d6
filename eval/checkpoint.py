"""A checkpoint as the evaluations see it: the model and the tokenizer of one Hugging Face folder."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from s2.inference.generate import generate
from s2.model.config import ModelConfig
from s2.model.hf import load_config, load_pretrained
from s2.model.transformer import Transformer

_SAMPLED_BYTES = 1 << 20


def checkpoint_name(folder: str | Path) -> str:
    """Short name for titles and tables: `runs/demo/extend-2k/hf` is `demo/extend-2k`."""
    parts = [part for part in Path(folder).resolve().parts if part != "hf"]
    return "/".join(parts[-2:]).lstrip("/")


def results_folder(folder: str | Path) -> Path:
    """Where results go by default: runs/<recipe>/<stage>/results for a run's `hf`, else inside the folder."""
    folder = Path(folder)
    return (folder.parent if folder.name == "hf" else folder) / "results"


def fingerprint(folder: str | Path) -> str:
    """Identity of a checkpoint's content: config.json, and size, head and tail of every weight file.

    Reads at most 2 MiB a file, so that results can be matched with their checkpoint without much reading.
    """
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for file in sorted(Path(folder).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
            stream.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def check_checkpoint(folder: str | Path) -> Path:
    """The folder, after a look at what must be there.

    Raises FileNotFoundError for a missing folder, config.json, tokenizer.json or weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint {folder}: no such folder; expected a Hugging Face folder such as runs/demo/extend-2k/hf"
        )
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"checkpoint {folder}: {name} is missing; a Hugging Face folder has one")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"checkpoint {folder}: no *.safetensors weights in it")
    return folder


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. `tokenizer` treats text that spells a special token as text, as the shards do."""

    folder: Path
    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer
    device: torch.device

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, dtype: torch.dtype | None = None) -> "Checkpoint":
        """Load onto `device` (default: the GPU if any) in `dtype` (default: bfloat16 there, else float32).

        Raises FileNotFoundError for missing files, ValueError for weights that do not fit the config.
        """
        folder = check_checkpoint(folder)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        model = load_pretrained(folder, device=where, dtype=dtype).eval()
        return cls(folder, load_config(folder), model, load_tokenizer(folder), where)

    @property
    def name(self) -> str:
        return checkpoint_name(self.folder)

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @cached_property
    def bos_id(self) -> int | None:
        """The token that opens every document, None where the tokenizer adds none."""
        return bos_of(self.tokenizer)

    @torch.inference_mode()
    def predict_last(self, tokens: list[int], count: int) -> list[int]:
        """Most likely next token after each of the last `count` of `tokens`, in one forward pass."""
        input_ids = torch.tensor([tokens], device=self.device)
        logits = self.model(input_ids, logits_to_keep=count)  # [1, count, V]
        return logits[0, -count:].argmax(-1).tolist()

    @torch.inference_mode()
    def generate(self, tokens: list[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of `tokens` (only the new ones, at most `max_new_tokens`)."""
        input_ids = torch.tensor([tokens], device=self.device)
        return generate(self.model, input_ids, max_new_tokens)[0].tolist()

    def describe(self) -> dict[str, Any]:
        """What result files record about the checkpoint."""
        return {
            "checkpoint": self.name,
            "fingerprint": fingerprint(self.folder),
            "attention_layout": self.config.attention_layout,
            "block_size": self.config.block_size,
            "max_position_embeddings": self.max_length,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
        }


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The folder's tokenizer.json, set to read special tokens in a text as plain text."""
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def bos_of(tokenizer: Tokenizer) -> int | None:
    """The token that `tokenizer` itself puts before a text, None if it puts none."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    return framed[0] if len(framed) > len(bare) and framed[1 : 1 + len(bare)] == bare else None
