"""Tests Ray's start on a busy machine: it is retried once, then fails with one line, and leaves no process of a failed start."""

import subprocess
import sys

import psutil
import pytest
from heliostat.cluster import connect
from heliostat.errors import ClusterError, ConfigError
from heliostat.validation import check

from tests.unit.build_job import job

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup.\nmore"


@pytest.fixture
def rays(monkeypatch):
    """Simulates `ray.init` at each attempt. Each attempt starts a process, like a raylet that starts too late."""
    tries: list[BaseException | None] = []
    started: list[subprocess.Popen] = []

    def init(**options: object) -> None:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if fault := tries.pop(0):
            raise fault

    monkeypatch.setattr(connect.ray, "init", init)
    yield tries, started
    for process in started:
        process.kill()
        process.wait()


def test_a_start_that_was_too_slow_is_tried_once_more(rays, caplog):
    tries, started = rays
    tries += [RuntimeError(SLOW), None]
    connect.init()
    assert not tries and "Trying once more" in caplog.text
    assert not psutil.pid_exists(started[0].pid) or started[0].poll() is not None
    assert started[1].poll() is None


def test_a_second_failure_is_one_line(rays):
    tries, started = rays
    tries += [RuntimeError(SLOW), ConnectionError(SLOW)]
    with pytest.raises(
        ClusterError, match=r"^Ray didn't start in 2 attempts: The current .*failed to startup\.\. Check the"
    ) as e:
        connect.init()
    assert "\n" not in str(e.value) and all(p.wait(60) is not None for p in started)


def test_ctrl_c_while_ray_starts_is_no_reason_to_try_again(rays):
    tries, started = rays
    tries += [KeyboardInterrupt(), None]
    with pytest.raises(KeyboardInterrupt):
        connect.init()
    assert len(started) == 1 and started[0].wait(60) is not None


def test_gpus_that_are_not_here_are_refused_before_ray_starts(rays, monkeypatch):
    """If no cluster is named. Otherwise Ray would assign as many GPUs as requested."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connect.ray, "is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(
        ConfigError, match=r"^workers\.gpus: the workers need .* this machine has no usable GPU.* `heliostat submit`"
    ):
        connect.connect(cpus=2, gpus=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert check.require_gpus(1) == 1
    with pytest.raises(ConfigError, match="need 8 GPUs, but this machine has 1 usable GPUs"):
        check.check_devices(job(**{"workers.gpus": 1, "workers.count": 8, "train.global_batch_size": 16}), None)
