"""The Makefile is how people use the project: each of its targets is there, with a line of help."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.gate import GateConfig
from s2.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.name for path in (ROOT / "recipes").iterdir() if (path / "gates").is_dir())

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def make(*words: str) -> str:
    done = subprocess.run(["make", "--no-print-directory", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_target_has_a_rule_and_a_line_of_help():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    helped = re.findall(r"^  make ([a-z-]+) ", make("help"), re.MULTILINE)
    assert sorted(helped) == sorted(phony.split())


@pytest.mark.parametrize("recipe", RECIPES)
def test_stages_are_measured_by_a_gate_before_the_next_begins(recipe, tmp_path):
    gates = {path.stem: GateConfig.load(path) for path in (ROOT / "recipes" / recipe / "gates").glob("*.yaml")}
    stages = {path.stem: load_recipe(path) for path in (ROOT / "recipes" / recipe).glob("*.yaml")}
    assert sorted(gates) == sorted(stages)
    for name, stage in stages.items():
        init_from = stage["model"].get("init_from")
        if (Path(init_from or "").parts[:2]) == ("runs", recipe):
            before = Path(init_from).parent.name
            assert before in gates and stage["run"]["gate"] == "required"
            assert str(gates[name].base) == init_from
        longest = stage["data"]["init_args"]["seq_len"]
        assert max(check.length for check in (*gates[name].loss, *gates[name].needle)) == longest
        ends = {(check.begin, check.end or check.length, check.length) for check in gates[name].loss}
        short = min(check.length for check in gates[name].loss)  # the old context, where there is one
        assert {(0, short, short), (0, 1024, short), (short // 2, short, short)} <= ends
        assert (longest // 2, longest, longest) in ends
        assert {check.task for check in gates[name].tasks} == {"piqa", "arc_easy"}
        said = make("-n", "gate", f"RECIPE={recipe}", f"CKPT=runs/{recipe}/{name}/hf")
        assert "--data-dir" not in said
        assert "--data-dir rows" in make("-n", "gate", f"RECIPE={recipe}", "EVAL_DATA=rows")
        assert f"eval.gate --ckpt runs/{recipe}/{name}/hf --config recipes/{recipe}/gates/{name}.yaml" in said


def test_layers_are_chosen_for_any_layout():
    said = make(
        "-n", "layers", "CKPT=models/a", "LAYOUT=4*L8V12+sink1|5*W8", "DENSE=5", "HAYSTACK=b.txt", "ARGS=--n 32"
    )
    words = "eval.layers --ckpt models/a --layout '4*L8V12+sink1|5*W8' --dense 5 --haystack b.txt --n 32"
    assert words in " ".join(said.replace("\\\n", " ").split())
