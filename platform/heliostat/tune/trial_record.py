"""Defines a sweep's files in storage: plain JSON in STORAGE/SWEEP. To resume or read a sweep, heliostat needs only these files.

    sweep.json                the sweep, its base job, and its MLflow run
    records/trial-0003.json   a trial: parameters, status, reports, clones
    trials/SWEEP-0003/        the trial's run folder
    lease/                    the driver that runs the sweep, and whether it is alive
    stop                      exists while a stop is requested
    result.json               the outcome

Only the driver writes records. heliostat never reads Ray Tune's own state.
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
Clone = TypedDict(  # a checkpoint and parameters that a trial took from another trial; `id`: the clone's number, only in `Config`
    "Clone", {"id": int, "from": int, "step": int, "at_step": int, "folder": str, "old": Params, "params": Params, "at": float},
    total=False,
)  # fmt: skip


def renamed_params(params: Params) -> Params:
    """Replaces old names of job keys in parameters."""
    return {renamed_path(Job, key): value for key, value in params.items()}


@closed
@dataclass
class TrialRecord:
    """Describes one trial. `status`: waiting, running, paused, stopped (it continues if the sweep is resumed), finished, pruned,
    or failed."""

    number: int
    params: Params
    drawn: Params = field(default_factory=dict)  # from the searcher, including keys whose condition isn't true
    status: str = "waiting"
    step: int = 0
    steps: int = 0
    reports: list[tuple[int, float, float]] = field(default_factory=list)  # step, metric, wall-clock time in seconds
    scores: dict[str, float] = field(default_factory=dict)  # scores of the last evaluation
    clones: list[Clone] = field(default_factory=list)
    seconds: float = 0.0  # running time
    tokens: float = 0.0  # tokens trained on, or samples if the job has no tokens
    run_id: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        """Replaces old names of job keys, for records of earlier versions."""
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
    """Describes the best trial in a sweep's report."""

    trial: int
    value: float | None
    params: Params
    run_id: str
    run_folder: NotRequired[str]
    model_uri: NotRequired[str | None]


class SweepProgress(TypedDict):
    """Describes a sweep's progress: its totals, its best trial, and all trials, the best first."""

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
    """Describes a sweep's outcome. This is the content of `result.json`."""

    tokens: float


@open_
class KeptBest(TypedDict, total=False):
    trial: int
    model_uri: str | None


@open_
class KeptOutcome(TypedDict, total=False):
    """Describes the keys of `result.json` that heliostat itself reads."""

    best: KeptBest | None


class Config(TypedDict):
    """Describes the configuration that Ray Tune passes to a trial's process."""

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
    """Reads the records of all trials, sorted by number."""
    names = [n for n, _ in folder.join("records").files() if n.endswith(".json")]
    return sorted((TRIAL.read(folder.join("records", n)) for n in names), key=lambda r: r.number)


def read_json(place: Location, format_: Format[T]) -> T | None:
    """Reads another file in the sweep's folder; None if the file doesn't exist."""
    try:
        return format_.read(place)
    except FileNotFoundError:
        return None


def ranked(records: list[TrialRecord], mode: str) -> list[TrialRecord]:
    """Sorts trials, the best first: finished trials by value, then the others by step (most first) and value."""
    sign = 1 if mode == "min" else -1

    def key(record: TrialRecord) -> tuple[bool, int, float]:
        value, finished = record.value, record.status == "finished"
        order = float("inf") if value is None or value != value else sign * value
        return not finished, 0 if finished else -record.step, order  # finished trials may have trained for different steps

    return sorted(records, key=key)


def best(records: list[TrialRecord], mode: str) -> TrialRecord | None:
    """Returns the best finished trial; None if no trial has finished."""
    first = next(iter(ranked([r for r in records if r.value is not None], mode)), None)
    return first if first and first.status == "finished" else None
