"""What the figures of a run depend on beside its recipe: devices, versions, commit, command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from s2 import files
from s2.versions import version_of

_PACKAGES = ("torch", "triton", "lightning", "deepspeed", "transformers", "lm_eval")
_FILE = "environment.json"


def environment() -> dict[str, Any]:
    """Of this process; `commit` is that of the tree the program runs from, S2_COMMIT where that is no checkout."""
    versions: dict[str, str | None] = {"python": sys.version.split()[0], "CUDA": torch.version.cuda}
    versions |= {name: version_of(name) for name in _PACKAGES}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "device": devices[0] if devices else f"CPU, {os.cpu_count()} cores",
        "commit": os.environ.get("S2_COMMIT") or _commit(),
        "versions": {name: number for name, number in versions.items() if number},
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def record_environment(folder: Path) -> None:
    """Write environment.json of a run; what earlier processes of it wrote stays there under `earlier`."""
    earlier = []
    if (folder / _FILE).is_file():
        try:
            before = files.read_json(folder / _FILE)
            earlier = [*before.pop("earlier", []), before]
        except (ValueError, TypeError, AttributeError) as error:
            print(f"{folder / _FILE} cannot be read ({error}); it is now {files.move_aside(folder / _FILE).name}")
    files.write_json(folder / _FILE, environment() | {"earlier": earlier})


def _commit() -> str | None:
    """Short commit of the checkout that this file lies in, with `+` where files differ from it; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() + "+" * (changed.returncode == 1) if found.returncode == 0 else None
