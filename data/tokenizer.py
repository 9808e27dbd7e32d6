"""The tokenizer of a recipe: trained on a sample of its corpus, or any `tokenizer.json` brought along.

The file's SHA-256 is the tokenizer's identity; shards record it, so tokens of two tokenizers never mix.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data.schema import whole_number

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_NAMES = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
PAD_NAMES = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]")
# Words with their leading space, digits in groups of at most three, runs of punctuation, runs of white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerSpec:
    """`prepare.tokenizer` of a recipe: exactly one of `train` and `path`.

    train: {vocab_size, sample_bytes}: byte-level BPE over the first `sample_bytes` (default 100 MB) of the
        corpus, shared evenly between the sources, held-out documents left out.
    path: an existing tokenizer.json.
    bos, eos: token that opens / closes every document; "auto" looks for the usual names, bos "none" opens
        with nothing.
    """

    train: dict[str, int] | None = None
    path: str | None = None
    bos: str = "auto"
    eos: str = "auto"

    def __post_init__(self) -> None:
        if (self.train is None) == (self.path is None):
            raise ValueError("expected exactly one of 'train: {vocab_size, sample_bytes}' and 'path'")
        if self.train is not None:
            settings = {"sample_bytes": 100_000_000, **self.train}
            if unknown := sorted(set(settings) - {"vocab_size", "sample_bytes"}):
                raise ValueError(f"train: unknown key {unknown[0]!r}; known keys: vocab_size, sample_bytes")
            least = {"vocab_size": 256 + 3, "sample_bytes": 1}  # every byte and the special tokens
            checked = {key: whole_number(settings.get(key), f"train.{key}", least[key]) for key in least}
            object.__setattr__(self, "train", checked)


class TextTokenizer:
    """A loaded tokenizer.json with its identity and the ids that frame a document.

    Raises FileNotFoundError for a missing file; ValueError for a file that is no tokenizer, an explicit
    `bos`/`eos` that is not in the vocabulary, or no end-of-document token under any usual name.
    """

    def __init__(self, file: str | Path, bos: str = "auto", eos: str = "auto"):
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"tokenizer {str(file)!r}: no such file; expected a tokenizer.json")
        content = self.file.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the binding raises bare Exception
            raise ValueError(f"{file}: not a tokenizer.json ({error})") from error
        # Text that happens to spell a special token (source code about tokenizers does) stays ordinary text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.bos_id = None if bos == "none" else self._find(vocab, "bos", bos, BOS_NAMES)
        self.pad_id = self._find(vocab, "pad", "auto", PAD_NAMES)
        eos_id = self._find(vocab, "eos", eos, EOS_NAMES)
        if eos_id is None:
            raise ValueError(
                f"{file}: no end-of-document token among {', '.join(EOS_NAMES)};"
                " set `eos` to the token that ends a text"
            )
        self.eos_id = eos_id

    def _find(self, vocab: dict[str, int], what: str, token: str, names: Iterable[str]) -> int | None:
        if token != "auto":
            if token not in vocab:
                raise ValueError(f"{self.file}: {what} token {token!r} is not in the vocabulary")
            return vocab[token]
        return next((vocab[name] for name in names if name in vocab), None)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id: uint16 up to 65,536 tokens, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """`[bos?] text eos` of each text, in `dtype`; runs on all cores."""
        head = [] if self.bos_id is None else [self.bos_id]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*head, *encoding.ids, self.eos_id], dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def describe(self) -> dict[str, Any]:
        """What a shard manifest records about the tokenizer."""
        keys = ("sha256", "vocab_size", "bos_id", "eos_id", "pad_id")
        return {key: getattr(self, key) for key in keys}


def train_tokenizer(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    """Train a byte-level BPE and write `file` (through a temporary file).

    Special tokens `<|bos|>`, `<|eos|>`, `<|pad|>` take ids 0, 1, 2. Encoding with special tokens prepends
    `<|bos|>`, which is how documents begin in the shards.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    temporary = file.with_name(file.name + ".tmp")
    tokenizer.save(str(temporary))
    temporary.replace(file)


def tokenizer_settings(spec: TokenizerSpec) -> dict[str, Any]:
    """The settings that decide the tokens: a brought tokenizer counts by content, not by where it lies.

    Raises FileNotFoundError where `path` is missing.
    """
    settings = asdict(spec)
    if spec.path is not None:
        if not Path(spec.path).is_file():
            raise FileNotFoundError(f"tokenizer path {spec.path!r}: no such file; expected a tokenizer.json")
        settings["path"] = "sha256:" + hashlib.sha256(Path(spec.path).read_bytes()).hexdigest()
    return settings
