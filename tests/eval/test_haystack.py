"""Prompts of the needle test: exact lengths, right places, nothing encoded twice."""

import re

import pytest

from eval.checkpoint import load_tokenizer
from eval.haystack import Haystack, build_prompt
from tests.eval.small_checkpoint import make_checkpoint, prose


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_checkpoint(tmp_path_factory.mktemp("haystack") / "hf"))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack.from_texts([prose(150, 1), prose(150, 2)], tokenizer, "prose")


def build(haystack, tokenizer, **options):
    return build_prompt(haystack, tokenizer, 0, **{"length": 400, "depth": 50, "seed": "s", **options})


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
        Haystack.from_texts(["", "  "], tokenizer, "nothing")
