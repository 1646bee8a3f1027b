"""Defines what a sweep leaves in storage, plain JSON below STORAGE/SWEEP: all that a resumed sweep, or a reader, needs.

    sweep.json            the sweep, its base job and its MLflow run
    records/trial-0003.json   a trial: parameters, status, reports, clones
    trials/SWEEP-0003/    the trial's run, as any other run's folder
    lease/                which driver may drive it, and whether it lives
    stop                  exists while the sweep is requested to stop
    result.json           the outcome

The driver alone writes records; Ray Tune's own state is never read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired, TypeVar

from typing_extensions import TypedDict

from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.schema import renamed_path
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Number, closed, open_
from heliostat.tune.space import Params

OVER = ("finished", "pruned", "failed")
STATES = ("waiting", "running", "paused", "stopped", *OVER)
T = TypeVar("T")
Clone = TypedDict(  # what a trial took over from another; `id`, in its configuration: which of its clones this is
    "Clone", {"id": int, "from": int, "step": int, "at_step": int, "folder": str, "old": Params, "params": Params, "at": float},
    total=False,
)  # fmt: skip


def renamed_params(params: Params) -> Params:
    """Returns parameters by today's names of the job's keys."""
    return {renamed_path(Job, key): value for key, value in params.items()}


@closed
@dataclass
class TrialRecord:
    """Describes one trial. `status`: waiting, running, paused, stopped (a resume continues it), finished, pruned or failed."""

    number: int
    params: Params
    drawn: Params = field(default_factory=dict)  # as the searcher gave them, with keys whose condition does not hold
    status: str = "waiting"
    step: int = 0
    steps: int = 0
    reports: list[tuple[int, float, float]] = field(default_factory=list)  # step, the metric, wall clock
    scores: dict[str, float] = field(default_factory=dict)  # the last
    clones: list[Clone] = field(default_factory=list)
    seconds: float = 0.0  # that it ran
    tokens: float = 0.0  # that it trained on
    run_id: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        """Replaces old names of keys, which records of earlier versions have."""
        self.params, self.drawn = renamed_params(self.params), renamed_params(self.drawn)
        for clone in self.clones:
            if "old" in clone:
                clone["old"] = renamed_params(clone["old"])
            if "params" in clone:
                clone["params"] = renamed_params(clone["params"])

    @property
    def value(self) -> float | None:
        return self.reports[-1][1] if self.reports else None

    @property
    def over(self) -> bool:
        return self.status in OVER


@open_
class KeptTrial(TypedDict):
    sweep: dict[str, Any]
    job: dict[str, Any]
    run_id: str
    seconds: Number
    created: NotRequired[Number]


def _fault(record: TrialRecord) -> str | None:
    if record.number < 0 or record.status not in STATES:
        return f"trial {record.number} is {record.status!r}"
    return None


class BestTrial(TypedDict):
    """Describes the best trial in what a sweep reports."""

    trial: int
    value: float | None
    params: Params
    run_id: str
    run_folder: NotRequired[str]
    model_uri: NotRequired[str | None]


class SweepProgress(TypedDict):
    """Describes how far a sweep has come: its totals, its best trial, and all trials, the best first."""

    sweep: str
    folder: str
    run_id: str
    running: NotRequired[bool]
    seconds: float
    steps: int
    metric: str
    best: BestTrial | None
    trials: list[dict[str, object]]


class SweepResult(SweepProgress):
    """Describes a sweep's outcome, as `result.json` holds it."""

    tokens: float


@open_
class KeptBest(TypedDict, total=False):
    trial: int
    model_uri: str | None


@open_
class KeptOutcome(TypedDict, total=False):
    """Holds what is read of `result.json`."""

    best: KeptBest | None


class Config(TypedDict):
    """Describes the configuration that Ray Tune gives to a trial's process."""

    job: dict[str, object]
    pauses: list[int]
    metric: str
    prunes: bool
    clone: Clone | None
    stop: str
    tags: dict[str, str]
    root: str
    cluster: str
    params: Params


TRIAL = Format(TrialRecord, "record of a trial", ConfigError, _fault)
KEPT = Format(KeptTrial, "record of a sweep", ConfigError)
RESULT = Format(KeptOutcome, "record of a sweep", ConfigError)
CLONE = Format(Clone, "record of a sweep", ConfigError)


def place(folder: Location, number: int) -> Location:
    return folder.join("records", f"trial-{number:04d}.json")


def write(folder: Location, record: TrialRecord) -> None:
    place(folder, record.number).write(json.dumps(asdict(record)).encode())


def read(folder: Location) -> list[TrialRecord]:
    """Reads the records of all trials, by number."""
    names = [n for n, _ in folder.join("records").files() if n.endswith(".json")]
    return sorted((TRIAL.read(folder.join("records", n)) for n in names), key=lambda r: r.number)


def read_json(place: Location, format_: Format[T]) -> T | None:
    """Reads one of the folder's other files; None if it does not exist."""
    try:
        return format_.read(place)
    except FileNotFoundError:
        return None


def ranked(records: list[TrialRecord], mode: str) -> list[TrialRecord]:
    """Sorts trials, the best first: finished ones by their value, then the others by their step, then by value."""
    sign = 1 if mode == "min" else -1

    def key(record: TrialRecord) -> tuple[bool, int, float]:
        value = record.value
        return record.status != "finished", -record.step, float("inf") if value is None or value != value else sign * value

    return sorted(records, key=key)


def best(records: list[TrialRecord], mode: str) -> TrialRecord | None:
    """Returns the best of the finished trials."""
    first = next(iter(ranked([r for r in records if r.value is not None], mode)), None)
    return first if first and first.status == "finished" else None
