"""`scripts/check_megatron.py` on the CPU: its report, its verdict, and a machine without megatron-core."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
SIZES = "--layers 3 --hidden 32 --ffn 48 --heads 4 --kv-heads 2 --vocab 61 --block-size 16 --steps 4 --seq-len 90"


@pytest.fixture
def script(monkeypatch, tmp_path):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (the extra `megatron`)")
    import check_megatron

    options = f"x {SIZES} --layout L1V2+dense1 --commit abc --output {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", options)
    return check_megatron


def test_the_report_has_all_models_and_layers(script, tmp_path):
    assert script.main() == 0
    page = next(tmp_path.glob("*-megatron.md")).read_text()
    for wanted in ("| our model |", "| GPTModel, S2 |", "| GPTModel, Megatron's attention |", "(limit 1e-04)"):
        assert wanted in page
    record = json.loads(next(tmp_path.glob("*-megatron.json")).read_text())
    assert list(record["halves"]) == ["L1V2, rotation 0", "dense, rotation 0"]
    assert len(record["models"]["GPTModel, S2"]["loss"]) == 4 and record["difference"] < 1e-5


def test_a_difference_ends_in_exit_code_1(script, monkeypatch):
    monkeypatch.setattr(script, "difference", lambda found: float("nan"))
    assert script.main() == 1


def test_heads_that_two_ranks_cannot_share_are_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--kv-heads", "1"])
    with pytest.raises(ValueError, match="--kv-heads 1 must be even"):
        script.main()


def test_without_megatron_it_says_what_to_install(monkeypatch):
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ValueError, match=r"megatron.*pip install -e '\.\[megatron\]'"):
        runpy.run_path(str(SCRIPTS / "check_megatron.py"))["main"]()
