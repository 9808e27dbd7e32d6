"""The lm-eval model at the borders of tokens: answers that join their context, empty ones, options of generation."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer

from eval.adapter import S2LM
from eval.results import Answers
from eval.sampling import Sampling
from s2.inference import pool as pooling
from tests.eval.small_checkpoint import make_checkpoint, mark_words, prose


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("adapter") / "hf")


@pytest.fixture(scope="module")
def lm(folder):
    return S2LM(folder, device="cpu")


def score(lm, context, answer):
    return lm.loglikelihood([Instance("loglikelihood", {}, (context, answer), 0)], disable_tqdm=True)[0]


def generate(lm, options, prompts=1):
    requests = [Instance("generate_until", {}, (prose(2, 1), options), i) for i in range(prompts)]
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def marking(folder, tmp_path_factory):
    """The same model with a tokenizer that marks the beginning of a text, as SentencePiece does."""
    copy = tmp_path_factory.mktemp("marking") / "hf"
    shutil.copytree(folder, copy)
    mark_words(copy)
    return S2LM(copy, device="cpu")


@pytest.mark.parametrize("which", ["bytes", "marks"])
def test_an_answer_that_joins_its_context_is_scored_by_all_of_its_characters(lm, marking, which):
    model = lm if which == "bytes" else marking
    alone = model.tok_encode("the ri")
    assert model.tok_encode("the river")[: len(alone)] != alone
    head, answer = model.encoder.pair("the ri", "ver")
    assert head == alone and model.encoder.decode(head + answer).endswith("the river")
    expected = model._loglikelihood_tokens([(None, head, answer)], disable_tqdm=True)[0]
    assert score(model, "the ri", "ver") == expected and expected[0] < 0
    # where nothing joins, answers have the tokens that the whole text gives them
    head, answer = model.encoder.pair("the old", " river")
    assert head + answer == model.tok_encode("the old river") and head == model.tok_encode("the old")


def test_an_answer_without_a_token_is_refused(lm):
    with pytest.raises(ValueError, match=r"the answer '' after 'return sel' has no token"):
        score(lm, "return sel", "")
    with pytest.raises(ValueError, match=r"the answer '' after '' has no token"):
        score(lm, "", "")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_context_of_spaces_alone_is_no_context(lm, adds_bos):
    model = S2LM(lm.checkpoint, add_bos_token=adds_bos)
    assert score(model, "  ", "the river") == score(model, "", "  the river")
    assert len(generate(model, {"max_gen_toks": 3, "until": []})[0]) > 0
    assert model.generate_until([Instance("", {}, ("", {"max_gen_toks": 3}), 0)], disable_tqdm=True)


def test_token_ids_are_those_of_the_tokenizer_file_whatever_else_describes_it(lm, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(settings))
    other = S2LM(tmp_path / "hf", device="cpu")
    text = "The old  river, 12 boats\n\n<|eos|> near 大"
    assert other.tok_encode(text) == lm.tok_encode(text) == [0, *lm.checkpoint.tokenizer.encode(text).ids[1:]]
    assert 1 not in other.tok_encode(text)  # "<|eos|>" in a text is text, as in the shards


def test_a_chat_template_is_filled_in_and_its_special_tokens_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf/chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    model = S2LM(tmp_path / "hf", device="cpu")
    text = model.apply_chat_template([{"role": "user", "content": "the river"}])
    assert text == "<|bos|>the river<|eos|>"
    assert model.tok_encode(text) == [0, *model.tok_encode("the river", add_special_tokens=False), 1]


def test_every_id_that_ends_a_text_ends_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    first = S2LM(folder, device="cpu")
    said = first.checkpoint.generate([first.tok_encode(prose(2, 1))], 3)[0]
    (tmp_path / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [1, said[1]]}))
    assert said[1] != said[0]
    model = S2LM(tmp_path / "hf", device="cpu")
    assert generate(model, {"max_gen_toks": 3, "until": []}) == [first.checkpoint.tokenizer.decode(said[:1])]


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_a_spare_special_token_is_not(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    file = tmp_path / "hf/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    size = 512 - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|spare{i}|>" for i in range(size + 1)])
    tokenizer.save(str(file))
    model = S2LM(tmp_path / "hf", device="cpu")
    assert max(model.tok_encode(f"<|spare{size}|>")) < 512
    (tmp_path / "hf/chat_template.jinja").write_text("x")
    model.apply_chat_template([{"role": "user", "content": "the river"}])
    with pytest.raises(ValueError, match=rf"writes '<\|spare{size}\|>', for which the model of 512 tokens"):
        model.tok_encode(f"<|spare{size}|>")
    tokenizer.add_tokens(["riverboat"])
    tokenizer.save(str(file))
    with pytest.raises(ValueError, match=r"the tokenizer has token 513, and the model embeds 512 .*'riverboat'"):
        S2LM(tmp_path / "hf", device="cpu")


def test_options_of_generation_are_read_as_lm_eval_and_transformers_read_them():
    def read(**options):
        return Sampling.read(options)

    assert read() == read(temperature=0.0, do_sample=False, until=None) == read(do_sample=False, temperature=0.7)
    assert read(temperature=0.7).temperature == 0.7 and read(do_sample=True).temperature == 1.0
    assert read(do_sample=True, temperature=0) == read()
    assert read(until="a").until == ("a",) and read(max_new_tokens=3).max_new_tokens == 3
    assert read(num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0) == read()
    full = read(temperature=0.5, top_p=0.9, top_k=3, seed=7)
    assert (full.top_p, full.top_k, full.seed) == (0.9, 3, 7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repetition_penalty": 1.2}, r"repetition_penalty=1.2 is not supported; supported are until"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"typo": 1}, "typo=1 is not supported"),
        ({"until": 5}, "until=5: expected a text"),
        ({"temperature": "hot"}, "temperature='hot': expected a number"),
        ({"temperature": -1, "do_sample": True}, "temperature=-1.0 must be 0"),
        ({"temperature": 1, "top_p": 2}, "top_p=2.0 must be"),
        ({"temperature": 1, "top_k": 1.5}, "top_k=1.5: expected a whole number of at least 0"),
        ({"temperature": 1, "seed": -1}, "seed=-1: expected a whole number"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: expected a whole number of at least 1"),
        ({"max_gen_toks": 2.5}, "max_gen_toks=2.5: expected a whole number of at least 1"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks=inf: expected a number"),
        ({"temperature": float("nan")}, "temperature=nan: expected a number"),
    ],
)
def test_options_that_are_not_implemented_or_out_of_range_are_refused(lm, options, words):
    with pytest.raises(ValueError, match=words):
        generate(lm, options)


def test_a_seed_repeats_what_is_drawn_and_repeated_requests_differ(lm):
    options = {"temperature": 2.0, "top_k": 50, "seed": 3, "max_gen_toks": 12, "until": []}
    texts = generate(lm, options, prompts=3)
    assert generate(lm, options, prompts=3) == texts and len(set(texts)) == 3
    assert generate(lm, options | {"seed": 4}, prompts=3) != texts
    assert len(set(generate(lm, options | {"top_k": 1}, prompts=2))) == 1


def test_full_memory_is_one_sentence_with_what_to_change(lm, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(lm.checkpoint.model.model, "forward", full)
    with pytest.raises(
        MemoryError, match=r"a batch of 1 x \d+ tokens does not fit into the memory of cpu; lower --max-l"
    ):
        score(lm, "the", " river")
    pairs = [Instance("loglikelihood", {}, ("the", " river"), i) for i in range(2)]
    with pytest.raises(MemoryError, match=r"a batch of 2 x \d+ tokens .* lower --batch-tokens, now 16384"):
        lm.loglikelihood(pairs, disable_tqdm=True)


def test_likelihoods_that_are_no_numbers_are_refused(lm, monkeypatch):
    monkeypatch.setattr(
        lm.checkpoint.model.lm_head, "forward", lambda hidden: torch.full((len(hidden), 512), torch.nan)
    )
    with pytest.raises(ValueError, match=r"likelihoods are not finite in torch.float32; evaluate in another --dtype"):
        score(lm, "the", " river")


class OnDevice(torch.Tensor):
    """Numbers of which none is on the host before `cpu()` has brought all of them there."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def item(self):
        raise AssertionError("waits for the device for one number")

    __bool__ = __float__ = tolist = item


def test_the_scores_of_a_batch_come_from_the_device_at_once(lm, monkeypatch):
    asked = [("the", " river"), ("a", " boat turns"), ("old", " wind")]
    requests = [Instance("loglikelihood", {}, args, i) for i, args in enumerate(asked)]
    expected = lm.loglikelihood(requests, disable_tqdm=True)
    compute = lm.checkpoint.log_likelihoods
    found = lambda *args: tuple(part.as_subclass(OnDevice) for part in compute(*args))  # noqa: E731
    monkeypatch.setattr(lm.checkpoint, "log_likelihoods", found)
    assert lm.loglikelihood(requests, disable_tqdm=True) == expected


def test_a_missing_checkpoint_file_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        S2LM(Path(tmp_path / "hf"), device="cpu")


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_an_interrupted_evaluation_goes_on_from_its_answers(lm, tmp_path, monkeypatch, kind):
    options = {"max_gen_toks": 4, "until": []}
    made = {
        "loglikelihood": lambda i: (prose(i % 4 * 6 + 1, i), " the river"),
        "loglikelihood_rolling": lambda i: (prose(i % 4 * 6 + 1, i),),
        "generate_until": lambda i: (prose(i % 4 * 6 + 1, i), options),
    }[kind]
    requests = [Instance(kind, {}, made(i), i) for i in range(8)]

    def model(answers=True):
        ours = S2LM(lm.checkpoint, max_length=64, batch_size=2)
        ours.answers = Answers(tmp_path, "table", {"fingerprint": "one"}) if answers else None
        return ours

    def run(ours):
        return getattr(ours, kind)(requests, disable_tqdm=True)

    expected = model(answers=False)
    results = run(expected)
    interrupted, calls = model(), []
    for name in ("_score_batch", "_generate_batch"):
        whole = getattr(interrupted, name)

        def until_interrupted(*args, whole=whole):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return whole(*args)

        monkeypatch.setattr(interrupted, name, until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
    interrupted.answers.close()
    file = tmp_path / ".unfinished" / "table.jsonl"
    file.write_text(file.read_text() + '["torn')  # by a kill
    resumed = model()
    assert 0 < len(resumed.answers) < len(requests)
    again = run(resumed)
    if kind == "loglikelihood":
        assert [greedy for _, greedy in again] == [greedy for _, greedy in results]
        again, results = ([value for value, _ in answers] for answers in (again, results))
    assert again == (results if kind == "generate_until" else pytest.approx(results, abs=1e-4))
    assert resumed.overflow_note() == expected.overflow_note()
    resumed.answers.discard()
    assert not file.exists() and len(model().answers) == 0


def test_answers_of_other_weights_are_not_used(tmp_path):
    first = Answers(tmp_path, "table", {"fingerprint": "one"})
    first.add("loglikelihood", ("a", "b"), (-1.0, True), None)
    first.close()
    assert Answers(tmp_path, "table", {"fingerprint": "one"}).get("loglikelihood", ("a", "b")) == ((-1.0, True), None)
    assert len(Answers(tmp_path, "table", {"fingerprint": "two"})) == 0


@pytest.fixture
def steps(monkeypatch):
    """A list that grows by one with each token that generation draws."""
    module, drawn = sys.modules["s2.inference.generate"], list[int]()  # the package has a function of this name
    draw = module._draw
    monkeypatch.setattr(module, "_draw", lambda *args: drawn.append(1) or draw(*args))
    return drawn


def test_a_batch_ends_when_each_row_has_ended_or_is_enough(folder, tmp_path, steps):
    """A row that said the end of text need not be told that it is enough."""
    shutil.copytree(folder, tmp_path / "hf")
    checkpoint = S2LM(folder, device="cpu").checkpoint
    rows = [checkpoint.tokenizer.encode(prose(4, seed)).ids[:15] for seed in (1, 2)]
    first, second = checkpoint.generate(rows, 3)
    assert first[1] not in (first[0], *second)
    (tmp_path / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [1, first[1]]}))
    steps.clear()
    said = S2LM(tmp_path / "hf", device="cpu").checkpoint.generate(rows, 100, lambda i, tokens: i == 1)
    assert said[0] == first[:1] and said[1][:3] == second and len(said[1]) == len(steps) == 8


@pytest.fixture
def caches(monkeypatch):
    """Rows and length of each cache that is made, for a pool or for one batch."""
    made, new_cache = [], pooling.new_cache
    for module in (pooling, sys.modules["s2.inference.generate"]):
        monkeypatch.setattr(module, "new_cache", lambda *args: made.append(args[1:]) or new_cache(*args))
    return made


def test_an_evaluation_makes_one_cache_for_all_batches_that_fit(lm, caches):
    """Prompts of unlike lengths are batches of their own."""
    asked = [(prose(sentences, seed=sentences), {"max_gen_toks": 4, "until": []}) for sentences in (1, 3, 2, 4)]
    texts = lm.generate_until([Instance("generate_until", {}, args, 0) for args in asked])
    assert len(caches) == 1
    assert texts == [lm.generate_until([Instance("generate_until", {}, args, 0)])[0] for args in asked]


def test_rows_that_grow_as_prompts_shrink_make_one_cache(lm, caches):
    """Of prompts that are no longer than a window a cache keeps all."""
    options = {"max_gen_toks": 4, "until": []}
    asked = [(prose(8), options)] + [(prose(3, seed=1), options)] * 3 + [(prose(1, seed=2), options)] * 9
    batches = S2LM(lm.checkpoint, batch_tokens=200)
    texts = batches.generate_until([Instance("generate_until", {}, args, 0) for args in asked])
    assert len(caches) == 1 and caches[0][0] > 3
    assert texts == [lm.generate_until([Instance("generate_until", {}, args, 0)])[0] for args in asked]
    assert S2LM(lm.checkpoint).generate_until([]) == []


@pytest.mark.parametrize("layout", ["dense", "L1V3+sink1"])
def test_prompts_are_continued_after_pieces_of_the_size_that_is_set(tmp_path, layout):
    path, widths = make_checkpoint(tmp_path / "hf", layout), []
    expected = generate(S2LM(path, device="cpu"), {"max_gen_toks": 6, "until": []})
    lm = S2LM(path, device="cpu", prefill_chunk=8)
    forward = lm.checkpoint.model.forward
    lm.checkpoint.model.forward = lambda ids, **more: widths.append(ids.shape[1]) or forward(ids, **more)
    assert generate(lm, {"max_gen_toks": 6, "until": []}) == expected
    assert len(lm.tok_encode(prose(2, 1))) > 16 and max(widths) == 8
    with pytest.raises(ValueError, match="prefill_chunk=8: the checkpoint is loaded already"):
        S2LM(lm.checkpoint, prefill_chunk=8)
    for wrong in ({"prefill_chunk": 0}, {"prefill_chunk": "all"}, {"batch_tokens": 2.5}, {"max_length": 32.5}):
        [(name, value)] = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number of at least 1"):
            S2LM(path, device="cpu", **wrong)


def test_a_stop_sequence_of_several_tokens_ends_generation(lm, steps):
    [text] = generate(lm, {"max_gen_toks": 40, "until": []})
    tokens = lm.tok_encode(text, add_special_tokens=False)
    stop = lm.checkpoint.tokenizer.decode(tokens[2:5])
    assert stop in text
    steps.clear()
    assert generate(lm, {"max_gen_toks": 40, "until": [stop]}) == [text.split(stop)[0]]
    assert len(steps) == 5
