"""Feeds a worker from an `ExactStream`: yields the worker's share of every step's samples, and writes the receipts.

Rank 0 starts the Ray Dataset in its worker, because only the worker knows the checkpoint's step. The other ranks get their parts
of the stream from rank 0. The stream ends when the workers end. The next workers start a new stream.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import ray
import torch.distributed as dist

from heliostat.checkpoint import agreement
from heliostat.cluster import nodes
from heliostat.config.fields import divisors
from heliostat.config.spec import Job
from heliostat.data import receipt, stream
from heliostat.data.content import Content
from heliostat.data.dataset import DataPlan, open_dataset, sample_bytes
from heliostat.errors import ConfigError
from heliostat.runs import segments
from heliostat.runs.history import receipts
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.training.worker.unsealed import Unsealed, check_budget

if TYPE_CHECKING:
    from ray.data import Dataset as RayDataset
    from ray.data.iterator import DataIterator

log = logging.getLogger(__name__)

START_S = 120.0  # maximum seconds for the actor that hands out the stream's parts


@dataclass(frozen=True)
class Batch:
    """Holds a worker's share of a step: `content` is int32 [samples, sequence_length] of tokens, or an Arrow table of rows.

    `step`: counted from 1. `lanes`: the virtual ranks of the samples, in this order. `replaced`: the number of samples that
    replace bad samples.
    """

    step: int
    content: Content
    lanes: range
    replaced: int


class Sealed(TypedDict):
    """Describes the receipts of a run so far: the number of steps, the chained hash of all receipts, and the number of replaced
    bad samples."""

    steps: int
    chain: str
    replaced: int


class Feed(Iterator[Batch]):
    """Iterates over a worker's batches, one per step, from the step at which the feed was opened to the last step."""

    def __init__(self, job: Job, plan: DataPlan, folder: str, step: int) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                "ExactStream.start: called outside a TorchTrainer. Call this method in the training function, on every worker"
            )
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.job, self.plan, self.folder = job, plan, Location(folder)
        self.done, self.last_step = step, job.last_step
        workers = divisors(plan.shape.lanes)
        if self.world not in workers:
            raise ConfigError(
                f"ExactStream.start: {self.world} workers don't divide the stream's {self.plan.shape.lanes} "
                f"virtual ranks. Use {' or '.join(map(str, workers))}"
            )
        if not 0 <= step <= self.last_step:
            raise ConfigError(
                f"ExactStream.start: step {step} isn't between 0 and the stream's last step, "
                f"{self.last_step}. Pass your checkpoint's step"
            )
        self.group = dist.new_group(backend="gloo")  # for tensors on the CPU, for any backend of the training
        self.dataset = open_dataset(self.plan)
        self._unsealed = Unsealed(self.folder, self.dataset, self.group)
        self._unsealed.chain, self._unsealed.replaced = self._begin(step)
        self._sealed, self._replaced = step, self._unsealed.replaced  # counts up to the last receipt; on rank 0, of all workers
        self._parts = self._share() if step < self.last_step else []
        if self._parts:
            order, part = self.dataset.order, self._parts[self.rank]
            self._samples = stream.iterate(part, self.plan, order, self.rank, self.world, step)

    def __next__(self) -> Batch:
        if self.done == self.last_step:
            raise StopIteration
        mine, index = self._samples.next_step(), self.done
        self.done += 1
        self._unsealed.add(index, mine)
        for bad in mine.bad:
            log.warning("step %d: replaced a bad sample: %s", self.done, bad.reason)
        return Batch(self.done, mine.content, mine.lanes, len(mine.bad))

    def receipt(self) -> Sealed:
        """Seals the steps since the last receipt, and returns the state of the run's receipts. All workers must call this method
        together.

        Call this method before you report the checkpoint of these steps, because a run continues only from a step at which a
        receipt ends. Raises DataError if more bad samples were replaced than `data.max_bad_fraction` allows.
        """
        done = self.done
        if done > self._sealed:
            self._replaced = self._unsealed.seal(done)
            self._sealed = done
        check_budget(self._replaced, done, self.job, self.dataset.order)
        return {"steps": done, "chain": self._unsealed.chain, "replaced": self._replaced}

    def close(self) -> None:
        """Ends the stream before its last step. Without this call, the stream ends when the workers end."""
        if self._parts and self.rank == 0:
            stream.end(self._parts)
        self._parts = []

    def _begin(self, step: int) -> tuple[str, int]:
        """Prepares the folder for a start after the step. Returns the chained hash of all receipts up to the step, and the number
        of bad samples before the step."""
        chain, replaced = agreement.first(self.group, lambda: self._started(step))
        return chain, replaced if self.rank == 0 else 0

    def _started(self, step: int) -> tuple[str, int]:
        """Prepares the folder for a start after the step, on rank 0. Raises ConfigError if no receipt ends at the step."""
        ends = {r.end: r.chain for r in receipts(self.folder)} | {0: receipt.GENESIS}
        if step not in ends:
            known = ", ".join(map(str, sorted(ends)))
            raise ConfigError(f"ExactStream.start: no receipt in {self.folder} ends at step {step}. Continue from one of {known}")
        segments.begin(self.folder, self.plan, step)
        listed = self.folder.join(run_folder.QUARANTINE)
        return ends[step], sum(len(listed.join(name).read().splitlines()) for name, _ in listed.files())

    def _share(self) -> list[DataIterator]:
        """Distributes the stream that rank 0 starts. Returns this worker's part.

        The parts contain Ray handles, which only Ray can send. So the other ranks get the parts from an actor that they find by
        name.
        """
        kept: list[Any] = []  # on rank 0, the actor

        def started() -> str:
            name = f"heliostat-stream-{uuid.uuid4().hex}"
            kept.append(Desk.options(name=name).remote(stream.split(self._dataset(), self.world)))
            return name

        name = agreement.first(self.group, started)
        parts: list[DataIterator] = agreement.agreed(
            self.group, lambda: ray.get(ray.get_actor(name).parts.remote(), timeout=START_S)
        )
        for desk in kept:  # now all ranks have their parts
            ray.kill(desk)
        return parts

    def _dataset(self) -> RayDataset:
        """Makes the Ray Dataset. If the trainer's workers leave no CPU free, the tasks that fetch the data reserve no CPU,
        because these tasks mostly wait."""
        data = self.job.data
        task = stream.fetch(self.plan, self.dataset.order, self.done, self.last_step, data.on_bad_sample == "replace")
        size = sample_bytes(data.sequence_length, self.dataset.sources)
        if crowd := nodes.crowded_now(self.job):
            log.warning("%s, so reading reserves no CPU in Ray, and shares the workers' cores", crowd)
        return stream.dataset(task, max(2, self.world), data.memory_limit, size, data.labels, own_cpu=not crowd)


class PartDesk:
    """Distributes the parts of a stream to the workers, as a Ray actor."""

    def __init__(self, parts: list[DataIterator]) -> None:
        self._parts = parts

    def parts(self) -> list[DataIterator]:
        """Returns all parts, in rank order."""
        return self._parts


Desk = ray.remote(num_cpus=0)(PartDesk)
