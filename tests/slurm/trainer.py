"""Stands in for `s2.training.cli` where a test is about SLURM: says what it sees, and stops as the trainer does.

The first start runs until it is signalled, "saves" and asks for its job to be requeued; restarts end at once.
TRAINER=deaf: the first start is still importing when the signal comes. TRAINER=endless: restarts wait too.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from s2 import ending
from s2.training import slurm

rank, restart = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
job, mode = slurm.job_id(os.environ), os.environ.get("TRAINER", "")
seen = Path(os.environ["SEEN"])
signals: list[int] = []
if not (mode == "deaf" and restart == 0):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
facts = {"arguments": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd()}
(seen / f"{job}.{restart}.{rank}.tmp").write_text(json.dumps(facts))
(seen / f"{job}.{restart}.{rank}.tmp").rename(seen / f"{job}.{restart}.{rank}.json")
if restart and mode != "endless":
    sys.exit(0)
while not signals:
    time.sleep(0.05)
saved = seen / f"{job}.{restart}.saved"
if rank == 0:
    words = slurm.requeue(os.environ, warned=signals != [signal.SIGTERM])
    saved.write_text(words)
while not saved.exists():
    time.sleep(0.05)
print(f"{ending.rank_prefix(os.environ)}stopped: saved; {saved.read_text()}", file=sys.stderr, flush=True)
sys.exit(ending.STOPPED)
