"""RULER's tasks: prompts are as long as asked, hold their answers, and score as RULER's do."""

import argparse
import json
import os
import pickle
import random
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from eval import ruler, ruler_tasks, samples
from eval.haystack import Haystack, encode_each_inside, encode_inside
from eval.ruler import main, plan, summarise
from eval.ruler_tasks import TASKS, Maker, Reading, match
from s2.inference.folder import load_tokenizer
from s2.inference.prefill import PREFILL_CHUNK
from s2.model.transformer import Transformer
from tests.eval.small_checkpoint import make_checkpoint, prose

NEW = {"vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # tokens of the answer; of the others 128


def lexicon(count, seed=0):
    """Sentences of many different words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghiklmnoprstuvw", k=rng.randint(4, 7))) for _ in range(count)]
    return " ".join(f"{' '.join(words[i : i + 8])}." for i in range(0, count, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ruler") / "hf", max_length=2048, layers=1)


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    paragraphs = [
        {"context": f"{prose(6, i)} The keeper of house {i} is Mira{i}.",
         "qas": [{"question": f"Who keeps house {i}?", "answers": [{"text": f"Mira{i}"}, {"text": f"Mira{i}"}]},
                 {"question": "Who does not?", "answers": [], "is_impossible": True}]}
        for i in range(30)
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("squad") / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return file


@pytest.fixture(scope="module")
def maker(folder, squad):
    tokenizer = load_tokenizer(folder)
    haystack = Haystack.from_texts([prose(1500, 1), lexicon(2500)], tokenizer, "prose")
    return Maker(haystack, tokenizer, 0, Reading.load(squad))


@pytest.fixture(scope="module")
def bytewise():
    """A maker with a token for each byte, whatever version trains tokenizers."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(signs)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    haystack = Haystack.from_texts([prose(1500, 1), lexicon(2500)], tokenizer, "prose")
    paragraphs = [f"{prose(6, i)} The keeper of house {i} is Mira{i}." for i in range(30)]
    questions = [(f"Who keeps house {i}?", [f"Mira{i}"], i) for i in range(30)]
    return Maker(haystack, tokenizer, 0, Reading(paragraphs, questions, "squad"))


def ask(maker, task, length=2048, seed="s"):
    question = maker.make(task, length, seed)
    return question, maker.tokenizer.decode(question.tokens, skip_special_tokens=False)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1500, 2048])
def test_prompt_and_answer_together_have_exactly_the_length(maker, task, length):
    for seed in ("a", "b"):
        question, text = ask(maker, task, length, seed)
        assert len(question.tokens) == length - NEW.get(task, 128)
        assert question.tokens.count(0) == 1 and question.tokens[0] == 0  # one BOS
        assert text.rstrip() == text  # the answer's space is the model's to write
        if task != "fwe":
            assert all(expected in text for expected in question.expected)
    assert maker.make(task, length, "a") == maker.make(task, length, "a") != maker.make(task, length, "b")


@pytest.mark.parametrize(
    "task,facts,expected,number",
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}"),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_are_as_many_as_the_paper_has(maker, task, facts, expected, number):
    question, text = ask(maker, task)
    context, asked = text.rsplit("\n\nQuestion:", 1)
    found = re.findall(rf"The secret (?:number|code) of (\S+) is ({number})\.", context)
    assert len(found) == facts and len(question.expected) == len(set(question.expected)) == expected
    assert set(question.expected) <= {value for _, value in found}
    keys = {key for key, value in found if value in question.expected}
    assert all(asked.count(key) == 2 for key in keys) and len(keys) == (4 if task == "niah_multiquery" else 1)


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_has_the_asked_key_once(maker, task):
    question, text = ask(maker, task)
    context, asked = text.rsplit("\n\nQuestion:", 1)
    key = re.search(r"of (\S+) in the text", asked)[1]
    assert context.count(f" {key} ") == 1 and f"{key} is {question.expected[0]}." in context
    assert context.count("\nThe secret ") >= 20


def test_variables_form_one_chain_and_the_example_another(maker):
    question, text = ask(maker, "vt")
    example, own = text.split("Follow the chain of assignments.")[1:]
    value = re.search(r"hold the value (\d{5})", own)[1]
    pairs = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", own)
    assert pairs == list(zip(question.expected, [value, *question.expected[:-1]], strict=True)) and len(pairs) == 5
    assert len(re.findall(r"VAR [A-Z]{3} = ", example)) == 5
    assert not set(re.findall(r"[A-Z]{5}", example))


def test_common_words_come_more_often_than_all_others(maker):
    for length, often, seldom in ((2048, 6, 1), (8192, 30, 3)):
        question, text = ask(maker, "cwe", length)
        listed = re.findall(r"(\d+)\. ([a-z]+)", text.split("than others.")[2].split("\nQuestion")[0])
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, count in counts.items() if count == often} == set(question.expected)
        assert set(counts.values()) == {often, seldom} and len(question.expected) == 10
        assert not text.split("\nQuestion")[1].endswith("\n" * 30)  # filled up with words, not with line breaks


def test_coded_words_have_zipf_counts_and_the_three_most_frequent_are_asked(maker):
    question, text = ask(maker, "fwe")
    counts = Counter(re.findall(r"(?<= )[a-z]{6}(?= )", text.split("\n\n")[1]))
    top = counts.most_common(4)
    assert [word for word, _ in top[:3]] == question.expected and top[2][1] > top[3][1]
    assert top[0][1] / top[2][1] == pytest.approx(4, rel=0.2)  # ranks 2 and 4


def test_questions_come_with_their_own_paragraph_whole(maker):
    question, text = ask(maker, "qa")
    house = re.search(r"Who keeps house (\d+)\?\nAnswer:$", text)[1]
    assert question.expected == [f"Mira{house}"] and f"The keeper of house {house} is Mira{house}." in text
    assert len(re.findall(r"Document \d+:", text)) > 5


DIGESTS = {
    "niah_single_1": "c9816ce621f9b725",
    "niah_single_2": "996bbf9e1a90c19b",
    "niah_single_3": "73a5f3d656a44be6",
    "niah_multikey_1": "55b393f7f631de79",
    "niah_multikey_2": "f4e7bb2b18f7abeb",
    "niah_multikey_3": "67828d4d92344d8e",
    "niah_multivalue": "ee7e9bad39ccdec1",
    "niah_multiquery": "8de34f4a90e4bebd",
    "vt": "bd900e8cb9050d40",
    "cwe": "fc880b24f749e7ff",
    "fwe": "b18e49ee6a22e5ea",
    "qa": "3afdac3f5dff02da",
}


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_those_of_files_written_before(bytewise, task):
    """Another prompt needs another `_VERSION`: samples of two versions are not of one evaluation."""
    assert samples.digest([bytewise.make(task, n, "s").tokens for n in (3900, 9000)]) == DIGESTS[task]


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3", "cwe"])
def test_how_many_texts_are_encoded_at_once_changes_no_prompt(maker, task, monkeypatch):
    expected = maker.make(task, 1500, "s")
    for some in (1, 3):
        monkeypatch.setattr(ruler_tasks, "_AT_ONCE", some)
        maker._known.clear()
        assert maker.make(task, 1500, "s") == expected


@pytest.mark.parametrize("task", ["niah_multikey_2", "cwe", "fwe"])
def test_words_and_lines_of_a_prompt_are_not_encoded_one_by_one(maker, task, monkeypatch):
    maker._known.clear()
    calls = []
    monkeypatch.setattr(ruler_tasks, "encode_inside", lambda *args: calls.append(args) or encode_inside(*args))
    question = maker.make(task, 8192, "s")
    assert len(calls) * 50 < len(question.tokens)


@pytest.mark.parametrize("lead", ["a", "0"])
def test_texts_encoded_together_have_the_tokens_of_each_alone(folder, lead):
    """Also where a tokenizer joins the character before a text with the text."""
    tokenizer = load_tokenizer(folder)
    if lead == "0":  # "a" and what follows are one token
        vocab = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=vocab | {"ab": 256}, merges=[("a", "b")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = ["b", " river", "\nThe key is 7.", "bell bell", ""]
    assert encode_each_inside(tokenizer, texts) == [encode_inside(tokenizer, text)[0] for text in texts]
    assert encode_each_inside(tokenizer, ["b"]) == [tokenizer.encode("b", add_special_tokens=False).ids]


def test_answers_score_as_rulers_string_match_does():
    assert match("vt", " abcde and FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"]) == 0.5
    assert match("qa", "It was Paris.", ["paris", "the capital"]) == 1 and match("qa", "Rome", ["paris"]) == 0
    assert match("niah_single_1", " 12345678", ["1234567"]) == 1


def test_the_effective_length_is_the_last_before_the_first_below_the_threshold():
    def rows(scores):
        return [
            {**sample, "scores": {"match": score}}
            for length, score in scores.items()
            for sample in plan(["vt", "cwe"], [length], 2, 0)
        ]

    summary = summarise(rows({4096: 1.0, 8192: 0.95, 16384: 0.8, 32768: 0.9}))
    assert summary["effective"]["length"] == 8192 and summary["effective"]["relative_length"] == 8192
    assert [row["score"] for row in summary["lengths"]] == [100, 95, 80, 90]
    weak = summarise(rows({4096: 0.5, 8192: 0.48, 16384: 0.3}))["effective"]
    assert weak["length"] is None and weak["relative_length"] == 8192 and weak["threshold"] == 85.6
    assert summarise(rows({4096: 0.0}))["lengths"][0]["relative"] is None
    chance = summarise(rows({4096: 0.04, 8192: 0.06}))  # a share of so little is noise
    assert chance["effective"]["relative_length"] is None and chance["lengths"][1]["relative"] == 1.5
    assert "none at 90% of the score at 4k, which is below 10 and so near chance" in ruler.describe(chance)
    assert "none at" in ruler.describe(summarise(rows({4096: 0.5}))) and "chance" not in ruler.describe(summary)


def test_the_command_writes_every_answer_and_goes_on(folder, squad, tmp_path, capsys):
    (tmp_path / "essays.txt").write_text(f"{prose(300, 1)} {lexicon(1000)}")
    command = ["--ckpt", str(folder), "--haystack", str(tmp_path / "essays.txt"), "--device", "cpu", "--output",
               str(tmp_path / "out"), "--lengths", "800", "--tasks", "vt,qa", "--qa", str(squad)]  # fmt: skip
    main([*command, "--n", "1"])
    main([*command, "--n", "2"])
    assert "2 samples are there already, 2 to go" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/ruler-800-taskvt+qa-n2-essays-squad.json").read_text())
    assert [sample["id"] for sample in results["samples"]] == ["qa/800/0", "qa/800/1", "vt/800/0", "vt/800/1"]
    assert {"expected", "generated", "prompt", "scores"} <= set(results["samples"][0])
    assert results["samples"][0]["prompt_tokens"] == 800 - 32 and results["conditions"]["n"] == 4
    assert results["conditions"]["bos"].startswith("exactly one") and results["conditions"]["sampling"] is False
    assert {row["task"] for row in results["summary"]["tasks"]} == {"vt", "qa"}


def test_pieces_of_prompts_change_no_answer(folder, tmp_path, monkeypatch):
    (tmp_path / "essays.txt").write_text(prose(300, 1))
    command = ["--ckpt", str(folder), "--haystack", str(tmp_path / "essays.txt"), "--device", "cpu", "--lengths", "800"]
    command += ["--tasks", "niah_single_2", "--n", "1"]
    forward, widths = Transformer.forward, []
    monkeypatch.setattr(
        Transformer, "forward", lambda model, ids, **more: widths.append(ids.shape[1]) or forward(model, ids, **more)
    )
    found = []
    for more in ([], ["--prefill-chunk", "90"]):
        widths.clear()
        file = tmp_path / f"{len(more)}.json"
        main([*command, "--output", str(file), *more])
        found.append(json.loads(file.read_text())["samples"])
        assert max(widths) == 90 if more else 600 < max(widths) < PREFILL_CHUNK
    assert found[0] == found[1]


def test_prompts_made_in_other_processes_are_the_same(folder, maker, tmp_path, monkeypatch):
    made = pickle.loads(pickle.dumps(partial(ruler._questions, maker)))
    batch = [sample for task in TASKS for sample in plan([task], [1500], 1, 0)]
    assert made(batch) == ruler._questions(maker, batch)
    (tmp_path / "essays.txt").write_text(prose(300, 1))
    command = ["--ckpt", str(folder), "--haystack", str(tmp_path / "essays.txt"), "--device", "cpu", "--lengths", "800"]
    found, asked = [], []
    for count in (0, 1):
        monkeypatch.setattr(samples, "makers", lambda *_, count=count: asked.append(count) or count)
        main([*command, "--tasks", "niah_multikey_2,vt", "--n", "2", "--output", str(tmp_path / f"{count}.json")])
        found.append(json.loads((tmp_path / f"{count}.json").read_text())["samples"])
    assert found[0] == found[1] and asked == [0, 1]


@pytest.mark.parametrize("device,part,cores,count", [("cpu", None, 16, 0), ("cuda", None, 2, 1), ("cuda", None, 16, 4),
                                                     ("cuda", samples.Part(0, 8), 16, 1)])  # fmt: skip
def test_a_gpu_has_processes_beside_it_and_a_cpu_none(monkeypatch, device, part, cores, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    args, checkpoint = argparse.Namespace(part=part), SimpleNamespace(device=torch.device(device))
    assert samples.makers(args, checkpoint) == count


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--tasks", "vtt"], "--tasks vtt: expected some of niah_single_1, "),
        (["--tasks", "qa"], "--tasks qa: name its questions with --qa FILE"),
        (["--lengths", "4k"], "--lengths 4096: the checkpoint reads at most 2048 tokens"),
        (["--lengths", "200", "--tasks", "cwe"], r"--lengths 200: no room for cwe, which takes \d+ tokens at least"),
        (["--lengths", "100", "--tasks", "fwe"], "--lengths 100: no room for fwe"),
        (["--n", "0"], "--n 0: expected at least 1"),
        (["--qa", "essays.txt"], "--qa .*essays.txt: not in the form of SQuAD's files"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(folder, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "essays.txt").write_text(f"{prose(300, 1)} {lexicon(1000)}")
    with pytest.raises(ValueError, match=message):
        main(["--ckpt", str(folder), "--haystack", "essays.txt", "--device", "cpu", "--output", "out", *arguments])
    assert not (tmp_path / "out").exists()
