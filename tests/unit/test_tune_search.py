"""Tests that a resume keeps Optuna's past trials, the schedulers' reports, and the promised part of the budget."""

import copy
import json
import os
import threading
from typing import Any

import pytest
import yaml
from heliostat.errors import ConfigError
from heliostat.storage import lease
from heliostat.storage.locations import Location
from heliostat.tune import driver, listing, schedulers, searchers
from heliostat.tune import trial_record as records
from heliostat.tune.state import SweepState
from heliostat.tune.sweep import SweepPlan, bracket, load
from heliostat.tune.trial_record import TrialRecord

from tests.unit import build_job
from tests.unit.build_job import ROOT

LR = "train.optimizer.lr"


@pytest.fixture
def plan(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    build_job.write(tmp_path)

    def make(**changes: Any) -> SweepPlan:
        sweep = {"name": "s", "job": "job.yaml", "space": {LR: {"loguniform": [1e-4, 1e-2]}}, "budget": {"trials": 4}, **changes}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        return load(tmp_path / "sweep.yaml")

    return make


def over(number: int, lr: float, value: float, step: int = 100, status: str = "finished", at: float = 0.0) -> TrialRecord:
    return TrialRecord(number, {LR: lr}, {LR: lr}, status, step, 100, [(step, value, at)])


def test_optuna_goes_on_as_if_it_had_not_been_interrupted(plan) -> None:
    """With the results of another command's trials, it draws in the good region."""
    pytest.importorskip("optuna", reason="needs optuna: pip install heliostat[tune]")
    made = plan(searcher={"name": "optuna", "seed": 1}).sweep
    resumed = searchers.make(made)
    assert resumed.sweep is made and "Optuna(" in repr(resumed)
    for n in range(30):  # the lower, the better
        resumed.observe(over(n, 1e-4 * 1.16**n, float(n)))
    drawn = [resumed.draw(30 + i)[LR] for i in range(12)]
    assert sum(lr < 1e-3 for lr in drawn) >= 10  # uninformed, half of them would be
    for number in (30, 31):
        resumed.observe(over(number, drawn[number - 30], 1.0))
    resumed.observe(TrialRecord(32, {LR: drawn[2]}, {LR: drawn[2]}, "failed"))
    assert resumed.draw(42) is not None


@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_halving_remembers_its_rungs(plan, name) -> None:
    """A trial that is worse than those of the earlier command stops, and a better one continues. HyperBand's other brackets don't
    count."""
    made = plan(scheduler={"name": name, "grace": 10, "reduction": 2})
    good, bad, *numbers = [n for n in range(20) if bracket(made.sweep, 100, n) == 0][:4]
    before = [over(good, 1e-3, 2.0, 10, at=1.0), over(bad, 1e-3, 3.0, 10, "pruned", at=2.0)]
    before += [over(n, 1e-3, 0.1, 10, at=3.0) for n in range(bad) if n != good]
    state = SweepState(made, before, 1, "", 0.0)
    scheduler = schedulers.make(state)
    scheduler.set_search_properties("value", "min")
    scheduler.replay(before)
    decisions = []
    for number, value in zip(numbers, (2.8, 1.5), strict=True):
        state.add(number, {LR: 1e-3})
        trial = schedulers._StandIn(made.name(number))
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, {"step": 10, "value": value}))
    assert decisions == ["STOP", "CONTINUE"]


def test_tokens_that_running_trials_may_still_need_are_promised(plan) -> None:
    one = 100 * 8 * 64
    made = plan(budget={"tokens": 2.5 * one})
    state = SweepState(made, [], 1, "", 0.0)
    assert made.tokens_per_trial == one
    first, _ = state.add(0, {LR: 1e-3}), state.add(1, {LR: 1e-3})
    assert not state.affords_another()  # two may still come to their ends
    first.status, first.step = "pruned", 60
    assert not state.affords_another()
    first.step = 40
    assert state.affords_another()  # 0.4, one that runs, and one more


def test_the_budget_of_a_dataset_of_conversations_counts_tokens_and_not_rows(plan) -> None:
    """Tokens per row are known once the datasets are read."""
    made = plan(set={"recipe": "heliostat.recipes:SFT", "data.sequence_length": None}, budget={"tokens": 100 * 8 * 250.5})
    assert made.tokens_per_trial == 100 * 8
    read = made.with_rows(125.25)
    state = SweepState(read, [], 1, "", 0.0)
    assert read.tokens_per_trial == 100 * 8 * 125.25
    first = state.add(0, {LR: 1e-3})
    assert state.affords_another()
    state.add(1, {LR: 1e-3})
    assert not state.affords_another()
    first.step = 40
    assert state._keep(first).tokens == 40 * 8 * 125.25
    with pytest.raises(ConfigError, match=r"^budget.tokens: 200,400 is below one trial's 240,000 tokens"):
        made.with_rows(300)
    assert plan().with_rows(64.0).tokens_per_trial == 100 * 8 * 64, "the job's sequence_length counts"


def test_a_used_up_budget_stops_the_trials_behind_a_checkpoint(plan) -> None:
    """The budget includes the hours of earlier commands, and its end isn't an interruption."""
    made = plan(budget={"trials": 4, "hours": 2})
    state = SweepState(made, [], 1, "", 1.9 * 3600)
    state.tick()
    assert not state.stopping and not state.folder.join("stop").exists()
    state = SweepState(made, [], 1, "", 2.1 * 3600)
    state.tick()
    assert state.used_up and b"budget.hours" in state.folder.join("stop").read()


def test_a_record_comes_back_as_it_was_written(plan) -> None:
    state = SweepState(plan(), [], 1, "", 0.0)
    donor, target = state.add(0, {LR: 1e-3}), state.add(1, {LR: 2e-3})
    state.record_result("s-0001", {"step": 20, "value": 1.5, "scores": {"loss": 1.5}})
    state.cloned(target, donor, 10, {LR: 1.2e-3})
    (first, second) = records.read(state.folder)
    assert (first, second) == (donor, target)
    assert second.params == {LR: 1.2e-3} and second.clones[0]["from"] == 0 and second.step == 10
    assert state.config(second)["clone"] == {"id": 1, "folder": f"{state.folder}/trials/s-0000", "step": 10}
    assert state.config(second)["job"]["train"]["optimizer"]["lr"] == 1.2e-3


def test_a_value_that_makes_no_valid_job_is_a_failed_trial(plan) -> None:
    state = SweepState(plan(), [], 1, "", 0.0)
    record = state.add(0, {LR: -1.0})
    assert record.status == "failed" and "train.optimizer.lr" in record.reason


def test_a_sweep_runs_while_its_lease_is_held(plan) -> None:
    folder = plan().folder
    assert not listing.running(folder)
    with lease.take(folder, "driven"):
        assert listing.running(folder)
        with pytest.raises(ConfigError, match=f"is being driven by process {os.getpid()}"):
            lease.take(folder, "driven")
    assert not listing.running(folder)


def test_a_sweep_that_an_earlier_version_began_goes_on_unless_its_job_was_changed(plan) -> None:
    made = plan()
    recorded = copy.deepcopy(made.base)
    recorded["train"]["cpu_kernels"] = True  # a key that is no more
    before = {"sweep": made.sweep.dump(), "job": recorded, "run_id": "", "seconds": 0.0}
    driver._same(made, before)
    recorded["train"]["seed"] = 3
    with pytest.raises(ConfigError, match=r"job\.train: was .* when the sweep began"):
        driver._same(made, before)


def test_drivers_that_died_on_other_machines_are_waited_for_together(tmp_path, monkeypatch) -> None:
    waits = threading.Barrier(3)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text(json.dumps({"sweep": {}, "job": {}, "run_id": "", "seconds": 0.0}))
    monkeypatch.setattr(listing, "running", lambda folder: waits.wait(10) is None)
    assert [(row["name"], row["running"]) for row in listing.sweeps(Location(str(tmp_path)))] == [(n, False) for n in "abc"]
