"""Runs jobs on forked ranks, each in one parallelism configuration, and resumes them in another: shared by the tests of
configurations.

In every rank, `begin` trains to the end and saves on the way, and `go_on` loads what another configuration saved and trains to
the end. A test module describes its cases in a `Grid` named GRID; a case has `workers`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.data.dataset import plan
from heliostat.data.manifest import read as read_manifest
from heliostat.engine import deepspeed_engine, sharded_state
from heliostat.numerics import play
from heliostat.recipes.loading import load
from heliostat.runs import segments
from heliostat.training.worker.evaluation import HeldOut
from safetensors.torch import load_file, save_file

from tests.golden import data
from tests.integration import ranks, selection
from tests.unit.build_job import job

STEPS, SAVED = 4, 2
GROUPS = (1, 2, 4)  # of so many ranks
SMALL_STAYS_DIVIDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Grid:
    """Describes the cases: the job of one in a folder, the case whose checkpoint each resumes from, and the case with the right
    losses.

    `prepare` changes a case's recipe, `held` assembles the state in a checkpoint, and `tell` adds to the compared values.
    """

    cases: Sequence[Any]
    job: Callable[[Any, Path], Job]
    saved_by: Mapping[Any, Any]
    right: Callable[[Any], Any]
    prepare: Callable[[Any], None] = lambda recipe: None
    held: Callable[[play.Player], dict[str, torch.Tensor]] = lambda one: play.state(one.engine)  # all parameters and moments
    tell: Callable[[play.Player], dict[str, Any]] = lambda one: {}

    def played(self, request: pytest.FixtureRequest, folder: Path) -> Rows:
        """Runs the cases that the tests of the fixture's module request by `case` and `loaded`."""
        data.build(folder)
        cases, loaded = selection.asked(request, "case"), selection.asked(request, "loaded")
        needed = dict.fromkeys([*map(self.right, cases), *cases, *loaded, *(self.saved_by[case] for case in loaded)])
        groups = tuple(n for n in GROUPS if any(case.workers == n for case in needed))
        names = (request.module.__name__, *map(str, needed))
        return ranks.run(f"{__name__}:played_in_ranks", groups, str(folder), *names, deadline_s=480)

    def trains(self, case: Any, played: Rows, near: float = 1) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compares losses, gradient norms, scores, and receipts with the right ones; returns both."""
        begun = {row["case"]: row for row in played if "case" in row}
        right, mine = begun[str(self.right(case))], begun[str(case)]
        assert mine["losses"] == pytest.approx(right["losses"], rel=2e-5 * near)
        assert mine["norms"] == pytest.approx(right["norms"], rel=1e-4 * near)
        assert mine["scores"] == pytest.approx(right["scores"], rel=2e-5 * near)
        assert mine["chain"] == right["chain"]
        return mine, right

    def goes_on(self, loaded: Any, played: Rows, rel: float = 1e-5) -> None:
        """Compares the state bit by bit, and then the losses with those of the unbroken run."""
        (row,) = (row for row in played if row.get("loaded") == str(loaded))
        assert row["saved"] == str(self.saved_by[loaded]) and row["unequal"] == [] and row["chain"]
        assert row["losses"] == pytest.approx(row["unbroken"], rel=rel)


def in_rings(rings: Iterable[Sequence[Any]]) -> dict[Any, Any]:
    """Lets each case resume from the checkpoint of the next one in its ring."""
    return {case: ring[(at + 1) % len(ring)] for ring in rings for at, case in enumerate(ring)}


def described(name: Any, folder: Path, batch: int = 8, **changes: Any) -> Job:
    """Returns the job of a case: a few clipped steps on the golden text, scored twice, with these changes."""
    given: dict[str, Any] = {
        "name": str(name).replace("_", "-"),
        "storage": str(folder),
        "data.shuffle_window": 64,
        "data.virtual_ranks": 4,
    }
    given |= {"data.sources": [{"path": str(folder / "causal_lm")}], "train.precision": "fp32", "train.steps": STEPS}
    given |= {"train.global_batch_size": batch, "train.micro_batch_size": 1, "train.grad_clip": 0.5, "train.optimizer.lr": 3e-3}
    given |= {"train.optimizer.eps": 1e-4, "evaluate": {"every": 2, "samples": 6, "fraction": 0.1}}
    return job(**given | changes)


def player(made: Job, prepare: Callable[[Any], None] = lambda recipe: None) -> play.Player:
    """Creates a worker with the job's configuration; `prepare` changes its recipe."""
    sources = [read_manifest(location) for location in made.sources]
    data_plan, recipe = plan(made, sources), load(made, sources)
    if dist.get_rank() == 0:
        segments.begin(made.run_folder, data_plan, 0)
    prepare(recipe)
    return play.Player(made, data_plan, recipe)


@contextmanager
def _alone(grid: Grid, case: Any, folder: Path) -> Iterator[play.Player]:
    """Runs a worker of a case. Afterwards, DeepSpeed has forgotten its groups, as between attempts."""
    yield player(grid.job(case, folder), grid.prepare)
    deepspeed_engine.destroy_engines()
    deepspeed_engine.forget_groups()


def played_in_ranks(group: Any, everyone: Any, place: str, module: str, *names: str) -> Iterator[dict[str, Any]]:
    """In every rank, trains each of these configurations with this number of workers, then resumes from the checkpoints of the
    others."""
    grid, folder = importlib.import_module(module).GRID, Path(place)
    mine = [case for case in grid.cases if str(case) in names and case.workers == dist.get_world_size()]
    for case in mine:
        with _alone(grid, case, folder) as one:
            row = {"case": str(case), **begin(one, folder, grid)}
        if dist.get_rank() == 0:
            yield row
    everyone.wait()
    for case in mine:
        if (saved := grid.saved_by.get(case)) and str(saved) in names:
            with _alone(grid, case, folder) as one:
                row = {"saved": str(saved), "loaded": str(case), **go_on(one, grid.job(saved, folder), folder, grid)}
            if dist.get_rank() == 0:
                yield row


def begin(one: play.Player, folder: Path, grid: Grid) -> dict[str, Any]:
    """Trains to the end, and saves on the way; returns losses, norms, scores, the receipts' chain, and the result of `tell`."""
    losses = one.losses(0, SAVED)
    state = grid.held(one)
    one.save(SAVED)
    if one.rank == 0:
        save_file(state, folder / f"{one.job.name}.safetensors")
    losses += one.losses(SAVED, STEPS)
    one.engine.eval()
    held_out = HeldOut(one.job, one.dataset, one.recipe, one.sharing)
    scores = held_out.scores(one.engine, one.device, one.control, lambda: None)
    one.engine.train()
    row = {"losses": losses, "norms": list(one.stepper.norms), "scores": scores, "chain": one.unsealed.chain, **grid.tell(one)}
    if one.rank == 0:
        (folder / f"{one.job.name}.json").write_text(json.dumps(row))
    return row


def go_on(one: play.Player, saved: Job, folder: Path, grid: Grid) -> dict[str, Any]:
    """Loads another configuration's checkpoint into an engine full of NaN, and trains to the end.

    Returns the names of the values that differ in a bit, the losses and those of the unbroken run, and whether the receipts'
    chain is the same.
    """
    for shard in sharded_state.of(one.engine).tensors(whole=True).values():
        (shard.local if isinstance(shard, sharded_state.FlatShard) else shard).fill_(float("nan"))
    one.load(saved.run_folder, SAVED)
    expected, state = load_file(folder / f"{saved.name}.safetensors"), grid.held(one)
    unequal = sorted(expected.keys() ^ state.keys()) + [n for n in expected if not torch.equal(expected[n], state[n])]
    losses, unbroken = one.losses(SAVED, STEPS), json.loads((folder / f"{saved.name}.json").read_text())
    chain = one.unsealed.chain == unbroken["chain"]
    return {"unequal": unequal, "losses": losses, "unbroken": unbroken["losses"][SAVED:], "chain": chain}
