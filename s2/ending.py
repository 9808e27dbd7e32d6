"""How every command of the project ends: one sentence on stderr and an exit code that scripts can act on.

    if __name__ == "__main__":
        ending.run(main)

| code | meaning |
|---|---|
| 0 | done, or nothing left to do |
| 1 | crash: a fault of the program; its traceback is in the file that the sentence names |
| 2 | bad input: a recipe, an argument, a file or the machine (a full disk) is not as it has to be |
| 3 | the training diverged |
| 4 | files that the program wrote are damaged, and there is nothing whole to go on from |
| 5 | out of memory |
| 75 | stopped by a signal and saved: run the same command again to go on (EX_TEMPFAIL) |
| 130 | interrupted from the keyboard |

S2_DEBUG=1 shows tracebacks. An exception says how it ends with a class attribute `exit_code`; of the others ValueError
and OSError are bad input, and everything unforeseen is a crash.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

DONE, CRASH, BAD_INPUT, DIVERGED, DAMAGED, OUT_OF_MEMORY, STOPPED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 75, 130
_BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended

_ERRNO = re.compile(r"^\[Errno -?\d+\] ")

_crash_folder: Path | None = None


class DamagedError(Exception):
    """A file that the program wrote is not what it wrote, and nothing can stand in for it."""

    exit_code = DAMAGED


class FailureError(Exception):
    """Something outside of the program failed (a worker that was killed, a server that is gone)."""

    exit_code = CRASH


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process as this module says."""
    code = call(main)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE
    if code == _BROKEN_PIPE:  # the interpreter flushes once more at its end, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def call(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit code; what it raises becomes a sentence on stderr.

    With S2_DEBUG=1 the traceback stands above the sentence.
    """
    try:
        return main() or DONE
    except BrokenPipeError:
        return _BROKEN_PIPE  # whoever read our output has seen enough
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
        if os.environ.get("S2_DEBUG") == "1":
            traceback.print_exc()
        print(f"{rank_prefix(os.environ)}{sentence(error, code)}", file=sys.stderr, flush=True)
        return code


def exit_code(error: BaseException) -> int:
    """The exit code that `error` ends a command with."""
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    return BAD_INPUT if isinstance(error, ValueError | OSError) else CRASH


def sentence(error: BaseException, code: int) -> str:
    """What is said of `error`; of a crash its kind, its place, and where the traceback is kept."""
    if code == INTERRUPTED:
        return "interrupted"
    if code == CRASH and not isinstance(error, FailureError):
        return f"crashed: {type(error).__name__}: {_words(error)}{_place(error)}{_kept_traceback(error)}"
    return f"{'stopped' if code == STOPPED else 'error'}: {_words(error) or type(error).__name__}"


def keep_crashes_in(folder: Path) -> None:
    """Where tracebacks of crashes go from now on; by default into the folder for temporary files."""
    global _crash_folder
    _crash_folder = folder


def rank_prefix(environment: Mapping[str, str]) -> str:
    """`[rank 3] ` for a process of several, as torchrun, srun or Lightning have numbered it; empty for the first."""
    rank = environment.get("RANK") or environment.get("LOCAL_RANK") or environment.get("SLURM_PROCID") or "0"
    return "" if rank == "0" else f"[rank {rank}] "


def _words(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return _ERRNO.sub("", words) if isinstance(error, OSError) else words


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _kept_traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        folder = _crash_folder if _crash_folder is not None and _crash_folder.is_dir() else Path(tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(
            "w", prefix="s2-crash-", suffix=".txt", dir=folder, delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return f"\n{text}"  # nowhere to keep it
    return f"; the traceback is in {file.name}"
