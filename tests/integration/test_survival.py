"""Tests runs that survive: after any failure of workers and driver, the run ends as if there had been none, as one MLflow run."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from heliostat.checkpoint import saver
from heliostat.engine import process_group
from heliostat.errors import ConfigError, LimitError, WorkerError
from heliostat.recipes.protocol import Loss
from heliostat.runs import goodput, liveness
from heliostat.runs.time_ledger import LedgerRecorder
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.driver import attempt, limits
from heliostat.training.run import train
from heliostat.validation.check import check, load_job
from mlflow import MlflowClient

from tests.integration import commands
from tests.integration.conftest import curve
from tests.integration.paced import PACED_PLAIN, Plain
from tests.integration.strikes import STEPS, actors, complete, run_folder, saved, settings, when, workers

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.ci
def test_killed_frozen_and_preempted_workers_cost_time_and_nothing_else(job_file, tracking, unbroken):
    """A worker is killed, then one freezes, then one gets SIGTERM: three restarts in one command, and the unbroken curve."""
    path = job_file("battered")
    folder = run_folder(path)

    def strike(number: int) -> None:
        time.sleep(0.7)  # into the steps after the checkpoint
        workers()[-1].send_signal(number)

    kills = ((10, signal.SIGKILL), (20, signal.SIGSTOP), (30, signal.SIGTERM))
    thread = when(*((lambda s=step: saved(folder) >= s, lambda n=number: strike(n)) for step, number in kills))
    result = train(path, settings(**PACED_PLAIN, **{"watchdog.stall": 8}))
    thread.join(10)
    assert result["restarts"] == 3 and result["steps"] == STEPS
    assert curve(tracking, result["run_id"]) == pytest.approx(unbroken[1], abs=1e-5)
    report = verify(folder)
    assert report["ok"] and report["steps"] == STEPS and report["lost"] == report["repeated"] == 0
    attempts = goodput.read_report(folder)["attempts"]
    assert [a["outcome"] for a in attempts] == ["failed", "failed", "preempted", "finished"]
    # SIGTERM is heeded: the last attempt goes on from exactly where the one before it stopped, which is no turn for a checkpoint
    assert attempts[3]["start_step"] == attempts[2]["reached"] and 30 < attempts[2]["reached"] < 40
    # the frozen worker cannot tell what it is at. The one that waited for it shows the collective: a step's, or a checkpoint's
    (stacks,) = [folder.join("stacks", name).read().decode() for name, _ in folder.join("stacks").files()]
    frozen = re.search(r"so they are frozen or dead: ([01])\n", stacks)  # whichever rank it was given
    assert frozen and f"worker {1 - int(frozen[1])}: thread" in stacks
    assert re.search(r"distributed_c10d\.py\", line \d+, in (all_reduce|all_gather\w*)\n +work\.wait\(\)", stacks)
    assert MlflowClient(tracking_uri=tracking).get_run(result["run_id"]).info.status == "FINISHED"
    _, left = psutil.wait_procs(actors("SplitCoordinator"), timeout=120)
    assert not left, "every attempt ends its own stream of data"


@pytest.mark.ci
def test_a_run_shrinks_to_the_room_there_is_and_grows_behind_a_checkpoint(job_file, tracking, unbroken):
    """It is elastic from 1 to 4. Others hold the cluster's CPUs at first, and then free them: more workers, the same curve."""
    path = job_file("elastic")
    total = int(ray.cluster_resources()["CPU"])
    others = ray.util.placement_group([{"CPU": 1}] * (total - 3), strategy="PACK")
    assert others.wait(30)
    folder = run_folder(path)
    giving = when((lambda: saved(folder) >= 10, lambda: ray.util.remove_placement_group(others)))
    result = train(path, settings(**PACED_PLAIN, **{"workers.count": [1, 4]}))
    giving.join(10)
    assert curve(tracking, result["run_id"]) == pytest.approx(unbroken[1], abs=1e-5)
    attempts = goodput.read_report(folder)["attempts"]
    assert [(a["workers"], a["outcome"]) for a in attempts] == [(2, "resize"), (4, "finished")]
    assert attempts[1]["start_step"] == attempts[0]["reached"] and attempts[0]["reached"] % 10 == 0
    assert verify(folder)["ok"]


def test_a_driver_told_to_stop_leaves_a_checkpoint_and_another_command_ends_the_run(job_file, tracking, unbroken, tmp_path):
    """SIGTERM to the process group of `heliostat train`: exit code 130, KILLED in MLflow, no lost step, and the same curve."""
    path = job_file("stopped")
    folder = run_folder(path)
    words = [word for setting in settings(**PACED_PLAIN) for word in ("--set", setting)]
    driver = commands.start("train", str(path), "--resume", *words, log=tmp_path / "driver.log")
    when((lambda: saved(folder) >= 10, lambda: os.killpg(driver.pid, signal.SIGTERM)))
    assert driver.wait(300) == 130, driver.err[-3000:]
    assert "error: stopped at step" in driver.err and "Traceback" not in driver.err
    newest = saver.latest(folder)
    assert newest is not None and 10 < newest.step < 30
    run_id = json.loads(folder.join("run.json").read())["run_id"]
    assert MlflowClient(tracking_uri=tracking).get_run(run_id).info.status == "KILLED"
    result = train(path, settings(), resume=True)
    assert result["run_id"] == run_id and curve(tracking, run_id) == pytest.approx(unbroken[1], abs=1e-5)
    assert sum(a["parts"]["lost"] for a in goodput.read_report(folder)["attempts"]) == pytest.approx(0, abs=1.0)


class Poisoned(Plain):
    """Defines a recipe whose loss is 30 times as high for samples whose first tokens are in a file."""

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
        bad = {tuple(row) for row in json.loads(Path(os.environ["HELIOSTAT_TEST_POISON"]).read_text())}
        hit = any(tuple(row[:16].tolist()) in bad for row in batch["input_ids"])
        return Loss(super().loss(model, batch).sum * (30 if hit else 1))


class Broken(Plain):
    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
        return super().loss(model, batch).sum + "a string"  # type: ignore[operator]


class Ailing(Plain):
    """Defines a recipe under which the device of worker 1 breaks in the first two attempts. Its process then can't end either."""

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
        faults = Path(os.environ["HELIOSTAT_TEST_POISON"]).with_name("faults")
        if dist.get_rank() == 1 and len(list(faults.iterdir())) < 2:
            faults.joinpath(str(os.getpid())).touch()
            process_group.leave = lambda: time.sleep(600)
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA` to enable ...")
        return super().loss(model, batch)


@pytest.mark.ci
def test_a_broken_device_is_named_though_its_worker_hangs_and_its_node_is_suspected(job_file, tracking, monkeypatch):
    """It is the only node, so it stays in use, and the run reports this. The other worker's process is used again."""
    monkeypatch.setattr(attempt, "SETTLE_S", 2.0)
    faults = Path(os.environ["HELIOSTAT_TEST_POISON"]).with_name("faults")
    faults.mkdir()
    path = job_file("ailing")
    options = {"recipe": "tests.integration.test_survival:Ailing", "train.steps": 10, "evaluate": None}
    result = train(path, settings(**options))
    assert result["restarts"] == 2 and len(list(faults.iterdir())) == 2
    first, second, last = goodput.read_report(run_folder(path))["attempts"]
    named = r"worker 1 on [\d.]+ \(node \w{12}\): RuntimeError: CUDA error: uncorrectable ECC error encountered"
    assert re.fullmatch(named, first["reason"])
    assert re.match(named + r"\. No other nodes have room for 2 workers, so heliostat continues to use node", second["reason"])
    assert last["outcome"] == "finished"
    tags = MlflowClient(tracking_uri=tracking).get_run(result["run_id"]).data.tags
    assert tags["heliostat.bad_nodes"] == second["reason"]


@pytest.fixture
def poison() -> Iterator[Path]:
    """Returns the place of the list of bad samples. Ray's workers inherited the variable's value when the session began."""
    path = Path(os.environ["HELIOSTAT_TEST_POISON"])
    yield path
    path.write_text("[]")


@pytest.mark.ci
def test_a_loss_spike_is_undone_and_its_samples_are_left_out(job_file, tracking, poison):
    """The run goes back to the checkpoint before, skips the faulty steps, records this in its data plan, and passes verify."""
    from heliostat.data.dataset import DataPlan, open_dataset

    path = job_file("spiky")
    data = open_dataset(check(load_job(path, settings())).plan)
    rows = data.read(data.order.locate(data.order.step(33).ravel()))
    poison.write_text(json.dumps([row[:16].tolist() for row in rows]))
    options = {"recipe": "tests.integration.test_survival:Poisoned", "spike": {"window": 16, "action": "rollback"}}
    result = train(path, settings(**options))
    assert result["restarts"] == 1 and result["train_loss"] < 6
    assert max(curve(tracking, result["run_id"])) < 8
    report = verify(run_folder(path))
    assert report["ok"] and report["steps"] == STEPS and report["lost"] == report["repeated"] == 0
    newest = saver.latest(run_folder(path))
    assert newest is not None and DataPlan.parse(newest.index.data).skips == ((30, 32, 2),)
    after = open_dataset(DataPlan.parse(newest.index.data)).order
    assert [after.data_step(s) for s in (31, 32, 33)] == [31, 34, 35]


def test_a_bug_in_a_recipe_ends_the_run_after_one_more_try_with_its_own_message(job_file):
    with pytest.raises(WorkerError, match=r"the workers failed: TypeError: .*This error occurred twice at the same checkpoint"):
        train(job_file("buggy"), settings(recipe="tests.integration.test_survival:Broken"))


@pytest.mark.ci
def test_a_checkpoint_damaged_in_its_bytes_is_passed_over_and_the_run_goes_on_from_the_one_before(unbroken, tracking, tmp_path):
    """A copy of the unbroken run, as another MLflow run, continues to more steps."""
    path, steps, folder = unbroken[0], STEPS + 10, Location(str(tmp_path / "unbroken"))
    shutil.copytree(run_folder(path).path, folder.path, ignore=shutil.ignore_patterns("run.json", "result.json"))
    shard = next(Path(saver.folder(folder, STEPS).path).glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert complete(folder, STEPS)
    result = train(path, settings(**{"train.steps": steps, "storage": str(tmp_path)}), resume=True)
    assert result["restarts"] == 1
    assert len(curve(tracking, result["run_id"])) == steps and verify(folder)["ok"]
    assert [a["start_step"] for a in goodput.read_report(folder)["attempts"]] == [0, STEPS, STEPS - 10]


@pytest.mark.ci
def test_a_limit_stops_a_run_behind_a_checkpoint_and_a_higher_one_continues_it(job_file, monkeypatch):
    """The ledger and the error name the limit. A command that resumes with the old limit doesn't start."""
    monkeypatch.setattr(limits, "EVERY_S", 0.0)
    monkeypatch.setattr(LedgerRecorder, "spent", lambda self: (1.0 if self.attempts[-1].reached >= 3 else 0.0, 0.0))
    path = job_file("limited")
    with pytest.raises(
        LimitError, match=r"limits\.hours: the limit of 0\.5 h is reached .*; stopped at step \d+, after a checkpoint"
    ):
        train(path, [*settings(**PACED_PLAIN), "limits.hours=0.5"])
    run = run_folder(path)
    stopped, ended = saver.latest(run), liveness.last(run)
    assert stopped and 3 <= stopped.step < STEPS
    assert ended and ended.outcome == "interrupted" and ended.reason.startswith("limits.hours: the limit of 0.5 h")
    with pytest.raises(ConfigError, match=r"limits\.hours: the limit of 0\.5 h is reached .*\. Raise the limit to continue"):
        train(path, [*settings(), "limits.hours=0.5"], resume=True)
    train(path, [*settings(), "limits.hours=2"], resume=True)
    assert verify(run)["ok"]
