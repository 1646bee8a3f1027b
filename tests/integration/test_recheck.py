"""Tests `train.sdc_check`: a flipped bit in one worker's weights is found, and the worker is named. Nothing else changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
import torch.distributed as dist
from heliostat.data import manifest
from heliostat.data.dataset import plan
from heliostat.errors import CorruptionError
from heliostat.training.run import train
from heliostat.training.worker.recheck import CorruptionCheck

from tests.golden import curves, data
from tests.integration import ranks
from tests.integration.conftest import curve, tiny_job
from tests.integration.flipping import FLIPPING
from tests.integration.reference import plain_losses
from tests.unit.build_job import job

STAGES = ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"))
FLIPPED = "model.layers.1.mlp.up_proj.weight"
STEPS = 4


def _steps(folder: str, stage: int, precision: str, **model: Any) -> curves.Steps:
    changes: dict[str, Any] = {"train.zero.stage": stage, "train.precision": precision, "workers.count": dist.get_world_size()}
    changes |= {
        "data.sources": [{"path": folder}],
        "evaluate": None,
        "train.sdc_check": {"every": 2},
        "train.global_batch_size": 12,
    }
    made = job(**changes, **model)
    return curves.Steps(made, plan(made, [manifest.read(location) for location in made.sources]))


def _recheck(steps: curves.Steps, group: Any) -> CorruptionCheck:
    where = f"node-{steps.rank}", f"10.0.0.{steps.rank}"
    context: Any = SimpleNamespace(job=steps.job, control=group)
    return CorruptionCheck(context, steps.engine, steps.recipe, steps.dataset, steps.batch_plan, where)


def _flip(p: torch.Tensor) -> None:
    """Flips the lowest bit of one weight."""
    kind = {2: torch.int16, 4: torch.int32}[p.element_size()]
    p.data.view(-1).view(kind)[7] ^= 1


def _flips(steps: curves.Steps) -> None:
    _flip(dict(steps.engine.module.named_parameters())[FLIPPED])


def _errs(steps: curves.Steps) -> None:
    """From now on, adds a small error to one layer's output, like a worn unit."""
    steps.engine.module.model.layers[0].mlp.register_forward_hook(lambda module, given, made: made * (1 + 2**-7))


def _errs_once(steps: curves.Steps) -> None:
    handle = steps.engine.module.model.layers[0].mlp.register_forward_hook(
        lambda module, given, made: (handle.remove(), made * (1 + 2**-7))[1]
    )


def _wavers(steps: curves.Steps) -> None:
    steps.engine.module.model.layers[0].mlp.register_forward_hook(
        lambda module, given, made: made * (1 + 2**-7 * float(torch.rand((), generator=NOISE)))
    )


NOISE = torch.Generator().manual_seed(0)
FAULTS = {"flips": _flips, "errs": _errs, "errs once": _errs_once, "wavers": _wavers}


def _play(steps: curves.Steps, recheck: CorruptionCheck | None, fault: str = "") -> dict[str, Any]:
    """Trains some steps like the training loop. Before the second step, worker 1 gets a fault, or all workers do if kernels
    vary."""
    samples, looked, said = steps.dealt(), list[int](), list[str | None]()
    for step in range(STEPS):
        if fault and step == 1 and (steps.rank == 1 or fault == "wavers"):
            NOISE.manual_seed(steps.rank)
            FAULTS[fault](steps)
        if recheck and recheck.due(step):
            said.append(recheck.look(step))
            looked.append(step)
        steps.step(step, steps.prepare(step, samples.next_step()))
    losses = torch.stack(steps.losses).double()
    dist.all_reduce(losses)
    return {"curve": [losses.tolist(), steps.norms], "at": looked, "said": said}


def grid(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In every rank, runs each stage without and with checks, and then each fault at its possible stages."""
    for stage, precision in STAGES:
        without = _play(_steps(folder, stage, precision), None)
        looked = _steps(folder, stage, precision)
        recheck = _recheck(looked, group)
        told = _play(looked, recheck)
        gradients = recheck._all(*recheck._micro(1), recheck._drawn(1))[0].digests[-len(recheck._drawn(1)) :]
        yield {"stage": stage, "without": without["curve"], "with": told["curve"], "at": told["at"], "none": gradients.count(0)}
        for fault in {1: ("flips", "errs once", "wavers"), 3: ("errs",)}.get(stage, ("flips",)):
            faulty = _steps(folder, stage, precision)
            row = {"stage": stage, "fault": fault, "error": None}
            try:
                row |= _play(faulty, _recheck(faulty, group), fault)
            except CorruptionError as e:
                row |= {"error": str(e), "nodes": e.nodes, "agreed": e.agreed}
            yield row


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict[str, Any]]:
    folder = data.tokens(tmp_path_factory.mktemp("data") / "documents")
    return ranks.run(f"{__name__}:grid", (2, 3), str(folder), deadline_s=480)


@pytest.mark.ci
def test_looks_change_no_loss_and_no_gradient(told) -> None:
    """To the last bit, at every stage. The checks run at the first step and at every second one, and cover all gradients."""
    rows = [row for row in told if "with" in row]
    assert len(rows) == len(STAGES) * 5
    for row in rows:
        assert row["with"] == row["without"], row
        assert row["at"] == [0, 1, 3] and row["none"] == 0


@pytest.mark.ci
@pytest.mark.parametrize(("fault", "stages", "what"), [("flips", 3, f"the weights of {FLIPPED}"), ("errs", 1, "the loss")])
def test_a_fault_is_found_by_all_and_its_worker_named(fault, stages, what, told) -> None:
    """For the lowest bit of one weight, and a unit with errors: every worker finds it at the next check. Of three workers, the
    faulty one is named; of two, both."""
    rows = [row for row in told if row.get("fault") == fault]
    assert len(rows) == stages * 5
    for row in rows:
        assert "step 2: silent data corruption: worker" in row["error"] and what in row["error"]
        assert row["nodes"] == (["node-1"] if row["workers"] == 3 else ["node-0", "node-1"])
        assert ("doesn't know" in row["error"]) == (row["workers"] == 2)
        assert row["agreed"] == 0


@pytest.mark.ci
def test_a_worker_that_errs_once_differs_from_itself_and_is_named_even_among_two(told) -> None:
    rows = [row for row in told if row.get("fault") == "errs once"]
    assert len(rows) == 5 and all(row["nodes"] == ["node-1"] and "doesn't know" not in row["error"] for row in rows)


@pytest.mark.ci
def test_kernels_that_are_not_deterministic_are_no_corruption_and_end_the_looks(told) -> None:
    rows = [row for row in told if row.get("fault") == "wavers"]
    assert len(rows) == 5
    for row in rows:
        assert row["error"] is None and row["at"] == [0, 1]  # the look before the last step is left out
        assert "train.sdc_check is off from now on" in row["said"][-1]


# whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_a_run_goes_back_to_before_a_flipped_bit_and_says_what_it_found(corpus, tracking, tmp_path, caplog) -> None:
    """At stage 0, where it would persist. Of two workers on one node, either may be wrong, and no other node has room."""
    made = {**tiny_job(corpus, tracking, tmp_path), "name": "flipping", **FLIPPING, "checkpoint": {"every": 4, "keep": 4}}
    path = tmp_path / "flipping.json"
    path.write_text(json.dumps(made))
    settings = ["train.zero.stage=0", "train.sdc_check={every: 8}", "evaluate.every=20"]
    with caplog.at_level(logging.WARNING, "heliostat"):
        result = train(path, settings)
    assert result["restarts"] == 1 and Path(made["storage"], "flipped").exists()
    said = [record.getMessage() for record in caplog.records]
    found = next(line for line in said if "silent data corruption" in line)
    assert "step 16: silent data corruption: worker 0 on" in found and "All workers agreed up to step 7" in found
    assert "Resuming from step 4" in found  # of the checkpoints at 4, 8 and 12 the one that is in no doubt
    assert any("No other nodes have room for 2 workers, so heliostat continues to use node" in line for line in said)
    run = mlflow.MlflowClient(tracking_uri=tracking).get_run(result["run_id"])
    assert "silent data corruption" in run.data.tags["heliostat.corruption"]
    unflipped = plain_losses(path, [*settings, "recipe=heliostat.recipes:CausalLM"])
    assert curve(tracking, result["run_id"]) == pytest.approx(unflipped, abs=1e-4)
