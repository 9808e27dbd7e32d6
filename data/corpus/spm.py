"""SentencePiece models as `tokenizers` tokenizers whose ids equal those of the SentencePiece library.

Converters in transformers suit one family of models each; this one follows the rules of SentencePiece itself:

- text is normalized by the model's character map, white space is collapsed and stripped, the text gets a dummy
  prefix (or suffix), and spaces become "▁", each where the model asks for it;
- user-defined symbols are never normalized or divided; control symbols, byte pieces and the unknown piece are never
  found in text;
- what no piece covers becomes bytes where the model has byte fallback, else one unknown id for each run.

What may differ: a unigram model adds its scores in 32 bits from the beginning of the text, so where two divisions
score the same, as in long runs of one character, rounding decides there and the exact sum here (1 id in 10,000 of
source code). With a character map of the NFKC kind, combining marks in an unusual order are put in order, and one
after a character that the map replaces can be lost. And a text that is one user-defined symbol of a BPE, or that the
map deletes whole, gets no dummy prefix.
"""

import re
import unicodedata
from typing import Any

import numpy as np
from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_pb: Any = sentencepiece_model_pb2  # generated at import: no static types
_Type = _pb.ModelProto.SentencePiece
_Trainer = _pb.TrainerSpec
_NEITHER = "neither a tokenizer.json nor a SentencePiece model"
_SPACE = "▁"
_SHIELD = 0xF0000  # private-use characters stand for user-defined symbols while the character map is applied
_BARRIER = "\ufff0"  # unassigned: in no text; divides grapheme clusters and sequences of marks
_UNKNOWN = "\U0010ffff"  # a noncharacter: in no text and no piece


def parse_model(content: bytes) -> Any:
    """The ModelProto in `content`. Raises ValueError where it is not a SentencePiece model."""
    try:
        SentencePieceProcessor(model_proto=content)  # checks more than the parser
        model = _pb.ModelProto.FromString(content)
    except Exception as error:  # RuntimeError, OSError and DecodeError, by what is wrong
        raise ValueError(_NEITHER) from error
    if not model.pieces:  # an empty file
        raise ValueError(_NEITHER)
    return model


def to_tokenizer(model: Any) -> Tokenizer:
    """Convert a ModelProto; encoding with special tokens prepends its beginning-of-text symbol, if it has one.

    The ids of every piece's text are compared with SentencePiece's. Raises ValueError for a model that cannot be
    expressed: of type word, with unused pieces in a BPE, with unusual normalization rules, or whose ids differ.
    """
    kind = model.trainer_spec.model_type
    unigram = kind == _Trainer.UNIGRAM
    if kind == _Trainer.WORD:
        raise ValueError("a SentencePiece model of type word, which has no equal in a tokenizer.json")
    if not unigram and any(piece.type == _Type.UNUSED for piece in model.pieces):
        raise ValueError("a SentencePiece BPE with unused pieces, which has no equal in a tokenizer.json")
    symbols = [piece.piece for piece in model.pieces if piece.type == _Type.USER_DEFINED]
    tokenizer = Tokenizer(_unigram(model) if unigram else _bpe(model))
    tokenizer.normalizer = _normalizer(model, symbols)
    if splits := _splits(model):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = _decoder(model)
    reserved = [piece for piece in model.pieces if piece.type in (_Type.CONTROL, _Type.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True) for piece in reserved])
    if not unigram:  # the unigram model finds them by their score
        for symbol in symbols:
            if " " in symbol:  # never matches: the text has "▁" by then
                continue
            if tokenizer.normalizer.normalize_str(symbol) != symbol:
                raise ValueError(f"its normalization changes the user-defined symbol {symbol!r}")
            tokenizer.add_tokens([AddedToken(symbol, normalized=True, special=False)])
    bos = model.trainer_spec.bos_piece
    if any(piece.piece == bos and piece.type == _Type.CONTROL for piece in reserved):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    _compare(model, tokenizer)
    return tokenizer


def _unigram(model: Any) -> models.Unigram:
    """Scores as SentencePiece uses them; pieces that it never finds in text get one that no path chooses."""
    least = min((piece.score for piece in model.pieces if piece.type == _Type.NORMAL), default=0.0)
    longest = max(len(piece.piece) for piece in model.pieces)

    def score(piece: Any) -> float:
        if piece.type == _Type.NORMAL:
            return piece.score
        if piece.type == _Type.USER_DEFINED:  # GetUserDefinedScore in SentencePiece's unigram_model.cc
            return float(np.float32(0.1 * (len(piece.piece.encode()) - 1)))
        return -(abs(least) + 10) * (longest + 1)

    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type == _Type.UNKNOWN), None)
    vocab = [(piece.piece, score(piece)) for piece in model.pieces]
    return models.Unigram(vocab, unk_id=unknown, byte_fallback=model.trainer_spec.byte_fallback)


def _bpe(model: Any) -> models.BPE:
    """SentencePiece merges any two neighbours whose concatenation is a piece, the best score first, then leftmost."""
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges: list[tuple[str, str]] = []
    if model.trainer_spec.model_type == _Trainer.BPE:  # type char has no merges
        score = {piece.piece: piece.score for piece in model.pieces if piece.type == _Type.NORMAL}
        for piece in sorted(score, key=lambda piece: -score[piece]):
            # The longest left part first: where two of these overlap in a text, it is the leftmost.
            pairs = [(piece[:i], piece[i:]) for i in range(len(piece) - 1, 0, -1)]
            merges += [(left, right) for left, right in pairs if left in score and right in score]
    unknown = next((piece.piece for piece in model.pieces if piece.type == _Type.UNKNOWN), None)
    fallback = model.trainer_spec.byte_fallback
    return models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)


def _normalizer(model: Any, symbols: list[str]) -> normalizers.Normalizer:
    spec = model.normalizer_spec
    steps = _character_map(spec.precompiled_charsmap, symbols) if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""),
        ]
    if spec.add_dummy_prefix:
        if model.trainer_spec.treat_whitespace_as_suffix:
            steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), " "))
        elif symbols and model.trainer_spec.model_type != _Trainer.UNIGRAM:
            # An added token is looked for in the form that the normalizer gives it, so that must be itself.
            alone = "|".join(re.escape(symbol) for symbol in symbols)
            steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)(?=[\s\S])"), " "))
        else:
            steps.append(normalizers.Prepend(" "))  # to any text but the empty one
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if model.trainer_spec.model_type == _Trainer.UNIGRAM:
        steps += [normalizers.Replace(text, _UNKNOWN) for text in _spelled(model)[1]]
    return normalizers.Sequence(steps)


def _character_map(charsmap: bytes, symbols: list[str]) -> list[Any]:
    spec = _pb.NormalizerSpec(
        precompiled_charsmap=charsmap, add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=False
    )
    reference = SentencePieceNormalizer(normalizer_spec=spec.SerializeToString())
    # `Precompiled` takes a short grapheme cluster for one character, which loses what follows a mapped one in it (the
    # line feed of CR LF), and never composes a long one. NFC composes where the map does, before and after it. The
    # barrier keeps NFC from reordering Arabic and Hebrew marks and `Precompiled` from losing them.
    steps: list[Any] = []
    if reference.normalize("\r") == reference.normalize("\n"):
        steps.append(normalizers.Replace("\r\n", "\n\n"))
    if reference.normalize("a\u0301") == reference.normalize("\u00e1"):
        before, mark = r"[\p{M}\x{FB1D}-\x{FDFF}\x{FE70}-\x{FEFF}]", r"[[\x{0591}-\x{08FF}]&&\p{M}]"
        steps.append(normalizers.Replace(Regex(f"(?<={before})(?={mark})"), _BARRIER))
        steps += [normalizers.NFC(), normalizers.Precompiled(charsmap), normalizers.NFC()]
        steps.append(normalizers.Replace(_BARRIER, ""))
    else:
        steps.append(normalizers.Precompiled(charsmap))
    ours = normalizers.Sequence(steps)
    for text, mapped in reference.decompile():
        # With marks it may differ (see above), and what Python does not know is rare.
        known = not any(unicodedata.category(c) in ("Mn", "Mc", "Me", "Cn") for c in text)
        if known and ours.normalize_str(text) != mapped:
            raise ValueError(f"its normalization rule {text!r} -> {mapped!r} has no equal in a tokenizer.json")
    # A longer symbol is matched before one that it contains.
    changed = sorted((s for s in symbols if reference.normalize(s) != s), key=lambda s: (-len(s), s))
    hide = [normalizers.Replace(s, chr(_SHIELD + i)) for i, s in enumerate(changed)]
    show = [normalizers.Replace(chr(_SHIELD + i), s) for i, s in enumerate(changed)]
    return [*hide, *steps, *show]


def _splits(model: Any) -> list[Any]:
    """Divide the text at runs of "▁" where no piece reaches across: the same ids, in less time and memory."""
    splits = []
    if model.trainer_spec.model_type == _Trainer.UNIGRAM and (halves := _spelled(model)[0]):
        splits.append(pre_tokenizers.Split(Regex("|".join(halves)), "merged_with_previous"))
    pieces = [piece.piece for piece in model.pieces if piece.type in (_Type.NORMAL, _Type.USER_DEFINED)]
    if _SPACE in pieces:  # else a run of unknown characters, which has one id, may reach across
        if not any(re.search(f"[^{_SPACE}]{_SPACE}", piece) for piece in pieces):
            splits.append(pre_tokenizers.Split(Regex(f"{_SPACE}+"), "merged_with_next"))
        elif not any(re.search(f"{_SPACE}[^{_SPACE}]", piece) for piece in pieces):
            splits.append(pre_tokenizers.Split(Regex(f"{_SPACE}+"), "merged_with_previous"))
    return splits


def _spelled(model: Any) -> tuple[list[str], list[str]]:
    """How to keep the unigram model, whose unknown characters score below every piece, from finding reserved ones.

    Where text spells a reserved piece such as "</s>" and some of its characters have no piece of their own, it is
    divided by one of the expressions returned first; where none of them has, it may be replaced by any unknown one.
    """
    ordinary = (_Type.NORMAL, _Type.USER_DEFINED)
    known = {piece.piece for piece in model.pieces if piece.type in ordinary}
    halves, unknown = [], []
    for text in (piece.piece for piece in model.pieces if piece.type not in ordinary):
        covered = [character in known for character in text]
        # No piece reaches across an unknown character, but a run of them is one id, unless it becomes bytes.
        fused = not model.trainer_spec.byte_fallback
        cuts = [i for i in range(1, len(text)) if covered[i - 1] != covered[i] or not (fused or covered[i])]
        if cuts:
            halves.append(f"{re.escape(text[: cuts[0]])}(?={re.escape(text[cuts[0] :])})")
        elif not any(covered):
            unknown.append(text)
    return halves, unknown


def _decoder(model: Any) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        suffix = model.trainer_spec.treat_whitespace_as_suffix
        steps.append(decoders.Strip(" ", left=int(not suffix), right=int(suffix)))
    return decoders.Sequence(steps)


def _compare(model: Any, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the text of a piece has other ids than SentencePiece gives it."""
    reference = SentencePieceProcessor(model_proto=model.SerializeToString())
    tokenizer.encode_special_tokens = True
    texts = [("a" if piece.type == _Type.USER_DEFINED else "") + piece.piece for piece in model.pieces]
    texts = [text.replace(_SPACE, " ") for text in texts]
    for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        ids, expected = encoding.ids, reference.encode(text)
        if ids == expected:
            continue
        tie = abs(sum(reference.get_score(ids)) - sum(reference.get_score(expected))) < 1e-3
        if not (tie and reference.decode(ids) == reference.decode(expected)):
            raise ValueError(f"its ids of the text {text!r} cannot be had from a tokenizer.json")
