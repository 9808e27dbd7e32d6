"""What a job of pretrain.sbatch, extend.sbatch or eval.sbatch does on its first node:

    python -m scripts.slurm.job pretrain|extend|eval       (the sbatch files start it, in the repository)

It checks the settings, the environment and the recipe once, before any task is there; keeps a record of what it starts
(`scripts.slurm.record`); runs the tasks under srun, python directly; and decides about the queue where they were
stopped before they could do that themselves. The sbatch files describe the variables of the environment.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from s2 import ending
from s2.recipe import apply_overrides, load_recipe
from s2.training import slurm
from s2.training.config import RunConfig
from s2.training.run_folder import complete_checkpoints
from scripts.slurm.record import Record

IDLE_STARTS = 3  # starts of a job in a row that get nothing done, after which it does not start again
WARNING = 600  # seconds before the time limit at which the sbatch files ask for USR1
_LATE = 90  # SLURM sends it within a minute before that


class WarnedError(Exception):
    """SLURM has sent the warning signal to the job's script."""


def main(argv: list[str] | None = None) -> int:
    """Run the job; its exit code. Raises ValueError or OSError for wrong settings, before any task is started."""
    (kind,) = sys.argv[1:] if argv is None else argv
    step = Step(raises=kind == "eval")
    step.take_signals()
    environment = dict(os.environ)
    slurm.limit(environment)
    try:
        return evaluate(environment, step) if kind == "eval" else train(kind, environment, step)
    except WarnedError:
        return stopped(f"warned before a task was there; {slurm.requeue(environment, warned=True)}")


def train(kind: str, environment: dict[str, str], step: Step) -> int:
    """Pretrain or extend, then measure the stage's gate, if the recipe has one."""
    source = recipe_path(kind, environment)
    arguments = words("ARGS", environment)
    check_environment(environment)
    tasks, cpus = tasks_per_node(environment), cpus_per_task(environment)
    nodes = int(environment["SLURM_NNODES"])
    remarks = []
    if tasks < (gpus := gpus_on_node(environment)):
        remarks.append(f"{gpus} GPUs a node, but {tasks} tasks: the others stay idle (--gpus-per-node={tasks})")
    record = Record(environment, source)
    overrides = [f"trainer.devices={tasks}", f"trainer.num_nodes={nodes}", "run.slurm_requeue=true", *arguments]
    run = run_folder(record.recipe, overrides)
    if record.is_restart and (run / "slurm" / record.job).is_dir():
        overrides.append("run.resume=auto")  # run.resume=never is about what was there before this job
    command = ["-m", "s2.training.cli", str(record.recipe), *overrides]
    record.note(["python", *command], progress_of(run))
    say_start(environment, f"{shlex.join(['python', *command])} on {nodes} x {tasks} tasks of {cpus} CPUs")
    remarks += record.differences(source) if record.is_restart else []
    for remark in [*remarks, *short_time(environment)]:
        print(f"note: {remark}", flush=True)
    environment["S2_JOB_RECORD"] = str(record.folder)
    code = step.run(nodes, tasks, cpus, command, environment)
    gate = source.parent / "gates" / source.name
    # For the next stage, which may wait for this job. With run.checkpoint_every=null there is nothing to measure.
    if code == ending.DONE and gate.is_file() and (run / "hf").is_dir():
        data = ["--data-dir", environment["EVAL_DATA"]] if environment.get("EVAL_DATA") else []
        command = ["-m", "eval.gate", "--ckpt", str(run / "hf"), "--config", str(gate), *data]
        code = step.run(1, 1, cpus, command, environment)
    if code in (ending.DONE, ending.STOPPED) or not made_way(code, environment):
        return code  # the trainer has said what it has to say
    idle = record.idle_starts(progress_of(run))
    if idle >= IDLE_STARTS:
        return stopped(
            f"{idle} starts of job {record.job} in a row ended before a step was trained; it does not start again "
            f"(submit it with a longer --time)"
        )
    return stopped(f"the tasks were ended by a signal; {slurm.requeue(environment, warned=True)}")


def evaluate(environment: dict[str, str], step: Step) -> int:
    """The lm-eval table of one checkpoint, then its needle sweep."""
    checkpoint = pick_checkpoint(environment)
    if not (Path(checkpoint) / "config.json").is_file():
        raise FileNotFoundError(
            f"CKPT={checkpoint}: no Hugging Face folder (config.json) there, seen from {Path.cwd()}"
        )
    tasks = environment.get("TASKS") or "s2_heldout,s2_passkey"
    data = ["--data-dir", environment["EVAL_DATA"]] if environment.get("EVAL_DATA") else []
    phases = {
        "table": ["-m", "eval.lm", "--ckpt", checkpoint, "--tasks", tasks, *data, *words("EVAL_ARGS", environment)],
        "needle": ["-m", "eval.needle", "--ckpt", checkpoint, *words("NEEDLE_ARGS", environment)],
    }
    check_environment(environment)
    cpus = cpus_per_task(environment)
    record = Record(environment)
    say_start(environment, f"evaluate {checkpoint}")
    for phase, command in phases.items():
        if phase in record.facts["done"]:
            print(f"the {phase} was finished by an earlier start of this job", flush=True)
            continue
        # Both go on where they stopped: a sweep by its samples, which each start adds to, a table by its answers.
        progress = f"{phase} {kept_answers(checkpoint) if phase == 'table' else len(record.facts['starts'])}"
        record.note(["python", *command], progress)
        code = step.run(1, 1, cpus, command, environment)
        if code == ending.DONE:
            record.finish(phase)
            continue
        if not made_way(code, environment):
            return code
        if (idle := record.idle_starts(progress)) >= IDLE_STARTS:
            return stopped(
                f"the lm-eval table was cut off in {idle} starts of job {record.job} before an answer was kept; the "
                f"job does not start again: submit it with a longer --time, or with fewer TASKS a job"
            )
        return stopped(f"before the {phase} was finished; {slurm.requeue(environment, warned=True)}")
    return ending.DONE


def kept_answers(checkpoint: str) -> int:
    """Bytes of the answers that cut-off evaluations have kept beside their results (see `eval.results.Answers`)."""
    places = (Path(checkpoint).parent / "results", *Path("runs/eval").glob("*/results"))
    return sum(file.stat().st_size for place in places for file in (place / ".unfinished").glob("*.jsonl"))


def recipe_path(kind: str, environment: Mapping[str, str]) -> Path:
    """recipes/<RECIPE>/pretrain.yaml or extend-<TO>.yaml. Raises ValueError where a setting is missing."""
    known = ", ".join(sorted(folder.name for folder in Path("recipes").iterdir()))
    recipe, to = environment.get("RECIPE"), environment.get("TO")
    if not recipe:
        raise ValueError(f"RECIPE is not set; it names a folder under recipes/ ({known}), for example RECIPE=1.3b")
    if not (Path("recipes") / recipe).is_dir():
        raise ValueError(f"RECIPE={recipe}: no such folder under recipes/; there are {known}")
    if kind == "extend" and not to:
        raise ValueError(f"TO is not set; it names a stage recipes/{recipe}/extend-<TO>.yaml, for example TO=32k")
    return Path("recipes") / recipe / ("pretrain.yaml" if kind == "pretrain" else f"extend-{to}.yaml")


def pick_checkpoint(environment: Mapping[str, str]) -> str:
    """The array task's part of CKPT. Raises ValueError where that is missing, or does not fit the array."""
    checkpoints = environment.get("CKPT", "").split()
    if not checkpoints:
        raise ValueError("CKPT is not set; it names a Hugging Face folder, for example CKPT=runs/7b/extend-32k/hf")
    last, task = len(checkpoints) - 1, environment.get("SLURM_ARRAY_TASK_ID")
    if task is None and last > 0:
        raise ValueError(f"CKPT names {last + 1} checkpoints: submit with --array=0-{last}")
    if int(task or 0) > last:
        raise ValueError(f"array task {task}, but CKPT names {last + 1} checkpoints (0 to {last})")
    return checkpoints[int(task or 0)]


def words(name: str, environment: Mapping[str, str]) -> list[str]:
    """A variable's words, quotes as in a shell. Raises ValueError for one that is not closed."""
    try:
        return shlex.split(environment.get(name, ""))
    except ValueError as error:
        raise ValueError(f"{name}={environment[name]}: {error}") from None


def check_environment(environment: Mapping[str, str], project: Path = Path("pyproject.toml")) -> None:
    """Refuse an environment that lacks what pyproject.toml asks for: jobs install nothing.

    Raises ValueError that names the package and the command that mends it.
    """
    venv = environment.get("VENV", ".venv")
    mend = f"run `make setup{'' if venv == '.venv' else f' VENV={venv}'}` on the login node"
    name = "packaging"
    try:
        from packaging.requirements import Requirement

        for text in tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]:
            requirement = Requirement(text)
            name = requirement.name
            if not requirement.specifier.contains(found := metadata.version(name), prereleases=True):
                raise ValueError(f"the environment in {venv} has {name} {found}, not {requirement}; {mend}")
    except ImportError:  # PackageNotFoundError is one
        raise ValueError(f"the environment in {venv} is not whole ({name} is missing); {mend}") from None


def gpus_on_node(environment: Mapping[str, str]) -> int:
    """GPUs of the job on this node; 0 where it has none."""
    if count := environment.get("SLURM_GPUS_ON_NODE"):
        return int(count)
    return len([index for index in environment.get("SLURM_JOB_GPUS", "").split(",") if index])


def tasks_per_node(environment: Mapping[str, str]) -> int:
    """One task per GPU, or as many as were asked for where there are fewer of those or no GPUs."""
    asked = int(environment.get("SLURM_NTASKS_PER_NODE") or 0)
    if not asked:
        asked = max(1, int(environment.get("SLURM_NTASKS", "1")) // int(environment["SLURM_NNODES"]))
    return min(asked, gpus_on_node(environment) or asked)


def cpus_per_task(environment: Mapping[str, str]) -> int:
    """CPUs of a task: as asked for, else an equal share of the node's."""
    if asked := environment.get("SLURM_CPUS_PER_TASK"):
        return int(asked)
    return max(1, int(environment.get("SLURM_CPUS_ON_NODE", "1")) // tasks_per_node(environment))


class Step:
    """A step of the job, and the signals that reach this process meanwhile.

    SIGTERM is left to srun and the tasks, which get it too, so that this process outlives them.

    Args:
        raises: on USR1 raise WarnedError; else a step that runs gets it.
    """

    def __init__(self, *, raises: bool) -> None:
        self._raises = raises
        self._process: subprocess.Popen[bytes] | None = None

    def take_signals(self) -> None:
        """From now on."""
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGUSR1, self._warned)

    def run(self, nodes: int, tasks: int, cpus: int, command: list[str], environment: Mapping[str, str]) -> int:
        """Run `python <command>` as `nodes` x `tasks` tasks of `cpus` CPUs; the exit code, 128 + n for signal n, which
        may have come to this process in place of the step."""
        own = {"OMP_NUM_THREADS": str(cpus), **environment}
        # What the sbatch file asks for may have been replaced by --gres; a step has all that the job got.
        own.pop("SLURM_GPUS_PER_NODE", None)
        try:
            self._process = subprocess.Popen([*srun(nodes, tasks, cpus), sys.executable, *command], env=own)
            code = self._process.wait()
        except WarnedError:
            return 128 + signal.SIGUSR1
        return 128 - code if code < 0 else code

    def _warned(self, number: int, frame: Any) -> None:
        if self._raises or self._process is None:
            signal.signal(number, signal.SIG_IGN)  # one is enough
            raise WarnedError
        self._process.send_signal(number)


def srun(nodes: int, tasks: int, cpus: int) -> list[str]:
    """The srun command of a step, up to the program."""
    return [
        "srun",
        "--kill-on-bad-exit=1",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",  # not inherited from the job since SLURM 22.05
        "--export=ALL",  # after `sbatch --export=RECIPE=demo` a step would get nothing else
    ]


def made_way(code: int, environment: Mapping[str, str]) -> bool:
    """Whether a step that ended with `code` was signalled because the job makes way, and nobody has seen to that yet.

    A process that the warning meets before it can save dies of it. srun then ends the others, and reports the highest
    exit code of all, so that of the other signals SLURM has to say whether it meant the job.
    """
    if code - 128 == signal.SIGUSR1:
        return True
    if code - 128 not in (signal.SIGTERM, signal.SIGKILL) or (job := asked(environment)) is None:
        return False
    if not job.is_ours_to_requeue() or job.restarts > int(environment.get("SLURM_RESTART_COUNT", "0")):
        return False  # cancelled, or back in the queue already
    return job.reason == "TimeLimit" or job.preempted or is_near_limit(job)


def asked(environment: Mapping[str, str]) -> slurm.Job | None:
    """The job as SLURM sees it, where that answers."""
    try:
        return slurm.ask(slurm.job_id(environment))
    except ValueError:
        return None


def is_near_limit(job: slurm.Job) -> bool:
    return job.seconds_left is not None and job.seconds_left < WARNING + _LATE


def short_time(environment: Mapping[str, str]) -> list[str]:
    """A sentence where the time limit is so near that the run will be warned at once."""
    job = asked(environment)
    if job is None or not is_near_limit(job):
        return []
    return [
        f"{job.seconds_left:.0f} s to the time limit, of which the sbatch files warn {WARNING} s before: the run will "
        f"stop after a few steps, unless the job was submitted with a later warning, as --signal=USR1@60"
    ]


def run_folder(recipe: Path, overrides: list[str]) -> Path:
    """The run folder of a recipe. Raises ValueError for a recipe, an override or a name in it that is wrong."""
    keys = load_recipe(recipe)
    apply_overrides(keys, overrides)
    run = keys.get("run")
    if not isinstance(run, dict) or not {"recipe", "stage"} <= run.keys():
        raise ValueError(f"{recipe}: the keys run.recipe and run.stage are missing")
    return RunConfig(recipe=run["recipe"], stage=run["stage"], root=run.get("root", "runs")).folder


def progress_of(run: Path) -> str:
    """The newest checkpoint of a run."""
    checkpoints = complete_checkpoints(run / "checkpoints")
    return checkpoints[-1].name if checkpoints else "no checkpoint"


def say_start(environment: Mapping[str, str], what: str) -> None:
    """The first line of a start in the log."""
    name = slurm.job_id(environment)
    bare = "" if name == environment["SLURM_JOB_ID"] else f"{environment['SLURM_JOB_ID']}, "
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    nodes = environment.get("SLURM_JOB_NODELIST", "?")
    print(f"job {name} ({bare}restart {restart}) on {nodes}, in {Path.cwd()}: {what}", flush=True)


def stopped(sentence: str) -> int:
    """Say why the job ends unfinished, and return the exit code for that."""
    print(f"stopped: {sentence}", file=sys.stderr, flush=True)
    return ending.STOPPED


if __name__ == "__main__":
    ending.run(main)
