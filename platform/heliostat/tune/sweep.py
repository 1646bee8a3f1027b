"""Reads the sweep file (docs/tuning.md): base job, search space over its keys, metric, budget, searcher, and scheduler.

`load` also checks the sweep before anything starts. It rejects unknown keys, empty ranges, and a metric that the job doesn't
report. It rejects, too, corners of the space that aren't valid jobs, rungs without an evaluation, and a budget that is too small
for one trial.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from heliostat import schema
from heliostat.config import file_kinds, spec, workspace
from heliostat.config.fields import Name, Positive
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import Evaluates
from heliostat.schema import Strict, renamed_path
from heliostat.storage.locations import Location
from heliostat.text import brief
from heliostat.tune import space as spaces
from heliostat.tune.rungs import bracket_of, rungs
from heliostat.tune.space import Params, Space
from heliostat.tune.sweep_sections import MOST, Scheduler, SearcherSection, SweepBudget
from heliostat.validation import check

if TYPE_CHECKING:
    from heliostat.cluster.cluster_file import ClusterFile

# keys that the sweep sets, or that must be equal so that trials are comparable
OWN = ("name", "storage", "mlflow", "recipe", "evaluate", "train.epochs", "train.tokens")
FIXED_WHERE_COMPARED = ("train.steps",)
# a checkpoint doesn't fit a job with different values of these keys
DATA = ("data", "train.global_batch_size", "train.micro_batch_size", "model", "train.ema", "train.steps")


class Sweep(Strict):
    name: Name
    """Name of the sweep. The sweep's folder is the job's `storage/name`."""
    job: str
    """File of the base job, relative to the workspace."""
    set_: Params = Field(default={}, alias="set")
    """Job keys that all trials share, for example `train.steps: 100`."""
    space: Annotated[Space, Field(min_length=1)]
    """Job keys to vary, each with a domain."""
    metric: str = "loss"
    """Score of the job's evaluation that compares trials."""
    mode: Literal["min", "max"] = "min"
    """Whether a low or a high score is better."""
    budget: SweepBudget = SweepBudget()
    """Limits of the sweep. The searcher `grid` ends without a limit; other searchers require one."""
    searcher: SearcherSection = SearcherSection()
    """Search algorithm."""
    scheduler: Scheduler = Scheduler()
    """Scheduler, which decides which trials continue."""
    concurrency: Positive | None = None
    """Maximum concurrent trials. Unset: as many as fit."""
    register_best: bool = True
    """Exports, logs, and registers the best trial's model, under the job's `mlflow.register`."""

    @model_validator(mode="before")
    @classmethod
    def _take_old_keys(cls, value: object) -> object:
        return renamed_keys(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        faults = spaces.faults(self.space)
        for key, domain in self.space.items():
            if domain.kind == "grid" and self.searcher.name != "grid":
                faults.append(f"space.{key}: grid needs searcher.name 'grid'. With {self.searcher.name!r}, use choice")
            if not domain.listed and self.searcher.name == "grid":
                faults.append(f"space.{key}: searcher 'grid' needs lists of values. Write grid: [...] instead of {domain.kind}")
            if key in self.set_:
                faults.append(f"space.{key}: is also in `set`. Remove it from `space` or from `set`")
        points = math.prod(len(d.values) for d in self.space.values() if d.listed)
        if self.searcher.name == "grid" and points > MOST:
            faults.append(
                f"space: the grid has {points:,} points, but a sweep can have at most {MOST:,} trials. List fewer values"
            )
        faults += _scheduler_faults(self)
        if faults:
            raise ValueError("\n  ".join(faults))
        return self

    def dump(self) -> dict[str, object]:
        return json.loads(self.model_dump_json(by_alias=True, exclude_defaults=True))


def renamed_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Replaces old names of job keys in a sweep's file or record; raises ValueError if the file has both the old and the new name
    of a key."""
    for key in (key for key in ("set", "space") if isinstance(raw.get(key), dict)):
        new = {renamed_path(Job, str(path)): part for path, part in raw[key].items()}
        if len(new) < len(raw[key]):
            raise ValueError(f"{key}: sets the same job key twice, by its old name and by its new name. Remove one of them")
        for path, part in new.items():
            if key == "space" and isinstance(part, dict) and isinstance(part.get("when"), dict):
                new[path] = part | {"when": {renamed_path(Job, str(other)): one for other, one in part["when"].items()}}
        raw = raw | {key: new}
    return raw


def _scheduler_faults(sweep: Sweep) -> list[str]:
    scheduler, faults = sweep.scheduler, []
    name = repr(scheduler.name)
    if scheduler.halves and scheduler.grace is None:
        faults.append(f"scheduler.grace: missing, but {name} requires it. Set it to the steps of the first rung")
    if scheduler.exchanges:
        if scheduler.interval is None:
            faults.append(f"scheduler.interval: missing, but {name} requires it. Set it to the steps between two exchanges")
        if sweep.searcher.name != "random":
            faults.append(f"searcher.name: {name} starts with random trials. Remove {sweep.searcher.name!r}")
        if sweep.budget.trials is None or sweep.budget.trials < 2:
            faults.append(f"budget.trials: {name} needs the size of its population. Set budget.trials to 2 or more")
        for key, domain in sweep.space.items():
            if _below(key, DATA):
                faults.append(
                    f"space.{key}: {name} can't change this key during a run, because checkpoints wouldn't fit. Remove this key"
                )
            if domain.when:
                faults.append(f"space.{key}.when: not supported by {name}. Remove `when`")
            if domain.listed and scheduler.name == "pb2":
                faults.append(f"space.{key}: {name} needs ranges. Use a range instead of {domain.kind}, or use 'pbt'")
    return faults


def _below(key: str, parents: tuple[str, ...]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


@dataclass(frozen=True)
class SweepPlan:
    """Holds a sweep's file, its base job as plain data, and the number of planned trials (None if it is unknown).

    `row_tokens`: the mean tokens of a row in datasets of conversations; 0 for other datasets, and until the datasets are read.
    """

    sweep: Sweep
    base: dict[str, Any]
    trials: int | None
    row_tokens: float = 0.0

    @property
    def folder(self) -> Location:
        return Location(self.base["storage"]).join(self.sweep.name)

    def name(self, number: int) -> str:
        return f"{self.sweep.name}-{number:04d}"

    def job(self, number: int, params: Params) -> Job:
        """Builds a trial's job; ConfigError if its parameters don't make a valid job."""
        raw = place(self.base, params)
        raw["name"], raw["storage"] = self.name(number), str(self.folder.join("trials"))
        if self.sweep.scheduler.exchanges:
            raw["checkpoint"]["every"] = self.sweep.scheduler.interval  # trials clone checkpoints of these steps
            raw["checkpoint"]["keep"] = max(3, raw["checkpoint"]["keep"])
        return schema.validate(Job, raw, self.name(number))

    @property
    def tokens_per_trial(self) -> int:
        """Returns the number of tokens that a complete trial of the base job trains on, or samples if the job has no tokens."""
        train = self.base["train"]
        return round(train["steps"] * train["global_batch_size"] * self.sample_tokens({}))

    def sample_tokens(self, params: Params) -> float:
        """Returns the mean tokens of a sample in a trial with these parameters. 1 if samples have no tokens."""
        length = params.get("data.sequence_length", self.base["data"].get("sequence_length"))
        return spaces.number(length) if length else self.row_tokens or 1.0

    def with_rows(self, row_tokens: float) -> SweepPlan:
        """Returns the plan with the mean tokens of its datasets' rows. Raises ConfigError if the budget is below one trial."""
        plan = replace(self, row_tokens=0.0 if self.base["data"].get("sequence_length") else row_tokens)
        if fault := plan.token_fault():
            raise ConfigError(fault)
        return plan

    def token_fault(self) -> str:
        """Explains that the token budget is below one trial; "" if it isn't."""
        tokens, one = self.sweep.budget.tokens, self.tokens_per_trial
        if tokens is None or tokens >= one:
            return ""
        unit = "tokens" if self.base["data"].get("sequence_length") or self.row_tokens else "samples"
        return f"budget.tokens: {tokens:,.0f} is below one trial's {one:,} {unit}. Raise budget.tokens or lower train.steps"


def place(raw: dict[str, Any], params: Params) -> dict[str, Any]:
    """Returns the job with the parameters set."""
    return spec.apply(raw, settings(params))


def settings(params: Params) -> list[str]:
    """Formats the parameters as settings `key.path=value`."""
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in params.items()]


def holds(sweep: Sweep, job: Job, number: int) -> list[int]:
    """Lists the steps after which the trial with this number pauses for the scheduler. Leaves out the trial's last step."""
    scheduler, steps = sweep.scheduler, job.train.steps
    if scheduler.halves:
        assert scheduler.grace is not None
        all_rungs = rungs(scheduler.grace, scheduler.reduction, steps)
        return all_rungs[bracket(sweep, steps, number) :]
    if scheduler.exchanges:
        assert scheduler.interval is not None
        return list(range(scheduler.interval, steps, scheduler.interval))
    if scheduler.name == "median":
        assert job.evaluate
        return list(range(job.evaluate.every, steps, job.evaluate.every))
    return []


def brackets(sweep: Sweep, steps: int) -> int:
    """Counts the sweep's brackets. HyperBand has one bracket per rung, and one more bracket, which has no rungs. Other schedulers
    have one bracket."""
    scheduler = sweep.scheduler
    if scheduler.name != "hyperband":
        return 1
    assert scheduler.grace is not None
    return len(rungs(scheduler.grace, scheduler.reduction, steps)) + 1


def bracket(sweep: Sweep, steps: int, number: int) -> int:
    """Returns the number of the bracket of the trial with this number."""
    return bracket_of(number, brackets(sweep, steps), sweep.scheduler.reduction)


def load(path: Path, changes: list[str] | None = None, cluster: ClusterFile | None = None) -> SweepPlan:
    """Loads a sweep from a YAML file, applies `key.path=value` changes to the sweep's keys, and checks the sweep without Ray or
    any store.

    `cluster`: the file of the target cluster, which decides `workers.gpus: auto`. ConfigError if the sweep is invalid.
    """
    sweep = file_kinds.load(Sweep, "sweep", path, changes)
    file = base_file(sweep)
    if not file.is_file():
        raise ConfigError(f"{path}: job: {sweep.job!r}: no such file in {workspace.root()}")
    return make(sweep, place(spec.read(file), sweep.set_), str(path), cluster)


def base_file(sweep: Sweep) -> Path:
    """Returns the path of the base job's file."""
    return Path(sweep.job) if Path(sweep.job).is_absolute() else workspace.root() / sweep.job


def make(sweep: Sweep, raw: dict[str, object], where: str, cluster: ClusterFile | None = None) -> SweepPlan:
    """Plans and checks a sweep, given the content of its file and of its base job (`raw`); ConfigError if the sweep is invalid.

    `where`: the file's name, for error messages.
    """
    base = check.make_job(raw, f"{where}: job {sweep.job} with set", cluster)
    plan = SweepPlan(sweep, base.dump(), count(sweep))
    faults = [*_base_faults(sweep, base), *_budget_faults(plan, base), *_hold_faults(sweep, base)]
    if faults:
        raise ConfigError("\n  ".join([f"{where}:", *faults]) if len(faults) > 1 else f"{where}: {faults[0]}")
    _check_corners(plan, where)
    _check_drawn(plan, where)
    return plan


def count(sweep: Sweep) -> int | None:
    """Returns the number of planned trials; None if it is unknown."""
    return len(spaces.grid(sweep.space)) if sweep.searcher.name == "grid" else sweep.budget.trials


def _base_faults(sweep: Sweep, base: Job) -> list[str]:
    faults = []
    for key in sweep.space:
        if _below(key, OWN):
            faults.append(f"space.{key}: can't be varied. Remove it from the space")
        if key == "train.optimizer.name":
            faults.append(
                f"space.{key}: the keys depend on the optimizer. Vary whole optimizers instead: "
                "space.train.optimizer: {choice: [{name: adamw, lr: 1.0e-3}, {name: sgd, lr: 0.1}]}"
            )
        if _below(key, FIXED_WHERE_COMPARED) and sweep.scheduler.name != "none":
            faults.append(f"space.{key}: trials of different lengths can't be compared. Use scheduler 'none', or set {key}")
    if isinstance(base.workers.count, list):
        faults.append(
            f"job: workers.count {base.workers.count} is elastic, but a sweep needs a fixed number. Write "
            "set: {workers.count: N}"
        )
    if base.limits.hours or base.limits.cost:
        faults.append("job: limits apply to one run. Use the sweep's budget, and write set: {limits: {}}")
    if base.train.parallel.auto:
        faults.append(
            "job: train.parallel auto could choose a different configuration for each trial. Set the configuration that "
            "`heliostat plan JOB --rank` finds"
        )
    if base.evaluate is None:
        faults.append("job: has no section `evaluate`, so it reports no metric. Add this section to the job")
    else:
        recipe = check.check_job(base)[1]
        scores = recipe.scores if isinstance(recipe, Evaluates) else ()
        if sweep.metric not in scores:
            near = schema.nearest(sweep.metric, list(scores))
            faults.append(f"metric: {brief(repr(sweep.metric), 100)} isn't a score of {base.recipe}{near}")
    return faults


def _budget_faults(plan: SweepPlan, base: Job) -> list[str]:
    budget = plan.sweep.budget
    faults = list(filter(None, [plan.token_fault()]))
    if budget.gpu_hours is not None and not base.workers.gpus:
        faults.append("budget.gpu_hours: the job's workers have no GPUs (workers.gpus is 0). Use budget.hours")
    if plan.sweep.searcher.name == "grid":
        if budget.trials is not None and budget.trials < (plan.trials or 0):
            faults.append(
                f"budget.trials: {budget.trials} is below the grid's {plan.trials} trials. Raise the budget, or shrink the grid"
            )
    elif not any((budget.trials, budget.hours, budget.gpu_hours, budget.tokens)):
        faults.append(f"budget: searcher {plan.sweep.searcher.name!r} needs a limit. Set trials, hours, gpu_hours, or tokens")
    return faults


def _hold_faults(sweep: Sweep, base: Job) -> list[str]:
    key = "interval" if sweep.scheduler.exchanges else "grace"
    value = getattr(sweep.scheduler, key)
    if sweep.scheduler.name == "none" or value is None or base.evaluate is None:
        return []
    every, faults = base.evaluate.every, []
    if value % every:
        near = every * max(1, round(value / every))
        faults.append(f"scheduler.{key}: {value} isn't a multiple of the job's evaluate.every {every}. Nearest: {near}")
    if value >= base.train.steps:
        faults.append(f"scheduler.{key}: {value} must be below the job's train.steps {base.train.steps}")
    return faults


def _check_corners(plan: SweepPlan, where: str) -> None:
    """Checks that every corner of the space is a valid job for its recipe. If trials clone each other, checks that a trial can
    load the checkpoints of the others."""
    seen: set[str] = set()
    kept: dict[tuple[str, ...], str] = {}
    for params in spaces.corners(plan.sweep.space):
        job = _check_point(plan, params, f"{where}: the space contains values that don't make a valid job: {tell(params)}", seen)
        kept.setdefault(job.train.optimizer.state, job.train.optimizer.name)
    if plan.sweep.scheduler.exchanges and len(kept) > 1:
        what = " and ".join(f"{', '.join(state) or 'nothing'} ({name})" for state, name in kept.items())
        raise ConfigError(
            f"{where}: space: {plan.sweep.scheduler.name!r} lets trials clone each other, but these optimizers "
            f"keep different state per parameter: {what}. Use optimizers with the same state, or another scheduler"
        )


def _check_drawn(plan: SweepPlan, where: str) -> None:
    """Checks that each of the first ALL random trials is a valid job, because values between the corners may be invalid even if
    the corners are valid."""
    if plan.sweep.searcher.name == "random" and plan.trials:
        seen: set[str] = set()
        for number in range(min(plan.trials, spaces.ALL)):
            params = spaces.draw(plan.sweep.space, plan.sweep.searcher.seed, number)
            _check_point(plan, params, f"{where}: trial {number} isn't a valid job: {tell(params)}", seen)


def _check_point(plan: SweepPlan, params: Params, what: str, seen: set[str]) -> Job:
    try:
        job = plan.job(0, params)
        if (model := json.dumps([job.recipe, job.model])) not in seen:
            seen.add(model)
            check.check_job(job)
        return job
    except ConfigError as e:
        raise ConfigError(f"{what}:\n  {str(e).removeprefix(f'{plan.name(0)}: ')}") from e


def tell(params: Params) -> str:
    """Formats the parameters in one line."""
    return ", ".join(f"{key.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
                     for key, value in params.items())  # fmt: skip
