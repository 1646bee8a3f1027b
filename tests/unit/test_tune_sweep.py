"""Tests the sweep file: every fault is one clear error before anything starts, and the plan follows the file."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from heliostat.config import spec
from heliostat.config.spec import Workers
from heliostat.errors import ConfigError
from heliostat.tune import driver, report
from heliostat.tune.sweep import Sweep, SweepPlan, holds, load
from heliostat.tune.trial_record import KeptTrial, TrialRecord, best, ranked

from tests.unit import build_job
from tests.unit.build_job import ROOT

GOOD = {"name": "s", "job": "job.yaml", "space": {"train.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}, "budget": {"trials": 4}}


@pytest.fixture(autouse=True)
def workspace(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


def plan(tmp_path: Path, base: dict | None = None, **changes) -> SweepPlan:
    build_job.write(tmp_path, **(base or {}))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**GOOD, **changes}))
    return load(tmp_path / "sweep.yaml")


def test_a_trials_job_is_the_base_job_with_its_parameters_below_the_sweeps_folder(tmp_path):
    made = plan(tmp_path, set={"train.steps": 50}, space={"train.optimizer.lr": {"loguniform": [1e-5, 1e-4]}})
    job = made.job(3, {"train.optimizer.lr": 1e-5})
    assert (job.train.optimizer.lr, job.train.steps, job.name) == (1e-5, 50, "s-0003")
    assert str(job.run_folder) == f"{tmp_path}/runs/s/trials/s-0003"


def test_values_keep_their_types(tmp_path):
    """1e-05 in YAML is a string, and a model's keys aren't validated as numbers."""
    made = plan(tmp_path, space={"model.rms_norm_eps": {"choice": [1e-05, 1e-06]}})
    assert made.job(0, {"model.rms_norm_eps": 1e-05}).model["rms_norm_eps"] == 1e-05


def test_the_cluster_that_a_sweep_is_for_decides_on_gpus(tmp_path):
    plan(tmp_path, {"workers.gpus": "auto"})
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**GOOD, "budget": {**GOOD.get("budget", {}), "gpu_hours": 2}}))
    cluster = SimpleNamespace(path="c.yaml", pools=[SimpleNamespace(gpus=1, most=2)])
    assert load(tmp_path / "sweep.yaml", cluster=cluster).base["workers"]["gpus"] == 1


OPTIMIZERS = {"train.optimizer": {"choice": [{"lr": 1e-3}, {"name": "sgd", "lr": 0.1}, {"name": "rmsprop", "lr": 0.01}]}}
PBT = {"scheduler": {"name": "pbt", "interval": 10}}


def test_a_space_may_hold_keys_of_an_optimizer_and_whole_ones(tmp_path):
    """Each optimizer has its own keys, and none of the base job's."""
    made = plan(tmp_path, space=OPTIMIZERS)
    drawn = {made.job(0, {"train.optimizer": choice}).train.optimizer.name for choice in OPTIMIZERS["train.optimizer"]["choice"]}
    assert drawn == {"adamw", "sgd", "rmsprop"}
    base = {"train.optimizer": {"name": "sgd", "lr": 0.1}}
    made = plan(tmp_path, base, space={"train.optimizer.momentum": {"uniform": [0.5, 0.9]}}, **PBT)
    assert made.job(0, {"train.optimizer.momentum": 0.75}).train.optimizer.momentum == 0.75


def test_trials_that_clone_each_other_keep_the_same_of_every_parameter(tmp_path):
    """For any optimizer of the base job: the check compares those of the space."""
    with pytest.raises(
        ConfigError, match=r"space: 'pbt' .* exp_avg, exp_avg_sq \(adamw\) and momentum_buffer \(sgd\) and square"
    ):
        plan(tmp_path, space=OPTIMIZERS, **PBT)
    both = [{"name": "sgd", "lr": 0.1}, {"name": "sgd", "lr": 0.1, "nesterov": True}]
    plan(tmp_path, space={"train.optimizer": {"choice": both}}, **PBT)
    with pytest.raises(ConfigError, match=r"keep different state per parameter: nothing \(sgd\) and momentum_buffer"):
        base = {"train.optimizer": both[0]}
        plan(tmp_path, base, space={"train.optimizer.momentum": {"uniform": [0.0, 0.9]}}, **PBT)


@pytest.mark.parametrize(
    ("changes", "job", "needle"),
    [
        ({"space": {"train.optimzer.lr": {"uniform": [0.1, 1]}}}, {}, "train.optimzer: unknown key. Did you mean 'optimizer'"),
        ({"space": {"train.optimizer.lr": {"uniform": [1, 0.1]}}}, {}, "The first number must be below the second"),
        (
            {"space": {"train.optimizer.lr": {"uniform": [-1, 1]}}},
            {},
            "the space contains values that don't make a valid job: lr -1",
        ),
        ({"space": {"train.global_batch_size": {"choice": [8, 9]}}}, {}, "don't make a valid job: global_batch_size 9"),
        ({"space": {"train.optimizer.momentum": {"uniform": [0, 0.9]}}}, {}, "train.optimizer.momentum: unknown key"),
        ({"space": {"train.optimizer.name": {"choice": ["adamw", "sgd"]}}}, {}, "Vary whole optimizers instead: space.train.opt"),
        ({"space": {"model.num_attention_heads": {"choice": [4, 5]}}}, {}, "don't make a valid job: num_attention_heads 5"),
        ({"space": {"train.global_batch_size": {"randint": [8, 16]}}}, {}, "trial 0 isn't a valid job: global_batch_size"),
        ({"space": {"name": {"choice": ["a", "b"]}}}, {}, "space.name: can't be varied"),
        ({"space": {}}, {}, "space"),
        ({"job": "jbo.yaml"}, {}, "job: 'jbo.yaml': no such file"),
        ({"set": {"train.stesp": 5}}, {}, "train.stesp: unknown key. Did you mean 'steps'"),
        ({"set": {"train.optimizer.lr": 1e-3}}, {}, "space.train.optimizer.lr: is also in `set`"),
        ({"metric": "los"}, {}, "metric: 'los' isn't a score of heliostat.recipes:CausalLM. Did you mean 'loss'"),
        ({}, {"evaluate": None}, "job: has no section `evaluate`, so it reports no metric"),
        ({}, {"workers.count": [1, 4]}, "is elastic, but a sweep needs a fixed number"),
        ({}, {"train.parallel": "auto"}, "train.parallel auto could choose a different configuration"),
        ({"budget": {}}, {}, "budget: searcher 'random' needs a limit"),
        ({"budget": {"trials": 0}}, {}, "budget.trials: 0 is too small. Use a number above 0"),
        ({"budget": {"tokens": 1000}}, {}, "budget.tokens: 1,000 is below one trial's 51,200 tokens"),
        ({"budget": {"gpu_hours": 2}}, {}, "budget.gpu_hours: the job's workers have no GPUs"),
        ({"searcher": {"name": "grid"}}, {}, "searcher 'grid' needs lists of values"),
        ({"space": {"train.seed": {"grid": [1, 2]}}}, {}, "grid needs searcher.name 'grid'"),
        (
            {"space": {"train.seed": {"grid": [1, 2, 3]}}, "searcher": {"name": "grid"}, "budget": {"trials": 2}},
            {},
            "budget.trials: 2 is below the grid's 3 trials",
        ),
        ({"searcher": {"name": "bohb"}}, {}, "searcher.name: 'bohb' isn't a choice"),
        ({"scheduler": {"name": "asha"}}, {}, "scheduler.grace: missing, but 'asha' requires it"),
        (
            {"scheduler": {"name": "asha", "grace": 15}},
            {},
            "grace: 15 isn't a multiple of the job's evaluate.every 10",
        ),
        ({"scheduler": {"name": "asha", "grace": 100}}, {}, "scheduler.grace: 100 must be below the job's train.steps 100"),
        ({"scheduler": {"name": "asah"}}, {}, "Did you mean 'asha'"),
        ({"scheduler": {"name": "bohb"}}, {}, "'bohb' isn't a choice. Use one of: asha, hyperband, median, none, pb2, pbt"),
        ({"scheduler": {"name": "hyperband"}}, {}, "scheduler.grace: missing, but 'hyperband' requires it"),
        ({"scheduler": {"name": "pb2"}}, {}, "scheduler.interval: missing, but 'pb2' requires it"),
        (
            {"scheduler": {"name": "pb2", "interval": 10}, "space": {"train.grad_clip": {"choice": [0.5, 1.0]}}},
            {},
            "space.train.grad_clip: 'pb2' needs ranges. Use a range instead of choice",
        ),
        (
            {"scheduler": {"name": "asha", "grace": 10}, "space": {"train.steps": {"choice": [50, 100]}}},
            {},
            "space.train.steps: trials of different lengths can't be compared",
        ),
        ({"scheduler": {"name": "pbt"}}, {}, "scheduler.interval: missing, but 'pbt' requires it"),
        (
            {"scheduler": {"name": "pbt", "interval": 10}, "space": {"model.hidden_size": {"choice": [32, 64]}}},
            {},
            "space.model.hidden_size: 'pbt' can't change this key during a run",
        ),
        ({"scheduler": {"name": "pbt", "interval": 10}, "budget": {"hours": 1}}, {}, "budget.trials: 'pbt' needs"),
    ],
)
def test_a_bad_sweep_is_one_clear_error(tmp_path, changes, job, needle):
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, job, **changes)
    assert needle in str(caught.value)


def test_ashas_rungs_are_where_trials_wait(tmp_path):
    made = plan(tmp_path, scheduler={"name": "asha", "grace": 10, "reduction": 3})
    assert holds(made.sweep, made.job(0, {}), 0) == [10, 30, 90]
    made = plan(tmp_path, scheduler={"name": "median"})
    assert holds(made.sweep, made.job(0, {}), 0) == list(range(10, 100, 10))
    assert holds(plan(tmp_path).sweep, made.job(0, {}), 0) == []


def test_hyperbands_trials_begin_at_different_rungs(tmp_path):
    """One bracket begins at each rung, and one has no rungs. Most trials are in the bracket that stops most of them."""
    made = plan(tmp_path, scheduler={"name": "hyperband", "grace": 10, "reduction": 3}, budget={"trials": 17})
    waits = [tuple(holds(made.sweep, made.job(n, {}), n)) for n in range(44)]
    assert set(waits) == {(10, 30, 90), (30, 90), (90,), ()}
    assert waits[0] == (10, 30, 90)
    assert waits.count((10, 30, 90)) > waits.count((30, 90)) > waits.count((90,)) >= waits.count(()) > 0


@pytest.mark.parametrize("name", ["pbt", "pb2"])
def test_a_populations_checkpoints_are_kept_until_all_have_come_so_far(tmp_path, name):
    made = plan(tmp_path, {"checkpoint.keep": 1}, scheduler={"name": name, "interval": 20})
    job = made.job(0, {})
    assert (job.checkpoint.every, holds(made.sweep, job, 0)) == (20, [20, 40, 60, 80])
    assert job.checkpoint.keep >= 3


def test_a_sweep_dumps_to_what_it_was_loaded_from(tmp_path):
    made = plan(tmp_path, set={"train.steps": 50}, scheduler={"name": "asha", "grace": 10}).sweep
    assert Sweep.model_validate(made.dump()) == made


def test_the_best_is_a_finished_trial_and_not_one_that_was_luckier_early():
    trials = [
        TrialRecord(0, {}, status="finished", step=20, reports=[(10, 3.0, 0.0), (20, 2.0, 0.0)]),
        TrialRecord(1, {}, status="pruned", step=10, reports=[(10, 1.0, 0.0)]),
        TrialRecord(2, {}, status="finished", step=20, reports=[(20, 2.5, 0.0)]),
        TrialRecord(3, {}, status="failed"),
        TrialRecord(4, {}, status="finished", step=20, reports=[(20, float("nan"), 0.0)]),
    ]
    assert [r.number for r in ranked(trials, "min")] == [0, 2, 4, 1, 3]
    assert best(trials, "min").number == 0 and best(trials, "max").number == 2
    assert best(trials[1:2], "min") is None


def test_the_best_of_trials_with_different_numbers_of_steps_has_the_best_value():
    """Steps differ where the space contains `train.steps`, or a batch size with `train.epochs`."""
    long = TrialRecord(0, {}, status="finished", step=40, reports=[(40, 3.0, 0.0)])
    short = TrialRecord(1, {}, status="finished", step=20, reports=[(20, 2.0, 0.0)])
    assert best([long, short], "min") is short and best([long, short], "max") is long


def test_the_table_names_keys_by_their_last_part_unless_two_share_it(tmp_path):
    made = plan(tmp_path)
    record = TrialRecord(0, {"train.optimizer.lr": 1e-3}, status="finished", step=20, steps=20, reports=[(20, 2.0, 0.0)])
    head, row = report.cells(report.rows(made, [record]))
    assert head == ["trial", "status", "step", "loss", "lr", "seconds"]
    assert "20/20" in row and "0.001" in row


@pytest.mark.parametrize(
    ("workers", "cpus", "count"),
    [
        (Workers(count=2), [8], 2),  # two workers, a CPU for data and a tenth for Tune, twice
        (Workers(count=2), [2], 0),
        (Workers(count=2), [2, 2, 2], 1),
        (Workers(count=3, placement="strict_spread"), [10, 10], 0),
        (Workers(count=2, placement="strict_spread"), [10, 1], 1),
        (Workers(count=2, placement="strict_spread"), [10, 3, 3], 5),
    ],
)
def test_as_many_trials_as_find_room_for_all_their_workers(workers, cpus, count):
    assert driver.gangs(workers, {str(i): {"CPU": float(c)} for i, c in enumerate(cpus)}) == count


def test_gpus_count_too_and_one_machine_holds_at_least_one_trial():
    assert driver.gangs(Workers(count=2, gpus=1), {"a": {"CPU": 100.0, "GPU": 5.0}}) == 2
    assert (
        driver.here(Workers(count=2), 2),
        driver.here(Workers(count=4), 2),
        driver.here(Workers(count=1), 8),
    ) == (1, 1, 8)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs/sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_file_that_is_handed_out_is_right(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = load(path)
    assert made.sweep.name.startswith(path.stem) and made.trials
    assert all(rung % made.base["evaluate"]["every"] == 0 for rung in holds(made.sweep, made.job(0, {}), 0))


def test_a_sweep_of_an_earlier_version_goes_on_and_a_changed_one_is_refused(tmp_path):
    """Earlier jobs had `train.cpu_kernels`."""
    made = plan(tmp_path)
    then = {**made.base, "train": {**made.base["train"], "cpu_kernels": True}}
    driver._same(made, KeptTrial(sweep=made.sweep.dump(), job=then, run_id="", seconds=0.0))
    then["train"]["steps"] += 1
    with pytest.raises(ConfigError, match=r"job\.train: was .* when the sweep began"):
        driver._same(made, KeptTrial(sweep=made.sweep.dump(), job=then, run_id="", seconds=0.0))


def test_trials_of_a_resumed_sweep_follow_the_rules_of_those_before(tmp_path):
    """Sweeps from before the keys were recorded keep the values of that time, also after another resume."""
    made = plan(tmp_path)

    def resumed(train: dict, then: SweepPlan = made) -> SweepPlan:
        job = {**made.base, "train": train}
        return driver._same(then, KeptTrial(sweep=made.sweep.dump(), job=job, run_id="", seconds=0.0))

    def rules(of: SweepPlan) -> tuple:
        train = of.job(0, {}).train
        return train.recipe_version, train.grad_accum_dtype

    train = made.base["train"]
    earlier = resumed({key: value for key, value in train.items() if key not in spec.BEFORE_KEYS})
    assert rules(earlier) == rules(resumed(earlier.base["train"])) == (1, "same")
    assert rules(resumed(train)) == rules(made) == (None, None), "as in new runs"
    with pytest.raises(ConfigError, match=r"job\.train: was .* when the sweep began"):
        resumed(earlier.base["train"], replace(made, base=made.base | {"train": train | {"recipe_version": 2}}))
