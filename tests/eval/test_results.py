"""Result files of lm-eval tables: none replaces another's, and nothing is lost on the way to them."""

import json
import math
import os
import runpy
from importlib.metadata import version
from pathlib import Path

import pytest

from eval import lm as module
from eval.checkpoint import results_folder
from eval.lm import S2LM, evaluate, main
from eval.results import Conditions, checksum_of, is_current, write_results
from tests.eval.small_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("results") / "hf")


BASE = {
    "checkpoint": "/runs/demo/hf",
    "tasks": ("a",),
    "max_length": 256,
    "bos": "yes",
    "dtype": "float32",
    "on_overflow": "warn",
    "num_fewshot": None,
    "limit": None,
    "data": None,
    "heldout": None,
    "metadata": {},
}


def test_results_of_other_conditions_have_other_files():
    others = [
        {},
        {"checkpoint": "/other/demo/hf"},
        {"tasks": ("a", "b")},
        {"tasks": ("a", "b", "c", "d", "e")},
        {"tasks": ("a", "b", "c", "d", "f")},
        {"max_length": 128},
        {"bos": "no"},
        {"dtype": "bfloat16"},
        {"on_overflow": "error"},
        {"num_fewshot": 5},
        {"limit": 10},
        {"limit": 0.1},
        {"data": "/data"},
        {"heldout": "/books.txt"},
        {"metadata": {"max_seq_lengths": [128]}},
    ]
    names = [Conditions(**BASE | other).name for other in others]
    assert len(set(names)) == len(names)
    assert Conditions(**BASE).name == names[0]
    assert names[9].startswith("lm-a-5shot-") and names[11].startswith("lm-a-limit0.1-")


def results(fingerprint="one", content="x", **more):
    about = {"fingerprint": fingerprint, "lm_eval": "0.4"}
    return {"s2": about, "s2_files": {"name": "lm-a-0", "content": {"file": content}}, **more}


def test_results_of_other_weights_or_data_move_aside_and_the_same_are_replaced(tmp_path):
    for count, values in enumerate(
        [results(), results("two"), results("two", "y"), results("two", "y", samples={"a": []}), results("two", "y")]
    ):
        files = write_results(tmp_path, values, f"table {count}")
        assert json.loads(files[0].read_text()) == values and files[1].read_text() == f"table {count}"
    assert sorted(path.name for path in tmp_path.glob("*.md*")) == [
        "lm-a-0.md",
        "lm-a-0.md.1",  # other weights
        "lm-a-0.md.2",  # other data
        "lm-a-0.md.3",  # its samples would be lost; before it the same conditions, replaced
    ]
    assert (tmp_path / "lm-a-0.md.3").read_text() == "table 3"


def test_a_table_of_other_data_or_another_lm_eval_is_not_current(tmp_path):
    data = tmp_path / "test.jsonl"
    data.write_text("{}\n")
    name = "lm-a-0"

    def write(lm_eval=None):
        about = {"fingerprint": "one", "lm_eval": lm_eval or version("lm_eval")}
        content = {str(data): checksum_of(data), "of-the-hub": None}
        return write_results(tmp_path, {"s2": about, "s2_files": {"name": name, "content": content}}, "table")[0]

    assert is_current(file := write()) and not is_current(tmp_path / "lm-b-0.json")
    data.write_text("{}\n{}\n")
    assert not is_current(file) and is_current(write()) and not is_current(write("0.4"))


def test_a_table_of_a_folder_whose_texts_have_changed_is_not_current(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a river")
    for source in (texts, texts / "*.txt"):
        about = {"fingerprint": "one", "lm_eval": version("lm_eval")}
        content = {"name": "lm-a-0", "content": {str(source): checksum_of(source)}}
        file, _ = write_results(tmp_path / "out", {"s2": about, "s2_files": content}, "table")
        assert is_current(file) and checksum_of(source) is not None
        (texts / "a.txt").write_text(f"{(texts / 'a.txt').read_text()} of stones")
        assert not is_current(file)
    assert checksum_of(tmp_path / "nowhere") is None


def test_text_without_spaces_has_an_infinite_perplexity_per_word_and_finite_bits_per_byte(folder, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "河水流过石桥" * 60}, ensure_ascii=False) + "\n", encoding="utf-8")
    main(["--ckpt", str(folder), "--tasks", "s2_heldout", "--heldout", str(text), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "word_perplexity" in printed and "Infinity" in printed and f"held-out documents: {text}" in printed
    (file,) = (tmp_path / "out").glob("*.json")
    values = json.loads(file.read_text())["results"]["s2_heldout"]
    assert values["word_perplexity,none"] is None  # JSON has no infinity
    assert math.isfinite(values["bits_per_byte,none"]) and math.isfinite(values["byte_perplexity,none"])


def test_documents_without_text_are_named(folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(ValueError, match=r"s2_heldout: .*empty.jsonl has no document with text"):
        evaluate(S2LM(folder, device="cpu"), ["s2_heldout"], metadata={"heldout": str(tmp_path / "empty.jsonl")})


def test_what_is_wrong_is_said_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "S2LM", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("in the way")
    base = ["--ckpt", str(folder), "--tasks", "s2_passkey"]
    for arguments, error, words in (
        (["--output", str(tmp_path / "file")], OSError, f"{tmp_path}/file: cannot write there"),
        (["--tasks", ","], ValueError, "--tasks: no task is named"),
        (["--tasks", "s2_heldout"], FileNotFoundError, "--heldout FILE"),
        (["--heldout", str(tmp_path / "file")], ValueError, "only s2_heldout reads it"),
        (["--data-dir", str(tmp_path)], ValueError, "--data-dir"),
        (["--num-fewshot", "-1"], ValueError, "--num-fewshot -1"),
        (["--num-fewshot", "5"], ValueError, "--num-fewshot 5: s2_heldout, s2_passkey take no examples"),
    ):
        with pytest.raises(error, match=words):
            main([*base, *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], "'0': expected a number of documents, at least 1, or a fraction of them below 1"),
        (["--limit", "inf"], "'inf': expected a number of documents"),
        (["--limit", "some"], "'some': expected a number of documents"),
        (["--metadata", "{"], "'{': expected a JSON object such as"),
        (["--metadata", "[1]"], "expected a JSON object"),
    ],
)
def test_arguments_that_cannot_be_read_say_what_would_be_right(folder, capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        main(["--ckpt", str(folder), *arguments])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_the_numbers_are_printed_before_the_files_are_written(folder, tmp_path, monkeypatch, capsys):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_results", full_disk)
    with pytest.raises(OSError, match="No space left"):
        main(["--ckpt", str(folder), "--tasks", "s2_passkey", "--limit", "0.03", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "|s2_passkey|" in printed and "limit: 0.03" in printed and "BOS: yes" in printed


def test_the_command_ends_with_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.lm", "--ckpt", "runs/nowhere/hf"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("eval.lm", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: checkpoint runs/nowhere/hf: no such folder; expected")


def test_results_of_a_checkpoint_of_others_do_not_go_into_its_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign = Path("models/llama")
    foreign.mkdir(parents=True)
    (foreign / "config.json").write_text("{}")
    assert results_folder(foreign) == Path("runs/eval/models-llama/results")
    assert results_folder(Path("runs/eval/models-llama")) == Path("runs/eval/models-llama/results")
    os.rename(foreign, foreign.with_name("hf"))
    assert results_folder("models/hf") == Path(f"runs/eval/{tmp_path.name}-models/results")
    (Path("models") / "summary.json").write_text("{}")  # of a run, as earlier versions left it
    assert results_folder("models/hf") == results_folder("models/hf/") == Path("models/results")
    assert results_folder(folder) == folder.parent / "results"
    assert results_folder("runs/demo/extend-2k") == results_folder("runs/demo/extend-2k/hf")
