"""Runs the small job on a worker, without Ray, with the code of the training loop: step, engine, data, checkpoints, and receipts.

`play` runs on every worker of the job's parallelism configuration. `resume` runs on one worker, with another parallelism
configuration. Both functions write the results to a folder: the tensors before and after each step (`weights-STEP`,
`gradients-STEP`), and everything else as JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import together
from heliostat.config.spec import Job
from heliostat.data import stream
from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.engine import deepspeed_engine, sharded_state
from heliostat.engine.sample_group import SampleGroup
from heliostat.engine.sharded_state import MASTER, ShardedState
from heliostat.numerics.compare import relative
from heliostat.numerics.rows import DifferenceRow
from heliostat.numerics.small import SAVED, STEPS
from heliostat.parallel import division
from heliostat.recipes import building
from heliostat.recipes.protocol import Recipe
from heliostat.runs import segments
from heliostat.runs.time_ledger import Ledger
from heliostat.storage.lease import Fence
from heliostat.storage.locations import Location
from heliostat.training.worker.context import Context, Posts
from heliostat.training.worker.micro_batches import BatchPlan
from heliostat.training.worker.step import Stepper
from heliostat.training.worker.training_state import TrainingState
from heliostat.training.worker.unsealed import Unsealed

if TYPE_CHECKING:
    import pyarrow as pa

    from heliostat.engine.deepspeed_engine import DeepSpeedEngine

FREE = SimpleNamespace(check=lambda: None)  # a fence that always passes, because no other driver can take over the trial
POLL_S = 0.05
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Player:
    """Acts as a training worker without a driver: computes steps, and saves and restores checkpoints."""

    def __init__(self, job: Job, plan: DataPlan, recipe: Recipe, start_step: int = 0) -> None:
        self.job, self.recipe = job, recipe
        self.step = start_step  # the current step, from 0
        self.rank, self.control = dist.get_rank(), dist.new_group(backend="gloo")
        ledger, self.dataset = Ledger("computing"), open_dataset(plan)
        context = Context(
            job, plan, job.run_folder, start_step, self.rank, dist.get_world_size(), self.control, cast(Fence, FREE),
            Posts(None, self.rank), progressed=lambda: None, ledger=ledger,
        )  # fmt: skip
        self.sharing = SampleGroup(job.train.parallel)
        self.engine = deepspeed_engine.build_engine(job, recipe, self.sharing)
        self.device = self.engine.device
        self.unsealed = Unsealed(job.run_folder, self.dataset, self.control, self.sharing.reads)
        self.state = TrainingState(context, self.engine, self.unsealed)
        self.stepper = Stepper(job, self.engine, recipe, BatchPlan(job, plan), self.sharing, ledger)
        self.samples = self._dealt(start_step)
        if start_step:
            self.state.restore()

    def load(self, run_folder: Location, step: int) -> None:
        """Loads the checkpoint of a step from a run with any parallelism configuration. The next steps continue from this
        checkpoint."""
        self.state.context = replace(self.state.context, run_folder=run_folder, start_step=step)
        self.state.restore()
        self.samples = self._dealt(step)

    def losses(self, first: int, last: int) -> list[float]:
        """Computes the steps [first, last). Returns the losses of these steps over the global batch."""
        begun = len(self.stepper.losses)
        for step in range(first, last):
            mine = self.sharing.share(self._read)
            self.stepper.step(step, self.stepper.prepare(step, mine))
            self.unsealed.add(step, mine)
        sums = torch.stack(self.stepper.losses[begun:]).double()
        dist.all_reduce(sums)
        return sums.tolist()

    def save(self, done: int) -> None:
        self.state.save(done)
        self.state.wait()

    def _dealt(self, start_step: int) -> stream.LaneStream | None:
        group = self.sharing
        return dealt(self.dataset.plan, group.replica, group.replicas, start_step) if group.reads else None

    def _read(self) -> stream.StepSamples:
        assert self.samples
        return self.samples.next_step()


def dealt(plan: DataPlan, rank: int, world: int, start_step: int) -> stream.LaneStream:
    """Streams a worker's data blocks for the steps from `start_step` on. Divides the blocks among workers in the same way as
    training."""
    order = open_dataset(plan).order
    task = stream.fetch(plan, order, start_step, STEPS, replace=True)

    def mine() -> Iterator[pa.Table]:
        for window in range(task.count):
            for table in task({"id": np.array([window])}):
                if table["block"][0].as_py() % world == rank:
                    yield table

    return stream.LaneStream(mine(), plan, order, rank, world, start_step)


def play(job: Job, plan: DataPlan, recipe: Recipe, folder: Path) -> None:
    """Runs all steps on a worker of the job's parallelism configuration, and saves a checkpoint after step `SAVED`."""
    if dist.get_rank() == 0:
        segments.begin(job.run_folder, plan, 0)
    player = Player(job, plan, recipe)
    losses, in_use = [], DifferenceRow("weights in use", 0.0)
    watch(player.engine, lambda computed: _keep(folder / f"gradients-{player.step}", computed))
    for step in range(STEPS):
        weigh(player.engine, job, step + 1, in_use)
        _keep(folder / f"weights-{step}", masters(player.engine))
        player.step = step
        losses += player.losses(step, step + 1)
        if step + 1 == SAVED:
            _keep(folder / "saved", state(player.engine))
            player.save(SAVED)
    _keep(folder / f"weights-{STEPS}", masters(player.engine))
    everyone = together(player.control, in_use.dump)
    if player.rank == 0:
        (folder / "played.json").write_text(json.dumps({"losses": losses, "rows": everyone}))


def resume(job: Job, plan: DataPlan, recipe: Recipe, folder: Path) -> None:
    """Loads the checkpoint with another parallelism configuration, and continues to the last step."""
    player = Player(job, plan, recipe, SAVED)
    row, saved = DifferenceRow("resumed state", 0.0), read(folder / "saved", 0.0)
    for name, loaded in state(player.engine).items():
        row.add(SAVED, name, relative(loaded, saved[name]))
    losses = player.losses(SAVED, STEPS)
    player.save(STEPS)
    (folder / "resumed.json").write_text(json.dumps({"losses": losses, "row": row.dump()}))


def watch(engine: DeepSpeedEngine, keep: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Makes the engine pass each step's gradients to `keep` after the step's last backward pass: reduced over workers, before
    clipping."""
    backward = engine.backward

    def watched(*args: object, **named: object) -> object:
        result = backward(*args, **named)
        if engine.is_gradient_accumulation_boundary():
            keep(gradients(engine))
        return result

    engine.backward = watched


def gradients(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Assembles every parameter's gradient, in fp32. Collective."""
    full, sharded = {}, sharded_state.of(engine)
    for name, p in sharded.trained():
        grad = sharded.full_gradient(p)
        if grad is None:
            full[name] = torch.zeros(building.shape(p))
        else:
            full[name] = division.assembled(p, grad).float().cpu().clone() / sharded.loss_scale
    return full


def masters(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Assembles every parameter's fp32 master weight. Collective."""
    sharded = sharded_state.of(engine)
    return {name: _full(sharded, p, None) for name, p in sharded.trained()}


def state(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Assembles the fp32 master weights and the optimizer state, named KIND.PARAMETER. Collective."""
    sharded = sharded_state.of(engine)
    return {
        f"{key or MASTER}.{name}": _full(sharded, p, key) for name, p in sharded.trained() for key in (None, *sharded.moments[p])
    }


def _full(sharded: ShardedState, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
    return division.assembled(p, sharded.full(p, key)).float().cpu().clone()


def weigh(engine: DeepSpeedEngine, job: Job, step: int, row: DifferenceRow) -> None:
    """Compares the weights that this worker's forward pass uses with the rounded fp32 master weights. Collective."""
    sharded = sharded_state.of(engine)
    for name, p in sharded.trained():
        right = _full(sharded, p, None).to(TYPES[job.train.precision])
        with sharded.gathered(p):
            used = division.assembled(p, p.detach()).cpu().to(right.dtype)
        row.add(step, f"{name} on worker {dist.get_rank()}", relative(used.float(), right.float()), lambda: "a stale buffer")


def _keep(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        write(place, tensors)


def write(place: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors to the file `place` for another process. This file appears only when it is complete."""
    part = place.with_name(f"{place.name}.part.npz")
    np.savez(part, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    part.rename(place)


def read(place: Path, seconds: float) -> dict[str, torch.Tensor]:
    """Reads the tensors of a file. Waits for the file at most `seconds`, and then raises TimeoutError."""
    until = time.monotonic() + seconds
    while not place.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{place.name} wasn't written within {seconds:.0f} s")
        time.sleep(POLL_S)
    with np.load(place, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
