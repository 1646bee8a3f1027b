"""Tests whole runs with other optimizers than AdamW: losses equal the plain loop's, and an interrupted run is the same.

The scored and exported weights are those that the optimizer chooses.
"""

import json
from pathlib import Path

import pytest
from heliostat.evaluation.losses import evaluate
from heliostat.tracking.models import resolve
from heliostat.training.run import train

from tests.integration.conftest import curve, tiny_job
from tests.integration.reference import plain_losses

OPTIMIZERS = {
    "lion": {"train.optimizer": {"name": "lion", "lr": 3e-4}},
    "schedule_free": {
        "train.optimizer": {"name": "schedule_free", "lr": 3e-3},
        "train.schedule": {"name": "constant", "warmup_steps": 4},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_was_stopped_is_the_plain_loop(name, ray_session, corpus, tracking, tmp_path: Path) -> None:
    job = tiny_job(corpus, tracking, tmp_path)
    job["train"] |= {key.partition(".")[2]: value for key, value in OPTIMIZERS[name].items()}
    job["mlflow"]["register"] = f"{name.replace('_', '-')}-lm"
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({**job, "name": name}))
    assert train(path, ["train.stop_after=10"])["steps"] == 10
    result = train(path, resume=True)
    assert curve(tracking, result["run_id"]) == pytest.approx(plain_losses(path, []), abs=1e-4)
    folder = resolve(result["model_uri"], tracking)
    scores = evaluate(folder, corpus, 24, None, 0.05)
    assert scores == pytest.approx(result["eval"], rel=1e-4), "what is exported is what was scored: Schedule-Free's average"
