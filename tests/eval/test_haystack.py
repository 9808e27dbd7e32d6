"""Prompts of the needle test: exact lengths, right places, nothing encoded twice."""

import random
import re
import time

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from eval.haystack import Haystack
from eval.needle_prompts import MAX_SHIFT, build_prompt
from s2.inference.folder import load_tokenizer
from tests.eval.small_checkpoint import make_checkpoint, prose


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_checkpoint(tmp_path_factory.mktemp("haystack") / "hf"))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack.from_texts([prose(150, 1), prose(150, 2)], tokenizer, "prose")


def build(haystack, tokenizer, **options):
    return build_prompt(haystack, tokenizer, 0, **{"length": 400, "depth": 50, "seed": "s", **options})


def test_of_a_text_that_is_longer_than_the_haystack_the_beginning_is_encoded(tokenizer):
    class Counting:
        def encode(self, text, **options):
            sizes.append(len(text))
            return tokenizer.encode(text, **options)

    sizes, book = [], prose(3000, 1)
    found = Haystack.from_texts([book, book], Counting(), "book", 1000)
    whole = Haystack.from_texts([book], tokenizer, "book")
    assert max(sizes) == 64_000 < len(book) and found.tokens.tolist() == whole.tokens[:1000].tolist()
    assert found.starts.tolist() == [start for start in whole.starts if start < 1000]


@pytest.mark.parametrize("length", [300, 301, 417, 1024])
@pytest.mark.parametrize("needles,distractors", [(1, 0), (2, 3)])
def test_prompt_has_exactly_the_length_asked_for(haystack, tokenizer, length, needles, distractors):
    prompt = build(haystack, tokenizer, length=length, needles=needles, distractors=distractors)
    assert len(prompt.tokens) == length
    assert prompt.tokens[0] == 0 and 0 not in prompt.tokens[1:]


@pytest.mark.parametrize("depth", [0, 10, 37.5, 50, 90, 100])
def test_needle_lies_at_its_depth_on_a_sentence_start(haystack, tokenizer, depth):
    prompt = build(haystack, tokenizer, length=1000, depth=depth)
    (needle,) = prompt.needles
    longest_sentence = max(b - a for a, b in zip(haystack.starts, haystack.starts[1:], strict=False))
    hay = 1000 * abs(needle.depth - depth) / 100
    assert hay <= longest_sentence
    before = tokenizer.decode(prompt.tokens[1 : needle.position], skip_special_tokens=False)
    assert before == "" or before.rstrip().endswith((".", "!", "?"))
    assert prompt.on_boundary
    if depth == 0:
        assert needle.position == 1


def test_recorded_position_is_where_the_needle_text_begins(haystack, tokenizer):
    needle = build(haystack, tokenizer, depth=63).needles[0]
    prompt = build(haystack, tokenizer, depth=63)
    text = tokenizer.decode(prompt.tokens[needle.position : needle.position + 40], skip_special_tokens=False)
    assert text.startswith(f" The magic number of the {needle.key} is {needle.number}.")


def test_needle_is_there_once_and_the_answer_repeats_its_tokens(haystack, tokenizer):
    prompt = build(haystack, tokenizer, distractors=4)
    (needle,) = prompt.needles
    answer = prompt.tokens[needle.answer]
    assert needle.answer.stop == len(prompt.tokens)
    assert tokenizer.decode(answer).strip() == needle.number and len(needle.number) == 7
    windows = [prompt.tokens[i : i + len(answer)] for i in range(len(prompt.tokens))]
    assert windows.count(answer) == 2
    text = tokenizer.decode(prompt.tokens)
    assert text.count(f"the {needle.key} is") == 2


def test_distractors_have_other_keys_and_other_numbers(haystack, tokenizer):
    prompt = build(haystack, tokenizer, length=800, distractors=6)
    found = re.findall(r"The magic number of the (\w+ \w+) is (\d{7})\.", tokenizer.decode(prompt.tokens))
    assert len(found) == 7
    assert len({key for key, _ in found}) == 7 and len({number for _, number in found}) == 7


def test_several_needles_are_each_asked_for_and_spread_over_the_context(haystack, tokenizer):
    prompt = build(haystack, tokenizer, length=1000, needles=4, depth=10)
    assert [tokenizer.decode(prompt.tokens[n.answer]).strip() for n in prompt.needles] == [
        n.number for n in prompt.needles
    ]
    assert [round(n.depth) for n in prompt.needles] == pytest.approx([10, 35, 60, 85], abs=3)


def test_haystack_tokens_reach_the_prompt_unchanged(haystack, tokenizer):
    prompt = build(haystack, tokenizer, length=600, depth=50)
    (needle,) = prompt.needles
    before = prompt.tokens[1 : needle.position]
    stack = haystack.tokens.tolist()
    begin = next(i for i in range(len(stack)) if stack[i : i + len(before)] == before)
    needle_length = len(tokenizer.encode(f" The magic number of the {needle.key} is {needle.number}.").ids) - 1
    after = prompt.tokens[needle.position + needle_length :][:200]
    assert stack[begin + len(before) :][:200] == after


def test_same_seed_same_prompt_and_other_seed_another(haystack, tokenizer):
    one, same, other = (build(haystack, tokenizer, seed=seed) for seed in ("a", "a", "b"))
    assert one == same
    assert one.needles[0].number != other.needles[0].number


def test_every_number_length_of_text_is_cut_at_sentence_starts(tokenizer):
    text = 'He said "Stop." Then he left. Version 3.14 stays whole! New line\nbegins here'
    haystack = Haystack.from_texts([text], tokenizer, "text")
    pieces = [
        tokenizer.decode(haystack.tokens[a:b]).strip()
        for a, b in zip(haystack.starts, [*haystack.starts[1:], len(haystack.tokens)], strict=True)
    ]
    assert pieces == [
        'He said "Stop."',
        "Then he left.",
        "Version 3.14 stays whole!",
        "New line",
        "begins here",
    ]


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    haystack = Haystack.from_texts(["About <|bos|> and <|eos|>. The end."], tokenizer, "text")
    assert not {0, 1, 2} & set(haystack.tokens.tolist())


def test_too_short_haystack_says_how_many_tokens_are_needed(haystack, tokenizer):
    with pytest.raises(ValueError, match=r"haystack prose is too short: [\d,]+ tokens, but .* --haystack FILE"):
        build(haystack, tokenizer, length=len(haystack.tokens) + 500)


def test_length_without_room_for_a_haystack_is_refused(haystack, tokenizer):
    with pytest.raises(ValueError, match="length 30 leaves no room"):
        build(haystack, tokenizer, length=30)


def test_empty_haystack_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no text in it"):
        Haystack.from_texts(["", "  ", "\n\u3000\t"], tokenizer, "nothing")


@pytest.mark.parametrize("length", [160, 256, 512, 1500])
def test_needles_lie_where_they_are_meant_and_between_sentences(haystack, tokenizer, length):
    """Within MAX_SHIFT of the depth, or a token: a small part of the distance between two rows."""
    depths = [10 * i for i in range(11)]
    prompts = [build(haystack, tokenizer, length=length, depth=d, seed=f"{d}/{i}") for d in depths for i in range(5)]
    for prompt, depth in zip(prompts, [d for d in depths for _ in range(5)], strict=True):
        size = prompt.needles[0].answer.start - 60  # at least this many tokens of haystack
        assert abs(prompt.needles[0].depth - depth) <= max(MAX_SHIFT, 100 * 1.5 / size)
    assert sum(prompt.on_boundary for prompt in prompts) >= 0.9 * len(prompts)


def test_further_needles_stand_between_sentences_too(haystack, tokenizer):
    prompts = [build(haystack, tokenizer, length=1200, needles=3, depth=10 * i, seed=str(i)) for i in range(11)]
    assert sum(prompt.on_boundary for prompt in prompts) >= 10
    for i, prompt in enumerate(prompts):
        depths = [needle.depth for needle in prompt.needles]
        assert depths == pytest.approx([10 * i, *((10 * i + 100 / 3 * k) % 100 for k in (1, 2))], abs=3)


def test_where_no_sentence_begins_at_the_depth_the_needle_breaks_one_and_says_so(tokenizer):
    haystack = Haystack.from_texts(["One two. " + "the road " * 400 + "the end. Last."], tokenizer, "long sentence")
    prompt = build(haystack, tokenizer, length=256, depth=50)
    assert prompt.needles[0].depth == pytest.approx(50, abs=0.5) and not prompt.on_boundary


def byte_level(texts, size, pattern=None):
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sentencepiece_like(characters):
    """Unigram pieces behind metaspaces, with digits and full stops in one piece, as SentencePiece makes them."""
    pairs = [a + b for a in characters for b in characters if a.isdigit() and b.isdigit()]
    stops = [a + "." for a in characters if a.isdigit()]
    pieces = [("<unk>", 0.0), *((c, -4.0) for c in ("\u2581", *characters)), *((p, -5.0) for p in (*pairs, *stops))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


@pytest.fixture(scope="module")
def numbers():
    rng = random.Random(0)
    years = [f"{prose(1, i)} In {rng.randrange(1000, 10000)}{rng.randrange(10)}." for i in range(300)]
    return [*years, "The magic number of the amber anchor is 12. " * 20, "0123456789 abcdefghijklmnopqrstuvwxyz TM" * 3]


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe across spaces", "bytes"])
def test_any_ordinary_tokenizer_can_ask_for_a_number(numbers, kind):
    """Also where a number has other tokens before a full stop, or shares a token with the word before it."""
    tokenizer = {
        "sentencepiece": lambda: sentencepiece_like(sorted(set("".join(numbers)) - {" "})),
        "bpe across spaces": lambda: byte_level(numbers, 600, pattern=r"\n"),
        "bytes": lambda: byte_level(numbers, 256),
    }[kind]()
    haystack = Haystack.from_texts(["\n".join(numbers)], tokenizer, "numbers")
    changed = 0
    for i in range(20):
        prompt = build_prompt(haystack, tokenizer, None, length=600, depth=5 * i, seed=str(i), needles=2, distractors=1)
        assert len(prompt.tokens) == 600
        text = tokenizer.decode(prompt.tokens)
        for needle in prompt.needles:
            answer = prompt.tokens[needle.answer]
            assert needle.number in tokenizer.decode(answer)
            assert sum(prompt.tokens[j : j + len(answer)] == answer for j in range(600)) == 2
            assert text.count(f"magic number of the {needle.key} is {needle.number}") == 2
        plain = tokenizer.encode(f"is {prompt.needles[0].number}.").ids
        changed += tokenizer.encode(f"is {prompt.needles[0].number}").ids != plain[:-1]
    assert changed or kind == "bytes"  # the tokenizer is of the difficult kind


def test_our_own_tokenizer_reads_needles_as_it_reads_any_text(haystack, tokenizer):
    prompt = build(haystack, tokenizer, needles=2)
    for needle in prompt.needles:
        fact = f" The magic number of the {needle.key} is {needle.number}."
        plain = tokenizer.encode(fact, add_special_tokens=False).ids
        assert prompt.tokens[needle.position :][: len(plain)] == plain


def test_a_tokenizer_without_digits_is_refused(haystack):
    letters = sentencepiece_like("abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(ValueError, match=r"the tokenizer cannot write the number \d{7}"):
        build_prompt(Haystack.from_texts(["abc " * 900], letters, "a"), letters, None, length=400, depth=5, seed="s")


@pytest.mark.parametrize(
    "text",  # sentences, between bars
    [
        "\u4eca\u5929\u4e0b\u96e8\u3002|\u4ed6\u8bf4\uff1a\u300c\u597d\uff01\u300d|\u8d70\u5427\uff1f|\u5929\u6674\u4e86",
        "\u0928\u092e\u0938\u094d\u0924\u0947\u0964| \u0915\u0948\u0938\u0947 \u0939\u0948\u0902?",
        "\u0647\u0644 \u0623\u0646\u062a\u061f| \u0646\u0639\u0645\u06d4| \u062e\u0648\u0628",
        "\u041e\u043d: \u00ab\u0414\u0430!\u00bb| \u0418 \u0443\u0448\u0451\u043b\u2026| \u0412\u0441\u0451.",
        'He said: ("Go!")| Version 3.14 is out.|\nNew line',
    ],
)
def test_sentences_of_other_scripts_are_told_apart(tokenizer, text):
    haystack = Haystack.from_texts([text.replace("|", "")], tokenizer, "text")
    pieces = [tokenizer.decode(piece).strip() for piece in np.split(haystack.tokens, haystack.starts[1:])]
    assert pieces == [sentence.strip() for sentence in text.split("|")]


@pytest.mark.parametrize("stop", ["\u3002", ""])
def test_windows_begin_anywhere_in_a_text_of_any_script(tokenizer, stop):
    """Also in one that has no ends of sentences at all."""
    rng = random.Random(0)
    text = "".join(chr(0x4E00 + i * 7 % 9000) + (stop if rng.random() < 0.1 else "") for i in range(3000))
    haystack = Haystack.from_texts([text], tokenizer, "chinese")
    begins = {haystack.window(500, random.Random(i)).start for i in range(20)}
    assert len(begins) > 15
    prompt = build(haystack, tokenizer, length=800, depth=50)
    assert prompt.on_boundary == bool(stop) and prompt.needles[0].depth == pytest.approx(50, abs=0.5)
    assert "\ufffd" not in tokenizer.decode(prompt.tokens[1 : prompt.needles[0].position])  # no character is broken


def test_sentence_ends_are_found_in_linear_time(tokenizer):
    start = time.process_time()
    Haystack.from_texts(["." * 200_000 + "\u3002" * 200_000 + " x" * 10], tokenizer, "dots", 1000)
    assert time.process_time() - start < 5
