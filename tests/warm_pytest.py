"""A process that has imported what the tests need of other libraries, and forks for each run of pytest: that takes
seconds less than a new process. It reads a line for each run, a JSON object with

    root     folder that the run works in, and imports the project from
    tests    arguments for pytest
    output   file for what pytest prints

and answers with two lines: the run's process id, which is its process group too, and at its end its exit code (of one
that a signal has ended, less than 0). It imports nothing of the project. Not for GPUs, which do not bear a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys

LIBRARIES = (
    "numpy", "torch", "torch._dynamo", "triton", "pytest", "hypothesis", "yaml", "tokenizers", "pyarrow.parquet",
    "safetensors.torch", "transformers", "datasets", "lightning.pytorch", "matplotlib.pyplot", "lm_eval.api.model",
)  # fmt: skip


def run(root: str, tests: list[str], output: str) -> int:
    """In a process of its own, which ends with its parent."""
    os.setsid()
    with contextlib.suppress(AttributeError):  # of Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(root)
    os.environ["PYTHONPATH"] = root
    sys.path[0] = root
    import pytest

    code = pytest.main(tests)
    sys.stdout.flush()
    return int(code)


def main() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py does where there is no GPU
    sys.dont_write_bytecode = True
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 3
            try:
                code = run(asked["root"], asked["tests"], asked["output"])
            finally:
                os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
