"""One driver at a time for a run, and a dead one never stands in the way."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from heliostat.errors import ConfigError
from heliostat.goodput import FOLDER, Attempt
from heliostat.storage import Location
from heliostat.train import driver


def leave(run: Location, **facts: object) -> Attempt:
    now = time.time()
    attempt = Attempt("a", now - 5, now - 1, now, 0, 2, host=socket.gethostname(), pid=os.getpid())
    for key, value in facts.items():
        setattr(attempt, key, value)
    run.join(FOLDER, "attempt-1.json").write(attempt.dump())
    return attempt


def test_a_run_that_another_process_trains_is_refused_with_its_number(tmp_path):
    run = Location(str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        leave(run, pid=other.pid, started=time.time() + 1)
        with pytest.raises(ConfigError, match=f"is being trained by process {other.pid} on {socket.gethostname()}"):
            driver.alone(run)
        leave(run, pid=other.pid, outcome="failed")
        driver.alone(run)
    finally:
        other.kill()
        other.wait()
    leave(run, pid=other.pid)
    driver.alone(run)


def test_a_process_that_was_given_a_dead_drivers_number_is_not_it(tmp_path):
    run = Location(str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        leave(run, pid=other.pid, started=time.time() - 3600)
        driver.alone(run)
    finally:
        other.kill()
        other.wait()


def test_a_new_run_and_the_process_itself_may_train(tmp_path):
    driver.alone(Location(str(tmp_path)))
    leave(Location(str(tmp_path)))
    driver.alone(Location(str(tmp_path)))


@pytest.mark.parametrize("lives", [True, False])
def test_a_driver_on_another_host_counts_as_long_as_it_gives_signs_of_life(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(driver, "SILENCE_S", 1.5)
    run = Location(str(tmp_path))
    leave(run, host="elsewhere", pid=1)
    sign = threading.Timer(0.5, lambda: leave(run, host="elsewhere", pid=1, seen=time.time() + 9))
    if not lives:
        driver.alone(run)
        return
    sign.start()
    with pytest.raises(ConfigError, match="is being trained by process 1 on elsewhere; wait for it, stop it, or use"):
        driver.alone(run)
