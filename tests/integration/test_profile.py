"""Tests `heliostat debug profile` of a real run of two workers: the trace, the table, the artifacts, and the same losses."""

import gzip
import json

import pytest
from heliostat.runs import profile, profile_table
from heliostat.storage.locations import Location
from mlflow import MlflowClient

from tests.integration import commands
from tests.integration.conftest import curve
from tests.integration.paced import PACED_PLAIN
from tests.integration.strikes import run_folder, settings
from tests.waiting import until

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("ray_session")]


def _stacks(folder: Location) -> list[str]:
    """Returns the file of the driver's stacks, if py-spy is installed and may read another process."""
    if not folder.join(profile.DRIVER).exists():
        return []
    assert b"profiles" in folder.join(profile.DRIVER).read(), "the thread that looks for requests has called py-spy"
    return [profile.DRIVER]


def test_a_running_job_is_profiled_and_trains_on_as_if_it_was_not(job_file, tracking, unbroken, tmp_path):
    """Profiles worker 1 of two from another process, then a worker that the run doesn't have, then after the run's end."""
    path = job_file("profiled")
    folder = run_folder(path)
    words = [word for setting in settings(**PACED_PLAIN) for word in ("--set", setting)]
    driver = commands.start("train", str(path), *words, log=tmp_path / "driver.log")
    until(folder.join("ledger").files, "sign of life", 240, lambda: driver.poll() is None, lambda: driver.err)
    asked = ["profile", str(folder), "--mlflow", tracking, "--steps", "3", "--json"]
    unknown = commands.start(*asked, "--rank", "2", log=tmp_path / "unknown.log")
    done = commands.run(*asked, "--rank", "1", log=tmp_path / "profile.log")
    assert driver.wait(300) == 0, driver.err[-3000:]
    assert unknown.wait(300) == 2 and "--rank: the run has 2 workers" in unknown.err
    assert done.returncode == 0, done.err[-3000:]
    result = json.loads(done.out)
    assert (result["rank"], result["steps"], result["device"]) == (1, 3, "cpu")
    assert result["files"] == ["rank-00001.trace.json.gz", *_stacks(Location(result["folder"]))] and 0 < result["busy"] < 1
    assert {"aten::mm", "aten::addmm"} & {o["name"] for o in result["operations"]}
    assert result["gaps"][0]["seconds"] > 0.1, "the recipe sleeps so long in each step"
    trace = Location(result["folder"]).join(result["files"][0])
    read = profile_table.read(trace)
    assert read["operations"] == result["operations"]
    named = {e["name"] for e in json.loads(gzip.decompress(trace.read()))["traceEvents"] if e.get("cat") == "user_annotation"}
    assert named >= {"batch", "forward", "backward", "reduce", "optimizer"}
    run_id = json.loads(folder.join("run.json").read())["run_id"]
    client = MlflowClient(tracking_uri=tracking)
    kept = [f.path for group in client.list_artifacts(run_id, "profiles") for f in client.list_artifacts(run_id, group.path)]
    assert sorted(name.rpartition("/")[2] for name in kept) == sorted(result["files"])
    assert curve(tracking, run_id) == pytest.approx(unbroken[1], abs=1e-5)
    ended = commands.run(*asked, log=tmp_path / "ended.log")
    assert ended.returncode == 2 and "isn't running" in ended.err
