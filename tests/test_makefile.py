"""The Makefile is how people use the project: each of its targets is there, with a line of help."""

import itertools
import re
import shlex
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


def said_by(*words: str, folder: Path = ROOT) -> list[list[str]]:
    """The words of each command that make would run."""
    lines = make("-n", *words, folder=folder).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if re.match(r"\.venv/bin/python -m (data|eval|s2)\.", line)]


def plain(*words: str, folder: Path = ROOT) -> str:
    return "\n".join(" ".join(command) for command in said_by(*words, folder=folder))


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
        said = plain("gate", f"RECIPE={recipe}", f"CKPT=runs/{recipe}/{name}/hf")
        assert "--data-dir" not in said
        assert "--data-dir rows" in plain("gate", f"RECIPE={recipe}", "EVAL_DATA=rows")
        assert f"eval.gate --ckpt runs/{recipe}/{name}/hf --config recipes/{recipe}/gates/{name}.yaml" in said


def test_layers_are_chosen_for_any_layout():
    layout = "4*L8V12+sink1|5*W8"
    (said,) = said_by("layers", "CKPT=models/a", f"LAYOUT={layout}", "DENSE=5", "HAYSTACK=b.txt", "ARGS=--n 32")
    wanted = ["--ckpt", "models/a", "--layout", layout, "--dense", "5", "--haystack", "b.txt", "--n", "32"]
    assert said[2:] == ["eval.layers", *wanted]


def test_rotations_are_tried_at_lengths_beyond_the_trained_one():
    (said,) = said_by("rope", "CKPT=a", "LENGTHS=8k,32k", "DOCUMENTS=b.txt", "ARGS=--rope '{rope_theta: 2.0e+5}'")
    wanted = ["--ckpt", "a", "--lengths", "8k,32k", "--documents", "b.txt", "--rope", "{rope_theta: 2.0e+5}"]
    assert said[2:] == ["eval.rope", *wanted]


@pytest.mark.parametrize("name", ["my models/it's", "a;b", "$(HOME)", "ä b"])
def test_paths_are_one_word_whatever_is_in_them(name):
    name_in_make = name.replace("$", "$$")
    given = {
        f"{key}={name_in_make}" for key in ("CKPT", "HELDOUT", "HAYSTACK", "DOCUMENTS", "EVAL_DATA", "CONFIG", "OUT")
    }
    settings = [*given, "LAYOUT=L1V2", "DENSE=1", "RUNS=a", "TASKS=piqa"]
    for target, options in (
        ("gate", {"--ckpt", "--config", "--data-dir"}),
        ("eval", {"--ckpt", "--data-dir"}),
        ("suite", {"--ckpt", "--haystack", "--documents", "--data-dir"}),
        ("layers", {"--ckpt", "--haystack", "--documents"}),
        ("rope", {"--ckpt", "--haystack", "--documents"}),
        ("needle", {"--ckpt", "--haystack"}),
        ("report", {"--output"}),
    ):
        (said,) = said_by(target, *settings)
        assert {option for option, value in itertools.pairwise(said) if value == name} == options


def test_sources_are_a_word_each():
    (said,) = said_by("data", "SOURCES=it's ~/b", "OUT=c d")
    assert said[3:] == ["--sources", "it's", str(Path("~/b").expanduser()), "--output", "c d"]


def test_generate_says_which_checkpoint_was_chosen_for_it(clone):
    said = "echo 'checkpoint: runs/smollm2/extend-32k/hf' >&2"
    assert said in make("-n", "generate", "RECIPE=smollm2", "PROMPT=a", folder=clone)
    assert "checkpoint:" not in make("-n", "generate", "CKPT=models/a", "PROMPT=a", folder=clone)


def test_a_recipe_that_has_no_extension_is_refused_with_those_that_have():
    done = subprocess.run(["make", "-o", "setup", "extend", "RECIPE=nope"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "recipes/nope has no extend-*.yaml; recipes that have: 1.3b 7b demo llama3.1-8b smollm2" in done.stdout


def test_an_empty_setting_is_none(clone):
    assert "--ckpt runs/smollm2/extend-32k/hf" in plain("needle", "RECIPE=smollm2", "CKPT=", folder=clone)
    home = Path("~/models/a").expanduser()
    assert f"--ckpt {home} " in plain("suite", "CKPT=~/models/a", "TASKS=piqa")  # zsh leaves it to us


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "recipes", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs/smollm2/extend-8k/hf").mkdir(parents=True)
    (tmp_path / "runs/smollm2/extend-32k/hf").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("target", ["needle", "eval", "suite", "generate", "gate"])
def test_a_stage_that_is_named_is_the_one_that_is_measured(target, clone):
    said = plain(target, "RECIPE=smollm2", "TO=8k", "PROMPT=a", folder=clone)
    assert "--ckpt runs/smollm2/extend-8k/hf" in said and "32k" not in said
    assert "--ckpt runs/smollm2/extend-32k/hf" in plain(target, "RECIPE=smollm2", "PROMPT=a", folder=clone)
    assert "--ckpt models/a" in plain(target, "RECIPE=smollm2", "TO=8k", "CKPT=models/a", folder=clone)


@pytest.mark.parametrize(("recipe", "first"), [("1.3b", "pretrain"), ("llama3.1-8b", "extend-8k")])
def test_without_exports_the_checkpoint_is_that_of_the_first_stage_that_the_recipe_has(recipe, first, clone):
    assert f"--ckpt runs/{recipe}/{first}/hf" in plain("needle", f"RECIPE={recipe}", folder=clone)


def test_a_gate_is_of_the_run_that_was_trained(clone):
    words = ("-n", "extend", "RECIPE=smollm2", "TO=8k")
    measured = "gate RECIPE=smollm2 CKPT=runs/smollm2/extend-8k/hf"
    assert measured in make(*words, folder=clone)
    for more in ("GATE=no", "ARGS=run.stage=dense-8k", "ARGS=a.b=1 run.root='/data/my runs'", "ARGS=run.recipe=b"):
        said = make(*words, more, folder=clone)
        assert measured not in said
        assert ("CONFIG=recipes/smollm2/gates/extend-8k.yaml" in said) == (more != "GATE=no")
