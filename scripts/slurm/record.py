"""What a job started with, in runs/slurm/<job>/, so that its restarts train the same:

    recipe.yaml     the recipe file as it was at the first start; restarts train this one
    job.json        job, command, commit, what differs from it, and every start of the job
    changes.patch   differences of tracked files from the commit, if there were any

The trainer puts a copy into its run folder (`slurm/<job>/`).
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from s2 import files
from s2.recipe import differences, load_recipe
from s2.training import slurm

FOLDER = Path("runs/slurm")
KIND = "record of a SLURM job"
SETTINGS = ("RECIPE", "TO", "ARGS", "CKPT", "TASKS", "EVAL_DATA", "EVAL_ARGS", "NEEDLE_ARGS")
_PATCH = ("diff", "HEAD", "--no-color", "--no-ext-diff")


class Record:
    """The record of this job, begun at its first start and read at the next ones.

    Attributes: `folder` is runs/slurm/<job>, `facts` the content of job.json; `is_restart`: an earlier start left it.

    Args:
        environment: of the job.
        recipe: file that a first start copies. Raises FileNotFoundError where it is not there; known ones are named.
    """

    def __init__(self, environment: Mapping[str, str], recipe: Path | None = None) -> None:
        self.job, self.code = slurm.job_id(environment), _code()
        self.folder = FOLDER / self.job
        restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        if restarts == 0 and self.folder.exists():
            files.move_aside(self.folder)  # of a job that had this number before the cluster was set up anew
        self.is_restart = (self.folder / "job.json").is_file()
        self.facts: dict[str, Any] = (
            files.read_json(self.folder / "job.json") if self.is_restart else self._begin(recipe, environment)
        )
        start = {"restart": restarts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": self.code["commit"]}
        self.facts["starts"].append(start | {"nodes": environment.get("SLURM_JOB_NODELIST")})

    @property
    def recipe(self) -> Path:
        """The recipe that this job trains."""
        return self.folder / "recipe.yaml"

    def note(self, command: list[str], progress: str) -> None:
        """Write down what this start runs, and how far the job was when it began."""
        self.facts["starts"][-1] |= {"command": command, "progress": progress}
        self._write()

    def finish(self, phase: str) -> None:
        """Write down that a phase of the job is done, which restarts leave out."""
        self.facts["done"].append(phase)
        self._write()

    def idle_starts(self, progress: str) -> int:
        """How many starts in a row, this one included, have not brought the job beyond `progress`."""
        starts = reversed(self.facts["starts"])
        return sum(1 for _ in takewhile(lambda start: start.get("progress") == progress, starts))

    def differences(self, recipe: Path) -> list[str]:
        """Sentences about what has changed in the working tree since the job first started."""
        said = []
        if not recipe.is_file() or recipe.read_bytes() != self.recipe.read_bytes():
            said.append(
                f"{recipe} {_changed_keys(self.recipe, recipe)}; job {self.job} goes on with {self.recipe}, the recipe "
                f"that it first started with (to train the edited one, cancel the job and submit again)"
            )
        then, now = self.facts["code"], self.code
        if then != now:
            since = f"the code has changed since job {self.job} first started"
            said.append(f"{since}: {_describe(then)} then, {_describe(now)} now")
        return said

    def _begin(self, recipe: Path | None, environment: Mapping[str, str]) -> dict[str, Any]:
        if recipe is not None:
            load_recipe(recipe)
        files.make_folder(self.folder, KIND)
        if recipe is not None:
            files.write_text(self.recipe, recipe.read_text(encoding="utf-8"))
        if self.code["changed"]:
            files.write_text(self.folder / "changes.patch", _git(*_PATCH) or "")
        return {
            "job": self.job,
            "recipe": str(recipe) if recipe else None,
            "submitted_from": environment.get("SLURM_SUBMIT_DIR"),
            "settings": {name: environment[name] for name in SETTINGS if name in environment},
            "code": self.code,
            "done": [],
            "starts": [],
        }

    def _write(self) -> None:
        files.write_json(self.folder / "job.json", self.facts)


def _code() -> dict[str, Any]:
    """The commit of the working tree, the tracked files that differ from it and how; None without git."""
    commit, status, patch = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno"), _git(*_PATCH)
    return {
        "commit": commit.strip() if commit else None,
        "changed": status.splitlines() if status is not None else None,
        "changes": hashlib.sha256(patch.encode()).hexdigest()[:16] if patch else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # nodes do not always have git
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _describe(code: Mapping[str, Any]) -> str:
    if code["commit"] is None:
        return "an unknown commit"
    return f"{code['commit'][:12]}{' with changes' if code['changed'] else ''}"


def _changed_keys(before: Path, after: Path) -> str:
    try:
        changed = differences(load_recipe(before), load_recipe(after))
    except FileNotFoundError:
        return "is gone"
    except ValueError:
        return "has changed (and cannot be read)"
    shown = [f"{key}={new!r} instead of {old!r}" for key, old, new in changed[:3]] or ["comments only"]
    return f"has changed ({', '.join(shown)}{', ...' if len(changed) > 3 else ''})"
