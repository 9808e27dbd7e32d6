"""The sbatch files on a SLURM of one node, most of them with a stand-in for the trainer (`trainer.py`)."""

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import Cluster, missing
from tests.slurm.stand_in import ROOT, tool
from tests.training.tiny import tiny_recipe

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs SLURM: {', '.join(missing())} not found")

RECIPE = "run: {recipe: demo, stage: pretrain}\nmodel: {optimizer: {lr: 2.0e-3}}\n"
URGENT = ("--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
SMALL = ("--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        running = Cluster(Path(folder))
        yield running
        running.stop()


class Clone:
    """A repository as it is after `git clone` and `make setup`, and jobs that are submitted from it."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder, self.seen = cluster, folder, folder / "seen"
        shutil.copytree(ROOT / "scripts/slurm", folder / "scripts/slurm")
        (folder / "recipes/demo").mkdir(parents=True)
        self.recipe = folder / "recipes/demo/pretrain.yaml"
        self.recipe.write_text(RECIPE)
        (folder / "pyproject.toml").write_text('[project]\ndependencies = ["PyYAML>=6"]\n')
        tool(folder / ".venv/bin/python", f'exec {sys.executable} "$@"')
        self.seen.mkdir()
        (folder / "s2/training").mkdir(parents=True)
        for name in (
            "__init__",
            "ending",
            "settings",
            "locks",
            "files",
            "recipe",
            "training/__init__",
            "training/slurm",
            "training/config",
            "training/optim",
            "training/run_folder",
        ):
            shutil.copy(ROOT / f"s2/{name}.py", folder / f"s2/{name}.py")
        shutil.copy(ROOT / "tests/slurm/trainer.py", folder / "s2/training/cli.py")
        self.settings = {"RECIPE": "demo", "SEEN": str(self.seen)}

    def submit(self, *options, name="pretrain", cwd=None, **settings):
        script = f"{self.folder if cwd else '.'}/scripts/slurm/{name}.sbatch"
        return self.cluster.submit(*options, script, environment=self.settings | settings, cwd=cwd or self.folder)

    def task(self, job, restart=0, rank=0):
        """What a task of a job has seen, once it is there."""
        file = self.seen / f"{job}.{restart}.{rank}.json"
        self.cluster.until(file.exists, f"task {file.name}; the log says: {self.log(job)}")
        return json.loads(file.read_text())

    def log(self, job, name="pretrain", folder=None):
        file = (folder or self.folder) / f"s2-{name}-{job}.log"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def clone(cluster, tmp_path):
    yield Clone(cluster, tmp_path)
    cluster.call("scancel", "--signal=KILL", "--full", "--state=RUNNING")
    cluster.call("scancel", "--state=PENDING")
    cluster.until(lambda: not cluster.call("squeue", "-h").strip(), "an empty queue")


def test_a_fresh_clone_trains_requeues_on_the_warning_and_goes_on(cluster, clone):
    job = clone.submit(*SMALL)
    first = clone.task(job)
    clone.task(job, rank=1)
    assert first["arguments"] == [
        *(f"runs/slurm/{job}/recipe.yaml", "trainer.devices=2", "trainer.num_nodes=1", "run.slurm_requeue=true")
    ]
    cluster.call("scancel", "--signal=USR1", job)
    cluster.restart(job)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert clone.task(job, restart=1)["arguments"] == first["arguments"]
    assert f"saved; job {job} goes back into the queue and continues from there" in clone.log(job)
    assert "[rank 1] stopped: saved" in clone.log(job)
    record = json.loads((clone.folder / f"runs/slurm/{job}/job.json").read_text())
    assert [start["restart"] for start in record["starts"]] == [0, 1]


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, clone):
    job = clone.submit(*SMALL)
    clone.task(job), clone.task(job, rank=1)
    cluster.call("scancel", job)
    assert cluster.wait(job, "CANCELLED", "PENDING", "FAILED") == "CANCELLED"
    assert cluster.field(job, "Restarts") == "0"
    assert (
        "was cancelled or ended by SLURM (COMPLETING) and does not go back"
        in (clone.seen / f"{job}.0.saved").read_text()
    )


@pytest.mark.parametrize("who", ["a job of more urgency", "an admin"])
def test_a_job_that_slurm_puts_back_itself_is_no_traceback(cluster, clone, who):
    job = clone.submit(*SMALL)
    clone.task(job), clone.task(job, rank=1)
    if who == "an admin":
        cluster.call("scontrol", "requeue", job)
    else:
        cluster.submit(*URGENT)
    cluster.until((clone.seen / f"{job}.0.saved").exists, "checkpoint")
    cluster.wait(job, "PENDING")
    assert (clone.seen / f"{job}.0.saved").read_text() == f"SLURM has put job {job} back into the queue itself"
    assert "Traceback" not in clone.log(job) and cluster.field(job, "Restarts") == "1"


def test_a_job_with_grace_time_goes_back_before_it_is_ended(cluster, clone):
    job = clone.submit(*SMALL, "--partition=grace")
    clone.task(job), clone.task(job, rank=1)
    cluster.submit(*URGENT)
    cluster.until((clone.seen / f"{job}.0.saved").exists, "checkpoint")
    cluster.wait(job, "PENDING")
    assert "goes back into the queue" in (clone.seen / f"{job}.0.saved").read_text()


def test_a_job_that_may_not_go_back_says_how_to_go_on(cluster, clone):
    job = clone.submit(*SMALL, "--no-requeue")
    clone.task(job), clone.task(job, rank=1)
    cluster.call("scancel", "--signal=USR1", job)
    assert cluster.wait(job, "FAILED", "PENDING", "COMPLETED") == "FAILED"
    assert cluster.field(job, "ExitCode") == "75:0"
    assert "(--no-requeue); submit it again to continue from there" in clone.log(job)
    assert "Traceback" not in clone.log(job)


def test_restarts_are_limited(cluster, clone):
    job = clone.submit(*SMALL, MAX_REQUEUES="1", TRAINER="endless")
    for restart in range(2):
        clone.task(job, restart), clone.task(job, restart, rank=1)
        cluster.call("scancel", "--signal=USR1", job)
        if restart == 0:
            cluster.restart(job)
    assert cluster.wait(job, "FAILED", "PENDING") == "FAILED"
    assert f"job {job} has been restarted 1 times and MAX_REQUEUES=1" in clone.log(job)


def test_a_warning_before_training_begins_is_not_lost(cluster, clone):
    job = clone.submit(*SMALL, TRAINER="deaf")
    clone.task(job), clone.task(job, rank=1)
    cluster.call("scancel", "--signal=USR1", job)
    cluster.restart(job)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert f"stopped: the tasks were ended by a signal; job {job} goes back into the queue" in clone.log(job)


def test_a_job_of_which_a_task_died_fails_and_does_not_come_back(cluster, clone):
    job = clone.submit(*SMALL)
    clone.task(job)
    os.kill(int(clone.task(job, rank=1)["environment"]["SLURM_TASK_PID"]), signal.SIGKILL)
    assert cluster.wait(job, "FAILED", "PENDING", "COMPLETED") == "FAILED"
    assert "is not making way" in clone.log(job) and cluster.field(job, "Restarts") == "0"


def test_a_part_of_a_node_can_be_had_in_every_spelling(cluster, clone):
    one = ("--ntasks-per-node=1", "--cpus-per-task=3")
    jobs = [
        clone.submit("--gpus-per-node=1", *one),
        clone.submit("--gres=gpu:1", *one),
        clone.submit("--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=2"),
    ]
    seen = [clone.task(job) for job in jobs]  # all three at once: none has the node for itself
    assert [facts["arguments"][1] for facts in seen] == ["trainer.devices=1", "trainer.devices=1", "trainer.devices=2"]
    visible = [facts["environment"].get("CUDA_VISIBLE_DEVICES") for facts in seen]
    assert sorted(visible[:2]) == ["0", "1"] and not visible[2]
    clone.task(jobs[2], rank=1)
    # a step has the CPUs of its tasks, and its tasks know how many
    assert "TRES=cpu=3," in cluster.call("scontrol", "show", "step", f"{jobs[0]}.0")
    assert "TRES=cpu=4," in cluster.call("scontrol", "show", "step", f"{jobs[2]}.0")
    assert [facts["environment"]["OMP_NUM_THREADS"] for facts in seen] == ["3", "3", "2"]


def test_a_job_can_be_submitted_from_anywhere_with_a_bare_environment(cluster, clone, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    job = clone.submit(*SMALL, f"--export=RECIPE=demo,SEEN={clone.seen}", cwd=elsewhere)
    facts = clone.task(job)
    assert facts["cwd"] == str(clone.folder) and facts["environment"]["OMP_NUM_THREADS"] == "1"
    assert "on 1 x 2 tasks of 1 CPUs" in clone.log(job, folder=elsewhere)


def test_a_restart_trains_what_was_submitted(cluster, clone):
    job = clone.submit(*SMALL)
    clone.task(job), clone.task(job, rank=1)
    clone.recipe.write_text(RECIPE.replace("2.0e-3", "6.0e-3"))
    cluster.call("scancel", "--signal=USR1", job)
    cluster.restart(job)
    cluster.wait(job, "COMPLETED", "FAILED")
    trained = clone.folder / clone.task(job, restart=1)["arguments"][0]
    assert trained.read_text() == RECIPE
    assert "note: recipes/demo/pretrain.yaml has changed (model.optimizer.lr=0.006 instead of 0.002)" in clone.log(job)


def test_a_wrong_recipe_is_refused_once_and_before_any_task(cluster, clone):
    job = clone.submit(*SMALL, RECIPE="8b")
    assert cluster.wait(job, "FAILED", "COMPLETED") == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert clone.log(job) == "error: RECIPE=8b: no such folder under recipes/; there are demo\n"


def write_evaluation(clone, lm):
    (clone.folder / "eval").mkdir()
    for name in ("a", "b"):
        (clone.folder / name).mkdir()
        (clone.folder / name / "config.json").write_text("{}")
    for name, body in (("__init__", ""), ("lm", lm), ("needle", "print(sys.argv[1:])")):
        (clone.folder / f"eval/{name}.py").write_text(f"import sys, time\n{body}\n")


ONE = ("--gpus-per-node=1", "--cpus-per-task=1")


def test_logs_of_an_array_have_the_names_that_squeue_shows(cluster, clone):
    write_evaluation(clone, "print(sys.argv[1:])")
    job = clone.submit(*ONE, "--array=0-1", "--output=%x-%A_%a.log", name="eval", CKPT="a b")
    for log, checkpoint in ((f"{job}_0", "a"), (f"{job}_1", "b")):
        done = f"['--ckpt', '{checkpoint}']"
        cluster.until(lambda log=log, done=done: done in clone.log(log, "eval"), f"needle of {log}")
        assert clone.log(log, "eval").startswith(f"job {log} (")


def test_a_warned_evaluation_of_an_array_requeues_itself_alone_and_not_for_ever(cluster, clone):
    write_evaluation(clone, "print('table', flush=True); time.sleep(300)")
    job = clone.submit(*ONE, "--array=0-1", "--output=%x-%A_%a.log", name="eval", CKPT="a b")
    last = f"{job}_1"  # its bare id is that of the whole array
    for start in range(3):
        cluster.until(lambda start=start: clone.log(last, "eval").count("\ntable") == start + 1, "table")
        cluster.call("scancel", "--batch", "--signal=USR1", last)
        if start < 2:
            cluster.restart(last)
    assert cluster.wait(last, "FAILED", "PENDING") == "FAILED"
    assert f"the lm-eval table was cut off in 3 starts of job {last}" in clone.log(last, "eval")
    assert cluster.field(f"{job}_0", "Restarts") == "0" and cluster.field(f"{job}_0", "JobState") == "RUNNING"


@pytest.fixture
def real_clone(cluster, clone):
    """A clone whose trainer is the real one, and a recipe of a few seconds."""
    shutil.rmtree(clone.folder / "s2")
    for name in ("s2", "data"):
        (clone.folder / name).symlink_to(ROOT / name)
    (clone.folder / "tiny").mkdir()
    recipe = tiny_recipe(clone.folder / "tiny")
    recipe["run"] |= {"root": "runs", "checkpoint_every": 1000, "validate_every": 1000}
    recipe["trainer"] |= {"log_every_n_steps": 1, "max_steps": 400}  # longer than a look at the log takes
    clone.recipe.write_text(yaml.safe_dump(recipe))
    return clone


def test_the_trainer_itself_saves_comes_back_and_finishes(cluster, real_clone):
    job = real_clone.submit(*SMALL)
    cluster.until(lambda: "\nstep 5/" in real_clone.log(job), "step 5")
    cluster.call("scancel", "--signal=USR1", job)
    cluster.restart(job)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", real_clone.log(job)
    said = real_clone.log(job)
    assert f"job {job} goes back into the queue" in said and "continuing from" in said and "Traceback" not in said
    run = real_clone.folder / "runs/tiny/pretrain"
    assert (run / "summary.json").exists()
    assert (run / f"slurm/{job}/recipe.yaml").read_bytes() == real_clone.recipe.read_bytes()


def test_a_trainer_outside_of_srun_does_not_wait_for_the_jobs_other_tasks(cluster, real_clone):
    command = ".venv/bin/python -m s2.training.cli recipes/demo/pretrain.yaml trainer.devices=2 trainer.max_steps=3"
    wrap = ("--gpus-per-node=2", "-n2", "--job-name=s2-wrap", "--output=%x-%j.log", "--wrap", command)
    job = cluster.submit(*wrap, environment={"PYTHONPATH": str(real_clone.folder)}, cwd=real_clone.folder)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", real_clone.log(job, "wrap")
    assert "x 2 ranks" in real_clone.log(job, "wrap")
    assert (real_clone.folder / "runs/tiny/pretrain/summary.json").exists()
