"""Text that comes in pieces is the text of all tokens, cut at the first stop string, whatever the tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from s2.inference.detokenize import RowText, TextDecoder

TEXTS = ["the river é ü 大水 🙂🙃 naïve", "def f(x):\n    return x\n\n", "a  b   c 水 river's\n"] * 3
SPECIAL = ["<|bos|>", "<|eos|>", "<|end|>"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece():
    """Like Llama 2's: words marked by their leading space, and bytes for characters without a token."""
    words = ["▁", "▁the", "▁river", "▁a", "é", "大", "x", ":", "▁▁", "▁x"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def metaspace():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def bert():
    words = [*SPECIAL, "the", "river", "##s", "do", "n't", ".", ",", "大"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="the"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


DECODERS = {make.__name__: TextDecoder(make()) for make in (byte_level, sentencepiece, metaspace, bert)}


def definition(decoder, tokens, stops):
    """Everything decoded, then cut."""
    end = next((i for i, token in enumerate(tokens) if decoder.stops_in(token, stops)), len(tokens))
    text = decoder.decode(tokens[:end])
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def read(decoder, tokens, stops):
    """The pieces, the tokens after which the row was stopped (None: it was not)."""
    row, pieces = RowText(decoder, stops), []
    for count, token in enumerate(tokens, 1):
        pieces.append(row.add(token))
        if row.is_stopped:
            return pieces, count
    return [*pieces, row.finish()], None


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_are_the_text_of_all_tokens_cut_at_the_first_stop_string(name, data):
    decoder = DECODERS[name]
    size = decoder.tokenizer.get_vocab_size() + 2  # rows of the embedding that no token has
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=25))
    text = decoder.decode(tokens)
    places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6))
    inside = places.map(lambda place: text[place[0] : place[0] + place[1]] or "x")
    stops = data.draw(st.lists(inside | st.text(alphabet="the \n大é\ufffd", min_size=1, max_size=3), max_size=3))
    stops += data.draw(st.sampled_from([[], [], ["<|end|>"], ["end"]]))
    pieces, _ = read(decoder, tokens, stops)
    assert "".join(pieces) == definition(decoder, tokens, stops)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 319), max_size=25))
def test_a_token_shows_all_but_half_a_character_at_once(tokens):
    decoder, row, shown = DECODERS["byte_level"], RowText(DECODERS["byte_level"]), ""
    for count, token in enumerate(tokens, 1):
        shown += row.add(token)
        assert shown == decoder.decode(tokens[:count]).removesuffix("\ufffd")


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 319), min_size=1, max_size=25), where=st.data())
def test_a_row_is_stopped_by_the_token_that_completes_a_stop_string_and_not_shown_its_beginning(tokens, where):
    decoder = DECODERS["byte_level"]
    text = decoder.decode(tokens).rstrip("\ufffd")
    if not text:
        return
    begin = where.draw(st.integers(0, len(text) - 1))
    stop = text[begin : begin + where.draw(st.integers(1, 6))]
    row, shown = RowText(decoder, [stop]), ""
    for count, token in enumerate(tokens, 1):
        shown += row.add(token)
        known = decoder.decode(tokens[:count]).removesuffix("\ufffd")
        assert row.is_stopped == (stop in known)
        if row.is_stopped:
            break
        held = max((n for n in range(len(stop)) if known.endswith(stop[:n])), default=0)
        assert shown == known[: len(known) - held]
    assert shown == text[: text.find(stop)]


def test_the_stop_string_that_begins_first_cuts_though_another_is_complete_before_it():
    decoder = DECODERS["byte_level"]
    tokens = decoder.tokenizer.encode("the river a  b", add_special_tokens=False).ids
    assert "".join(read(decoder, tokens, ["iver a", "ve"])[0]) == "the r"
    assert "".join(read(decoder, tokens, ["iver x", "ve"])[0]) == "the ri"
    tokens = decoder.tokenizer.encode("the rive", add_special_tokens=False).ids
    assert "".join(read(decoder, tokens, ["iver a", "ve"])[0]) == "the ri", "no token follows"


def test_a_special_token_ends_a_row_by_how_it_is_spelled_and_is_never_shown():
    decoder = DECODERS["byte_level"]
    tokens = [*decoder.tokenizer.encode("the", add_special_tokens=False).ids, 2, *[40] * 5]
    pieces, count = read(decoder, tokens, ["<|end|>"])
    assert "".join(pieces) == "the" and count == len(tokens) - 5
    assert "end" not in "".join(read(decoder, tokens, ["nothing"])[0])


def test_which_decoders_may_change_what_came_before():
    assert {name: decoder.is_adding for name, decoder in DECODERS.items()} == {
        "byte_level": True, "sentencepiece": True, "metaspace": True, "bert": False,
    }  # fmt: skip
    assert len(DECODERS["sentencepiece"].bytes) == 256 and not DECODERS["byte_level"].bytes
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    assert not TextDecoder(tokenizer).is_adding
