"""A checkpoint as the evaluations see it: the model and the tokenizer of one Hugging Face folder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from s2.files import kind_of
from s2.inference.generate import generate
from s2.inference.prefix import PrefixCache
from s2.model.config import ModelConfig, read_object
from s2.model.hf import FOLDER_KIND, fingerprint, load_config, load_pretrained
from s2.model.loss import chunk_rows
from s2.model.tokenizer_files import read_tokenizer
from s2.model.transformer import Transformer

ASK_EVERY = 8  # new tokens between questions whether they are enough
_PREFILL_CHUNK = 1 << 18  # tokens of each row that are fed at once before a continuation: bounds activations


def checkpoint_name(folder: str | Path) -> str:
    """Short name for titles and tables: `runs/demo/extend-2k/hf` is `demo/extend-2k`."""
    parts = [part for part in Path(folder).resolve().parts if part != "hf"]
    return "/".join(parts[-2:]).lstrip("/")


def results_folder(folder: str | Path) -> Path:
    """Where results go by default: runs/<recipe>/<stage>/results for a run or its `hf`, runs/eval/<name>/results for a
    checkpoint that no run here has made, whose folder is its owner's."""
    folder = Path(folder)
    is_checkpoint = (folder / "config.json").is_file()
    if folder.name == "hf":
        of_a_run = any((folder.parent / name).is_file() for name in ("summary.json", "logs/metrics.csv"))
        if kind_of(folder) == FOLDER_KIND or of_a_run or not is_checkpoint:
            return folder.parent / "results"
    if not is_checkpoint:
        return folder / "results"
    return Path("runs") / "eval" / checkpoint_name(folder).replace("/", "-") / "results"


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
    """A checkpoint whose weights are read when they are first needed. `tokenizer` treats text that spells a special
    token as text, as the shards do.

    Token ids are those of tokenizer.json everywhere: in training, here, and so in every evaluation.
    """

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(
        cls, folder: str | Path, device: str | None = None, dtype: torch.dtype | None = None, max_length: int = 0
    ) -> "Checkpoint":
        """For `device` (default: the GPU if any) in `dtype` (default: bfloat16 there, else float32).

        max_length: read so many tokens where config.json allows fewer, with RoPE as it is; for measuring how a model
            does beyond the length it was trained on.
        Raises FileNotFoundError for missing files, ValueError for a tokenizer that does not fit the config or a device
        that is not there.
        """
        folder = check_checkpoint(folder)
        config, where = load_config(folder), find_device(device)
        if max_length > config.max_position_embeddings:
            config = config.replace(max_position_embeddings=max_length)
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        return cls(folder, config, load_tokenizer(folder), where, dtype)

    @classmethod
    def load(cls, *args: Any, **options: Any) -> "Checkpoint":
        """`open`, with the weights read now. Raises ValueError for weights that do not fit the config, MemoryError for
        weights that do not fit on the device."""
        checkpoint = cls.open(*args, **options)
        checkpoint.model  # noqa: B018 -- reads them
        return checkpoint

    @cached_property
    def model(self) -> Transformer:
        with memory_for(f"the weights of {self.folder} in {self.dtype_name}", self.device, "take a larger one"):
            model = load_pretrained(self.folder, device=self.device, dtype=self.dtype).eval()
        model.config = self.config
        return model

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @cached_property
    def fingerprint(self) -> str:
        """`s2.model.hf.fingerprint` of the folder as it was when first asked."""
        return fingerprint(self.folder)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: those of config.json, then what generation_config.json adds."""
        ids = list(self.config.eos_token_ids)
        if (self.folder / "generation_config.json").is_file():
            more = read_object(self.folder / "generation_config.json").get("eos_token_id") or []
            ids += more if isinstance(more, list) else [more]
        return tuple(dict.fromkeys(ids))

    @torch.inference_mode()
    def predict_last(self, rows: Sequence[list[int]], count: int, prefix: PrefixCache | None = None) -> list[list[int]]:
        """Most likely next token after each of the last `count` tokens of each row, in one forward pass.

        rows: of one length. prefix: what the rows before have computed of these is not computed again.
        """
        input_ids = torch.tensor(rows, device=self.device)
        feed = self.model if prefix is None else prefix
        return feed(input_ids, logits_to_keep=count)[:, -count:].argmax(-1).tolist()

    def prefix_cache(self, rows: int, max_length: int) -> PrefixCache:
        """For `predict_last`, on batches of so many rows that begin alike."""
        return PrefixCache(self.model, rows, max_length)

    @torch.inference_mode()
    def generate(
        self, rows: Sequence[list[int]], max_new_tokens: int, is_done: Callable[[int, list[int]], bool] | None = None
    ) -> list[list[int]]:
        """Greedy continuations of rows of one length, up to an end of text, which is left out.

        is_done(i, tokens): whether row i needs no more than these new tokens; asked now and then, and it ends there.
        """
        lengths = [max_new_tokens] * len(rows)

        def is_enough(new: Tensor) -> list[bool]:
            if is_done is not None and new.shape[1] % ASK_EVERY == 0:
                for i, tokens in enumerate(new.tolist()):
                    if lengths[i] == max_new_tokens and is_done(i, tokens):
                        lengths[i] = len(tokens)
            return [length < max_new_tokens for length in lengths]

        input_ids = torch.tensor(rows, device=self.device)
        new = generate(
            self.model, input_ids, max_new_tokens, eos_token_id=self.eos_ids or None, is_enough=is_enough,
            prefill_chunk=_PREFILL_CHUNK,
        ).tolist()  # fmt: skip
        said = [tokens[:length] for tokens, length in zip(new, lengths, strict=True)]
        return [tokens[: next((i for i, t in enumerate(tokens) if t in self.eos_ids), None)] for tokens in said]

    @torch.inference_mode()
    def log_likelihoods(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens `[N]` after hidden states `[N, E]`: log-probabilities, float64 `[N]`, and whether each is the most
        likely one, bool `[N]`.

        Raises ValueError for log-probabilities that are not finite.
        """
        values, hits = [], []
        # The logits of a long window over a large vocabulary would not fit; a few thousand positions at a
        # time do.
        size = chunk_rows(self.config.vocab_size)
        for positions, tokens in zip(hidden.split(size), targets.split(size), strict=True):
            scores = F.log_softmax(cast(Tensor, self.model.lm_head(positions)), dim=-1)  # [<=size, V]
            values.append(scores.gather(1, tokens[:, None])[:, 0].double())
            hits.append(scores.argmax(-1) == tokens)
        result = torch.cat(values)
        if not result.isfinite().all():
            raise ValueError(f"the likelihoods are not finite in {hidden.dtype}; evaluate in another --dtype")
        return result, torch.cat(hits)

    def describe(self) -> dict[str, Any]:
        """What result files record about the checkpoint."""
        return {
            "checkpoint": checkpoint_name(self.folder),
            "fingerprint": self.fingerprint,
            "attention_layout": self.config.attention_layout,
            "block_size": self.config.block_size,
            "max_position_embeddings": self.max_length,
            "dtype": self.dtype_name,
        }


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The folder's tokenizer.json, set to read special tokens in a text as plain text.

    Raises ValueError for a token beyond the model's embedding, unless it is a special one, which text never gives.
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
    """The device of that name; without one the GPU if there is any. Raises ValueError if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: no such device here ({reason}); there is cpu, or cuda, cuda:1") from None
    return device


@contextmanager
def memory_for(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """Turn torch's report that memory is full into one sentence. Raises MemoryError."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises the plain one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryError(f"{what} does not fit into the memory of {device}; {advice}") from None


def bos_of(tokenizer: Tokenizer) -> int | None:
    """The token that `tokenizer` itself puts before a text, None if it puts none."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    return framed[0] if len(framed) > len(bare) and framed[1 : 1 + len(bare)] == bare else None
