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


def make(*words: str, folder: Path = ROOT) -> str:
    done = subprocess.run(["make", "--no-print-directory", *words], cwd=folder, capture_output=True, text=True)
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


def test_rotations_are_tried_at_lengths_beyond_the_trained_one():
    said = make("-n", "rope", "CKPT=a", "LENGTHS=8k,32k", "DOCUMENTS=b.txt", "ARGS=--rope '{rope_theta: 2.0e+5}'")
    words = "eval.rope --ckpt a --lengths 8k,32k --documents b.txt --rope '{rope_theta: 2.0e+5}'"
    assert words in " ".join(said.replace("\\\n", " ").split())


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "recipes", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs/smollm2/extend-8k/hf").mkdir(parents=True)
    (tmp_path / "runs/smollm2/extend-32k/hf").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("target", ["needle", "eval", "suite", "generate", "gate"])
def test_a_stage_that_is_named_is_the_one_that_is_measured(target, clone):
    said = make("-n", target, "RECIPE=smollm2", "TO=8k", "PROMPT=a", folder=clone)
    assert "--ckpt runs/smollm2/extend-8k/hf" in said and "32k" not in said
    assert "--ckpt runs/smollm2/extend-32k/hf" in make("-n", target, "RECIPE=smollm2", "PROMPT=a", folder=clone)
    assert "--ckpt models/a" in make("-n", target, "RECIPE=smollm2", "TO=8k", "CKPT=models/a", folder=clone)


@pytest.mark.parametrize(("recipe", "first"), [("1.3b", "pretrain"), ("llama3.1-8b", "extend-8k")])
def test_without_exports_the_checkpoint_is_that_of_the_first_stage_that_the_recipe_has(recipe, first, clone):
    assert f"--ckpt runs/{recipe}/{first}/hf" in make("-n", "needle", f"RECIPE={recipe}", folder=clone)


def test_a_gate_is_of_the_run_that_was_trained(clone):
    words = ("-n", "extend", "RECIPE=smollm2", "TO=8k")
    measured = "gate RECIPE=smollm2 CKPT=runs/smollm2/extend-8k/hf"
    assert measured in make(*words, folder=clone)
    for more in ("GATE=no", "ARGS=run.stage=dense-8k", "ARGS=a.b=1 run.root='/data/my runs'", "ARGS=run.recipe=b"):
        said = make(*words, more, folder=clone)
        assert measured not in said
        assert ("CONFIG=recipes/smollm2/gates/extend-8k.yaml" in said) == (more != "GATE=no")
