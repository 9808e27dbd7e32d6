"""Whether a job goes back into the queue, and which tasks a process is one of, without SLURM."""

import re
import signal
from datetime import datetime
from pathlib import Path

import pytest

from s2.training import slurm
from tests.slurm.stand_in import tool

SHOWN = """JobId=17 JobName=JobState=CANCELLED Reason=x
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   JobState={state} Reason={reason} Dependency=(null)
   Requeue={requeue} Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:03 TimeLimit=00:01:00 TimeMin=N/A
   StartTime=2026-11-30T18:53:33 EndTime={end} Deadline=N/A
   PreemptEligibleTime=2026-11-30T18:53:33 PreemptTime={preempted}
"""
AS_IT_RUNS = {
    "state": "RUNNING",
    "reason": "None",
    "requeue": 1,
    "restarts": 0,
    "end": "2026-11-30T18:54:33",
    "preempted": "None",
}


def shown(**fields):
    return SHOWN.format(**AS_IT_RUNS | fields)


def test_a_job_is_read_from_what_scontrol_shows_and_not_from_its_name():
    now = datetime.fromisoformat("2026-11-30T18:54:03").timestamp()
    assert slurm.Job.parse(shown(), now) == slurm.Job("RUNNING", "None", True, 0, False, 30.0)
    later = shown(state="COMPLETING", reason="TimeLimit", requeue=0, restarts=2, preempted="2026-11-30T18:53:36")
    assert slurm.Job.parse(later, now) == slurm.Job("COMPLETING", "TimeLimit", False, 2, True, 30.0)
    assert slurm.Job.parse(shown(end="Unknown")).seconds_left is None
    with pytest.raises(ValueError, match="Invalid job id"):
        slurm.Job.parse("Invalid job id specified")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, None),  # the warning signal, or the grace time of a preemption
        ({"preempted": "2026-11-30T18:53:36"}, None),
        ({"state": "SIGNALING"}, None),
        ({"state": "COMPLETING", "reason": "TimeLimit"}, None),
        ({"state": "TIMEOUT", "reason": "TimeLimit"}, None),
        # scancel; SLURM calls all jobs COMPLETING that it is ending
        ({"state": "COMPLETING"}, r"was cancelled or ended by SLURM \(\w+\) and does not go back"),
        ({"state": "CANCELLED"}, r"was cancelled or ended by SLURM \(\w+\) and does not go back"),
        # preemption without grace, an admin's requeue
        ({"state": "COMPLETING", "restarts": 1}, "SLURM has put job 17 back into the queue itself"),
        ({"state": "PENDING", "reason": "BeginTime", "restarts": 1}, "SLURM has put job 17 back"),
        ({"state": "COMPLETING", "requeue": 0, "preempted": "2026-11-30T18:53:36"}, "was preempted .* and does not go"),
        ({"requeue": 0}, r"\(--no-requeue\); submit it again to continue"),
        ({"state": "COMPLETING", "reason": "TimeLimit", "requeue": 0}, r"\(--no-requeue\); submit it again"),
    ],
)
def test_only_a_job_that_makes_way_is_put_back(fields, sentence):
    said = slurm.obstacle(slurm.Job.parse(shown(**fields)), "17", 0, most=100, warned=True)
    if sentence is None:
        assert said is None
    else:
        assert said is not None and re.search(sentence, said), said


@pytest.mark.parametrize(
    ("fields", "goes_back"),
    [
        ({}, False),  # srun has ended this task, because another one failed
        ({"preempted": "2026-11-30T18:53:36"}, True),
        ({"state": "COMPLETING", "reason": "TimeLimit"}, True),
    ],
)
def test_sigterm_alone_does_not_put_back_a_job_that_makes_no_way(fields, goes_back):
    said = slurm.obstacle(slurm.Job.parse(shown(**fields)), "17", 0, most=100, warned=False)
    assert (said is None) is goes_back


def test_restarts_have_a_limit():
    job = slurm.Job.parse(shown(restarts=4))
    assert slurm.obstacle(job, "17", started=4, most=5, warned=True) is None
    assert "restarted 4 times and MAX_REQUEUES=4" in (slurm.obstacle(job, "17", started=4, most=4, warned=True) or "")
    assert slurm.limit({}) == 100 and slurm.limit({"MAX_REQUEUES": "0"}) == 0
    for wrong in ("-1", "many", "1.5"):
        with pytest.raises(ValueError, match=f"MAX_REQUEUES={wrong} is a number"):
            slurm.limit({"MAX_REQUEUES": wrong})


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that shows a running job, writes down what it is told, and fails `requeue` where asked to."""

    def make(requeue="exit 0", show=None):
        (tmp_path / "shown").write_text(show or shown())
        show_or_requeue = f"if [[ $1 == show ]]; then cat {tmp_path}/shown; else {requeue}; fi"
        tool(tmp_path / "tools/scontrol", f'echo "$@" >> {tmp_path}/told\n{show_or_requeue}')
        monkeypatch.setenv("PATH", f"{tmp_path}/tools:/usr/bin:/bin")
        return tmp_path / "told"

    return make


def test_a_requeue_names_the_job_and_of_an_array_only_its_own_task(scontrol):
    told = scontrol()
    assert (
        slurm.requeue({"SLURM_JOB_ID": "17"}, warned=True) == "job 17 goes back into the queue and continues from there"
    )
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert "job 12_3 goes back" in slurm.requeue(array, warned=True)
    assert told.read_text().splitlines() == ["show job 17", "requeue 17", "show job 12_3", "requeue 12_3"]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"requeue": "echo 'Requested operation is presently disabled' >&2; exit 1"}, "presently disabled"),
        ({"show": "Invalid job id"}, "Invalid job id"),
        (None, "No such file or directory: 'scontrol'"),
    ],
)
def test_a_requeue_that_fails_is_a_sentence_and_no_traceback(scontrol, monkeypatch, tmp_path, how, sentence):
    if how is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        scontrol(**how)
    said = slurm.requeue({"SLURM_JOB_ID": "17"}, warned=True)
    assert said.startswith("job 17 could not be put back into the queue") and sentence in said
    assert said.endswith("submit it again to continue from there")


def test_the_signal_that_a_requeue_brings_does_not_end_the_request(scontrol, monkeypatch):
    scontrol(requeue="kill -TERM $$; kill -USR1 $$; exit 0")  # as SLURM signals all of the job's processes
    assert (
        slurm.requeue({"SLURM_JOB_ID": "17"}, warned=True) == "job 17 goes back into the queue and continues from there"
    )
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


STEP = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"}


def test_the_layout_is_that_of_the_step():
    assert slurm.layout(STEP | {"SLURM_NTASKS": "16"}) == (8, 2)
    assert slurm.layout(STEP | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "1"}) == (4, 1)
    # salloc calls its jobs "interactive", where Lightning would let every task train for itself
    assert slurm.layout(STEP | {"SLURM_NTASKS": "16", "SLURM_JOB_NAME": "interactive"}) == (8, 2)
    with pytest.raises(ValueError, match="5 tasks on 2 nodes"):
        slurm.layout(STEP | {"SLURM_NTASKS": "5"})


def test_a_process_that_srun_did_not_start_waits_for_no_others():
    assert slurm.layout({}) is None
    assert slurm.layout({"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_NTASKS": "2"}) is None
    shell = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}  # of salloc
    assert slurm.layout(shell) is None
    with pytest.raises(ValueError, match="2 nodes, but srun did not start this process"):
        slurm.layout({"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_NTASKS": "2"})


def test_the_run_folder_gets_a_copy_of_the_jobs_record(tmp_path):
    record, run = tmp_path / "17", tmp_path / "run"
    record.mkdir()
    (record / "job.json").write_text("{}")
    (record / ".s2-folder.json").write_text("{}")
    slurm.keep_record({}, run)
    assert not run.exists()
    slurm.keep_record({"S2_JOB_RECORD": str(record)}, run)
    assert [file.relative_to(run) for file in run.rglob("*.*")] == [Path("slurm/17/job.json")]
