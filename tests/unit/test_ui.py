"""`heliostat ui` takes its server with it, however it ends."""

import signal
import subprocess
import sys
import time

import psutil
import pytest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_ui_that_is_told_to_end_leaves_no_server_behind(number, tmp_path):
    code = f"from heliostat.track.ui import serve; serve('sqlite:///{tmp_path}/mlflow.db', '127.0.0.1', 0)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline, there = time.monotonic() + 30, []
    while not there and time.monotonic() < deadline:
        there = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    time.sleep(1.0)
    there = psutil.Process(process.pid).children(recursive=True)
    assert any("mlflow" in word for word in there[0].cmdline())
    process.send_signal(number)
    assert process.wait(30) != 0
    assert [p for p in there if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
