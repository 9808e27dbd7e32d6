"""`scripts/check_vllm.py` on the CPU, with our own model in vLLM's place: its report, its verdict, a machine without
vLLM."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch

from s2.inference import generate
from s2.model.hf import load_pretrained

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
SIZES = "--layers 2 --hidden 32 --ffn 48 --heads 4 --kv-heads 2 --vocab 61 --block-size 16 --layout L1V2+dense1"


def served(folder, prompts, new_tokens, engine):
    model = load_pretrained(folder, dtype=torch.float32)
    rounds = [[generate(model, [torch.tensor(p)], new_tokens)[0].tolist() for p in prompts] for _ in range(2)]
    row = {"start_s": 1.0, "sequences": 2.5, "capacity": 1000, "groups": 3}
    rounds = rounds if prompts else []
    return row | {"tokens": rounds, "found": [[0] * len(prompts)] * len(rounds), "seconds": [1.0] * len(rounds)}


@pytest.fixture
def script(monkeypatch, tmp_path):
    import check_vllm

    options = f"x {SIZES} --lengths 40,65 --new 5 --step 32 --commit abc --output {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", options)
    monkeypatch.setattr(check_vllm, "in_child", served)
    monkeypatch.setattr(check_vllm.importlib.util, "find_spec", lambda name: name)
    return check_vllm


def test_the_report_has_all_prompts_and_engines(script, tmp_path):
    assert script.main() == 0
    page = next(tmp_path.glob("*-vllm.md")).read_text()
    for wanted in ("| 1 | 40 | 0 | 5 of 5 | 5 of 5 | 0 |", "| all pages kept | 2.50 | 1,000 | 3 |", "| dense layers |"):
        assert wanted in page
    record = json.loads(next(tmp_path.glob("*-vllm.json")).read_text())
    assert [(row["round"], row["prompt"]) for row in record["rows"]] == [(1, 40), (1, 65), (2, 40), (2, 65)]


def test_engines_that_are_only_counted_start_eagerly_beside_the_one_that_serves(script, monkeypatch):
    together, asked = threading.Barrier(3, timeout=30), []

    def counted(folder, prompts, new_tokens, engine):
        asked.append((bool(prompts), engine["enforce_eager"]))
        together.wait()  # for all three
        return served(folder, prompts, new_tokens, engine)

    monkeypatch.setattr(script, "in_child", counted)
    assert script.main() == 0
    assert sorted(asked) == [(False, True), (False, True), (True, False)]


def test_an_engine_that_is_only_counted_may_fail_and_tokens_are_compared_nevertheless(script, monkeypatch, tmp_path):
    def failing(folder, prompts, new_tokens, engine):
        if not prompts and folder.endswith("dense"):
            raise RuntimeError("no backend\nfor dense layers")
        return served(folder, prompts, new_tokens, engine)

    monkeypatch.setattr(script, "in_child", failing)
    assert script.main() == 1
    page = next(tmp_path.glob("*-vllm.md")).read_text()
    assert "| 1 | 40 | 0 | 5 of 5 |" in page and "| all pages kept | 2.50 |" in page
    assert "| dense layers | **failed** |" in page and "dense layers: `no backend`" in page


def test_the_engine_that_serves_may_not_fail(script, monkeypatch):
    def failing(folder, prompts, *others):
        if prompts:
            raise RuntimeError("no kernel")
        return served(folder, prompts, *others)

    monkeypatch.setattr(script, "in_child", failing)
    with pytest.raises(RuntimeError, match="no kernel"):
        script.main()


def test_tokens_that_rounds_have_in_common_are_looked_at_once(script, monkeypatch):
    prompts, logits = [], script.new_logits
    monkeypatch.setattr(script, "new_logits", lambda *arguments: prompts.append(1) or logits(*arguments))
    assert script.main() == 0
    assert len(prompts) == 2 * 3  # prompts, models


def test_another_token_ends_in_exit_code_1(script, monkeypatch, tmp_path):
    def wrong(*arguments):
        row = served(*arguments)
        if row["tokens"]:
            row["tokens"][1][0][2] = (row["tokens"][1][0][2] + 1) % 61
        return row

    monkeypatch.setattr(script, "in_child", wrong)
    assert script.main() == 1
    (row,) = [r for r in json.loads(next(tmp_path.glob("*.json")).read_text())["rows"] if r["equal"] < 5]
    assert (row["round"], row["prompt"], row["equal"]) == (2, 40, 2)


def test_a_token_within_rounding_is_close(script):
    def is_close(margin, noise=0.01, control_margin=1.0):
        return script.is_close({"margin": margin, "noise": noise, "control_margin": control_margin})

    assert is_close(0.019) and not is_close(0.021) and not is_close(float("nan"))
    assert is_close(9e-4, noise=0.0) and not is_close(2e-3, noise=0.0)  # in float32, summed in another order
    assert not is_close(0.0, control_margin=0.02)  # tokens of another layout would be as close
    assert not is_close(0.0, control_margin=float("nan"))


def test_a_limit_that_dense_layers_keep_too_shows_nothing(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "LEAST_LIMIT", 1e3)
    assert script.main() == 1
    assert next(tmp_path.glob("*-vllm.md")).read_text().count("**shows nothing**") == 4


def test_prompts_share_beginnings_and_do_not(script):
    first, second, third = script.prompts_of([4, 5, 6], 1000)
    assert [len(x) for x in (first, second, third)] == [4, 5, 6]
    assert third[:4] == first and second[:4] != first


def test_without_vllm_it_says_what_to_install(script, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vLLM is not installed; pip install 'vllm==0\.24"):
        script.main()
