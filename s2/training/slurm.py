"""SLURM, as far as a run knows it: which of the tasks this process is, and whether the job goes back into the queue.

The order of things when a job has to make way: SLURM signals every task, the run saves at the next step boundary, then
the first rank asks `requeue`, and all processes end with exit code 75.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from s2 import files

MAX_REQUEUES = 100  # default of the variable of that name: restarts of a job, whoever asked for them
_AGAIN = "submit it again to continue from there"
_INTERACTIVE = ("bash", "interactive")  # job names of salloc and of shells under srun


def job_id(environment: Mapping[str, str]) -> str:
    """`17`, and `12_3` for a task of an array: the bare id of an array's last task means the whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def layout(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(tasks per node, nodes) of the step that this process is a task of, or None if it is the only one.

    A process that srun did not start, in a batch script for example, is alone however many tasks the job may start, and
    starts its own helpers for `trainer.devices`, as on a workstation.

    Raises:
        ValueError: the tasks cannot be one process per device.
    """
    if not {"SLURM_STEP_ID", "SLURM_STEPID"} & environment.keys():
        nodes = int(environment.get("SLURM_NNODES", "1"))
        if nodes > 1 and environment.get("SLURM_JOB_NAME") not in _INTERACTIVE:
            raise ValueError(
                f"the job has {nodes} nodes, but srun did not start this process, which would train on one of them; "
                f"start it with srun, one task per GPU, or with scripts/slurm/pretrain.sbatch"
            )
        return None
    # In the shell of an interactive allocation SLURM_NTASKS is what the allocation may start.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    if tasks == 1:
        return None
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    if tasks % nodes:
        raise ValueError(
            f"srun started {tasks} tasks on {nodes} nodes, which is not the same number on each; "
            f"ask for one task per GPU with --ntasks-per-node"
        )
    return tasks // nodes, nodes


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says about a job."""

    state: str  # RUNNING, SIGNALING, COMPLETING (any job that is being ended), TIMEOUT, CANCELLED, PENDING, ...
    reason: str  # TimeLimit for a job that has reached it
    may_requeue: bool  # false for --no-requeue
    restarts: int  # how often it has gone back into the queue; SLURM counts up when it does, not when the job starts
    preempted: bool = False  # SLURM has chosen it to make way
    seconds_left: float | None = None  # until the time limit; None without one

    @classmethod
    def parse(cls, text: str, now: float | None = None) -> Job:
        """Read the output of `scontrol show job`. Raises ValueError where it is something else."""
        # The name of a job, which ends the first line, can be anything; so can its comment and paths, which come last.
        fields = dict(reversed(re.findall(r"(\w+)=(\S+)", re.sub("JobName=.*", "", text, count=1))))
        try:
            left, end = None, fields.get("EndTime", "")
            if end[:4].isdecimal():
                left = datetime.fromisoformat(end).timestamp() - (time.time() if now is None else now)
            is_preempted = fields.get("PreemptTime", "None") not in ("None", "N/A")
            may_requeue, restarts = fields["Requeue"] == "1", int(fields["Restarts"])
            return cls(fields["JobState"], fields["Reason"], may_requeue, restarts, is_preempted, left)
        except (KeyError, ValueError):
            raise ValueError(f"scontrol show job said {text.strip()[:200]!r}") from None

    def is_ours_to_requeue(self) -> bool:
        """Whether the job only makes way: it runs on until it is ended, or has reached its time limit. In all other
        cases somebody has decided already: SLURM has put it back itself, or it was cancelled."""
        return self.is_running() or self.reason == "TimeLimit"

    def is_running(self) -> bool:
        """Whether nobody has ended the job; while SLURM sends a signal it calls a running job SIGNALING."""
        return self.state in ("RUNNING", "SIGNALING")


def ask(job: str) -> Job:
    """The job as SLURM sees it. Raises ValueError where it does not answer, as without scontrol in a container."""
    return Job.parse(_scontrol("show", "job", job))


def limit(environment: Mapping[str, str]) -> int:
    """MAX_REQUEUES of the job's environment. Raises ValueError for one that is no whole number."""
    text = environment.get("MAX_REQUEUES") or str(MAX_REQUEUES)
    if not text.isdecimal():
        raise ValueError(f"MAX_REQUEUES={text} is a number of restarts, 0 for none")
    return int(text)


def obstacle(job: Job, name: str, started: int, most: int, *, warned: bool) -> str | None:
    """Why the job `name`, which is `job` now, is not put back into the queue, as a sentence; None where it can be.

    Args:
        started: its number of restarts when this process began.
        most: restarts that it may have.
        warned: the warning signal came. SIGTERM alone also comes from srun, when another task has failed.
    """
    if job.restarts > started:
        return f"SLURM has put job {name} back into the queue itself"
    if not job.is_ours_to_requeue():
        cause = "preempted" if job.preempted else "cancelled or ended by SLURM"
        return f"job {name} was {cause} ({job.state}) and does not go back into the queue; {_AGAIN}"
    if job.is_running() and not (warned or job.preempted):
        return (
            f"job {name} is not making way (another task has failed, or somebody has stopped this one), and does "
            f"not go back into the queue; {_AGAIN}"
        )
    if not job.may_requeue:
        return f"job {name} may not go back into the queue (--no-requeue); {_AGAIN}"
    if job.restarts >= most:
        return (
            f"job {name} has been restarted {job.restarts} times and MAX_REQUEUES={most}: it does not go back into the "
            f"queue; {_AGAIN}, with a longer --time if a start trains few steps"
        )
    return None


def requeue(environment: Mapping[str, str], *, warned: bool) -> str:
    """Put this process's job back into the queue where that is ours to do; one sentence about what became of it. Never
    raises: the checkpoint is there, and how the job goes on is not worth a traceback.

    Args:
        warned: whether SLURM's warning signal (SIGUSR1) came, and not SIGTERM alone.
    """
    name = job_id(environment)
    started = int(environment.get("SLURM_RESTART_COUNT", "0"))
    try:
        if words := obstacle(ask(name), name, started, limit(environment), warned=warned):
            return words
        _scontrol("requeue", name)
    except ValueError as error:
        return f"job {name} could not be put back into the queue ({error}); {_AGAIN}"
    return f"job {name} goes back into the queue and continues from there"


def keep_record(environment: Mapping[str, str], run: Path) -> None:
    """Copy the job's record, where scripts/slurm started it, into the run folder as slurm/<job>/."""
    if record := environment.get("S2_JOB_RECORD"):
        for file in Path(record).glob("[!.]*"):
            files.write_text(run / "slurm" / Path(record).name / file.name, file.read_text(encoding="utf-8"))


def _scontrol(*arguments: str) -> str:
    command = f"scontrol {' '.join(arguments)}"
    environment = os.environ | {"SLURM_TIME_FORMAT": "standard"}
    # scontrol is a process of the job too: a requeue would end it before it has heard that all is well. It inherits the
    # mask; for this process the signals are only late.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        done = subprocess.run(
            ["scontrol", *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{command}: {error}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if done.returncode:
        raise ValueError(f"{command}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
