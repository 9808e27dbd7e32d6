"""Texts from a folder: prompts with one BOS, rows that end for a reason, text that streams as it is returned."""

import json
import shutil

import pytest
import torch

from s2.inference import ModelFolder, continue_texts, generate, stream_texts
from s2.inference.encoding import TextEncoder
from s2.inference.text import encode_prompts
from tests.eval.small_checkpoint import make_checkpoint, mark_words, prose

PROMPTS = ["The old river", prose(6, 3), "a\nboat"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("text") / "hf")


@pytest.fixture(scope="module")
def folder(path):
    return ModelFolder.load(path, "cpu")


@pytest.fixture
def changed(path, tmp_path):
    """A copy of the folder with other files in it, opened."""

    def change(**files):
        shutil.copytree(path, tmp_path / "hf", dirs_exist_ok=True)
        for name, content in files.items():
            file = tmp_path / "hf" / name.replace("__", ".")
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return ModelFolder.load(tmp_path / "hf", "cpu")

    return change


def plain(folder, prompt, count):
    ids = torch.tensor([TextEncoder(folder).encode(prompt)])
    return generate(folder.model, ids, count)[0].tolist()


def test_prompts_of_several_lengths_are_continued_as_if_alone(folder):
    said = continue_texts(folder, PROMPTS, 20)
    for prompt, each in zip(PROMPTS, said, strict=True):
        assert each == continue_texts(folder, [prompt], 20)[0]
        assert list(each.tokens) == plain(folder, prompt, 20) and each.reason == "length"
        assert each.text == folder.tokenizer.decode(each.tokens, skip_special_tokens=True)
        assert each.prompt_tokens == len(folder.tokenizer.encode(prompt).ids)


def test_a_text_is_what_its_tokens_add_to_the_text_of_the_prompt(tmp_path):
    folder = ModelFolder.load(mark_words(make_checkpoint(tmp_path / "hf")), "cpu")
    prompts = [prose(1, seed) for seed in range(6)]
    said = continue_texts(folder, prompts, 5)
    for prompt, each in zip(encode_prompts(folder, prompts), said, strict=True):
        before = folder.decoder.decode(prompt)
        assert before + each.text == folder.decoder.decode([*prompt, *each.tokens])
    assert any(each.text.startswith(" ") for each in said)
    apart = continue_texts(folder, prompts, 5, is_apart=True)
    assert [each.text for each in apart] == [folder.decoder.decode(each.tokens) for each in said]


def test_rows_end_by_a_token_that_ends_texts_by_a_stop_string_or_by_length(folder, changed):
    free = [continue_texts(folder, [prompt], 30)[0] for prompt in PROMPTS]
    eos = next(token for token in free[0].tokens[3:] if token not in (*free[1].tokens, *free[2].tokens))
    stop = next(
        text for n in range(3, len(free[1].text))
        if (text := free[1].text[n : n + 3]) and text not in free[0].text and text not in free[2].text
    )  # fmt: skip
    ends = changed(generation_config__json={"eos_token_id": [1, eos]})
    said = continue_texts(ends, PROMPTS, 30, stop=[stop])
    assert [each.reason for each in said] == ["eos", "stop", "length"]
    at = free[0].tokens.index(eos)
    assert said[0].tokens == free[0].tokens[: at + 1]
    assert said[0].text == folder.decoder.decode(free[0].tokens[:at])
    assert said[1].text == free[1].text[: free[1].text.index(stop)]
    needed = next(n for n in range(31) if stop in folder.decoder.decode(free[1].tokens[:n]).removesuffix("\ufffd"))
    assert said[1].tokens == free[1].tokens[:needed], "no token after the one that completes the stop string"
    assert said[2] == free[2]


def test_texts_stream_in_the_pieces_of_what_is_returned(folder):
    said = continue_texts(folder, PROMPTS, 30, stop=["e ", "12"])
    steps = list(stream_texts(folder, PROMPTS, 30, stop=["e ", "12"]))
    assert len(steps) == max(len(each.tokens) for each in said)
    for row, each in zip(zip(*steps, strict=True), said, strict=True):
        assert "".join(piece.text for piece in row) == each.text
        assert sum((piece.tokens for piece in row), ()) == each.tokens
        reasons = [piece.reason for piece in row]
        end = len(each.tokens) - 1
        assert reasons == [None] * end + [each.reason] * (len(steps) - end)
        assert not any(piece.text for piece in row[end + 1 :])
    assert any(piece.text for piece in next(iter(steps)))


def test_exactly_one_bos_stands_before_a_prompt(folder, tmp_path):
    assert encode_prompts(folder, ["the river"])[0][:2] != [0, 0] == encode_prompts(folder, ["the river"])[0][:1] * 2
    without = ModelFolder.open(make_checkpoint(tmp_path / "hf", adds_bos=False), "cpu")
    assert encode_prompts(without, ["the river"]) == [encode_prompts(folder, ["the river"])[0][1:]]
    assert encode_prompts(folder, [[7, 8]]) == [[7, 8]], "token ids are taken as they are"
    spelled = encode_prompts(folder, ["<|bos|><|eos|>"])[0]
    assert spelled.count(0) == 1 and 1 not in spelled, "text that spells a special token is text"


def test_chats_go_through_the_template_with_one_bos(folder, changed):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}it:{% endif %}"  # noqa: E501
    with_template = changed(chat_template__jinja=template)
    chat = [{"role": "user", "content": "the river"}]
    plain = TextEncoder(folder).encode("user:the river", with_bos=False)
    ids = encode_prompts(with_template, [chat, "the <|eos|>"])
    assert ids[0] == [0, *plain, 1, *TextEncoder(folder).encode("it:", with_bos=False)]
    assert 1 not in ids[1], "special tokens are read in what the template writes alone"
    without_bos = changed(chat_template__jinja=template.replace("{{ bos_token }}", ""))
    assert encode_prompts(without_bos, [chat]) == ids[:1]
    assert continue_texts(with_template, [chat], 5)[0].prompt_tokens == len(ids[0])
    strict = changed(chat_template__jinja="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="does not take these messages: roles must alternate"):
        encode_prompts(strict, [chat])
    joins = changed(chat_template__jinja="{{ messages[0].role + messages[0].content }}")
    with pytest.raises(ValueError, match="does not take these messages: can only concatenate str"):
        encode_prompts(joins, [[{"role": "user", "content": 5}]])
    with pytest.raises(ValueError, match="there is no chat template in it"):
        encode_prompts(folder, [chat])


def test_sampling_of_the_folder_is_what_its_file_says(folder, changed):
    assert folder.sampling == {"temperature": 0.0}
    assert changed(generation_config__json={"temperature": 0.6, "top_k": 3}).sampling == {"temperature": 0.0}
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "eos_token_id": 5}
    opened = changed(generation_config__json=said)
    assert opened.sampling == {"temperature": 0.6, "top_p": 0.9} and opened.eos_ids == (1, 5)
    assert changed(generation_config__json={"do_sample": True}).sampling == {"temperature": 1.0}
    assert changed(generation_config__json={"eos_token_id": 0}).eos_ids == (1, 0)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id='x' must be token ids"):
        changed(generation_config__json={"eos_token_id": "x"}).eos_ids  # noqa: B018
    with pytest.raises(ValueError, match=r"generation_config\.json: temperature='0\.7' must be a number"):
        changed(generation_config__json={"do_sample": True, "temperature": "0.7"}).sampling  # noqa: B018
    neutral = {"repetition_penalty": 1.0, "min_p": None, "num_beams": 1, "suppress_tokens": [], "use_cache": True}
    assert changed(generation_config__json=neutral).sampling == {"temperature": 0.0}
    for key, value in {"repetition_penalty": 1.1, "min_p": 0.05, "typical_p": 0.9, "suppress_tokens": [3]}.items():
        for said in ({"do_sample": True}, {}):  # penalties change what is likeliest
            with pytest.raises(ValueError, match=rf"generation_config\.json: {key}=.* is not supported; supported are"):
                changed(generation_config__json=said | {key: value}).sampling  # noqa: B018
    (opened.folder / "generation_config.json").unlink()
    bare = ModelFolder.open(opened.folder, "cpu")
    assert bare.sampling == {"temperature": 0.0} and bare.eos_ids == (1,)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "at least one prompt"),
        ("the river", {}, "prompts='the river' must be a list"),
        ("the river" * 99, {}, "prompts='the river.{,80} must be a list"),
        (["a", []], {}, "prompt 2 of 2 is empty"),
        (["a", [3, 1_000_000]], {}, "prompt 2 of 2 has token 1000000"),
        ([[-1, 3]], {}, "prompt 1 of 1 has token -1"),
        ([3, 4], {}, r"prompt 1 of 2 must be a text, a list of token ids or a chat \(a list of messages\), got 3"),
        ([{"role": "user", "content": "a"}], {}, "prompt 1 of 1 must be a text, .*got {'role': 'user'"),
        (["a", b"a"], {}, "prompt 2 of 2 must be a text, .*got b'a'"),
        (["a", [3, 1.5]], {}, r"prompt 2 of 2 must be a text, .*got \[3, 1\.5\]"),
        (["a", None], {}, "prompt 2 of 2 must be a text, .*got None"),
        (7, {}, "prompts=7 must be a list"),
        (["a"], {"stop": [7]}, r"stop=\[7\] must be a list of texts"),
        (["a"], {"max_new_tokens": 2.5}, r"max_new_tokens=2\.5 must be a whole number"),
        (["a"], {"stop": "x"}, "stop='x' must be a list of texts"),
        (["a"], {"stop": ["x", ""]}, "none of them empty"),
        (["a"], {"temperature": -1.0}, "temperature=-1.0"),
        (["a"], {"eos_token_id": 7}, "eos_token_id: a text ends at the tokens that its folder names"),
        (["a"], {"is_enough": all}, "is_enough: a text ends at those tokens and at its stop strings"),
        (["a"], {"temprature": 0.7}, "temprature: no such option; there are cache, generator"),
        (["a"], {"lengths": [1]}, "lengths: prompts are as long as they are"),
        (["a"], {"stop": 7}, "stop=7 must be a list of texts"),
        (["a", [True, False]], {}, r"prompt 2 of 2 must be a text, .*got \[True, False\]"),
        (["a", torch.tensor([True])], {}, "prompt 2 of 2 must be a text, .*got tensor"),
        (["a", "b\ud800"], {}, "holds half a character"),
        (["a"], {"max_new_tokens": 255}, "2 prompt tokens and max_new_tokens=255 make 257"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_it_begins(folder, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        next(stream_texts(folder, prompts, **{"max_new_tokens": 5, **options}))


def test_stop_strings_may_come_one_by_one_or_not_at_all(folder):
    texts = ["the river", "a"]
    some = continue_texts(folder, texts, 12)
    stop = next(said.text[1:3] for said in some if len(said.text) > 3)
    expected = continue_texts(folder, texts, 12, stop=[stop])
    assert expected != some and continue_texts(folder, texts, 12, stop=(text for text in [stop])) == expected
    assert continue_texts(folder, texts, 12, stop=None) == some


def test_a_folder_is_opened_before_its_texts_are_continued(folder):
    with pytest.raises(ValueError, match=r"must be a ModelFolder, as ModelFolder.load\(path\) opens it"):
        continue_texts(folder.folder, ["a"], 3)
