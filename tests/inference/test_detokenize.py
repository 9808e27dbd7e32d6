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


def sure(decoder, tokens):
    """The text that no later token changes: nothing of a run of bytes at the end, nor half a character."""
    while tokens and tokens[-1] in decoder.bytes:
        tokens = tokens[:-1]
    return decoder.decode(tokens).removesuffix("\ufffd")


def definition(decoder, tokens, stops, prompt=()):
    """What all tokens up to the one that completes a stop string add to the prompt's text, cut."""
    before = decoder.decode(prompt)

    def added(end):
        whole = decoder.decode([*prompt, *tokens[:end]])
        return whole[max(n for n in range(len(before) + 1) if whole.startswith(before[:n])) :]

    for end in range(len(tokens) + 1):
        if any(decoder.stops_in(token, stops) for token in tokens[end : end + 1]):
            break
        known = added(end)
        if not (end and tokens[end - 1] in decoder.bytes):
            known = known.removesuffix("\ufffd")
        if decoder.is_adding and first_is_sure(known, stops):
            break
    text = added(end)
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def first_is_sure(text, stops):
    """Whether a stop string is in the text, and none that begins before it may still complete."""
    at = min((at for at in map(text.find, stops) if at >= 0), default=len(text))
    begun = (n for n in range(len(text)) if any(stop.startswith(text[n:]) for stop in stops))
    return at < len(text) and at <= next(begun, len(text))


def read(decoder, tokens, stops, prompt=()):
    """The pieces, the tokens after which the row was stopped (None: it was not)."""
    row, pieces = RowText(decoder, stops, prompt), []
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
    prompt = data.draw(st.just([]) | st.lists(st.integers(0, size - 1), max_size=5))
    text = decoder.decode(tokens)
    places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6))
    inside = places.map(lambda place: text[place[0] : place[0] + place[1]] or "x")
    stops = data.draw(st.lists(inside | st.text(alphabet="the \n大é\ufffd", min_size=1, max_size=3), max_size=3))
    stops += data.draw(st.sampled_from([[], [], ["<|end|>"], ["end"]]))
    pieces, _ = read(decoder, tokens, stops, prompt)
    assert "".join(pieces) == definition(decoder, tokens, stops, prompt)


def rows(name):
    """Tokens of a tokenizer, none of them special; where there are byte tokens, most of them in whole characters."""
    if name == "byte_level":
        return st.lists(st.integers(3, 319), max_size=25)
    spelled = st.text("ab\n é大🙂", min_size=1, max_size=4).map(lambda text: [3 + byte for byte in text.encode()])
    pieces = st.one_of(spelled, spelled, st.integers(3, 268).map(lambda token: [token]))
    return st.lists(pieces, max_size=10).map(lambda drawn: [token for piece in drawn for token in piece])


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_token_shows_at_once_all_that_no_later_one_changes(name, data):
    decoder, row, shown = DECODERS[name], RowText(DECODERS[name]), ""
    tokens = data.draw(rows(name))
    for count, token in enumerate(tokens, 1):
        shown += row.add(token)
        assert shown == sure(decoder, tokens[:count])


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_row_is_stopped_by_the_token_that_completes_a_stop_string_and_not_shown_its_beginning(name, data):
    decoder, tokens = DECODERS[name], data.draw(rows(name))
    texts = [decoder.decode(tokens[:count]).rstrip("\ufffd") for count in range(len(tokens) + 1)]
    text = data.draw(st.sampled_from(texts))
    if not text:
        return
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = text[begin : begin + data.draw(st.integers(1, 6))]
    if "\ufffd" in stop:  # in a run of bytes it is known at the end
        return
    row, shown = RowText(decoder, [stop]), ""
    for count, token in enumerate(tokens, 1):
        shown += row.add(token)
        known = decoder.decode(tokens[:count]).removesuffix("\ufffd")
        assert row.is_stopped == (stop in known)
        if row.is_stopped:
            assert shown == known[: known.find(stop)]
            return
        known = sure(decoder, tokens[:count])
        held = max((n for n in range(len(stop)) if known.endswith(stop[:n])), default=0)
        assert shown == known[: len(known) - held]
    raise AssertionError("the text of some of the tokens has the stop string in it")


def test_a_stop_string_of_byte_tokens_ends_a_row_at_once_unless_another_begins_before_it():
    decoder, tokens = DECODERS["sentencepiece"], [260, *(3 + byte for byte in b"a\n\nb\xe5")]
    assert read(decoder, tokens, ["\n\n"]) == (["the", "", "", "a"], 4)
    assert read(decoder, tokens, ["\nb", "a\n"]) == (["the", "", ""], 3)
    assert read(decoder, tokens, ["e\n", "ea\n\nx", "\n"]) == (["th", "", "", "", "ea"], 5), "it does not complete"
    pieces, count = read(decoder, tokens, ["x"])
    assert "".join(pieces) == "the" + "\ufffd" * 5 and count is None, "one invalid byte takes all of them along"


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace"])
def test_the_space_before_the_first_word_is_shown_behind_a_prompt(name):
    decoder = DECODERS[name]
    token = decoder.tokenizer.token_to_id
    prompt, word = [token("▁the"), token("x")], token("▁river") if name == "sentencepiece" else token("▁a")
    shown = decoder.decode([*prompt, word])[len("thex") :]
    assert shown.startswith(" ") and read(decoder, [word], [], prompt)[0] == [shown, ""]
    assert read(decoder, [word], [], [token("<|bos|>")])[0] == read(decoder, [word], [])[0] == [shown[1:], ""]
    assert "".join(read(decoder, [word], [" "], prompt)[0]) == "", "a stop string may begin with it"


def test_what_follows_a_prompt_in_bytes_is_decoded_with_all_of_its_last_run():
    decoder = DECODERS["sentencepiece"]
    prompt, new = [260, *[3 + 0x0A] * 100], [3 + byte for byte in "大\nb".encode()]
    assert "".join(read(decoder, new, [], prompt)[0]) == "大\nb"
    assert read(decoder, new, ["\n"], prompt) == (["", "", "", "大"], 4), "that of the prompt stops nothing"
    long = [*[261] * 5000, *prompt]
    assert "".join(read(decoder, new, [], long)[0]) == "大\nb" and len(RowText(decoder, [], long)._tokens) < 200
    assert "".join(read(decoder, [3 + 0xE5, 4], [], long)[0]) == "\ufffd" * 102, "the whole run has become invalid"


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
    assert DECODERS["sentencepiece"].bytes == {3 + byte: byte for byte in range(256)}
    assert not DECODERS["byte_level"].bytes
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    assert not TextDecoder(tokenizer).is_adding
