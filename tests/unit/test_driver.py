"""Tests that the ledger shows whether a run's driver is alive: its place, its process, and the time of its last sign."""

import os
import socket
import subprocess
import sys
import time

import pytest
from heliostat.runs import liveness
from heliostat.runs.goodput import RecordedAttempt

from tests.waiting import until


def attempt(**facts: object) -> RecordedAttempt:
    now = time.time()
    made = RecordedAttempt("a", now - 5, now - 1, now, 0, 2, host=socket.gethostname(), pid=os.getpid())
    for key, value in facts.items():
        setattr(made, key, value)
    return made


def test_a_process_lives_until_it_is_gone_or_only_waits_for_its_parent():
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert liveness.lives(attempt(pid=other.pid, started=time.time() + 1))
        other.kill()
        until(lambda: not liveness.lives(attempt(pid=other.pid, started=time.time() + 1)), "end of the process")
    finally:
        other.kill()
        other.wait()
    assert not liveness.lives(attempt(pid=other.pid))


def test_a_process_that_was_given_a_dead_drivers_number_is_not_it():
    assert not liveness.lives(attempt(started=time.time() - 365 * 86400))


@pytest.mark.parametrize(("silent", "lives"), [(10, True), (600, False)])
def test_a_driver_on_another_host_lives_as_long_as_it_gives_signs_of_life(silent, lives):
    assert liveness.lives(attempt(host="elsewhere", pid=1, seen=time.time() - silent)) is lives
