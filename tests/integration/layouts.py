"""Plays jobs on forked ranks, each at one layout of its workers, and goes on at another: what tests of layouts share.

In every rank: `begin` trains to the end and saves on the way, `go_on` loads what another layout saved and trains to the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.data.dataset import plan
from heliostat.data.manifest import read as read_manifest
from heliostat.engine import zero_state
from heliostat.numerics import play
from heliostat.recipes.loading import load
from heliostat.runs import segments
from heliostat.training.worker.evaluation import HeldOut
from safetensors.torch import load_file, save_file

from tests.unit.build_job import job

STEPS, SAVED = 4, 2
GROUPS = (1, 2, 4)  # of so many ranks
State = Callable[[play.Player], dict[str, torch.Tensor]]


def described(name: Any, folder: Path, batch: int = 8, **changes: Any) -> Job:
    """The job of a case: a few clipped steps on the golden text, scored twice, with these changes."""
    given: dict[str, Any] = {"name": str(name).replace("_", "-"), "storage": str(folder), "data.window": 64, "data.lanes": 4}
    given |= {"data.sources": [{"path": str(folder / "causal_lm")}], "train.precision": "fp32", "train.steps": STEPS}
    given |= {"train.global_batch": batch, "train.micro_batch": 1, "train.grad_clip": 0.5, "train.optimizer.lr": 3e-3}
    given |= {"train.optimizer.eps": 1e-4, "evaluate": {"every": 2, "samples": 6, "fraction": 0.1}}
    return job(**given | changes)


def player(made: Job, prepare: Callable[[Any], None] = lambda recipe: None) -> play.Player:
    """A worker of the job's layout; `prepare` changes its recipe."""
    sources = [read_manifest(location) for location in made.sources]
    data_plan, recipe = plan(made, sources), load(made, sources)
    if dist.get_rank() == 0:
        segments.begin(made.run_folder, data_plan, 0)
    prepare(recipe)
    return play.Player(made, data_plan, recipe)


def whole(one: play.Player) -> dict[str, torch.Tensor]:
    """All parameters and moments, assembled."""
    return play.state(one.engine)


def begin(one: play.Player, folder: Path, held: State = whole, tell: Callable[[play.Player], dict] = lambda one: {}) -> dict:
    """Trains to the end, saving on the way; returns losses, norms, scores, the receipts' chain, and what `tell` does."""
    losses = one.losses(0, SAVED)
    state = held(one)
    one.save(SAVED)
    if one.rank == 0:
        save_file(state, folder / f"{one.job.name}.safetensors")
    losses += one.losses(SAVED, STEPS)
    one.engine.eval()
    held_out = HeldOut(one.job, one.dataset, one.recipe, one.sharing)
    scores = held_out.scores(one.engine, one.device, one.control, lambda: None)
    one.engine.train()
    told = {"losses": losses, "norms": list(one.stepper.norms), "scores": scores, "chain": one.unsealed.chain, **tell(one)}
    if one.rank == 0:
        (folder / f"{one.job.name}.json").write_text(json.dumps(told))
    return told


def go_on(one: play.Player, saved: Job, folder: Path, held: State = whole) -> dict[str, Any]:
    """Loads what another layout saved into an engine of NaN, and trains to the end; returns the names of what is not the same to
    the bit, the losses beside the unbroken run's, and whether the receipts' chain is its."""
    for shard in zero_state.state(one.engine, whole=True).values():
        (shard.local if isinstance(shard, zero_state.FlatShard) else shard).fill_(float("nan"))
    one.load(saved.run_folder, SAVED)
    expected, found = load_file(folder / f"{saved.name}.safetensors"), held(one)
    unequal = sorted(expected.keys() ^ found.keys()) + [n for n in expected if not torch.equal(expected[n], found[n])]
    losses, unbroken = one.losses(SAVED, STEPS), json.loads((folder / f"{saved.name}.json").read_text())
    chain = one.unsealed.chain == unbroken["chain"]
    return {"unequal": unequal, "losses": losses, "unbroken": unbroken["losses"][SAVED:], "chain": chain}
