"""The command: texts as they come, JSON lines, and errors in one sentence before the weights are read."""

import io
import json
import os
import re
import shutil
import threading

import pytest
import torch

from s2 import ending
from s2.inference import KVCache, ModelFolder, continue_texts
from s2.inference.cli import main
from tests.eval.small_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "hf")


@pytest.fixture(scope="module")
def folder(path):
    return ModelFolder.load(path, "cpu")


@pytest.fixture
def run(path, capsys):
    def run(*words, ckpt=path):
        code = ending.call(lambda: main(["--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "12", *words]))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_one_prompt_is_streamed(run, folder, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *args, **options: pieces.append((args, options)))
    assert run("--prompt", "The old river")[0] == 0
    said = continue_texts(folder, ["The old river"], 12)[0]
    streamed = [args[0] for args, options in pieces if options.get("end") == ""]
    assert len(streamed) == 12 and "".join(streamed) == said.text
    assert all(options["flush"] for args, options in pieces)
    assert "--prompt: 12 tokens (prompt: 4) in" in pieces[-1][0][0]


def test_text_alone_goes_to_standard_output(run, folder):
    code, out, err = run("--prompt", "The old river", "--stop", "zzz")
    assert (code, out) == (0, continue_texts(folder, ["The old river"], 12)[0].text + "\n")
    assert "tokens/s, ended by length" in err


def test_a_line_of_json_for_each_prompt_in_their_order(run, folder, tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text("an old boat\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("evening bell\n"))
    files = ["--prompt-file", str(tmp_path / "b.txt"), "--prompt-file", "-"]
    code, out, _ = run("--prompt", "The old river", "--prompt", "a", *files, "--json", "--batch-size", "3")
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    said = continue_texts(folder, ["The old river", "a", "an old boat", "evening bell"], 12)
    for record, each in zip(records, said, strict=True):
        assert record["text"] == each.text and record["reason"] == each.reason
        assert tuple(record["token_ids"]) == each.tokens and record["tokens"] == len(each.tokens)
        assert record["prompt_tokens"] == each.prompt_tokens
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"], rel=0.02)


def test_standard_input_is_the_prompt_where_none_is_named(run, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The old river\n\n"))
    code, out, _ = run("--json")
    assert code == 0 and json.loads(out)["text"] == continue_texts(folder, ["The old river\n"], 12)[0].text


def test_a_seed_repeats_and_the_checkpoint_says_how_to_sample_if_asked(run, path, tmp_path):
    def text(*words, **options):
        code, out, err = run("--prompt", "The old river", *words, **options)
        assert code == 0, err
        return out

    hot = "--temperature", "2"
    assert text(*hot) == text(*hot) != text(*hot, "--seed", "1")
    assert text(*hot, "--top-k", "1") == text()
    shutil.copytree(path, tmp_path / "hf")
    said = {"do_sample": True, "temperature": 2.0, "top_k": 7, "eos_token_id": 1}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(said))
    own = {"ckpt": tmp_path / "hf"}
    assert text(**own) == text()
    assert text("--own-sampling", **own) == text(*hot, "--top-k", "7") != text()
    assert text("--own-sampling", "--top-k", "0", **own) == text(*hot)


def test_stop_strings_and_chats(run, folder, path, tmp_path):
    text = continue_texts(folder, ["The old river"], 12)[0].text
    code, out, err = run("--prompt", "The old river", "--stop", "zzz", "--stop", text[4:7])
    assert (code, out) == (0, text[: text.index(text[4:7])] + "\n") and "ended by stop" in err
    shutil.copytree(path, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}, {{ eos_token }}")
    code, out, _ = run("--chat", "--prompt", "The old river", "--json", ckpt=tmp_path / "hf")
    [ids] = [[0, *folder.tokenizer.encode("The old river, ", add_special_tokens=False).ids, 1]]
    assert json.loads(out)["text"] == continue_texts(folder, [ids], 12)[0].text


def change(folder, name):
    if name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif name == "no folder":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("broken", "words", "said"),
    [
        ("no folder", ["--prompt", "a"], "hf: no such folder"),
        ("no tokenizer", ["--prompt", "a"], "hf: tokenizer.json is missing"),
        ("", ["--prompt", ""], "--prompt: the prompt is empty"),
        ("", ["--prompt", "a\udcff"], "--prompt: not a text in UTF-8"),
        ("", ["--prompt", "a", "--prompt", ""], "--prompt 2: the prompt is empty"),
        ("", ["--prompt", "a " * 300], r"--prompt: 30\d tokens and --max-new-tokens 12 make 31\d, more than max_pos"),
        ("", ["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: no such file"),
        ("", ["--prompt-file", "{folder}/model.safetensors"], "not a text in UTF-8"),
        ("", ["--prompt-file", "{folder}"], "--prompt-file .*hf: a folder, not a text"),
        ("", ["--prompt", "a", "--chat"], "--chat: .*there is no chat template"),
        ("", ["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
        ("", ["--prompt", "a", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        ("", ["--prompt", "a", "--prefill-chunk", "-1"], "--prefill-chunk -1: expected at least 1"),
        ("", ["--prompt", "a", "--seed", "-1"], "--seed -1: expected a whole number"),
        ("", ["--prompt", "a", "--stop", ""], "--stop ''"),
        ("", ["--prompt", "a", "--temperature", "nan"], "--temperature nan must be 0"),
        ("", ["--prompt", "a", "--top-p", "1.5"], "--top-p 1.5 must be above 0"),
        ("", ["--prompt", "a", "--top-k", "-1"], "--top-k -1 must be a whole number"),
        ("", ["--prompt", "a", "--graph"], "--graph: the model is on cpu"),
        ("", ["--prompt", "a", "--device", "tpu9"], "--device tpu9: no such device here"),
    ],
)
def test_wrong_input_is_one_sentence_before_the_weights_are_read(run, path, tmp_path, monkeypatch, broken, words, said):
    shutil.copytree(path, tmp_path / "hf")
    change(tmp_path / "hf", broken)
    monkeypatch.setattr("s2.inference.folder.load_pretrained", None)
    code, out, err = run(*(word.format(folder=tmp_path / "hf") for word in words), ckpt=tmp_path / "hf")
    assert (code, out) == (ending.BAD_INPUT, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    assert re.search(said, err), err


def test_a_prompt_may_come_from_a_pipe(run, tmp_path):
    """As `--prompt-file <(command)` gives one."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=["The old river"])
    writer.start()
    code, from_pipe, err = run("--prompt-file", str(pipe))
    writer.join()
    assert code == ending.DONE, err
    assert run("--prompt", "The old river")[1] == from_pipe


def test_a_terminal_without_a_prompt_is_not_waited_for(run, monkeypatch):
    terminal = io.StringIO("The old river")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    code, _, err = run()
    assert code == ending.BAD_INPUT and "no prompt: give --prompt TEXT" in err


def test_full_memory_says_how_large_the_cache_is_and_what_to_lower(run, folder, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("s2.model.transformer.Decoder.forward", full)
    code, _, err = run("--prompt", "The old river")
    size = KVCache(folder.config, 1, 4 + 12 - 1).num_bytes
    assert code == ending.OUT_OF_MEMORY
    assert f"generation for 1 x 16 tokens, whose KV cache alone takes {size:,} bytes, does not fit" in err
    assert "lower --max-new-tokens or --prefill-chunk" in err and "batch-size" not in err
    code, _, err = run("--prompt", "The old river", "--prompt", "a")
    size = KVCache(folder.config, 2, 4 + 12 - 1).num_bytes
    assert f"2 x 16 tokens, whose KV cache alone takes {size:,} bytes" in err and "--batch-size, now 8" in err
