"""Prompts are made while the device computes: in order, in other processes, the same ones."""

import os
import time
from contextlib import closing

import pytest

from eval.ahead import made_ahead
from s2.ending import FailureError


def process_of(item):
    return item, os.getpid()


def die(parent):
    if os.getpid() != parent:
        os._exit(9)


def test_things_are_made_here_until_processes_have_started_and_there_from_then_on():
    found = []
    with closing(made_ahead(process_of, range(3000), 2)) as made:
        for item, process in made:
            found.append((item, process))
            if [process for _, process in found].count(os.getpid()) < len(found) - 20:
                break
            time.sleep(0.02)
    assert [item for item, _ in found] == list(range(len(found)))  # in order, none twice
    processes = [process for _, process in found]
    assert processes[0] == os.getpid() not in processes[-21:]


def test_a_process_that_is_killed_ends_the_evaluation_with_a_sentence():
    made = made_ahead(die, [os.getpid()] * 3000, 1)
    with pytest.raises(FailureError, match=r"a process that makes prompts was killed.*the same command goes on"):
        for _ in made:
            time.sleep(0.02)


def test_for_nothing_or_one_thing_no_process_is_started(monkeypatch):
    monkeypatch.setattr("eval.ahead.ProcessPoolExecutor", None)
    assert not list(made_ahead(process_of, [], 2)) and list(made_ahead(process_of, [1], 2)) == [(1, os.getpid())]


def test_without_processes_nothing_is_made_before_it_is_asked_for():
    made_ones = []
    made = made_ahead(made_ones.append, range(3), 0)
    next(made)
    assert made_ones == [0]
