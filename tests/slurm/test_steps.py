"""The sbatch files with stand-ins for srun and scontrol: what they run, and what the warning signal does to it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.slurm.stand_in import ROOT, tool


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A job's environment whose srun runs its command once, here, in a process group of its own, as a step."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["PyYAML>=6"]\n')
    (tmp_path / "runs/a/hf").mkdir(parents=True)
    (tmp_path / "runs/a/hf/config.json").write_text("{}")
    tool(tmp_path / ".venv/bin/python", f'exec {sys.executable} "$@"')
    group = "import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])"
    arguments = f"while [[ $1 == --* ]]; do shift; done; echo $$ > {tmp_path}/step.pid"
    tool(tmp_path / "tools/srun", f"{arguments}; exec {sys.executable} -c '{group}' \"$@\"")
    shown = "JobState=RUNNING Reason=None\\n   Requeue=1 Restarts=0\\n   Command=(null)"
    tool(tmp_path / "tools/scontrol", f"echo \"$@\" >> {tmp_path}/told; printf '   {shown}\\n'")
    monkeypatch.chdir(tmp_path)
    return {
        "PATH": f"{tmp_path}/tools:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "1",
    }


def start(name, environment):
    script = ROOT / "scripts/slurm" / name
    return subprocess.Popen(["bash", str(script)], env=environment, stdout=-1, stderr=-1, text=True)


def write_evaluation(folder, lm, needle="print('swept', sys.argv[1:])"):
    (folder / "eval").mkdir()
    (folder / "eval/__init__.py").touch()
    for name, body in (("lm", lm), ("needle", needle)):
        (folder / f"eval/{name}.py").write_text(f"import sys, time, pathlib\n{body}\n")


def wait_for(file):
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, f"{file.name} did not appear"
        time.sleep(0.02)


def test_evaluation_runs_its_array_tasks_checkpoint_with_the_given_arguments(cluster, tmp_path):
    write_evaluation(tmp_path, "print('table', sys.argv[1:])")
    settings = {"CKPT": "x runs/a/hf", "SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "1", "TASKS": "piqa"}
    arguments = {"EVAL_ARGS": "--num-fewshot 5", "NEEDLE_ARGS": "--lengths '1k, 2k'", "EVAL_DATA": "d"}
    said, errors = start("eval.sbatch", cluster | settings | arguments).communicate(timeout=60)
    assert said.splitlines() == [
        f"job 16_1 (17, restart 0) on node1, in {tmp_path}: evaluate runs/a/hf",
        "table ['--ckpt', 'runs/a/hf', '--tasks', 'piqa', '--data-dir', 'd', '--num-fewshot', '5']",
        "swept ['--ckpt', 'runs/a/hf', '--lengths', '1k, 2k']",
    ], errors


def test_an_evaluation_that_is_warned_requeues_once_and_keeps_a_finished_table(cluster, tmp_path):
    write_evaluation(tmp_path, "print('table')", "pathlib.Path('running').write_text('x'); time.sleep(60)")
    job = start("eval.sbatch", cluster | {"CKPT": "runs/a/hf"})
    wait_for(tmp_path / "running")
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=60)
    os.killpg(int((tmp_path / "step.pid").read_text()), signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 75
    assert errors.startswith("stopped: before the needle was finished; job 17 goes back into the queue")
    assert (tmp_path / "told").read_text().splitlines()[-2:] == ["show job 17", "requeue 17"]
    (tmp_path / "eval/needle.py").write_text("print('swept')\n")
    restart = cluster | {"CKPT": "runs/a/hf", "SLURM_RESTART_COUNT": "1"}
    said, _ = start("eval.sbatch", restart).communicate(timeout=60)
    assert said.splitlines()[1:] == ["the table was finished by an earlier start of this job", "swept"]


def test_an_environment_that_is_not_there_is_named_with_the_command_that_makes_it(cluster):
    job = start("pretrain.sbatch", cluster | {"RECIPE": "demo", "VENV": "gone"})
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    assert errors == "error: there is no environment in gone; run `make setup VENV=gone` on the login node\n"


def test_a_script_outside_of_the_repository_says_so(cluster, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = ROOT / "scripts/slurm/pretrain.sbatch"
    done = subprocess.run(["bash", str(script)], cwd=elsewhere, env=cluster, capture_output=True, text=True)
    assert done.returncode == 2 and f"error: {elsewhere} is not the repository; submit from there" in done.stderr
