"""The SLURM scripts: they parse, call targets that exist, and survive the signal before the time limit."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))


def test_all_three_scripts_are_there():
    assert [script.name for script in SCRIPTS] == ["eval.sbatch", "extend.sbatch", "pretrain.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_make_target_and_variable_exists(script):
    makefile = (ROOT / "Makefile").read_text()
    body = re.sub(r"\\\n\s*", "", script.read_text().split("set -euo pipefail")[1])
    calls = re.findall(r"^(?:srun \S+ |step )?make (\w+)(.*)$", body, re.MULTILINE)
    assert ("setup", "") in [(target, re.sub(" #.*", "", variables)) for target, variables in calls]
    for target, variables in calls:
        variables = re.sub(r" SHELL=\S+| #.*", "", variables)  # SHELL is make's own
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for name in re.findall(r" (\w+)=", variables):
            assert re.search(rf"\$\(.*\b{name}\b.*\)", makefile), f"{target} ignores {name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_directives_requeue_append_and_warn_before_the_limit(script):
    directives = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    for wanted in ("--requeue", "--open-mode=append"):
        assert wanted in directives
    assert any(re.fullmatch(r"--signal=(B:)?USR1@\d+", line) for line in directives)
    # sbatch stops reading directives at the first command.
    assert script.read_text().rindex("#SBATCH") < script.read_text().index("set -euo pipefail")
    if script.name != "eval.sbatch":
        values = dict(line.lstrip("-").split("=", 1) for line in directives if "=" in line)
        assert values["gpus-per-node"] == values["ntasks-per-node"]


def command(folder, name, body):
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A job's environment whose srun runs its command here, in a process group of its own, as a step."""
    tools = tmp_path / "tools"
    tools.mkdir()
    step = "import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])"
    arguments = 'while [[ $1 == --* ]]; do shift; done; echo $$ > "$SLURM_SUBMIT_DIR/step.pid"'
    command(tools, "srun", f"{arguments}; exec {sys.executable} -c '{step}' \"$@\"")
    command(tools, "scontrol", 'echo "$@" >> "$SLURM_SUBMIT_DIR/scontrol.log"')
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }


def wait_for(file):
    deadline = time.monotonic() + 20
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, f"{file.name} did not appear"
        time.sleep(0.02)
    return file.read_text().strip()


TRAINER = """
import pathlib, signal, sys, time
stopping = []
signal.signal(signal.SIGUSR1, lambda *_: stopping.append(1))
pathlib.Path("started").write_text(" ".join(sys.argv[1:]) or "started")
while not stopping:
    time.sleep(0.02)
time.sleep(0.3)
pathlib.Path("saved").write_text("saved")
sys.exit(75)
"""


@pytest.mark.parametrize(
    "name,target,extra", [("pretrain.sbatch", "pretrain", {}), ("extend.sbatch", "extend", {"TO": "32k"})]
)
def test_the_signal_reaches_the_trainer_and_kills_neither_make_nor_its_shell(cluster, tmp_path, name, target, extra):
    (tmp_path / "trainer.py").write_text(TRAINER)
    trainer = f"{sys.executable} trainer.py $(RECIPE) $(TO) $(GPUS) $(ARGS)"
    recipe = f"setup:\n\t@true\n{target}:\n\tcd . && {trainer}; exit $$?\n"
    (tmp_path / "Makefile").write_text(recipe)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = cluster | {"RECIPE": "1.3b", "ARGS": "trainer.max_steps=5 data.seed=1", **extra}
    job = subprocess.Popen(["bash", str(FOLDER / name)], env=environment, stderr=subprocess.PIPE, text=True)
    arguments = wait_for(tmp_path / "started").split()
    assert arguments == [
        *("1.3b", *extra.values(), "8", "trainer.num_nodes=2", "run.slurm_requeue=true"),
        *("trainer.max_steps=5", "data.seed=1"),
    ]
    os.killpg(int((tmp_path / "step.pid").read_text()), signal.SIGUSR1)
    _, errors = job.communicate(timeout=20)
    assert (tmp_path / "saved").read_text() == "saved"
    assert "Error 75" in errors and job.returncode == 2  # make reports the trainer's own exit code
    assert "User defined signal" not in errors


def test_evaluation_runs_its_array_tasks_checkpoint_with_the_given_arguments(cluster, tmp_path):
    recorder = 'printf "%s|" "$@" >> "$SLURM_SUBMIT_DIR/calls"; echo >> "$SLURM_SUBMIT_DIR/calls"'
    command(tmp_path / "tools", "make", recorder)
    environment = cluster | {
        "CKPT": "runs/a/hf runs/b/hf",
        "SLURM_ARRAY_TASK_ID": "1",
        "TASKS": "hellaswag,piqa",
        "EVAL_ARGS": "--num-fewshot 5",
        "NEEDLE_ARGS": "--lengths 1k,2k",
    }
    subprocess.run(["bash", str(FOLDER / "eval.sbatch")], env=environment, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "setup|",
        "eval|CKPT=runs/b/hf|TASKS=hellaswag,piqa|EVAL_DATA=|ARGS=--num-fewshot 5|",
        "needle|CKPT=runs/b/hf|ARGS=--lengths 1k,2k|",
    ]


def test_evaluation_requeues_itself_once_when_the_time_limit_is_near(cluster, tmp_path):
    command(
        tmp_path / "tools",
        "make",
        '[[ $1 == setup ]] && exit; echo x > "$SLURM_SUBMIT_DIR/running"; sleep 5',
    )
    job = subprocess.Popen(["bash", str(FOLDER / "eval.sbatch")], env=cluster | {"CKPT": "runs/a/hf"})
    wait_for(tmp_path / "running")
    time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert wait_for(tmp_path / "scontrol.log") == "requeue 17"
    job.wait(timeout=20)
    os.killpg(int((tmp_path / "step.pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    "name,environment,message",
    [
        ("pretrain.sbatch", {}, "RECIPE: names a folder under recipes/"),
        ("extend.sbatch", {"RECIPE": "7b"}, "TO: names a stage recipes/7b/extend-<TO>.yaml"),
        ("eval.sbatch", {}, "CKPT: names a Hugging Face folder"),
        ("eval.sbatch", {"CKPT": "a b"}, "submit with --array=0-1"),
        (
            "eval.sbatch",
            {"CKPT": "a b", "SLURM_ARRAY_TASK_ID": "2"},
            "array task 2, but CKPT names 2 checkpoints",
        ),
    ],
)
def test_missing_settings_stop_the_job_at_once(cluster, name, environment, message):
    done = subprocess.run(["bash", str(FOLDER / name)], env=cluster | environment, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr
