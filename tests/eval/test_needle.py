"""The needle sweep: scores mean what they say, an interrupted sweep goes on, wrong input stops at once."""

import json
import random
import re
from pathlib import Path

import pytest

from eval import needle
from eval.checkpoint import Checkpoint, bos_of, load_tokenizer, results_folder
from eval.haystack import Haystack, build_prompt
from eval.needle import Grid, main, parse_depths, parse_lengths, run_sweep, score
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

    def generate(self, tokens, max_new_tokens):
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return self.tokenizer.encode(f" {self.number(text)}", add_special_tokens=False).ids[:max_new_tokens]

    def predict_last(self, tokens, count):
        self.calls += 1
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

    def generate(self, tokens, max_new_tokens):
        return [random.Random(tokens[-5]).randrange(3, 512) for _ in range(max_new_tokens)]

    def predict_last(self, tokens, count):
        self.calls += 1
        return random.Random(sum(tokens)).choices(range(3, 512), k=count)


class OneDigitOff(Oracle):
    """Retrieves all but the last token of the number."""

    def predict_last(self, tokens, count):
        return [*super().predict_last(tokens, count)[:-1], 5]

    def generate(self, tokens, max_new_tokens):
        return [*super().generate(tokens, max_new_tokens)[:-1], 5]


def sweep(reader, tokenizer, haystack, file, grid=None, **options):
    grid = grid or Grid((200, 300), (0.0, 50.0, 100.0), 2)
    about = {"checkpoint": "test", "fingerprint": options.pop("fingerprint", "f"), "train_length": 256}
    return run_sweep(reader, tokenizer, bos_of(tokenizer), haystack, grid, file, about, **options)


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
    record = score(OneDigitOff(tokenizer), tokenizer, prompt)
    tokens = prompt.needles[0].answer.stop - prompt.needles[0].answer.start
    assert record["scores"] == {"exact": 0, "partial": pytest.approx(1 - 1 / tokens), "generated": 0}
    assert record["expected"] == prompt.needles[0].number != record["generated"].strip()


def test_records_say_where_what_and_which_seed(tokenizer, haystack, tmp_path):
    results = sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "needle.json")
    sample = results["samples"][-1]
    assert {"id", "length", "depth", "index", "seed", "needles", "expected", "generated", "scores"} <= set(sample)
    assert {"key", "number", "position", "depth"} == set(sample["needles"][0])
    assert json.loads((tmp_path / "needle.json").read_text()) == results


def test_an_interrupted_sweep_keeps_what_it_had_and_goes_on(tokenizer, haystack, tmp_path):
    file = tmp_path / "needle.json"

    class Interrupted(Oracle):
        def predict_last(self, tokens, count):
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().predict_last(tokens, count)

    with pytest.raises(KeyboardInterrupt):
        sweep(Interrupted(tokenizer), tokenizer, haystack, file)
    assert len(json.loads(file.read_text())["samples"]) == 5
    reader = Oracle(tokenizer)
    resumed = sweep(reader, tokenizer, haystack, file)
    assert reader.calls == 12 - 5
    whole = sweep(Oracle(tokenizer), tokenizer, haystack, tmp_path / "whole.json")
    assert sorted(resumed["samples"], key=str) == sorted(whole["samples"], key=str)


def test_the_file_is_whole_and_current_at_every_moment_of_a_sweep(tokenizer, haystack, tmp_path, monkeypatch):
    monkeypatch.setattr(needle, "_WRITE_EVERY_SECONDS", 0.0)
    seen = []

    class Watching(Oracle):
        def predict_last(self, tokens, count):
            if (tmp_path / "needle.json").exists():
                seen.append(len(json.loads((tmp_path / "needle.json").read_text())["samples"]))
            return super().predict_last(tokens, count)

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


def test_results_of_another_checkpoint_are_set_aside_not_mixed(tokenizer, haystack, tmp_path, capsys):
    file = tmp_path / "needle.json"
    sweep(Guesser(tokenizer), tokenizer, haystack, file)
    results = sweep(Oracle(tokenizer), tokenizer, haystack, file, fingerprint="other")
    assert mean(results, "exact") == 1 and len(results["samples"]) == 12
    assert mean(json.loads((tmp_path / "needle.old1.json").read_text()), "exact") == 0
    assert "checkpoint differ" in capsys.readouterr().out


def test_command_line_writes_json_and_heatmap_of_a_real_model(folder, tmp_path, capsys):
    text = tmp_path / "haystack.txt"
    text.write_text(prose(200, 3))
    command = ["--ckpt", str(folder), "--lengths", "128,256", "--depths", "3", "--n", "2", "--device", "cpu"]
    command += ["--haystack", str(text), "--output", str(tmp_path / "out"), "--score", "partial"]
    main(command)
    results = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert len(results["samples"]) == 12 and results["train_length"] == 256
    assert (tmp_path / "out" / "needle.png").stat().st_size > 10_000
    assert "n = 2 per cell" in capsys.readouterr().out


def test_teacher_forcing_and_generation_agree_on_a_real_model(folder, haystack, tokenizer):
    """Fed its own greedy continuation as the answer, the model must score it as exact."""
    checkpoint = Checkpoint.load(folder, "cpu")
    prompt = build_prompt(haystack, tokenizer, 0, length=250, depth=40, seed="s")
    where = prompt.needles[0].answer
    said = checkpoint.generate(prompt.tokens[: where.start], where.stop - where.start)
    tokens = [*prompt.tokens[: where.start], *said]
    assert checkpoint.predict_last(tokens[:-1], len(said)) == said


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (["--lengths", "512"], ValueError, r"--lengths 512: the checkpoint reads at most 256 tokens"),
        (["--lengths", "128", "--n", "0"], ValueError, "--n 0: expected at least 1"),
        (["--lengths", "128", "--depths", "0,150"], ValueError, "--depths 150: a depth is a percentage"),
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


def test_short_haystack_and_missing_heldout_say_what_to_do(folder, tmp_path):
    text = tmp_path / "haystack.txt"
    text.write_text("Too short.")
    base = ["--ckpt", str(folder), "--lengths", "128", "--device", "cpu", "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"haystack haystack.txt has only \d+ tokens; give a longer one"):
        main([*base, "--haystack", str(text)])
    with pytest.raises(FileNotFoundError, match="no held-out shards near it"):
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
    assert needle.default_lengths(32768) == (4096, 8192, 16384, 32768)
    assert needle.default_lengths(600) == (300, 600) and needle.default_lengths(128) == (128,)
    assert results_folder("runs/demo/extend-2k/hf") == Path("runs/demo/extend-2k/results")
    assert results_folder("models/llama") == Path("models/llama/results")


def test_lengths_and_depths_are_read_as_written():
    assert parse_lengths("2k,512,1k,512") == (512, 1024, 2048)
    assert parse_lengths("1m") == (1 << 20,)
    assert parse_depths("5") == (0, 25, 50, 75, 100)
    assert parse_depths("0,33.3,100") == (0, 33.3, 100)
    for wrong in ("2x", "-5", "0", ""):
        with pytest.raises(ValueError, match="is no length"):
            parse_lengths(wrong)
