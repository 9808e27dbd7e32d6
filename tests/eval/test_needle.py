"""The needle sweep: scores mean what they say, an interrupted sweep goes on, wrong input stops at once."""

import importlib
import json
import random
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval import samples
from eval.checkpoint import Checkpoint, results_folder
from eval.grid import Grid, default_lengths, parse_depths, parse_lengths, result_stem
from eval.haystack import Haystack
from eval.needle import Prompts, main, run_sweep, score
from eval.needle_prompts import KINDS, build_prompt, filler
from eval.samples import place_in
from s2.inference.folder import bos_of, load_tokenizer
from tests.eval.small_checkpoint import make_checkpoint, prose


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("needle") / "hf")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack.from_texts([prose(300, 1)], tokenizer, "prose")


class Oracle:
    """Finds the number in the text before the question, as a perfect model would."""

    max_length = 2048

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls = 0

    def number(self, text):
        key = re.findall(r"magic number of the (\w+ \w+) is", text)[-1]
        return re.search(rf"the {key} is (\d{{7}})", text)[1]

    def generate(self, rows, max_new_tokens):
        return [self.go_on(tokens, max_new_tokens) for tokens in rows]

    def predict_last(self, rows, count):
        self.calls += len(rows)
        return [self.predict(tokens, count) for tokens in rows]

    def go_on(self, tokens, max_new_tokens):
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return self.tokenizer.encode(f" {self.number(text)}", add_special_tokens=False).ids[:max_new_tokens]

    def predict(self, tokens, count):
        said = []
        for i in range(len(tokens) - count, len(tokens)):
            text = self.tokenizer.decode(tokens[: i + 1], skip_special_tokens=False)
            question = text.rindex(" is") + len(" is")
            answer = self.tokenizer.encode(f" {self.number(text[:question])}", add_special_tokens=False).ids
            done = len(self.tokenizer.encode(text[question:], add_special_tokens=False).ids) if text[question:] else 0
            said.append(answer[done] if done < len(answer) else 0)
        return said


class Guesser(Oracle):
    """Says random tokens."""

    def go_on(self, tokens, max_new_tokens):
        return [random.Random(tokens[-5]).randrange(3, 512) for _ in range(max_new_tokens)]

    def predict(self, tokens, count):
        return random.Random(sum(tokens)).choices(range(3, 512), k=count)


class OneDigitOff(Oracle):
    """Retrieves all but the last token of the number."""

    def predict(self, tokens, count):
        return [*super().predict(tokens, count)[:-1], 5]

    def go_on(self, tokens, max_new_tokens):
        return [*super().go_on(tokens, max_new_tokens)[:-1], 5]


def sweep(reader, tokenizer, haystack, file, grid=None, **options):
    grid = grid or Grid((200, 300), (0.0, 50.0, 100.0), 2)
    about = {"checkpoint": "test", "fingerprint": options.pop("fingerprint", "f"), "train_length": 256}
    return run_sweep(reader, Prompts(haystack, tokenizer, bos_of(tokenizer), grid), file, about, **options)


def header(about, prompts):
    return {"kind": "needle", **about, "settings": prompts.settings()}


def mean(results, name):
    values = [sample["scores"][name] for sample in results["samples"]]
    return sum(values) / len(values)


@pytest.mark.parametrize("needles,distractors", [(1, 0), (1, 5), (3, 2)])
def test_a_perfect_reader_scores_one_everywhere(tokenizer, haystack, tmp_path, needles, distractors):
    grid = Grid((400, 500), (0.0, 50.0, 100.0), 2, needles, distractors)
    results = sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "needle.json", grid)
    assert len(results["samples"]) == 12
    assert [mean(results, name) for name in ("exact", "partial", "generated")] == [1, 1, 1]


def test_a_guessing_reader_scores_zero(tokenizer, haystack, tmp_path):
    results = sweep(Guesser(tokenizer), tokenizer, haystack, tmp_path / "needle.json")
    assert mean(results, "exact") == mean(results, "generated") == 0
    assert mean(results, "partial") < 0.2


def test_one_wrong_digit_fails_exact_but_counts_in_part(tokenizer, haystack):
    prompt = build_prompt(haystack, tokenizer, 0, length=300, depth=50, seed="s")
    [record] = score(OneDigitOff(tokenizer), tokenizer, [prompt])
    tokens = prompt.needles[0].answer.stop - prompt.needles[0].answer.start
    assert record["scores"] == {"exact": 0, "partial": pytest.approx(1 - 1 / tokens), "generated": 0}
    assert record["expected"] == prompt.needles[0].number != record["generated"].strip()
    assert record["predicted"].strip() != record["expected"]


def test_records_say_where_what_and_which_seed(tokenizer, haystack, tmp_path):
    results = sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "needle.json")
    sample = results["samples"][-1]
    assert {"id", "length", "depth", "index", "seed", "needles", "expected", "generated", "scores"} <= set(sample)
    assert {"key", "number", "position", "depth"} == set(sample["needles"][0])
    assert json.loads((tmp_path / "needle.json").read_text()) == results


def test_an_interrupted_sweep_keeps_what_it_had_and_goes_on(tokenizer, haystack, tmp_path):
    file = tmp_path / "needle.json"

    class Interrupted(Oracle):
        def predict(self, tokens, count):
            if self.calls > 5:
                raise KeyboardInterrupt
            return super().predict(tokens, count)

    with pytest.raises(KeyboardInterrupt):
        sweep(Interrupted(tokenizer), tokenizer, haystack, file)
    assert len(json.loads(file.read_text())["samples"]) == 5
    reader = Oracle(tokenizer)
    resumed = sweep(reader, tokenizer, haystack, file)
    assert reader.calls == 12 - 5
    whole = sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "whole.json")
    assert sorted(resumed["samples"], key=str) == sorted(whole["samples"], key=str)


def test_the_file_is_whole_and_current_at_every_moment_of_a_sweep(tokenizer, haystack, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_WRITE_EVERY_SECONDS", 0.0)
    seen = []

    class Watching(Oracle):
        def predict(self, tokens, count):
            if (tmp_path / "needle.json").exists():
                seen.append(len(json.loads((tmp_path / "needle.json").read_text())["samples"]))
            return super().predict(tokens, count)

    sweep(Watching(tokenizer), tokenizer, haystack, tmp_path / "needle.json")
    assert seen == list(range(1, 12))
    assert [file.name for file in tmp_path.iterdir()] == ["needle.json"]


def test_more_samples_extend_a_finished_sweep(tokenizer, haystack, tmp_path):
    sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "needle.json")
    reader = Oracle(tokenizer)
    grid = Grid((200, 300), (0.0, 50.0, 100.0), 3)
    results = sweep(reader, tokenizer, haystack, tmp_path / "needle.json", grid)
    assert len(results["samples"]) == 18 and reader.calls == 6


def test_samples_without_generation_are_run_again_when_it_is_wanted(tokenizer, haystack, tmp_path):
    file = tmp_path / "needle.json"
    results = sweep(Oracle(tokenizer), tokenizer, haystack, file, generate=False)
    assert "generated" not in results["samples"][0]["scores"]
    assert mean(sweep(Oracle(tokenizer), tokenizer, haystack, file), "generated") == 1


def test_results_of_earlier_weights_are_set_aside_not_mixed(tokenizer, haystack, tmp_path, capsys):
    sweep(Guesser(tokenizer), tokenizer, haystack, tmp_path / "needle.json")
    (tmp_path / "needle.png").write_bytes(b"old")
    about = {"checkpoint": "test", "fingerprint": "other", "train_length": 256}
    prompts = Prompts(haystack, tokenizer, bos_of(tokenizer), Grid((200, 300), (0.0, 50.0, 100.0), 2))
    with pytest.raises(ValueError, match=r"needle\.json is of another checkpoint, haystack or kind of prompt"):
        sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "needle.json", fingerprint="other")
    file = place_in(tmp_path, "needle", header(about, prompts))
    results = run_sweep(Oracle(tokenizer), prompts, file, about)
    assert file == tmp_path / "needle.json" and mean(results, "exact") == 1 and len(results["samples"]) == 12
    assert mean(json.loads((tmp_path / "needle.json.1").read_text()), "exact") == 0
    assert (tmp_path / "needle.png.1").read_bytes() == b"old"
    assert "is of an earlier checkpoint; kept as needle.json.1" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["haystack", "dtype", "checkpoint", "seed"])
def test_another_sweep_of_the_same_name_goes_to_a_file_of_its_own(tokenizer, haystack, tmp_path, change):
    about = {"checkpoint": "test", "fingerprint": "f", "dtype": "bfloat16"}
    prompts = Prompts(haystack, tokenizer, bos_of(tokenizer), Grid((200,), (0.0, 50.0, 100.0), 1))
    first = place_in(tmp_path, "needle", header(about, prompts))
    run_sweep(Oracle(tokenizer), prompts, first, about)
    before = first.read_bytes()
    if change == "haystack":
        prompts = replace(prompts, haystack=Haystack.from_texts([prose(300, 2)], tokenizer, "prose"))
    elif change == "seed":
        prompts = replace(prompts, grid=Grid((200,), (0.0, 50.0, 100.0), 1, seed=1))
    else:
        about[change] = {"dtype": "float32", "checkpoint": "another"}[change]
    second = place_in(tmp_path, "needle", header(about, prompts))
    assert second != first and re.fullmatch(r"needle-[0-9a-f]{6}\.json", second.name)
    reader = Oracle(tokenizer)
    results = run_sweep(reader, prompts, second, about)
    assert reader.calls == len(results["samples"]) == 3  # nothing of the other sweep was taken over
    assert first.read_bytes() == before
    assert place_in(tmp_path, "needle", header(about, prompts)) == second


def test_a_file_that_is_no_needle_result_is_left_alone(tokenizer, haystack, tmp_path):
    file = tmp_path / "needle.json"
    for content in ("[1]", '{"kind": "other"}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"needle\.json is no needle result file"):
            sweep(Oracle(tokenizer), tokenizer, haystack, file)
        assert file.read_text() == content


def test_a_sweep_takes_over_the_samples_that_another_of_the_same_kind_has(tokenizer, haystack, tmp_path):
    sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "needle-n1.json", Grid((200,), (0.0, 100.0), 1))
    reader = Oracle(tokenizer)
    results = sweep(reader, tokenizer, haystack, tmp_path / "needle.json", Grid((200,), (0.0, 100.0), 3))
    assert reader.calls == 4 and len(results["samples"]) == 6


def test_a_quick_look_into_the_same_file_leaves_the_full_sweep_there(tokenizer, haystack, tmp_path):
    full = sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "n.json")
    quick = sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "n.json", Grid((200,), (0.0, 100.0), 1))
    assert quick["samples"] == full["samples"]


def test_every_cell_has_its_interval_and_n(tokenizer, haystack, tmp_path):
    results = sweep(Guesser(tokenizer), tokenizer, haystack, tmp_path / "needle.json", Grid((200,), (0.0, 100.0), 5))
    summary = results["summary"]["exact"]
    assert summary["cells"][0] == {"length": 200, "depth": 0, "score": 0, "n": 5, "interval": [0, 0.4345]}
    assert summary["mean"] == 0 and summary["interval"] == [0, 0.2775] and summary["interval_kind"] == "Wilson, 95 %"
    assert set(results["summary"]) == {"exact", "partial", "generated"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8589934592"),
                                   RuntimeError("another")], ids=["cuda", "cpu", "other"])  # fmt: skip
def test_running_out_of_memory_keeps_the_shorter_lengths(tokenizer, haystack, tmp_path, error):
    class Small(Oracle):
        def predict(self, tokens, count):
            if len(tokens) > 250:
                raise error
            return super().predict(tokens, count)

    kind, said = (
        (RuntimeError, "another")
        if str(error) == "another"
        else (MemoryError, "--lengths 300: no room for so .*lower --batch-tokens or")
    )
    with pytest.raises(kind, match=said):
        sweep(Small(tokenizer), tokenizer, haystack, tmp_path / "needle.json")
    assert {sample["length"] for sample in json.loads((tmp_path / "needle.json").read_text())["samples"]} == {200}


def run(folder, tmp_path, *arguments):
    text = tmp_path / "haystack.txt"
    text.write_text(prose(200, 3))
    main(["--ckpt", str(folder), "--device", "cpu", "--haystack", str(text), *arguments])


def test_command_line_writes_json_and_heatmap_of_a_real_model(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--lengths", "128,256", "--depths", "3", "--output", str(out)]
    run(folder, tmp_path, *arguments, "--n", "2", "--score", "partial")
    file = out / "needle-128+256-d3-n2-haystack.json"
    results = json.loads(file.read_text())
    assert len(results["samples"]) == 12 and results["train_length"] == 256
    assert (out / "needle-128+256-d3-n2-haystack.partial.png").stat().st_size > 10_000
    assert "n = 2 per cell" in capsys.readouterr().out
    before = file.read_bytes()
    run(folder, tmp_path, *arguments, "--n", "1", "--no-generate")  # a quick look
    assert file.read_bytes() == before
    assert (out / "needle-128+256-d3-n1-haystack-no-generate.png").exists()
    quick, whole = (json.loads((out / name).read_text())["conditions"]["scoring"] for name in (
        "needle-128+256-d3-n1-haystack-no-generate.json", "needle-128+256-d3-n2-haystack.json"
    ))  # fmt: skip
    assert "generation" not in quick and whole == f"{quick}; greedy generation where that is not right"


def test_results_go_to_the_file_that_is_named(folder, tmp_path):
    run(
        folder, tmp_path, "--lengths", "128", "--depths", "0,100", "--n", "1", "--output", str(tmp_path / "before.json")
    )
    assert len(json.loads((tmp_path / "before.json").read_text())["samples"]) == 2
    assert (tmp_path / "before.png").stat().st_size > 10_000


def test_a_model_is_measured_beyond_its_length_where_that_is_asked_for(folder, tmp_path):
    """The line of the heatmap and the record stay at the length that the model was trained on."""
    text = tmp_path / "haystack.txt"
    text.write_text(prose(200, 3))
    command = ["--ckpt", str(folder), "--lengths", "256,512", "--depths", "0,100", "--n", "1", "--device", "cpu"]
    main([*command, "--haystack", str(text), "--output", str(tmp_path / "needle.json"), "--beyond"])
    results = json.loads((tmp_path / "needle.json").read_text())
    assert {sample["length"] for sample in results["samples"]} == {256, 512} and results["train_length"] == 256
    assert {"exact", "generated"} <= set(results["samples"][-1]["scores"])


def test_teacher_forcing_and_generation_agree_on_a_real_model(folder, haystack, tokenizer):
    """Fed its own greedy continuation as the answer, the model must score it as exact."""
    checkpoint = Checkpoint.load(folder, "cpu")
    prompt = build_prompt(haystack, tokenizer, 0, length=250, depth=40, seed="s")
    where = prompt.needles[0].answer
    [said] = checkpoint.generate([prompt.tokens[: where.start]], where.stop - where.start)
    tokens = [*prompt.tokens[: where.start], *said]
    assert checkpoint.predict_last([tokens[:-1]], len(said)) == [said]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_exactly_as_long_as_asked_and_can_be_answered(tokenizer, haystack, tmp_path, kind):
    grid = Grid((600, 700), (0.0, 50.0, 100.0), 2, kind=kind)
    text = filler(tokenizer, 700) if kind == "passkey" else haystack
    prompts = Prompts(text, tokenizer, 0, grid)
    for sample in grid.samples():
        prompt = prompts.build(sample)
        assert len(prompt.tokens) == sample["length"] and len(prompt.needles) == KINDS[kind].needles
        words = tokenizer.decode(prompt.tokens, skip_special_tokens=False)
        context, question = words.rsplit("\n\n", 1)
        for needle in prompt.needles:
            assert tokenizer.decode(prompt.tokens[needle.answer]).strip() == needle.number
            assert words.count(needle.number) == (3 if kind == "passkey" else 2)
            assert context.count(f"{needle.key} is {needle.number}") == 1 or kind == "passkey"
        asked = prompt.needles[0].key.split()
        facts = re.findall(r"of the (\w+) (\w+) is", context)
        others = [fact for fact in facts if list(fact) != asked]
        assert len(others) == KINDS[kind].distractors + (3 if kind == "multi-query" else 0)
        if kind == "distractors":
            assert all((fact[0] == asked[0]) + (fact[1] == asked[1]) == 1 for fact in others)
        if kind == "multi-value":
            said = re.findall(r"\d{7}", question)
            assert said == re.findall(r"\d{7}", context) and len(said) == 4


def test_a_reader_of_many_values_scores_each(tokenizer, haystack, tmp_path):
    """Half of four values right are half of a point."""
    prompt = build_prompt(haystack, tokenizer, 0, length=600, depth=30, seed="s", needles=4, kind="multi-value")

    class TwoOfFour:
        def predict_last(self, rows, count):
            said = prompt.tokens[-count:]
            for needle in prompt.needles[:2]:
                said[needle.answer.stop - 1 - len(prompt.tokens)] = 1
            return [said]

    [record] = score(TwoOfFour(), tokenizer, [prompt], generate=False)
    assert record["scores"]["exact"] == 0.5 and 0.5 < record["scores"]["partial"] < 1
    right = [said.strip() == needle.number for said, needle in zip(record["predicted"], prompt.needles, strict=True)]
    assert right == [False, False, True, True]


@pytest.mark.parametrize("way", [pytest.param("processes", marks=pytest.mark.nightly), "parts"])
def test_samples_split_over_processes_are_those_of_one(folder, tmp_path, way):
    command = ["--lengths", "128,200", "--depths", "0,100", "--n", "2", "--kind", "multi-key"]
    name = "needle-multi-key-128+200-d2-n2-haystack.json"
    run(folder, tmp_path, *command, "--output", str(tmp_path / "one"))
    split = [*command, "--batch-tokens", "256", "--output", str(tmp_path / "split")]
    if way == "processes":
        run(folder, tmp_path, *split, "--processes", "2")
    else:
        run(folder, tmp_path, *split, "--part", "2/2")
        assert not (tmp_path / "split" / name).exists()
        run(folder, tmp_path, *split, "--part", "1/2")
        run(folder, tmp_path, *split)
    one, both = (json.loads((tmp_path / out / name).read_text()) for out in ("one", "split"))
    for results in (one, both):
        del results["seconds"]
    assert one == both and one["conditions"]["n"] == 8 and len(one["conditions"]["prompts"]) == 16
    assert one["conditions"]["bos"].startswith("exactly one (") and one["conditions"]["cut"] == 0
    assert not list((tmp_path / "split/.unfinished").glob("needle*"))


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (["--lengths", "128", "--kind", "many"], ValueError, "--kind many: expected single, multi-key, "),
        (["--lengths", "128", "--kind", "passkey"], ValueError, "--kind passkey has a haystack of its own"),
        (["--lengths", "128", "--kind", "distractors", "--needles", "2"], ValueError, "distractors asks for one"),
        (["--lengths", "128", "--processes", "2", "--part", "1/2"], ValueError, "a part is one process's"),
        (["--lengths", "128", "--processes", "0"], ValueError, "--processes 0: expected at least 1"),
        (["--lengths", "512"], ValueError, r"--lengths 512: the checkpoint reads at most 256 tokens"),
        (["--lengths", "128", "--n", "0"], ValueError, "--n 0: expected at least 1"),
        (["--lengths", ""], ValueError, "--lengths : '' is no length"),
        (["--lengths", "2x"], ValueError, "--lengths 2x: '2x' is no length; write a number of tokens like 2048 or 2k"),
        (["--lengths", "128", "--depths", "0,150"], ValueError, "--depths 150: a depth is a percentage"),
        (["--lengths", "128", "--depths", "0,x"], ValueError, "--depths 0,x: expected a number of depths, or percents"),
        (["--lengths", "128", "--depths", "1"], ValueError, "--depths 1: at least 2"),
        (
            ["--lengths", "128", "--depths", "101"],
            ValueError,
            "depths: 101 depths cannot be told apart at 128 tokens",
        ),
        (["--lengths", "50"], ValueError, "length 50 leaves no room for a haystack"),
        (["--lengths", "128", "--needles", "2000"], ValueError, "--needles 2000 --distractors 0: there are names for"),
        (["--lengths", "128", "--train-length", "long"], ValueError, "--train-length: 'long' is no length"),
        (["--lengths", "128", "--score", "generated", "--no-generate"], ValueError, "drop --no-generate"),
        (
            ["--lengths", "128", "--ckpt", "nowhere/hf"],
            FileNotFoundError,
            "checkpoint nowhere/hf: no such folder",
        ),
    ],
)
def test_wrong_arguments_stop_before_any_work(folder, tmp_path, arguments, error, message):
    text = tmp_path / "haystack.txt"
    text.write_text(prose(200, 3))
    base = [
        "--ckpt",
        str(folder),
        "--haystack",
        str(text),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
    ]
    with pytest.raises(error, match=message):
        main([*base, *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["needle", "lm", "heatmap", "report.__main__"])
def test_an_empty_output_is_not_the_current_folder(name, folder, capsys):
    module = importlib.import_module(f"eval.{name}")
    with pytest.raises(SystemExit):
        module.main(["--ckpt", str(folder), "--output", ""] if name in ("needle", "lm") else ["x", "--output", ""])
    assert "argument --output: the name is empty" in capsys.readouterr().err


def test_short_haystack_and_missing_heldout_say_what_to_do(folder, tmp_path):
    text = tmp_path / "haystack.txt"
    text.write_text("Too short.")
    base = ["--ckpt", str(folder), "--lengths", "128", "--device", "cpu", "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"haystack haystack.txt has only \d+ tokens; give a longer one"):
        main([*base, "--haystack", str(text)])
    with pytest.raises(
        FileNotFoundError, match=r"no held-out shards near it .* --haystack FILE \(make: HELDOUT=FILE\)$"
    ):
        main(base)


def test_checkpoint_without_weights_or_tokenizer_is_named(folder, tmp_path):
    broken = tmp_path / "hf"
    broken.mkdir()
    base = ["--ckpt", str(broken), "--lengths", "128", "--output", str(tmp_path / "out")]
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        main(base)
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors weights"):
        main(base)


def test_lengths_and_output_default_to_the_models_and_the_runs_own():
    assert default_lengths(32768) == (4096, 8192, 16384, 32768)
    assert default_lengths(600) == (300, 600) and default_lengths(128) == (128,)
    assert results_folder("runs/demo/extend-2k/hf") == Path("runs/demo/extend-2k/results")
    assert results_folder("models/llama") == Path("models/llama/results")


def test_names_of_results_say_what_differs_from_the_defaults():
    def stem(depths="11", n=5, lengths=(256, 512), haystack=None, tokens=None, generate=True, **more):
        return result_stem(Grid(lengths, parse_depths(depths), n, **more), 512, haystack, tokens, generate)

    assert stem() == "needle"
    assert stem(n=1, seed=3, generate=False) == "needle-n1-seed3-no-generate"
    assert stem(lengths=(512, 2048), depths="0,33.3") == "needle-512+2k-depth0+33.3"
    assert stem(depths="35", haystack=Path("a b/my essays.jsonl.gz"), tokens=65536) == "needle-d35-my_essays-of-64k"
    many = {stem(lengths=tuple(range(256, 256 + 10 * i, 10))) for i in (8, 9)}
    assert len(many) == 2 and all(re.fullmatch(r"needle-[89]-lengths-[0-9a-f]{6}", name) for name in many)


def test_lengths_and_depths_are_read_as_written():
    assert parse_lengths("2k,512,1k,512") == (512, 1024, 2048)
    assert parse_lengths("1m") == (1 << 20,)
    assert parse_depths("5") == (0, 25, 50, 75, 100)
    assert parse_depths("0,33.3,100") == (0, 33.3, 100)
    assert parse_depths("100,50,50,0") == (0, 50, 100) and parse_depths("50,50") == parse_depths("50%") == (50,)
    assert Grid((512, 512), (50, 50), 1).lengths == (512,) and len(list(Grid((512, 512), (50, 50), 1).samples())) == 1
    for wrong in ("", "x", "nan", "0,inf", "1", "2.5", "-3"):
        with pytest.raises(ValueError, match="--depths"):
            parse_depths(wrong)
    for wrong in ("2x", "-5", "0", ""):
        with pytest.raises(ValueError, match="is no length"):
            parse_lengths(wrong)


def test_haystacks_and_folders_that_cannot_be_used_stop_before_the_sweep(folder, tmp_path):
    arguments = ["--lengths", "128", "--output", str(tmp_path / "out")]
    for content in ("", " \n \t ", " " * 5000):
        (tmp_path / "empty.txt").write_text(content)
        with pytest.raises(ValueError, match=r"empty\.txt"):
            run(folder, tmp_path, *arguments, "--haystack", str(tmp_path / "empty.txt"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/results: cannot write there"):
        run(folder, tmp_path, "--lengths", "128", "--output", str(tmp_path / "file" / "results"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_named(folder, tmp_path):
    copy = tmp_path / "hf"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ValueError, match=r"the tokenizer has token \d+, and the model embeds 300 .*another model's"):
        run(copy, tmp_path, "--lengths", "128", "--output", str(tmp_path / "out"))


@pytest.mark.parametrize(
    "command,message",
    [
        ("needle --ckpt FOLDER --lengths 4k", "--lengths 4096: the checkpoint reads at most 256 tokens"),
        ("heatmap nothing.json needle.png", "No such file or directory: 'nothing.json'"),
        ("report nowhere", "run nowhere: no such folder"),
        ("lm --ckpt FOLDER --tasks s2_passkey --batch-tokens 0", "batch_tokens=0 must be a whole number of at least 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_end_with_one_sentence(folder, monkeypatch, capsys, command, message):
    name, *arguments = command.replace("FOLDER", str(folder)).split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"eval.{name}", run_name="__main__")
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and said.startswith(f"error: {message}") and len(said.splitlines()) == 1
