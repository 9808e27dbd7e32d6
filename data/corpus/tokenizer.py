"""The tokenizer of a recipe: trained on a sample of its corpus, or any `tokenizer.json` or SentencePiece model.

The file's SHA-256 is the tokenizer's identity; shards record it, so tokens of two tokenizers never mix.
"""

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data.corpus.reserved import drops_characters, not_kept, text_encoder, unknown_id
from s2.files import whole, write_text
from s2.settings import Check, Positive, SettingError, Settings

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_NAMES = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
PAD_NAMES = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]")
# What encoding loses: where there is no byte fallback, characters become an unknown token or vanish.
UNKNOWN, DROPPED = "runs of unknown characters", "characters without a token"
# Words with their leading space, digits in groups of at most three, runs of punctuation, runs of white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Encoding takes about 100 bytes of memory for each byte of text, and one core for each text. So long texts are cut
# where that changes no token, and this many characters are encoded at a time.
_LINE_END = re.compile(r"\n(?=\S)")
_PIECE_CHARS = 1 << 18
_BATCH_CHARS = 8 << 20


@dataclass(frozen=True)
class Training(Settings):
    """`train` of a tokenizer: every byte and the special tokens have to fit into `vocab_size`."""

    vocab_size: Annotated[int, Check("a whole number >= 259", lambda n: n >= 256 + 3)]
    sample_bytes: Positive = 100_000_000


@dataclass(frozen=True)
class TokenizerSpec(Settings):
    """`prepare.tokenizer` of a recipe: exactly one of `train` and `path`.

    train: {vocab_size, sample_bytes}: byte-level BPE over a sample of `sample_bytes` (default 100 MB) from all over the
        corpus (`data.corpus.sample`), held-out documents left out.
    path: an existing tokenizer.json or SentencePiece model, or a folder with one of them.
    bos, eos: token that opens / closes every document; "auto" looks for the usual names among the special tokens, and
        in the whole vocabulary only where no special token has such a name; bos "none" opens with nothing.
    """

    train: Training | None = None
    path: str | None = None
    bos: str = "auto"
    eos: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.train is None) == (self.path is None):
            raise SettingError("", "expected exactly one of 'train: {vocab_size, sample_bytes}' and 'path'")
        if self.path is not None:
            object.__setattr__(self, "path", _in_folder(os.path.expanduser(self.path)))
            return
        for key, token in (("bos", self.bos), ("eos", self.eos)):
            if token not in ("auto", BOS, EOS, PAD, *(["none"] if key == "bos" else [])):
                raise SettingError(key, f"{token!r} is none of a trained tokenizer's, {BOS}, {EOS} and {PAD}")


def _in_folder(path: str) -> str:
    """The tokenizer's file where `path` is a folder."""
    if not os.path.isdir(path):
        return path
    names = ("tokenizer.json", "tokenizer.model")
    for name in names:
        if os.path.isfile(file := os.path.join(path, name)):
            return file
    raise FileNotFoundError(f"tokenizer {path!r}: the folder holds no {' and no '.join(names)}")


class TextTokenizer:
    """A loaded tokenizer.json or SentencePiece model, its identity and the ids that frame a document.

    Text never has these ids, nor those of other special tokens, whatever it spells (`data.corpus.reserved`).

    Raises FileNotFoundError for a missing file; ValueError for a file that is no tokenizer, an explicit
    `bos`/`eos` that is not in the vocabulary or stands for text, or no end-of-document token under any usual name.
    """

    def __init__(self, file: str | Path, bos: str = "auto", eos: str = "auto"):
        self.file = Path(file)
        content = _read(self.file)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._tokenizer, _ = _parse(content, self.file)
        self._lines_are_apart = _lines_are_apart(self._tokenizer)
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
        settings = json.loads(self._tokenizer.to_str())
        self.unk_id = unknown_id(settings)
        self._drops_characters = drops_characters(settings)
        try:
            frame = (self.bos_id, self.pad_id, self.eos_id)
            self._encoder = text_encoder(settings, {i for i in frame if i is not None})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        try:
            self.not_kept = not_kept(self._encoder)
        except Exception:  # it cannot encode these texts at all, which is said when a text of the corpus is like them
            self.not_kept = []

    def _find(self, vocab: dict[str, int], what: str, token: str, names: Iterable[str]) -> int | None:
        if token != "auto":
            if token not in vocab:
                raise ValueError(f"{self.file}: {what} token {token!r} is not in the vocabulary")
            return vocab[token]
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        known = special if any(name in special for name in EOS_NAMES) else vocab
        return next((vocab[name] for name in names if name in known), None)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id: uint16 up to 65,536 tokens, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode_documents(self, texts: list[str], lost: Counter[str] | None = None) -> list[np.ndarray]:
        """`[bos?] text eos` of each text, in `dtype`; runs on all cores.

        lost: counts what the vocabulary cannot express, under `UNKNOWN` and `DROPPED`.
        """
        lost = Counter() if lost is None else lost
        encode = self._encoder.encode_batch if self._drops_characters else self._encoder.encode_batch_fast
        head = [] if self.bos_id is None else [self.bos_id]
        ids = [array("I", head) for _ in texts]
        for batch in self._batches(texts):
            try:
                encodings = encode([piece for _, piece in batch], add_special_tokens=False)
            except Exception as error:  # the binding raises bare Exception
                raise ValueError(f"{self.file}: cannot encode text ({error})") from error
            for (text, piece), encoding in zip(batch, encodings, strict=True):
                ids[text].fromlist(encoding.ids)
                if self._drops_characters and (dropped := _dropped(piece, encoding.offsets)):
                    lost[DROPPED] += dropped
        for document in ids:
            document.append(self.eos_id)
        documents = [np.array(document, dtype=self.dtype) for document in ids]
        if self.unk_id is not None and (unknown := sum(int((each == self.unk_id).sum()) for each in documents)):
            lost[UNKNOWN] += unknown
        return documents

    def _batches(self, texts: list[str]) -> Iterator[list[tuple[int, str]]]:
        """Pieces of the texts, in order, with the index of their text."""
        batch: list[tuple[int, str]] = []
        size = 0
        for i, text in enumerate(texts):
            for piece in _pieces(text) if self._lines_are_apart else (text,):
                batch.append((i, piece))
                size += len(piece)
                if size >= _BATCH_CHARS:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def describe(self) -> dict[str, Any]:
        """What a shard manifest records about the tokenizer."""
        keys = ("sha256", "vocab_size", "bos_id", "eos_id", "pad_id", "unk_id", "not_kept")
        return {key: getattr(self, key) for key in keys}


def train_tokenizer(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    """Train a byte-level BPE and write `file`.

    Special tokens `<|bos|>`, `<|eos|>`, `<|pad|>` take ids 0, 1, 2. Encoding with special tokens prepends `<|bos|>`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
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
    write_text(file, tokenizer.to_str(pretty=True))


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _lines_are_apart(tokenizer: Tokenizer) -> bool:
    """Whether a text cut after a newline that no white space follows has the same tokens as the whole.

    So it is where `_SPLIT` alone divides it: none of its matches goes on after such a newline, or depends on it.
    """
    return (
        tokenizer.normalizer is None
        and tokenizer.pre_tokenizer is not None
        and tokenizer.pre_tokenizer.__getstate__() == _pre_tokenizer().__getstate__()
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARS and (cut := _LINE_END.search(text, start + _PIECE_CHARS - 1)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _dropped(text: str, offsets: Sequence[tuple[int, int]]) -> int:
    """Characters of `text`, white space aside, that lie in none of the spans."""
    dropped = reached = 0
    for begin, end in (*offsets, (len(text), len(text))):
        if begin > reached:
            dropped += len("".join(text[reached:begin].split()))
        reached = max(reached, end)
    return dropped


def _read(file: Path) -> bytes:
    if not file.is_file():
        expected = "expected a tokenizer.json or a SentencePiece model"
        raise FileNotFoundError(f"tokenizer {str(file)!r}: no such file; {expected}")
    return file.read_bytes()


def _parse(content: bytes, file: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer in `content`, and whether that is a tokenizer.json; raises ValueError, naming `file`."""
    try:
        return Tokenizer.from_buffer(content), True
    except Exception as error:  # the binding raises bare Exception
        if content.startswith(b"{"):
            raise ValueError(f"{file}: not a tokenizer.json ({error})") from error
    from data.corpus import spm  # here, because it asks for a recent protobuf and a tokenizer.json does not

    try:
        return spm.to_tokenizer(spm.parse_model(content)), False
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def save_tokenizer_json(source: Path, file: Path) -> None:
    """Write the tokenizer `source` as the tokenizer.json `file`.

    A tokenizer.json is copied byte for byte, unless it truncates or pads, which every reader of the file would do; a
    SentencePiece model is converted, always to the same bytes. Raises FileNotFoundError for a missing source and
    ValueError for one that is no tokenizer.
    """
    content = _read(source)
    tokenizer, is_json = _parse(content, source)
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        is_json = False
    with whole(file) as stream:
        stream.write(content if is_json else tokenizer.to_str(pretty=True).encode())


def tokenizer_settings(spec: TokenizerSpec) -> dict[str, Any]:
    """The settings that decide the tokens: a brought tokenizer counts by content, not by where it lies.

    Raises FileNotFoundError where `path` is missing.
    """
    settings = asdict(spec)
    if spec.path is not None:
        settings["path"] = "sha256:" + hashlib.sha256(_read(Path(spec.path))).hexdigest()
    return settings
