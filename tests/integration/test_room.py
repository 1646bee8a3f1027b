"""Tests that a run or a sweep without room reports this with numbers, and continues when there is room."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml
from heliostat.cluster import private_ray
from heliostat.training.run import train
from heliostat.tune import driver as tuning
from heliostat.tune.sweep import load
from ray.util.placement_group import placement_group, remove_placement_group

from tests.integration.paced import SET_PLAIN
from tests.waiting import until


@pytest.fixture
def others(ray_session: None) -> Iterator[Callable[[], None]]:
    """Occupies all CPUs except one, until it is called."""
    held = placement_group([{"CPU": 1}] * (int(ray.cluster_resources()["CPU"]) - 1))
    ray.get(held.ready())
    gone = []

    def release() -> None:
        if not gone:
            gone.append(True)
            remove_placement_group(held)

    yield release
    release()


def test_a_run_on_a_full_node_says_within_ten_seconds_what_others_hold_and_trains_when_they_are_done(others, job_file, caplog):
    caplog.set_level(logging.INFO)

    def at(words: str) -> float | None:
        return next((record.created for record in list(caplog.records) if words in record.getMessage()), None)

    def listen() -> None:
        deadline = time.monotonic() + 120
        while at("no room") is None and time.monotonic() < deadline:
            time.sleep(0.1)
        others()

    thread = threading.Thread(target=listen)
    thread.start()
    result = train(job_file("second"), [*SET_PLAIN, "train.steps=6", "checkpoint.every=6", "evaluate.every=6"])
    thread.join()
    assert result["steps"] == 6
    text = next(r.getMessage() for r in caplog.records if "no room" in r.getMessage())
    assert (
        "no room for 2 workers of 1 CPUs, and 1 CPU for reading the data: the 1 nodes that can hold such workers have 8 CPUs"
        in text
    )
    assert (
        "other jobs use 7 CPUs. There is room for 0 workers now, and for 7 workers when the other jobs have ended; waiting"
        in text
    )
    assert abs(at("no room") - at("placing the workers")) < 10, "a node's answer and the log of the placement have no order"


def test_a_sweep_without_room_for_one_trial_says_so_before_it_starts(others, job_file, tmp_path: Path, caplog):
    job_file("tiny")
    sweep = {"name": "rates", "job": str(tmp_path / "tiny.yaml"), "searcher": {"name": "grid"}, "register_best": False}
    sweep["space"] = {"train.optimizer.lr": {"grid": [1e-4, 1e-3]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    tuner = tuning._Tuning(load(tmp_path / "sweep.yaml", []), {}, False, False, None)
    assert tuner._connect() == 1
    assert "one trial after another: no room for 2 workers of 1 CPUs" in caplog.text and "other jobs use 7 CPUs" in caplog.text
    others()
    until(lambda: caplog.clear() or tuner._connect() > 1, "room for several trials")
    assert "no room" not in caplog.text


def test_a_command_that_joins_a_cluster_without_a_free_cpu_says_so(others):
    """For example, `prepare` and `generate`, whose tasks would wait silently."""
    last = placement_group([{"CPU": 1}])
    ray.get(last.ready())
    address, token = ray._private.worker._global_node.gcs_address, str(private_ray.token_file())
    joining = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    environment = {**os.environ, **private_ray.CONFINED, **joining}
    code = "from heliostat.cluster.connect import connect; connect(1)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    remove_placement_group(last)
    assert (
        done.returncode == 0
        and "none of the cluster's 8 CPUs is free, so the tasks of this command wait for a free CPU" in done.stderr
    ), done.stderr
