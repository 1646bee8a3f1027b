"""Tests the transfer of a learning rate: known lines and parabolas are found, and an impossible transfer is rejected."""

import math
from pathlib import Path

import pytest
import yaml
from heliostat.errors import ConfigError
from heliostat.tune import transfer
from heliostat.tune.sweep import load
from heliostat.tune.trial_record import TrialRecord
from heliostat.validation.check import load_job

from tests.unit import build_job
from tests.unit.build_job import ROOT


def test_the_vertex_of_a_parabola_in_log_lr_is_found_between_the_points():
    scores = {lr: 2 + (math.log(lr) - math.log(3e-3)) ** 2 for lr in (1e-4, 1e-3, 1e-2, 1e-1)}
    assert transfer.optimum(scores) == pytest.approx(3e-3)
    assert transfer.optimum({lr: -v for lr, v in scores.items()}, "max") == pytest.approx(3e-3)
    assert transfer.optimum({1e-4: 3.0, 1e-3: 2.0, 1e-2: 1.0}) == 1e-2  # at the edge


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0])
def test_a_power_law_is_continued(power):
    found = transfer.transfer({w: 0.5 * w**power for w in (64, 128, 256)}, 4096)
    assert found.power == pytest.approx(power, abs=1e-9) and found.measured
    assert found.rate == pytest.approx(0.5 * 4096**power)


def test_one_width_goes_by_mups_rule():
    found = transfer.transfer({64: 8e-3}, 512)
    assert found.rate == pytest.approx(1e-3) and not found.measured
    assert "muP's" in transfer.tell(found)[-1]


def test_the_big_job_gets_the_rate_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    build_job.write(tmp_path)
    models = [{**build_job.BASE["model"], "hidden_size": w} for w in (32, 64)]
    space = {"model": {"grid": models}, "train.optimizer.lr": {"grid": [1e-3, 2e-3, 4e-3, 8e-3]}}
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"name": "s", "job": "job.yaml", "space": space, "searcher": {"name": "grid"}})
    )
    plan = load(tmp_path / "sweep.yaml")
    big = tmp_path / "big.yaml"
    big.write_text(yaml.safe_dump(build_job.raw(**{"name": "big", "model.hidden_size": 512})))

    def loss(model: dict, lr: float) -> float:
        return (math.log(lr) - math.log(0.128 / model["hidden_size"])) ** 2  # best at 4e-3 and 2e-3

    trials = [
        TrialRecord(n, {"model": m, "train.optimizer.lr": lr}, status="finished", reports=[(100, loss(m, lr), 0.0)])
        for n, (m, lr) in enumerate((m, lr) for m in models for lr in (1e-3, 2e-3, 4e-3, 8e-3))
    ]
    found, path = transfer.carry(plan, trials, transfer.check(plan, big), big)
    assert found.rates == {32: pytest.approx(4e-3), 64: pytest.approx(2e-3)}
    assert found.rate == pytest.approx(0.128 / 512)
    assert path == tmp_path / "big-transferred.yaml"
    written, before = yaml.safe_load(path.read_text()), yaml.safe_load(big.read_text())
    assert written["train"]["optimizer"].pop("lr") == found.rate and before["train"]["optimizer"].pop("lr")
    assert written == before
    del before["train"]["optimizer"]
    before["train"].pop("schedule", None)
    big.write_text(yaml.safe_dump(before))
    job = transfer.check(plan, big)
    assert job.train.schedule.warmup_steps > 0, "the default of a job without a rate"
    assert load_job(transfer.carry(plan, trials, job, big)[1]).train.schedule == job.train.schedule
    del plan.sweep.space["train.optimizer.lr"]
    with pytest.raises(ConfigError, match=r"the sweep's space has no train\.optimizer\.lr"):
        transfer.check(plan, Path("big.yaml"))
