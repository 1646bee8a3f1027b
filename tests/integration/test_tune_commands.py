"""Sweeps as a person handles them: stopped and gone on with, failed trials tried again, the best job trained, a rate carried to a
big job; and Optuna's trials under median stopping. `make test-slow` runs it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from heliostat import goodput, spec
from heliostat.cli import app
from heliostat.storage import Location
from heliostat.tune import record
from heliostat.tune.run import tune
from typer.testing import CliRunner

from tests.integration.paced import PACED
from tests.integration.test_tune import _wait, grid, sweep_file
from tests.integration.test_tune import start as started

start = started  # the fixture
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def heliostat(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def base_of(folder: Path, **changes: Any) -> None:
    base = yaml.safe_load((folder / "base.yaml").read_text())
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) else value
    (folder / "base.yaml").write_text(yaml.safe_dump(base))


def test_a_stopped_sweep_goes_on_its_failed_trial_is_tried_again_and_the_best_job_is_trained(start, corpus, tracking, tmp_path):
    path = sweep_file(corpus, tracking, tmp_path, name="halted", space=grid(1e30, 1e-3, 1e-4), concurrency=1)
    base_of(tmp_path, train={"grad_clip": 0}, checkpoint={"every": 2}, **PACED)
    folder, log = Location(f"{tmp_path}/runs/halted"), tmp_path / "log"
    process = start(path, log)
    _wait(lambda: [r.status for r in record.read(folder)[:2]] == ["failed", "running"], process, log)
    stopped = heliostat("sweep", str(folder), "--stop")
    assert process.wait(60) == 130, log.read_text()[-3000:]
    assert not stopped["running"] and stopped["best"] is None
    assert {t["trial"]: t["status"] for t in stopped["trials"]} == {0: "failed", 1: "stopped"}

    result = tune(path, resume=True, retry_failed=True)
    assert {t["trial"]: t["status"] for t in result["trials"]} == {0: "failed", 1: "finished", 2: "finished"}
    tries = [len(goodput.read(folder.join("trials", f"halted-000{n}"))) for n in range(3)]
    assert tries[0] == 2 and tries[2] == 1
    best = heliostat("train", "--from-sweep", str(folder), "--best")
    rate = spec.load(tmp_path / "runs/halted/halted-best.yaml").train.optimizer.lr
    assert (rate, best["steps"]) == (result["best"]["params"]["train.optimizer.lr"], 8)


def test_the_rate_of_two_small_widths_is_carried_to_a_big_job(corpus, tracking, tmp_path):
    rates = {"train.optimizer.lr": {"grid": [1e-4, 1e-3, 1e-2]}}
    path = sweep_file(corpus, tracking, tmp_path, name="widths", space=rates, register_best=False)
    raw, base = yaml.safe_load(path.read_text()), yaml.safe_load((tmp_path / "base.yaml").read_text())
    widths = [{**base["model"], "hidden_size": w} for w in (32, 64)]
    path.write_text(yaml.safe_dump({**raw, "space": {**rates, "model": {"grid": widths}}}))
    big = tmp_path / "big.yaml"
    big.write_text(yaml.safe_dump({**base, "name": "big", "model": {**base["model"], "hidden_size": 256}}))
    found = heliostat("tune", str(path), "--transfer", str(big))
    assert {t["status"] for t in found["trials"]} == {"finished"} and len(found["trials"]) == 6
    told = found["transfer"]
    assert set(map(int, told["rates"])) == {32, 64} and told["measured"] and told["width"] == 256
    made = spec.load(Path(told["job"]))
    assert made.train.optimizer.lr == pytest.approx(told["rate"]) and made.model["hidden_size"] == 256


def test_optuna_draws_and_median_stopping_prunes(corpus, tracking, tmp_path):
    pytest.importorskip("optuna")
    space = {"train.optimizer.lr": {"loguniform": [1e-7, 1e-2]}}
    scheduler = {"name": "median", "grace": 2, "min_trials": 2}
    path = sweep_file(corpus, tracking, tmp_path, name="drawn", space=space, scheduler=scheduler, searcher={"name": "optuna"},
                      budget={"trials": 4}, concurrency=1)  # fmt: skip
    result = tune(path)
    status = {t["trial"]: t["status"] for t in result["trials"]}
    assert sorted(status) == [0, 1, 2, 3] and set(status.values()) == {"finished", "pruned"}
    for trial in result["trials"]:
        assert (trial["step"] == 8) == (trial["status"] == "finished")
    assert len({t["train.optimizer.lr"] for t in result["trials"]}) == 4
