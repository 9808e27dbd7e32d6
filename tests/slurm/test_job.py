"""What a job's first process decides and keeps, without SLURM and without any task."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from scripts.slurm import job
from scripts.slurm.record import Record
from tests.slurm.stand_in import ROOT

JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "1", "SLURM_SUBMIT_DIR": "/home/me"}
RECIPE = "run: {recipe: demo, stage: pretrain}\nmodel: {optimizer: {lr: 2.0e-3}}\n"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one recipe, outside of any job."""
    (tmp_path / "recipes/demo").mkdir(parents=True)
    (tmp_path / "recipes/demo/pretrain.yaml").write_text(RECIPE)
    (tmp_path / "recipes/demo/extend-2k.yaml").write_text(RECIPE)
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["PyYAML>=6"]\n')
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "per_node"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "3"}, 3),  # only --gpus-per-node was given
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_GPUS": "4,5"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4),  # no GPUs
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, 2),
        ({}, 1),
    ],
)
def test_there_is_one_task_per_gpu_and_any_part_of_a_node_can_be_had(settings, per_node):
    assert job.tasks_per_node(JOB | settings) == per_node


def test_a_task_gets_the_cpus_asked_for_or_its_share():
    assert job.cpus_per_task(JOB | {"SLURM_CPUS_PER_TASK": "12"}) == 12
    assert job.cpus_per_task(JOB | {"SLURM_CPUS_ON_NODE": "16", "SLURM_NTASKS_PER_NODE": "3"}) == 5
    assert job.cpus_per_task(JOB) == 1
    assert {"--cpus-per-task=12", "--ntasks=6", "--ntasks-per-node=3", "--export=ALL"} <= set(job.srun(2, 3, 12))


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("pretrain", {}, r"RECIPE is not set; it names a folder under recipes/ \(demo\)"),
        ("pretrain", {"RECIPE": "8b"}, "RECIPE=8b: no such folder under recipes/; there are demo"),
        ("pretrain", {"RECIPE": "demo", "ARGS": "data.x='a"}, "ARGS=data.x='a: No closing quotation"),
        ("pretrain", {"RECIPE": "demo", "ARGS": "data.x"}, "argument 'data.x' is not of the form key=value"),
        ("extend", {"RECIPE": "demo"}, "TO is not set; it names a stage recipes/demo/extend-<TO>.yaml"),
        ("extend", {"RECIPE": "demo", "TO": "3k"}, "did you mean recipes/demo/extend-2k.yaml"),
        ("pretrain", {"RECIPE": "demo", "MAX_REQUEUES": "x"}, "MAX_REQUEUES=x is a number"),
        ("eval", {}, "CKPT is not set; it names a Hugging Face folder"),
        ("eval", {"CKPT": "a b"}, "CKPT names 2 checkpoints: submit with --array=0-1"),
        ("eval", {"CKPT": "a b", "SLURM_ARRAY_TASK_ID": "2"}, "array task 2, but CKPT names 2 checkpoints"),
        ("eval", {"CKPT": "runs/a/hf"}, "CKPT=runs/a/hf: no Hugging Face folder"),
    ],
)
def test_a_wrong_setting_stops_the_job_before_any_task(repository, monkeypatch, kind, settings, sentence):
    for name, value in (JOB | settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job.Step, "take_signals", lambda self: None)
    monkeypatch.setattr(job.Step, "run", lambda *_: pytest.fail("a task was started"))
    with pytest.raises((ValueError, OSError), match=sentence):
        job.main([kind])


@pytest.mark.parametrize(
    ("dependency", "sentence"),
    [
        ("no-such-package>=1", r"no-such-package is missing\); run `make setup VENV=env` on the login node"),
        ("PyYAML>=999", r"has PyYAML .*, not PyYAML>=999; run `make setup VENV=env`"),
    ],
)
def test_an_environment_that_is_not_whole_is_refused_and_not_mended(repository, dependency, sentence):
    job.check_environment({})
    (repository / "pyproject.toml").write_text(f'[project]\ndependencies = ["{dependency}"]\n')
    with pytest.raises(ValueError, match=sentence):
        job.check_environment({"VENV": "env"})


def test_the_environment_of_the_tests_is_whole(monkeypatch):
    monkeypatch.chdir(ROOT)
    job.check_environment({})


def test_make_installs_nothing_inside_a_job(tmp_path):
    makefile = ["make", "-f", str(ROOT / "Makefile"), f"VENV={tmp_path}/venv", "PYTHON=false"]
    inside = {**os.environ, "SLURM_JOB_ID": "17"}
    done = subprocess.run([*makefile, "pretrain"], cwd=ROOT, env=inside, capture_output=True, text=True)
    assert done.returncode == 2 and "run `make setup` on the login node" in done.stderr
    asked = subprocess.run([*makefile, "setup"], cwd=ROOT, env=inside, capture_output=True, text=True)
    assert asked.returncode == 2 and "login node" not in asked.stderr  # it went on to PYTHON, which fails


def test_a_restart_trains_the_recipe_that_the_job_started_with(repository):
    source = Path("recipes/demo/pretrain.yaml")
    first = Record(JOB, source)
    first.note(["python"], "no checkpoint")
    source.write_text(RECIPE.replace("2.0e-3", "6.0e-3"))
    restart = Record(JOB | {"SLURM_RESTART_COUNT": "1"}, source)
    assert restart.is_restart and restart.recipe.read_text() == RECIPE
    (said,) = restart.differences(source)
    assert "has changed (model.optimizer.lr=0.006 instead of 0.002); job 17 goes on with runs/slurm/17/" in said
    source.unlink()
    assert "recipes/demo/pretrain.yaml is gone" in restart.differences(source)[0]
    # a new job takes the tree as it is, and leaves the record of a job of the same number alone
    source.write_text("run: {recipe: new, stage: s}\n")
    assert Record(JOB, source).recipe.read_text() == source.read_text()
    assert (repository / "runs/slurm/17.1/recipe.yaml").read_text() == RECIPE


def test_the_record_holds_commit_changes_and_command(repository):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "start")
    source = Path("recipes/demo/pretrain.yaml")
    record = Record(JOB, source)
    record.note(["python", "-m", "x"], "no checkpoint")
    facts = json.loads(Path("runs/slurm/17/job.json").read_text())
    assert facts["code"] == {"commit": git("rev-parse", "HEAD"), "changed": [], "changes": None}
    assert facts["starts"][0]["command"] == ["python", "-m", "x"] and facts["submitted_from"] == "/home/me"
    Path("pyproject.toml").write_text("# edited\n")
    (said,) = Record(JOB | {"SLURM_RESTART_COUNT": "1"}, source).differences(source)
    assert said.startswith("the code has changed since job 17 first started") and said.endswith("with changes now")
    other = Record(JOB | {"SLURM_JOB_ID": "18"}, source)
    assert other.facts["code"]["changed"] == [" M pyproject.toml"]
    assert "+# edited" in (other.folder / "changes.patch").read_text()


def test_starts_in_a_row_without_progress_are_counted(repository):
    for restart, progress in enumerate(["no checkpoint", "step-2", "step-2", "step-2"]):
        record = Record(JOB | {"SLURM_RESTART_COUNT": str(restart)}, Path("recipes/demo/pretrain.yaml"))
        record.note(["python"], progress)
    assert record.idle_starts("step-2") == 3 and record.idle_starts("step-4") == 0


@pytest.mark.parametrize(
    ("code", "fields", "is_way"),
    [
        (138, {}, True),  # the warning, before the trainer could take it
        (1, {}, False),
        (139, {}, False),  # a segmentation fault
        (137, {}, False),  # out of memory
        (143, {}, False),  # ended by srun because another task failed
        (143, {"state": "COMPLETING"}, False),  # cancelled
        (143, {"state": "COMPLETING", "reason": "TimeLimit"}, True),
        (143, {"preempted": True, "restarts": 1}, False),  # the trainer was faster
        (143, {"preempted": True}, True),
        (137, {"seconds_left": 500.0}, True),
        (143, {"seconds_left": 5000.0}, False),
    ],
)
def test_a_failure_is_told_from_a_job_that_makes_way(monkeypatch, code, fields, is_way):
    seen = {"state": "RUNNING", "reason": "None", "may_requeue": True, "restarts": 0} | fields
    monkeypatch.setattr(job.slurm, "ask", lambda _: job.slurm.Job(**seen))
    assert job.made_way(code, JOB) is is_way


def test_a_job_that_never_trains_a_step_is_not_requeued_for_ever(repository, monkeypatch, capsys):
    monkeypatch.setattr(job.slurm, "requeue", lambda _, warned: "requeued")
    for restart in range(3):
        step = job.Step(raises=False)
        monkeypatch.setattr(step, "run", lambda *_: 138)
        assert job.train("pretrain", JOB | {"RECIPE": "demo", "SLURM_RESTART_COUNT": str(restart)}, step) == 75
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["stopped: the tasks were ended by a signal; requeued"] * 2
    assert said[2].startswith("stopped: 3 starts of job 17 in a row ended before a step was trained")


@pytest.mark.parametrize(
    ("trained", "exports", "commands"),
    [(0, True, ["s2.training.cli", "eval.gate"]), (2, True, ["s2.training.cli"]), (0, False, ["s2.training.cli"])],
)
def test_a_finished_stage_is_measured_for_the_one_that_waits_for_it(
    repository, monkeypatch, trained, exports, commands
):
    """Not one that saves nothing, as when rates alone are measured: its job would fail."""
    (repository / "recipes/demo/gates").mkdir()
    (repository / "recipes/demo/gates/pretrain.yaml").write_text("needle: [{length: 512, min: 0.9}]\n")
    seen = []
    step = job.Step(raises=False)
    monkeypatch.setattr(step, "run", lambda *a: seen.append(a[3]) or (trained if len(seen) == 1 else 2))
    monkeypatch.setattr(job, "made_way", lambda *_: False)
    settings = JOB | {"RECIPE": "demo", "EVAL_DATA": "rows"}
    if exports:
        (repository / "runs/demo/pretrain/hf").mkdir(parents=True)
    assert job.train("pretrain", settings, step) == (2 if exports else 0)  # of the gate, or of the training
    assert [command[1] for command in seen] == commands
    if len(commands) > 1:
        assert seen[1][2:6] == ["--ckpt", "runs/demo/pretrain/hf", "--config", "recipes/demo/gates/pretrain.yaml"]
        assert seen[1][6:] == ["--data-dir", "rows"]


def test_starting_over_happens_once_a_job_and_not_at_every_restart(repository, monkeypatch):
    commands = []
    for restart in range(2):
        step = job.Step(raises=False)
        monkeypatch.setattr(step, "run", lambda *a: commands.append(a[3]) or 0)
        settings = {"RECIPE": "demo", "ARGS": "run.resume=never", "SLURM_RESTART_COUNT": str(restart)}
        job.train("pretrain", JOB | settings, step)
        job.slurm.keep_record({"S2_JOB_RECORD": "runs/slurm/17"}, Path("runs/demo/pretrain"))  # as the trainer does
    assert commands[0][-1] == "run.resume=never" and commands[1][-1] == "run.resume=auto"


def test_a_table_that_no_start_brings_further_ends_the_job(repository, monkeypatch, capsys):
    (repository / "hf").mkdir()
    (repository / "hf/config.json").write_text("{}")
    monkeypatch.setattr(job.slurm, "requeue", lambda _, warned: "requeued")

    for restart in range(3):
        step = job.Step(raises=True)
        monkeypatch.setattr(step, "run", lambda *_: 138)
        assert job.evaluate(JOB | {"CKPT": "hf", "SLURM_RESTART_COUNT": str(restart)}, step) == 75
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["stopped: before the table was finished; requeued"] * 2
    assert "cut off in 3 starts of job 17 before an answer was kept" in said[2] and "longer --time" in said[2]


def test_a_table_that_each_start_brings_further_is_finished_at_last(repository, monkeypatch, capsys):
    (repository / "run/hf").mkdir(parents=True)
    (repository / "run/hf/config.json").write_text("{}")
    kept = repository / "run/results/.unfinished/lm-x.jsonl"
    kept.parent.mkdir(parents=True)
    monkeypatch.setattr(job.slurm, "requeue", lambda _, warned: "requeued")

    def warned(*_):
        with kept.open("a") as file:
            file.write("an answer\n")
        return 138

    for restart in range(5):
        step = job.Step(raises=True)
        monkeypatch.setattr(step, "run", warned)
        assert job.evaluate(JOB | {"CKPT": "run/hf", "SLURM_RESTART_COUNT": str(restart)}, step) == 75
    assert capsys.readouterr().err.splitlines() == ["stopped: before the table was finished; requeued"] * 5


def test_a_time_limit_within_the_warning_is_said(monkeypatch):
    for left, is_said in ((300.0, True), (7200.0, False), (None, False)):
        seen = job.slurm.Job("RUNNING", "None", True, 0, False, left)
        monkeypatch.setattr(job.slurm, "ask", lambda _, seen=seen: seen)
        assert bool(job.short_time(JOB)) is is_said
