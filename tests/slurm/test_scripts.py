"""The sbatch files: they parse, and their options let a job come back and share its node."""

import re
import shutil
import subprocess

import pytest

from tests.slurm.stand_in import ROOT

FOLDER = ROOT / "scripts/slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))


def test_all_three_scripts_are_there():
    assert [script.name for script in SCRIPTS] == ["eval.sbatch", "extend.sbatch", "pretrain.sbatch"]


@pytest.mark.parametrize("script", [*SCRIPTS, FOLDER / "start.sh"], ids=lambda script: script.name)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_directives_requeue_append_warn_before_the_limit_and_log_where_a_folder_is(script):
    directives = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    for wanted in ("--requeue", "--open-mode=append"):
        assert wanted in directives
    assert any(re.fullmatch(r"--signal=(B:)?USR1@\d+", line) for line in directives)
    values = dict(line.lstrip("-").split("=", 1) for line in directives if "=" in line)
    assert "/" not in values["output"]  # SLURM makes no folder for it
    assert not {"exclusive", "mem"} & {line.lstrip("-").partition("=")[0] for line in directives}
    # sbatch stops reading directives at the first command.
    assert script.read_text().rindex("#SBATCH") < script.read_text().index("set -euo pipefail")
    if script.name != "eval.sbatch":
        assert values["gpus-per-node"] == values["ntasks-per-node"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_variable_that_is_described_is_read(script):
    program = (FOLDER / "job.py").read_text() + (FOLDER / "start.sh").read_text()
    described = set(re.findall(r"^#   ([A-Z_]+)  +\w", script.read_text(), re.MULTILINE))
    assert "VENV" in described and "MAX_REQUEUES" in described
    for name in described - {"MAX_REQUEUES"}:  # the last by s2.training.slurm
        assert re.search(rf'"{name}"|\{{{name}:', program), f"{script.name} describes {name}, which nothing reads"
