"""Provides the exact, elastic order of samples for your own training loop, with Ray Train's `TorchTrainer`.

    stream = heliostat.datasets({"sources": [{"path": "data"}], "sequence_length": 256, "virtual_ranks": 4}, steps=100,
    global_batch_size=8,
                                folder="runs/mine")

    def loop(config):                             # on every worker
        feed = config["stream"].start(done)       # number of steps in your checkpoint; 0 at first
        for batch in feed:                        # batch.step, batch.content: this worker's share of the step's global batch
            ...
            receipt = feed.receipt()              # wherever you save a checkpoint, after the last step

Every step's global batch depends only on the data, the seed, and the step. The global batch is the same on any number of workers
that divides the number of virtual ranks. heliostat writes the data plan, the receipts, and the list of bad samples to the folder,
so that `heliostat run verify FOLDER` can check the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heliostat import schema
from heliostat.config import spec, workspace
from heliostat.config.fields import divisors
from heliostat.config.sections import Data
from heliostat.config.spec import Job
from heliostat.data.dataset import DataPlan
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, StorageError
from heliostat.runs import segments
from heliostat.storage.locations import Location
from heliostat.validation.check import check_data

if TYPE_CHECKING:  # imports torch and Ray, which workers need, but planning doesn't
    from heliostat.api.exact_feed import Feed


class AnySamples:
    """Implements a minimal recipe. This recipe accepts samples of the job's kind, with any content."""

    def __init__(self, job: Job) -> None:
        self.kind = "tokens" if job.data.sequence_length else "rows"

    def bind(self, sources: list[Manifest]) -> None:
        pass


@dataclass(frozen=True)
class ExactStream:
    """Describes an exact stream of samples as plain data, for `train_loop_config`."""

    job: Job
    plan: DataPlan
    folder: str  # folder of the plan, the receipts, and the list of bad samples

    @property
    def steps(self) -> int:
        """Returns the number of steps."""
        return self.job.last_step

    @property
    def workers(self) -> list[int]:
        """Lists the numbers of workers that can share the stream: each divides the number of virtual ranks."""
        return divisors(self.plan.shape.lanes)

    def start(self, step: int = 0) -> Feed:
        """Opens this worker's share of the steps after `step`. All workers must call this method together, with the same step.

        Raises ConfigError if the number of workers doesn't divide the number of virtual ranks, or if no receipt ends at the step.
        heliostat removes the records of later steps from the folder, because these steps run again.
        """
        from heliostat.api.exact_feed import Feed

        return Feed(self.job, self.plan, self.folder, step)


def plan_stream(job: Job, folder: str) -> ExactStream:
    """Plans a job's data. If the folder has a plan, continues with this plan. Raises ConfigError if the samples would differ from
    those of this plan."""
    place = Location(folder).absolute(workspace.root())
    try:
        place.probe()
        place.require_writable()
    except StorageError as e:
        raise type(e)(f"folder: {e}") from e
    recorded = next(reversed(segments.read(place)), None)
    checked = check_data(job, AnySamples(job), recorded)  # type: ignore[arg-type]
    if recorded and (changes := recorded.differences(checked.plan)):
        raise ConfigError(
            f"{place}: has a data plan for other samples. Undo these changes, or pass another folder:\n  " + "\n  ".join(changes)
        )
    return ExactStream(checked.job, checked.plan, str(place))


def data_job(data: Mapping[str, object], steps: int, global_batch_size: int, held_out: float) -> Job:
    """Builds a job that has only data, with the keys and rules of a job file."""
    data = schema.renamed(Data, dict(data))
    ranks = data.get("virtual_ranks")
    divides = isinstance(ranks, int) and isinstance(global_batch_size, int) and ranks > 0 and global_batch_size % ranks == 0
    raw: dict[str, object] = {
        "name": "stream",
        "recipe": "heliostat.exact_stream:AnySamples",
        "model": {},
        "data": data,
        "train": {
            "steps": steps,
            "global_batch_size": global_batch_size,
            "micro_batch_size": global_batch_size // ranks if divides else 1,  # type: ignore[operator]
            "optimizer": {"lr": 1.0},
        },
        "checkpoint": {"every": 1},
        "storage": ".",
        "mlflow": {"uri": "sqlite:///none", "experiment": "none"},
    }
    if held_out:
        raw["evaluate"] = {"every": 1, "fraction": held_out}
    return spec.resolve(schema.validate(Job, raw, "heliostat.datasets"))
