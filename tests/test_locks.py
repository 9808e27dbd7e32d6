"""One writer at a time, and nobody waits for the dead."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from s2 import locks
from s2.ending import FailureError

HOLD = """
import os, sys, time
from pathlib import Path
from s2.locks import lock
with lock(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, *more: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(locks.LockedError, match=rf"process {process.pid} on "), locks.lock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_writer_is_taken_over_with_a_line(tmp_path: Path, capfd: Any) -> None:
    process = hold(tmp_path, "with a child that lives on")
    process.kill()
    process.wait()
    with locks.lock(tmp_path) as held:
        held.check()
    assert f"taking over from process {process.pid}" in capfd.readouterr().err
    with locks.lock(tmp_path):  # given back in order: nothing to say
        pass
    assert "taking over" not in capfd.readouterr().err


def test_waiting_ends_with_the_holder(tmp_path: Path, capfd: Any) -> None:
    process = hold(tmp_path)
    threading.Timer(0.7, process.kill).start()
    with locks.lock(tmp_path, wait=True):
        process.wait()
    assert "waiting" in capfd.readouterr().err


def _of_another_host(folder: Path, **more: Any) -> Path:
    file = folder / locks.LOCK
    record = {"host": "node7", "pid": 1, "since": "then", "boot": "b", "job": None, "restarts": 0}
    file.write_text(json.dumps(record | more))
    return file


def test_a_lock_that_another_host_renews_is_respected(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 2.0)
    file = _of_another_host(tmp_path)
    threading.Timer(0.6, lambda: os.utime(file)).start()
    with pytest.raises(locks.LockedError, match="process 1 on node7"), locks.lock(tmp_path):
        pass


def test_a_lock_that_another_host_left_is_taken_over(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.6)
    _of_another_host(tmp_path)
    with locks.lock(tmp_path):
        pass
    assert "taking over from process 1 on node7" in capfd.readouterr().err


def test_without_flock_the_renewals_tell(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.3)
    monkeypatch.setattr(locks, "_PATIENCE", 1.2)
    with locks.lock(tmp_path), pytest.raises(locks.LockedError, match=f"process {os.getpid()} on "):
        locks.lock(tmp_path)
    _of_another_host(tmp_path)
    with locks.lock(tmp_path):
        pass
    assert "taking over from process 1 on node7" in capfd.readouterr().err


def test_a_requeued_job_does_not_wait_for_itself(tmp_path: Path, monkeypatch: Any) -> None:
    _of_another_host(tmp_path, job="17", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    with locks.lock(tmp_path):
        pass
    assert time.monotonic() - began < 5


def test_a_holder_notices_that_its_lock_was_taken(tmp_path: Path) -> None:
    with locks.lock(tmp_path) as held:
        _of_another_host(tmp_path)
        with pytest.raises(FailureError, match="node7"):
            held.check()
    assert "node7" in (tmp_path / locks.LOCK).read_text()  # theirs is not wiped by us


def test_a_holder_puts_back_a_lock_file_that_was_removed(tmp_path: Path) -> None:
    with locks.lock(tmp_path) as held:
        (tmp_path / locks.LOCK).unlink()
        held.check()
        held.check()
        with pytest.raises(locks.LockedError, match=str(os.getpid())), locks.lock(tmp_path):
            pass


def test_a_removed_lock_file_does_not_let_two_in(tmp_path: Path) -> None:
    with locks.lock(tmp_path) as held:
        (tmp_path / locks.LOCK).unlink()
        process = hold(tmp_path)
        try:
            with pytest.raises(FailureError, match=f"process {process.pid} "):
                held.check()
        finally:
            process.kill()
            process.wait()
