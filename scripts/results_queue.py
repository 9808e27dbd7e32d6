"""Run the stages of an experiment's arms: one arm on each GPU at a time, each stage a process with its log in a file.

A finished stage is skipped; a training run that was stopped goes on from its checkpoint. When told to stop (SIGTERM,
SIGINT, or because the time is over) every process is sent SIGTERM, and what has not ended soon is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results_plan import Job

from s2 import files
from s2.ending import DONE, STOPPED
from s2.recipe import dump_yaml

ROOT = Path(__file__).resolve().parent.parent
SAVING = 60.0  # seconds before the end in which running processes save, and after which they are killed
_LEFT_BY_LIGHTNING = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")


@dataclass
class _Running:
    job: Job
    gpu: int | None
    process: subprocess.Popen[bytes]
    record: dict[str, Any]
    began: float = field(default_factory=time.monotonic)


class Queue:
    """The arms that are left to run.

    Args:
        arms: the stages of each arm, in order; arms in the order in which they are begun.
        gpus: indices of the GPUs to use; [None] for the CPU.
        minutes: after which everything has ended. None: no limit.
        about: what every record says beside its own (commit, data).
        say: takes lines for people.
    """

    def __init__(
        self,
        arms: Mapping[str, Sequence[Job]],
        gpus: Sequence[int | None],
        minutes: float | None,
        about: Mapping[str, Any],
        say: Callable[[str], None] = print,
        pause: float = 0.5,
    ) -> None:
        self.left = {arm: [job for job in jobs if not job.is_done] for arm, jobs in arms.items()}
        self.left = {arm: jobs for arm, jobs in self.left.items() if jobs}
        self.idle, self.running = list(gpus), list[_Running]()
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.about, self.say, self.pause = about, say, pause
        self.failed: dict[str, str] = {}  # arm -> what happened
        self.waiting: list[str] = []  # arms that were not begun, since they did not fit
        self.stopped: set[str] = set()  # arms that somebody else has told to stop
        self.signalled = False

    def run(self) -> None:
        """Until nothing is left, the time is over, or the process is told to stop."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self.running or self._begin():
                if self.signalled or (self.end is not None and time.monotonic() > self.end - SAVING):
                    return self._stop()
                for each in [each for each in self.running if each.process.poll() is not None]:
                    self._ended(each)
                self._begin()
                time.sleep(self.pause)
        except BaseException:
            self._stop()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, *_: Any) -> None:
        self.signalled = True

    def _begin(self) -> bool:
        """Start what can be started; whether anything runs."""
        busy = {each.job.arm for each in self.running}
        self.waiting = []
        for arm, jobs in self.left.items():
            if arm in busy or arm in self.stopped or not self.idle or self.signalled:
                continue
            needed = 60 * sum(job.minutes for job in jobs)
            if self.end is not None and not jobs[0].record and time.monotonic() + needed > self.end - SAVING:
                self.waiting.append(arm)
            else:
                self._start(jobs[0], self.idle.pop(0))
        return bool(self.running)

    def _start(self, job: Job, gpu: int | None) -> None:
        if job.recipe is not None:
            files.write_text(job.recipe_file, dump_yaml(job.recipe))
        env = {key: value for key, value in os.environ.items() if key not in _LEFT_BY_LIGHTNING}
        env |= {"PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        if gpu is not None:
            visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
            env["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
        job.folder.mkdir(parents=True, exist_ok=True)
        with files.naming(job.log_file), job.log_file.open("ab") as log:
            log.write(f"\n$ {' '.join(job.words)}\n".encode())
            log.flush()
            words = [sys.executable if word == "python" else word for word in job.words]
            process = subprocess.Popen(words, stdout=log, stderr=log, env=env, start_new_session=True)
        record = {"arm": job.arm, "stage": job.stage, "root": job.root, "command": job.words, "recipe": job.recipe}
        record |= self.about
        began = {"began": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": process.pid, "gpu": gpu}
        record["attempts"] = [*job.record.get("attempts", []), began]
        files.write_json(job.record_file, record)
        self.running.append(_Running(job, gpu, process, record))
        self.say(f"{time.strftime('%H:%M:%S')} {job.arm} {job.stage}: began{'' if gpu is None else f' on GPU {gpu}'}")

    def _ended(self, each: _Running) -> None:
        job, code = each.job, each.process.returncode
        self.running.remove(each)
        self.idle.append(each.gpu)
        each.record["attempts"][-1] |= {"seconds": round(time.monotonic() - each.began, 1), "exit_code": code}
        each.record |= {"exit_code": code, "seconds": sum(a.get("seconds", 0) for a in each.record["attempts"])}
        files.write_json(job.record_file, each.record)
        self.say(f"{time.strftime('%H:%M:%S')} {job.arm} {job.stage}: exit code {code}")
        if job.is_done:
            self.left[job.arm] = self.left[job.arm][1:]
        elif code == STOPPED or self.signalled:
            self.stopped.add(job.arm)
        else:
            why = f"exit code {code}" if code != DONE else f"it left no {' and '.join(job.leaves) or 'summary.json'}"
            self.failed[job.arm] = f"{job.stage}: {why}; {last_line(job.log_file)}"
        if job.arm in self.failed or not self.left[job.arm]:
            del self.left[job.arm]

    def _stop(self) -> None:
        self.signalled = True
        for each in self.running:
            each.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + SAVING
        while self.running:
            if time.monotonic() > until:
                for each in self.running:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(each.process.pid, signal.SIGKILL)
            for each in [each for each in self.running if each.process.poll() is not None]:
                self._ended(each)
            time.sleep(self.pause)


def last_line(log: Path) -> str:
    """The last line of a log, which says how a command ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"{log} ends: {lines[-1]}" if lines else f"{log} is empty"


def status(arms: Mapping[str, Sequence[Job]]) -> list[list[str]]:
    """Rows of arm, stage, state and progress, from files alone: another process may be at work."""
    rows = []
    for arm, jobs in arms.items():
        for job in jobs:
            record = job.record
            tries = record.get("attempts", [])
            state = "waiting"
            if job.is_done:
                state = f"done in {record['seconds'] / 60:.1f} min{_otherwise(job)}"
            elif tries and "exit_code" not in tries[-1]:
                state = f"running since {tries[-1]['began'][11:16]}" if _is_alive(tries[-1]["pid"]) else "killed"
            elif tries:
                state = "stopped" if tries[-1]["exit_code"] == STOPPED else f"exit code {tries[-1]['exit_code']}"
            rows.append([arm, job.stage, state, _progress(job)])
    return rows


def _otherwise(job: Job) -> str:
    try:
        job.check_done()
    except ValueError:
        return ", otherwise than the plan says now"
    return ""


def _progress(job: Job) -> str:
    from s2.training.metrics import read_metrics

    if job.recipe is None:
        return ""
    rows = [row for row in read_metrics(job.folder / job.stage / "logs" / "metrics.csv") if "train/loss" in row]
    if not rows:
        return ""
    last = rows[-1]
    rate = last.get("tokens_per_second_per_device", 0)
    return (
        f"step {last['step']:.0f} of {job.recipe['trainer']['max_steps']}, loss {last['train/loss']:.3f}, "
        f"{rate:,.0f} tokens/s"
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return True
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
