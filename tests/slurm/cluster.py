"""A SLURM cluster of one node on this machine, on the loopback, for tests: munged, slurmctld and slurmd.

The node claims 16 CPUs and two GPUs, which are counted but not there. Partitions: `gpu` (default), `grace`, whose jobs
get a minute when they are preempted, and `urgent`, which preempts both.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian puts the daemons

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=16 RealMemory=1000 Gres=gpu:2
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=grace Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs that the cluster needs and this machine does not have."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """A running cluster with its files in `folder`, which everybody has to be able to enter; stop it with `stop`."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)  # munged insists; its key is its own
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        port = random.SystemRandom().randrange(20000, 40000)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        self.config = folder / "slurm.conf"
        self.config.write_text(CONFIG.format(host=host, port=port, node_port=port + 1, user=user, folder=folder))
        # any two devices: they are counted, and nothing opens them
        lines = [f"NodeName={host} Name=gpu File=/dev/{device}\n" for device in ("null", "zero")]
        (folder / "gres.conf").write_text("".join(lines))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        self.environment = {"PATH": PATH, "HOME": str(folder), "SLURM_CONF": str(self.config)}
        try:
            self.call("munged", f"--seed-file={folder}/munge.seed", *(f"--{k}={folder}/{v}" for k, v in files.items()))
            self.call("slurmctld", "-f", str(self.config))
            self.call("slurmd", "-f", str(self.config), "-N", host)
            self.until(lambda: self.call("sinfo", "-h", "-p", "gpu", "-o", "%t").strip() == "idle", "an idle node")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        with contextlib.suppress(AssertionError):
            self.call("scancel", "--signal=KILL", "--full", "--state=RUNNING")
            self.call("scancel", "--state=PENDING")
            self.until(lambda: not self.call("squeue", "-h").strip(), "an empty queue")
        for name in ("slurmd", "slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError, AssertionError):
                pid = int((self.folder / f"{name}.pid").read_text())
                os.kill(pid, signal.SIGTERM)
                self.until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"end of {name}", 20)

    def call(self, *command: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Output of a command."""
        own = self.environment | dict(environment or {})
        done = subprocess.run(command, env=own, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """sbatch; the job's id."""
        return self.call("sbatch", "--parsable", *arguments, environment=environment, cwd=cwd).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", job))
        assert found, name
        return found[1]

    def wait(self, job: str, *states: str) -> str:
        """Wait for one of `states` and return it."""
        self.until(lambda: self.field(job, "JobState") in states, f"job {job} {' or '.join(states)}")
        return self.field(job, "JobState")

    def restart(self, job: str) -> None:
        """Start a requeued job now and not after the two minutes that SLURM waits."""
        self.wait(job, "PENDING")
        time.sleep(2)  # a job that starts in the second of its requeue has a credential that was revoked then

        def is_started() -> bool:
            if self.field(job, "JobState") == "PENDING":  # SLURM may set its own time after ours, so more than once
                with contextlib.suppress(AssertionError):  # it has started meanwhile
                    self.call("scontrol", "update", f"job={job}", "StartTime=now")
            return self.field(job, "JobState") not in ("PENDING", "COMPLETING")

        self.until(is_started, f"restart of job {job}")

    def until(self, is_so: Callable[[], bool], what: str, seconds: float = 180) -> None:
        """Wait for something."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s"
            time.sleep(0.1)
