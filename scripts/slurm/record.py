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
from pathlib import Path
from typing import Any

from s2 import files
from s2.recipe import load_recipe
from s2.training import slurm

FOLDER = Path("runs/slurm")
KIND = "record of a SLURM job"
_PATCH = ("diff", "HEAD", "--no-color", "--no-ext-diff")


class Record:
    """The record of this job, begun at its first start and read at the next ones.

    Attributes:
        folder: runs/slurm/<job>.
        is_restart: an earlier start of the job has left it.
        facts: content of job.json.
    """

    def __init__(self, environment: Mapping[str, str], recipe: Path | None = None) -> None:
        """Args:
            environment: of the job.
            recipe: file that a first start copies.

        Raises:
            FileNotFoundError: the recipe is not there; known ones are named.
        """
        self.job = slurm.job_id(environment)
        self.folder = FOLDER / self.job
        restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        if restarts == 0 and self.folder.exists():
            files.move_aside(self.folder)  # of a job that had this number before the cluster was set up anew
        self.is_restart = (self.folder / "job.json").is_file()
        self.code = _code()
        if self.is_restart:
            self.facts: dict[str, Any] = files.read_json(self.folder / "job.json")
        else:
            self.facts = self._begin(recipe, environment)
        self.facts["starts"].append(
            {
                "restart": restarts,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "nodes": environment.get("SLURM_JOB_NODELIST"),
                "commit": self.code["commit"],
            }
        )

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
        count = 0
        for start in reversed(self.facts["starts"]):
            if start.get("progress") != progress:
                break
            count += 1
        return count

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
            said.append(
                f"the code has changed since job {self.job} first started: {_describe(then)} then, {_describe(now)} now"
            )
        return said

    def _begin(self, recipe: Path | None, environment: Mapping[str, str]) -> dict[str, Any]:
        text = None
        if recipe is not None:
            load_recipe(recipe)
            text = recipe.read_text(encoding="utf-8")
        files.make_folder(self.folder, KIND)
        if text is not None:
            files.write_text(self.recipe, text)
        if self.code["changed"]:
            files.write_text(self.folder / "changes.patch", _git(*_PATCH) or "")
        return {
            "job": self.job,
            "recipe": str(recipe) if recipe else None,
            "submitted_from": environment.get("SLURM_SUBMIT_DIR"),
            "settings": {
                name: environment[name]
                for name in ("RECIPE", "TO", "ARGS", "CKPT", "TASKS", "EVAL_DATA", "EVAL_ARGS", "NEEDLE_ARGS")
                if name in environment
            },
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
        old, new = _leaves(load_recipe(before)), _leaves(load_recipe(after))
    except FileNotFoundError:
        return "is gone"
    except ValueError:
        return "has changed (and cannot be read)"
    keys = [key for key in {**old, **new} if old.get(key, "absent") != new.get(key, "absent")]
    if not keys:
        return "has changed (comments only)"
    shown = [f"{key}={new.get(key, 'absent')} instead of {old.get(key, 'absent')}" for key in keys[:3]]
    return f"has changed ({', '.join(shown)}{', ...' if len(keys) > 3 else ''})"


def _leaves(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in _leaves(item, f"{key}.{name}" if key else str(name)).items()}
    return {key: repr(value)}
