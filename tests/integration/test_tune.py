"""Tests sweeps on real Ray Tune: trials are normal runs, a stopped trial stops at its step, and nothing is lost, repeated, or
left.

Even such small models with few steps rank learning rates that differ by orders of magnitude.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import ray
import torch
import yaml
from heliostat.checkpoint import layout
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.run import train
from heliostat.tune import listing, trial_record
from heliostat.tune.driver import tune

from tests.integration import commands
from tests.integration.conftest import curve, tiny_job
from tests.integration.paced import SET_PLAIN

pytestmark = pytest.mark.ci


def sweep_file(corpus: str, tracking: str, folder: Path, **changes: Any) -> Path:
    """Writes a sweep over the tiny job's learning rate, with 8 steps per trial."""
    job = tiny_job(corpus, tracking, folder)
    job["train"] |= {"steps": 8, "schedule": {"name": "constant"}}
    job["evaluate"] = {"every": 2, "samples": 8, "fraction": 0.05}
    job["checkpoint"] = {"every": 8}
    job["mlflow"]["register"] = f"{changes['name']}-lm"
    (folder / "base.yaml").write_text(yaml.safe_dump(job))
    sweep = {"job": str(folder / "base.yaml"), "searcher": {"name": "grid"}, "concurrency": 2, **changes}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def grid(*rates: float) -> dict[str, Any]:
    return {"train.optimizer.lr": {"grid": list(rates)}}


def nested(tracking: str, result: dict[str, Any]) -> dict[int, Any]:
    """Returns the sweep's nested runs, by trial."""
    client = mlflow.MlflowClient(tracking_uri=tracking)
    experiment = client.get_run(result["run_id"]).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{result['run_id']}'")
    assert len({r.data.tags["heliostat.trial"] for r in found}) == len(found)  # one run a trial, whatever died
    return {int(r.data.tags["heliostat.trial"]): r for r in found}


def left() -> tuple[int, set[str]]:
    """Returns the number of placement groups, and the classes of the actors of runs."""
    groups = sum(g["state"] != "REMOVED" for g in ray.util.placement_group_table().values())
    alive = {a["class_name"] for a in _actors() if a["state"] == "ALIVE"}
    return groups, {c for c in alive if not c.startswith("_") and c not in ("datasets_stats_actor", "AutoscalingRequester")}


def _actors() -> list[dict[str, Any]]:
    from ray._private.state import actors

    return [{"class_name": a["ActorClassName"], "state": a["State"]} for a in actors().values()]


# ASHA ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asha(tmp_path_factory, ray_session, corpus, tracking):
    folder = tmp_path_factory.mktemp("asha")
    before = left()
    scheduler = {"name": "asha", "grace": 2, "reduction": 2}
    path = sweep_file(corpus, tracking, folder, name="asha", space=grid(1e-3, 1e-5, 1e-6, 1e-7), scheduler=scheduler)
    result = tune(path)
    return folder, path, result, before, left()


def test_asha_finds_the_best_rate_in_fewer_steps_and_stops_the_others_where_they_waited(asha) -> None:
    _, _, result, *_ = asha
    assert result["best"]["params"] == {"train.optimizer.lr": 1e-3}
    by_status = {row["trial"]: (row["status"], row["step"]) for row in result["trials"]}
    assert by_status[0] == ("finished", 8)
    pruned = [step for status, step in by_status.values() if status == "pruned"]
    assert len(pruned) >= 2 and set(pruned) <= {2, 4}
    assert result["steps"] == sum(step for _, step in by_status.values()) < 4 * 8


def test_nothing_of_a_sweep_is_left(asha) -> None:
    folder, _, _, before, after = asha
    assert after[0] == before[0] and after[1] <= before[1]  # what another test has left may go meanwhile
    assert not [n for n in ("stop", "ray") if (folder / "runs" / "asha" / n).exists()]


def test_mlflow_has_the_sweep_its_trials_and_what_became_of_them(asha, tracking) -> None:
    _, _, result, *_ = asha
    client = mlflow.MlflowClient(tracking_uri=tracking)
    parent, runs = client.get_run(result["run_id"]), nested(tracking, result)
    assert parent.info.status == "FINISHED" and sorted(runs) == [0, 1, 2, 3]
    for row in result["trials"]:
        run = runs[row["trial"]]
        assert run.info.run_id == row["run_id"]
        assert run.info.status == ("FINISHED" if row["status"] == "finished" else "KILLED")
        assert run.data.tags.get("heliostat.pruned") == (f"step {row['step']}" if row["status"] == "pruned" else None)
        assert float(run.data.params["train.optimizer.lr"]) == row["train.optimizer.lr"]
        assert len(curve(tracking, run.info.run_id)) == row["step"]  # what was stopped took no step more
        assert run.inputs.dataset_inputs
    files = {f.path for f in client.list_artifacts(result["run_id"])}
    assert {"sweep.json", "trials.json", "history.png", "parallel_coordinates.png"} <= files
    assert parent.data.metrics["best/loss"] == result["best"]["value"]
    version = client.get_model_version("asha-lm", "1")
    assert version.run_id == result["best"]["run_id"] and version.tags["heliostat.sweep_run"] == result["run_id"]


def test_a_trial_is_a_run_as_any_other(asha) -> None:
    """Its receipts pass, and its losses equal those of the same job trained alone."""
    folder, _, result, *_ = asha
    place = Location(result["best"]["run_folder"])
    assert verify(place)["ok"]
    settings = ["name=alone", f"storage={folder}/alone", "train.optimizer.lr=0.001", *SET_PLAIN]
    alone = train(folder / "base.yaml", settings)
    assert alone["eval"] == json.loads(place.join("summary.json").read())["eval"]


def test_a_finished_sweep_is_listed_and_not_repeated(asha, tracking) -> None:
    folder, path, result, *_ = asha
    again = tune(path, resume=True)
    assert again["best"] == result["best"] and again["trials"] == result["trials"]
    (listed,) = listing.sweeps(Location(f"{folder}/runs"))
    assert (listed["name"], listed["best"], listed["running"]) == ("asha", result["best"]["value"], False)
    job = listing.best_job(Location(result["folder"]))
    assert job["train"]["optimizer"]["lr"] == 1e-3 and job["name"] == "asha-best"


# a driver that dies --------------------------------------------------------------------------------------------------


@pytest.fixture
def start() -> Iterator[Callable[..., commands.Process]]:
    """Starts `heliostat sweep run` in a separate process. Its processes are killed after a failed test."""
    started: list[commands.Process] = []

    def make(path: Path, log: Path, *more: str) -> commands.Process:
        started.append(commands.start("sweep", "run", str(path), "--json", *more, log=log, RAY_ADDRESS=""))
        return started[-1]

    yield make
    for process in started:
        if process.poll() is None:
            for child in [*_descendants(process), process]:
                child.kill()


def _descendants(process: commands.Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_killed_driver_loses_and_doubles_nothing_and_a_failed_trial_stays_failed(start, corpus, tracking, tmp_path) -> None:
    path = sweep_file(corpus, tracking, tmp_path, name="killed", space=grid(1e-3, 1e30, 1e-4), concurrency=1)
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base["train"]["grad_clip"], base["checkpoint"]["every"] = 0, 2
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    folder = Location(f"{tmp_path}/runs/killed")
    first = start(path, tmp_path / "first.log")

    def second_trial_has_begun() -> bool:
        return [r.status for r in trial_record.read(folder)[:2]] == ["finished", "running"]

    first.until(second_trial_has_begun, "second trial", 450)
    # Ray's agents of a node, which hold nothing of ours, take a minute to see that their raylet is gone
    others = [p for p in _descendants(first) if not p.name().endswith("Agent")]
    before = trial_record.read(folder)
    first.send_signal(signal.SIGKILL)
    first.wait()
    _, stay = psutil.wait_procs(others, timeout=60)
    assert not stay
    second = start(path, tmp_path / "second.log", "--resume")
    others = []
    while second.poll() is None:
        others = _descendants(second) or others
        time.sleep(0.5)
    assert second.returncode == 0, (tmp_path / "second.log").read_text()[-3000:]
    assert not psutil.wait_procs(others, timeout=120)[1]
    result = json.loads(second.out.splitlines()[-1])
    rows = {row["trial"]: row for row in result["trials"]}
    assert {n: row["status"] for n, row in rows.items()} == {0: "finished", 1: "failed", 2: "finished"}
    assert "NonFiniteError" in rows[1]["reason"]
    assert trial_record.read(folder)[0].reports == before[0].reports
    runs = nested(tracking, result)
    assert {n: runs[n].info.status for n in runs} == {0: "FINISHED", 1: "FAILED", 2: "FINISHED"}
    for number in (0, 2):
        assert len(curve(tracking, rows[number]["run_id"])) == 8  # every step once
        assert verify(folder.join("trials", f"killed-{number:04d}"))["ok"]


# population based training -------------------------------------------------------------------------------------------


def test_pbt_goes_on_bitwise_from_the_donors_checkpoint(ray_session, corpus, tracking, tmp_path) -> None:
    """The clone has the donor's weights, moments, and data position. It takes the steps that the donor's checkpoint gives with
    the new settings, to the bit, and its receipts are complete."""
    path = sweep_file(
        corpus, tracking, tmp_path, name="pbt", space={"train.optimizer.lr": {"loguniform": [1e-6, 1e-2]}}, searcher={"seed": 2},
        budget={"trials": 2}, scheduler={"name": "pbt", "interval": 4, "quantile": 0.5, "resample": 0.0},
    )  # fmt: skip
    before = left()
    result = tune(path)
    assert left() == before
    folder = Location(result["folder"])
    cloned = [r for r in trial_record.read(folder) if r.clones]
    assert len(cloned) == 1
    (clone,) = cloned[0].clones
    donor = folder.join("trials", f"pbt-{clone['from']:04d}")
    own = folder.join("trials", f"pbt-{cloned[0].number:04d}")
    theirs, mine = layout.open_checkpoint(donor, 4), layout.open_checkpoint(own, 4)
    assert clone["params"] != trial_record.read(folder)[clone["from"]].params  # times 0.8 or 1.2
    assert clone["step"] == 4 and mine.index.receipt == theirs.index.receipt
    assert all(torch.equal(mine.read(name), theirs.read(name)) for name in theirs.index.tensors)
    assert verify(own)["ok"]

    reference = tmp_path / "reference" / "reference"
    for part in ("checkpoints/step-00000004", "receipts", "segments"):
        shutil.copytree(Path(donor.path) / part, reference / part)
    (reference / "receipts" / "step-00000008.json").unlink()
    settings = [f"train.optimizer.lr={clone['params']['train.optimizer.lr']!r}", "checkpoint.every=4"]
    settings += ["name=reference", f"storage={tmp_path / 'reference'}", *SET_PLAIN]
    alone = train(tmp_path / "base.yaml", settings, resume=True)
    client = mlflow.MlflowClient(tracking_uri=tracking)
    points = {m.step: m.value for m in client.get_metric_history(alone["run_id"], "train/loss")}
    trial = [(m.step, m.value) for m in client.get_metric_history(cloned[0].run_id, "train/loss") if m.step > 4]
    assert sorted(points) == [5, 6, 7, 8] and dict(trial) == points
    assert alone["eval"] == json.loads(own.join("summary.json").read())["eval"]
    lineage = json.loads(Path(client.download_artifacts(result["run_id"], "lineage.json")).read_text())
    assert lineage["clones"][0]["from"] == clone["from"]
