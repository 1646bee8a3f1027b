"""Tests whole runs on Ray whose workers share samples, matrices, or experts: the run is the same in another configuration, and
after the loss of a worker."""

from __future__ import annotations

import pytest
from heliostat.runs.verify import verify
from heliostat.training.run import train

from tests.integration.conftest import curve
from tests.integration.paced import PACED
from tests.integration.reference import plain_losses
from tests.integration.strikes import run_folder, saved, when, workers

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("ray_session")]
MIXTURE = ["model.arch=mixtral", "model.num_key_value_heads=2", "model.num_local_experts=4", "train.zero.stage=3"]
SETTINGS: dict[str, list[str]] = {
    "sequence": [],
    "tensor": ["train.ema.decay=0.9", "model.num_key_value_heads=2", "train.zero.stage=2"],  # with an average of the weights
    "expert": MIXTURE,
}


def whole(path, tracking, result, given) -> None:
    """Checks that the run equals the plain loop's, with every sample once."""
    assert curve(tracking, result["run_id"]) == pytest.approx(plain_losses(path, given), abs=1e-4)
    found = verify(run_folder(path))
    assert (found["ok"], found["steps"], found["lost"], found["repeated"]) == (True, 20, 0, 0)


@pytest.mark.parametrize("shared", SETTINGS)
def test_a_run_changes_how_many_workers_share(shared, job_file, tracking) -> None:
    """Ten steps of two workers that share samples, matrices, or experts, then ten steps of one worker."""
    path, given = job_file(shared), SETTINGS[shared]
    first = train(path, [*given, f"train.parallel.{shared}=2", "train.stop_after=10"])
    assert verify(run_folder(path))["ok"]
    result = train(path, [*given, "workers.count=1"], resume=True)
    assert first["run_id"] == result["run_id"]
    whole(path, tracking, result, given)


def test_a_group_that_divides_the_experts_and_loses_a_worker_goes_on_as_if_nothing_had_happened(job_file, tracking):
    """One of two workers, each with half of the experts, is killed after a checkpoint. The other's process continues in a new
    group with a new worker."""
    path = job_file("bereft")
    striking = when((lambda: saved(run_folder(path)) >= 10, lambda: workers()[-1].kill()))
    asked = [*MIXTURE, f"recipe={PACED['recipe']}", "train.parallel.expert=2", "checkpoint.every=5", "retries.backoff=0.1"]
    result = train(path, [*asked, "train.log_every=1", "mlflow.register=null"])
    striking.join(10)
    assert result["restarts"] == 1
    whole(path, tracking, result, MIXTURE)
