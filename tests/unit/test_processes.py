"""Tests ending processes: an ended process counts as ended, regardless of which process must reap it."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
from heliostat.cluster import processes

NEGLECTED = """
import subprocess, sys
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("patience_s", [0.0, 600.0])
def test_a_zombie_that_its_parent_does_not_reap_is_not_waited_for(patience_s: float) -> None:
    """For example, if the first process of a container reaps nothing."""
    with subprocess.Popen([sys.executable, "-c", NEGLECTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin and parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        began = time.monotonic()
        processes.stop([child], patience_s)
        assert time.monotonic() - began < 300 and child.status() == psutil.STATUS_ZOMBIE
        parent.stdin.close()


def test_a_process_that_ignores_the_request_to_end_is_killed_after_the_patience() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout and stubborn.stdout.readline()
        began = time.monotonic()
        processes.end_tree(stubborn, 0.5)
        assert time.monotonic() - began > 0.5 and not psutil.pid_exists(stubborn.pid)


def test_no_other_process_is_ended_in_the_place_of_one_that_was_reaped() -> None:
    """Its id is then free, and may belong to an unrelated process."""
    with subprocess.Popen(["true"]) as ended, subprocess.Popen(["sleep", "600"]) as stranger:
        ended.wait()
        ended.pid = stranger.pid
        processes.end_tree(ended)
        assert stranger.poll() is None
        stranger.kill()
