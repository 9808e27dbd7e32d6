"""Triton's kernels, compiled without a GPU in a process of their own: what ptxas says of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def build(child: str, folder: Path, **case: Any) -> dict[str, Any]:
    """Of the kernel that the program `child` compiles for a case, what that prints last (facts as JSON), bytes of
    spills, and registers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)  # ptxas says nothing of a kernel that is taken from a cache
    command = [sys.executable, "-c", child, json.dumps(case)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    facts = json.loads(result.stdout.splitlines()[-1])
    said = result.stdout + result.stderr
    for name, pattern in (("spills", r"(\d+) bytes spill stores"), ("registers", r"Used (\d+) registers")):
        found = re.search(pattern, said)
        assert found is not None, said
        facts[name] = int(found[1])
    return facts


def nightly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)
