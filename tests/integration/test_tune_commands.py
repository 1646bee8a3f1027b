"""Tests the commands for sweeps: stop and resume, retry of failed trials, training the best job, and transfer of a rate to a big
job.

Also tests Optuna's trials under median stopping, HyperBand's brackets, and PB2's model. `make test-slow` runs it.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from heliostat.config import spec
from heliostat.runs import goodput
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.tune import trial_record
from heliostat.tune.driver import tune

from tests.integration.answers import ask
from tests.integration.paced import PACED
from tests.integration.test_tune import grid, sweep_file
from tests.integration.test_tune import start as started

start = started  # the fixture
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def base_of(folder: Path, **changes: Any) -> None:
    base = yaml.safe_load((folder / "base.yaml").read_text())
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) else value
    (folder / "base.yaml").write_text(yaml.safe_dump(base))


def test_a_stopped_sweep_goes_on_its_failed_trial_is_tried_again_and_the_best_job_is_trained(
    start, corpus, tracking, tmp_path, capsys
):
    path = sweep_file(corpus, tracking, tmp_path, name="halted", space=grid(1e30, 1e-3, 1e-4), concurrency=1)
    base_of(tmp_path, train={"grad_clip": 0}, checkpoint={"every": 2}, **PACED)
    folder, log = Location(f"{tmp_path}/runs/halted"), tmp_path / "log"
    process = start(path, log)
    process.until(lambda: [r.status for r in trial_record.read(folder)[:2]] == ["failed", "running"], "second trial", 450)
    stopped = ask(capsys, "sweep", "show", str(folder), "--stop")
    assert process.wait(60) == 130, log.read_text()[-3000:]
    assert not stopped["running"] and stopped["best"] is None
    assert {t["trial"]: t["status"] for t in stopped["trials"]} == {0: "failed", 1: "stopped"}

    result = tune(path, resume=True, retry_failed=True)
    assert {t["trial"]: t["status"] for t in result["trials"]} == {0: "failed", 1: "finished", 2: "finished"}
    tries = [len(goodput.read(folder.join("trials", f"halted-000{n}"))) for n in range(3)]
    assert tries[0] == 2 and tries[2] == 1
    best = ask(capsys, "train", "--from-sweep", str(folder), "--best")
    rate = spec.load(tmp_path / "runs/halted/halted-best.yaml").train.optimizer.lr
    assert (rate, best["steps"]) == (result["best"]["params"]["train.optimizer.lr"], 8)


def test_the_rate_of_two_small_widths_is_carried_to_a_big_job(corpus, tracking, tmp_path, capsys):
    rates = {"train.optimizer.lr": {"grid": [1e-4, 1e-3, 1e-2]}}
    path = sweep_file(corpus, tracking, tmp_path, name="widths", space=rates, register_best=False)
    raw, base = yaml.safe_load(path.read_text()), yaml.safe_load((tmp_path / "base.yaml").read_text())
    widths = [{**base["model"], "hidden_size": w} for w in (32, 64)]
    path.write_text(yaml.safe_dump({**raw, "space": {**rates, "model": {"grid": widths}}}))
    big = tmp_path / "big.yaml"
    big.write_text(yaml.safe_dump({**base, "name": "big", "model": {**base["model"], "hidden_size": 256}}))
    found = ask(capsys, "sweep", "run", str(path), "--transfer", str(big))
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


def test_hyperbands_trials_wait_where_their_brackets_say(corpus, tracking, tmp_path):
    """Each trial is compared only with those of its bracket. The bracket without rungs stops no trial."""
    scheduler = {"name": "hyperband", "grace": 2, "reduction": 2}
    path = sweep_file(corpus, tracking, tmp_path, name="bands", space=grid(1e-3, 1e-4, 1e-6, 1e-7), scheduler=scheduler)
    result = tune(path)
    reported = {r.number: [step for step, *_ in r.reports] for r in trial_record.read(Location(result["folder"]))}
    assert reported == {0: [2, 4, 8], 1: [4, 8], 2: [8], 3: [2]}
    assert {t["trial"]: t["status"] for t in result["trials"]} == {0: "finished", 1: "finished", 2: "finished", 3: "pruned"}


def test_pb2_takes_what_comes_next_from_its_model(corpus, tracking, tmp_path):
    """From the second exchange on, the clone's rate isn't one of PBT's steps. The cloned run is complete, like every run."""
    path = sweep_file(
        corpus, tracking, tmp_path, name="bandit", space={"train.optimizer.lr": {"loguniform": [1e-6, 1e-2]}},
        searcher={"seed": 2}, budget={"trials": 2}, scheduler={"name": "pb2", "interval": 2, "quantile": 0.5, "resample": 0.0},
    )  # fmt: skip
    result = tune(path)
    assert [t["status"] for t in result["trials"]] == ["finished", "finished"]
    folder = Location(result["folder"])
    clones = sorted((c for r in trial_record.read(folder) for c in r.clones), key=lambda c: c["step"])
    assert [c["step"] for c in clones] == [2, 4, 6]
    rates = [c["params"]["train.optimizer.lr"] for c in clones]
    assert all(1e-6 <= rate <= 1e-2 for rate in rates)
    first = next(r for r in trial_record.read(folder) if r.number == clones[0]["from"]).drawn["train.optimizer.lr"]
    steps = (0.8, 1.2)
    assert any(rates[0] == pytest.approx(first * s) for s in steps)
    assert not any(rates[1] == pytest.approx(base * s) for s in steps for base in (first, rates[0]))
    assert all(verify(folder.join("trials", f"bandit-000{n}"))["ok"] for n in range(2))
