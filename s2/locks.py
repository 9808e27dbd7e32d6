"""One writer for a folder at a time.

A lock is a file in the folder that says who holds it. Two things tell whether the holder is still there: `flock`, which
a dead process of this host cannot keep, and the file's modification time, which the holder renews, for file systems
whose `flock` ends at the host or is missing. Whoever finds the lock of a dead process takes it over and says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, TypeGuard

from s2.ending import FailureError
from s2.files import read_record

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds between two renewals
_PATIENCE = 3.5 * HEARTBEAT  # a lock of another host that is not renewed for so long is taken over
_ORPHANS = 5.0  # seconds in which the children of a dead holder have let go of its lock


class LockedError(ValueError):
    """Another process is at work in the folder."""


class Lock:
    """A lock that is held; made by `lock`, and released at the end of a `with`."""

    def __init__(self, folder: Path, stream: IO[str]) -> None:
        self.folder, self._stream, self._record = folder, stream, _identity()
        _write(stream, self._record)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raise FailureError where another process has taken the lock over, believing this one dead (it was suspended,
        or its disk did not answer); a lock file that somebody has removed is put back."""
        if not (self.folder / LOCK).exists():
            stream = _open(self.folder)
            if _take(stream) is False or read_record(self.folder / LOCK):
                stream.close()  # the next has come in between
            else:
                _write(stream, self._record)
                removed, self._stream = self._stream, stream
                removed.close()
        if (holder := read_record(self.folder / LOCK)) != self._record:
            raise FailureError(f"{self.folder}: the lock was taken by {describe(holder)}")

    def release(self) -> None:
        """Give the folder free; the empty lock file stays, since to remove it would be a race."""
        self._end.set()
        self._thread.join()
        if os.pread(self._stream.fileno(), 4096, 0).decode("utf-8", "replace") == _line(self._record):
            os.ftruncate(self._stream.fileno(), 0)  # by its descriptor: the folder may have another name by now
        self._stream.close()

    def _renew(self) -> None:
        while not self._end.wait(HEARTBEAT):
            with contextlib.suppress(OSError, ValueError):
                os.utime(self._stream.fileno())


def lock(folder: Path, *, wait: bool = False) -> Lock:
    """Hold `folder` (which must be there) for this process and its threads, until `release` or the end of a `with`.

    Args:
        wait: wait for the holder, with a line on stderr, instead of refusing.

    Raises:
        LockedError: another process holds it; names host, process and since when.
        OSError: the lock file cannot be written.
    """
    said = False
    deadline = time.monotonic() + _ORPHANS
    while True:
        stream = _open(folder)
        taken, holder = _take(stream), read_record(folder / LOCK)
        is_dead = _is_here(holder) and (taken or (taken is None and not os.path.exists(f"/proc/{holder['pid']}")))
        if is_dead or (taken is not False and not _is_renewed(folder, holder, say=not said)):
            break
        stream.close()
        if _is_here(holder) and not os.path.exists(f"/proc/{holder['pid']}") and time.monotonic() < deadline:
            time.sleep(0.1)  # a child that it has just forked is about to let go
            continue
        if not wait:
            raise LockedError(
                f"{folder} is being written by {describe(holder)}; wait for it or stop it, or choose another folder"
            )
        if not said:
            print(f"{folder}: {describe(holder)} is at work there; waiting", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.5)
    if before := read_record(folder / LOCK):
        print(f"{folder}: taking over from {describe(before)}, which is gone", file=sys.stderr, flush=True)
    return Lock(folder, stream)


def describe(record: dict[str, Any] | None) -> str:
    """A holder in words."""
    if not record:
        return "another process"
    job = f", SLURM job {record['job']}" if record.get("job") else ""
    return f"process {record.get('pid')} on {record.get('host')} (since {record.get('since')}{job})"


def _identity() -> dict[str, Any]:
    job = os.environ.get("SLURM_ARRAY_JOB_ID") and (
        f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    )
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "boot": _boot(),
        "job": job or os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _open(folder: Path) -> IO[str]:
    return (folder / LOCK).open("a+", encoding="utf-8")


def _write(stream: IO[str], record: dict[str, Any]) -> None:
    stream.seek(0)
    stream.truncate()
    stream.write(_line(record))
    stream.flush()

    def close() -> None:
        with contextlib.suppress(OSError, ValueError):
            os.close(stream.fileno())

    os.register_at_fork(after_in_child=close)  # a child must not keep the lock of a parent that died


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _boot() -> str:
    """Tells hosts apart that have one name, and a host from itself before its last start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _take(stream: IO[str]) -> bool | None:
    """Whether no process that this host's `flock` knows of holds the file; None where there is no `flock`."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        return None
    return True


def _is_here(record: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether a record is that of a process of this host, since its last start."""
    return record is not None and (record.get("host"), record.get("boot")) == (socket.gethostname(), _boot())


def _is_renewed(folder: Path, record: dict[str, Any] | None, *, say: bool) -> bool:
    """Whether there is a process that `flock` does not tell of, and it still renews the lock."""
    if record is None:
        return False
    mine = _identity()
    if mine["job"] and record.get("job") == mine["job"] and mine["restarts"] > record.get("restarts", 0):
        return False  # the same job, started again: the scheduler has ended what was there
    file = folder / LOCK
    seen, until = file.stat().st_mtime_ns, time.monotonic() + _PATIENCE
    if say:
        print(f"{folder}: looking whether {describe(record)} is still at work", file=sys.stderr, flush=True)
    while time.monotonic() < until:
        time.sleep(0.5)
        if file.stat().st_mtime_ns != seen or read_record(file) != record:
            return read_record(file) is not None
    return False
