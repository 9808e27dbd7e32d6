"""A Hugging Face folder as whoever reads or writes text by it sees it: the model, the tokenizer, the ids that end.

Token ids are those of tokenizer.json, as in training, whatever else in the folder describes a tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer

from s2.model.config import ModelConfig, read_object
from s2.model.hf import load_config, load_pretrained
from s2.model.tokenizer_files import read_tokenizer
from s2.model.transformer import Transformer
from s2.out_of_memory import is_out_of_memory

from .checks import NEUTRAL, whole
from .detokenize import TextDecoder
from .prefill import PREFILL_CHUNK

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose weights are read when they are first needed. `tokenizer` treats text that spells a special token
    as text, as the shards do; prompts are read in pieces of `prefill_chunk` tokens."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    prefill_chunk: int = PREFILL_CHUNK

    @classmethod
    def open(
        cls,
        folder: str | Path,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_length: int = 0,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Self:
        """For `device` (default: the GPU if any) in `dtype` (default: bfloat16 there, else float32).

        Args:
            max_length: read so many tokens where config.json allows fewer, with RoPE as it is; for measuring how a
                model does beyond the length it was trained on.
            prefill_chunk: read prompts in pieces of so many tokens (`s2.inference.prefill`).

        Raises:
            FileNotFoundError: missing files.
            ValueError: a tokenizer that does not fit the config, a device that is not there, or an option that is no
                such thing.
        """
        folder = check_folder(folder)
        whole("max_length", max_length, 0)
        whole("prefill_chunk", prefill_chunk, 1)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype={dtype!r} must be a torch.dtype such as torch.bfloat16")
        config, where = load_config(folder), find_device(device)
        if max_length > config.max_position_embeddings:
            config = config.replace(max_position_embeddings=max_length)
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        return cls(folder, config, load_tokenizer(folder), where, dtype, prefill_chunk)

    @classmethod
    def load(cls, *args: Any, **options: Any) -> Self:
        """`open`, with the weights read now.

        Raises:
            ValueError: weights that do not fit the config.
            MemoryError: weights that do not fit on the device.
        """
        opened = cls.open(*args, **options)
        opened.model  # noqa: B018 -- reads them
        return opened

    @cached_property
    def model(self) -> Transformer:
        with memory_for(f"the weights of {self.folder} in {self.dtype_name}", self.device, "take a larger one"):
            model = load_pretrained(self.folder, device=self.device, dtype=self.dtype).eval()
        model.config = self.config
        return model

    @cached_property
    def decoder(self) -> TextDecoder:
        return TextDecoder(self.tokenizer)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: those of config.json, then what generation_config.json adds."""
        said = self._generation.get("eos_token_id")
        more = [] if said is None else said if isinstance(said, list) else [said]
        if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in more):
            raise ValueError(f"{self.folder / _GENERATION}: eos_token_id={said!r} must be token ids")
        return tuple(dict.fromkeys([*self.config.eos_token_ids, *more]))

    @property
    def sampling(self) -> dict[str, Any]:
        """`temperature`, `top_p` and `top_k` as generation_config.json has them, for `generate`; only those it names,
        and temperature 0 where it does not say `do_sample`.

        Raises:
            ValueError: one of them that is no number, or another option of generation that does something.
        """
        said = self._generation
        for key, neutral in NEUTRAL.items():
            if said.get(key) is not None and said[key] not in neutral:
                raise ValueError(
                    f"{self.folder / _GENERATION}: {key}={said[key]!r} is not supported; supported are do_sample,"
                    " temperature, top_p, top_k"
                )
        if not said.get("do_sample"):
            return {"temperature": 0.0}
        named = {key: said[key] for key in ("temperature", "top_p", "top_k") if said.get(key) is not None}
        for key, value in named.items():
            if isinstance(value, bool) or not isinstance(value, int if key == "top_k" else (int, float)):
                raise ValueError(f"{self.folder / _GENERATION}: {key}={value!r} must be a number")
        return {"temperature": 1.0} | named

    @cached_property
    def _generation(self) -> dict[str, Any]:
        file = self.folder / _GENERATION
        return read_object(file) if file.is_file() else {}


def check_folder(folder: str | Path) -> Path:
    """The folder, after a look at what must be there.

    Raises:
        FileNotFoundError: no folder, or no config.json, tokenizer.json or weights in it.
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


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The folder's tokenizer.json, set to read special tokens in a text as plain text.

    Raises:
        ValueError: a token beyond the model's embedding, unless it is a special one, which text never gives.
    """
    file = Path(folder) / "tokenizer.json"
    tokenizer, size = read_tokenizer(file), load_config(folder).vocab_size
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if beyond := [token for token, index in vocabulary.items() if index >= size and token not in special]:
        raise ValueError(
            f"{file}: the tokenizer has token {vocabulary[beyond[0]]}, and the model embeds {size}"
            f" (vocab_size in config.json): {beyond[0]!r}; the tokenizer is another model's, or the"
            " embedding was not enlarged for it"
        )
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find_device(name: str | None) -> torch.device:
    """The device of that name; without one the GPU if there is any.

    Raises:
        ValueError: it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: no such device here ({reason}); there is cpu, or cuda, cuda:1") from None
    return device


@contextmanager
def memory_for(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """Turn torch's report that memory is full into one sentence.

    Raises:
        MemoryError: instead of what torch raises.
    """
    handled = sys.exception()  # by who tries less after something that found no memory
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error, handled=handled):
            raise
        raise MemoryError(f"{what} does not fit into the memory of {device}; {advice}") from None


def bos_of(tokenizer: Tokenizer) -> int | None:
    """The token that `tokenizer` itself puts before a text, None if it puts none."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    return framed[0] if len(framed) > len(bare) and framed[1 : 1 + len(bare)] == bare else None
