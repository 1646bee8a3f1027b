"""Experts that are divided over workers train as undivided ones do: losses, gradient norms, scores, receipts, load and biases are
those of one worker, and checkpoints load at any other layout to the bit.

The loop's own worker plays real steps of real data on ranks without Ray, as `heliostat check --numerics` does; one run is on Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.numerics import play
from heliostat.parallel import experts
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.run import train

from tests.golden import data
from tests.integration import layouts, ranks, selection
from tests.integration.conftest import curve
from tests.integration.paced import PACED
from tests.integration.reference import plain_losses
from tests.integration.test_survival import saved, when, workers
from tests.unit.test_experts import FAMILIES, MODELS

MIXTURES = {"mixtral": {**MODELS["mixtral"], "router_z_loss_coef": 0.01}, "gpt_oss": FAMILIES["gpt_oss"],
            "deepseek_v3": {**FAMILIES["deepseek_v3"], "router_bias_update_rate": 0.01}}  # fmt: skip


@dataclass(frozen=True)
class Case:
    stage: int
    workers: int
    expert: int
    arch: str = "mixtral"
    checkpointed: bool = False  # and at DeepSpeed's own threshold, at which small parameters stay gathered

    def __str__(self) -> str:
        return f"{self.arch}-zero{self.stage}-{self.workers}-by-{self.expert}{'-checkpointed' * self.checkpointed}"


RINGS = (  # each goes on from what the next of its ring has saved
    [Case(1, 1, 1), Case(3, 2, 2), Case(3, 4, 4), Case(2, 2, 1), Case(3, 4, 2), Case(3, 2, 1)],
    [Case(1, 1, 1, "deepseek_v3"), Case(3, 4, 2, "deepseek_v3")],
    [Case(1, 1, 1, "gpt_oss"), Case(3, 2, 2, "gpt_oss")],
)
SAVED_BY = {case: ring[(at + 1) % len(ring)] for ring in RINGS for at, case in enumerate(ring)}
CASES = [*SAVED_BY, Case(3, 2, 2, checkpointed=True)]
FEW = Case(1, 1, 1), Case(3, 2, 2)


def _job(case: Case, folder: Path) -> Job:
    changes: dict[str, Any] = {"model": {**MIXTURES[case.arch], "arch": case.arch, "vocab_size": 96}}
    changes |= {"workers.count": case.workers, "train.parallel": {"expert": case.expert}, "train.zero.stage": case.stage}
    changes["train.activation_checkpointing"] = case.checkpointed
    if not case.checkpointed:
        changes["train.deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return layouts.described(case, folder, **changes)


def _held(player: play.Player) -> dict[str, torch.Tensor]:
    """The whole training state, biases too."""
    biases = {f"buffer.{name}": b.clone() for name, b in experts.biases(player.engine.module)}
    return play.state(player.engine) | biases


def _load(player: play.Player) -> dict[str, Any]:
    return {"load": player.stepper.experts.report()}


def played_in_ranks(group: Any, everyone: Any, folder: str, *names: str) -> Iterator[dict[str, Any]]:
    """In every rank: trains each of these layouts of this number of workers, then goes on from what the others have saved."""
    mine = [case for case in CASES if str(case) in names and case.workers == dist.get_world_size()]
    players = {case: layouts.player(_job(case, Path(folder))) for case in mine}
    for case, player in players.items():
        told = layouts.begin(player, Path(folder), _held, _load)
        if player.rank == 0:
            yield {"case": str(case), **told}
    everyone.wait(ranks.DEADLINE_S)
    for case, player in players.items():
        if (saved := SAVED_BY.get(case)) and str(saved) in names:
            told = layouts.go_on(player, _job(saved, Path(folder)), Path(folder), _held)
            if player.rank == 0:
                yield {"saved": str(saved), "loaded": str(case), **told}


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("experts")
    data.build(folder)
    cases, loaded = selection.asked(request, "case"), selection.asked(request, "loaded")
    needed = [*(Case(1, 1, 1, case.arch) for case in cases), *cases, *loaded, *(SAVED_BY[case] for case in loaded)]
    return ranks.run(f"{__name__}:played_in_ranks", layouts.GROUPS, str(folder), *dict.fromkeys(map(str, needed)), deadline_s=480)


@pytest.mark.parametrize("case", selection.kept(CASES, *FEW), ids=str)
def test_divided_experts_train_as_one_worker_does(case: Case, played: list[dict[str, Any]]) -> None:
    """Every step's loss, and the gradient norm over all parameters, once each; scores of held-out samples; receipts and the
    tokens of every expert exactly."""
    begun = {row["case"]: row for row in played if "case" in row}
    right, found = begun[str(Case(1, 1, 1, case.arch))], begun[str(case)]
    assert found["losses"] == pytest.approx(right["losses"], rel=2e-5)
    assert found["norms"] == pytest.approx(right["norms"], rel=1e-4) and min(found["norms"]) > 0.5  # each step is clipped
    assert found["scores"] == pytest.approx(right["scores"], rel=2e-5)
    assert found["chain"] == right["chain"]
    assert found["load"]["imbalance"][0] == right["load"]["imbalance"][0] > 1


@pytest.mark.parametrize("loaded", selection.kept(SAVED_BY, FEW[0]), ids=str)
def test_a_run_goes_on_with_experts_divided_otherwise(loaded: Case, played: list[dict[str, Any]]) -> None:
    """Parameters, moments and biases bit by bit, saved at another degree, stage or number of workers; then the losses of the
    unbroken run."""
    (row,) = (row for row in played if row.get("loaded") == str(loaded))
    assert row["saved"] == str(SAVED_BY[loaded]) and row["unequal"] == [] and row["chain"]
    assert row["losses"] == pytest.approx(row["unbroken"], rel=1e-5)


MIXTURE = ["model.arch=mixtral", "model.num_key_value_heads=2", "model.num_local_experts=4", "train.zero.stage=3"]


@pytest.mark.ci
def test_a_run_changes_how_many_workers_divide_the_experts(job_file, tracking) -> None:
    """On Ray: ten steps of two workers that have half of the experts each, then ten of one; it is the plain loop's run."""
    path = job_file("divided")
    train(path, [*MIXTURE, "train.parallel.expert=2", "train.stop_after=10"])
    assert verify(Location(f"{path.parent}/runs/divided"))["ok"]
    result = train(path, [*MIXTURE, "workers.count=1"], resume=True)
    assert curve(tracking, result["run_id"]) == pytest.approx(plain_losses(path, MIXTURE), abs=1e-4)
    found = verify(Location(f"{path.parent}/runs/divided"))
    assert (found["ok"], found["steps"], found["lost"], found["repeated"]) == (True, 20, 0, 0)


@pytest.mark.ci
def test_a_group_that_divides_the_experts_and_loses_a_worker_goes_on_as_if_nothing_had_happened(job_file, tracking):
    """On Ray: one of two workers, each with half of the experts, is killed behind a checkpoint. The other's process goes on, in a
    new group with a new one: the plain loop's losses, and no sample lost or repeated."""
    path = job_file("bereft")
    run = Location(f"{path.parent}/runs/bereft")
    striking = when(lambda: saved(run) >= 10, lambda: workers()[-1].kill())
    asked = [*MIXTURE, f"recipe={PACED['recipe']}", "train.parallel.expert=2", "checkpoint.every=5", "retries.backoff=0.1"]
    result = train(path, [*asked, "train.log_every=1", "mlflow.register=null"])
    striking.join(10)
    assert result["restarts"] == 1
    assert curve(tracking, result["run_id"]) == pytest.approx(plain_losses(path, MIXTURE), abs=1e-4)
    found = verify(run)
    assert (found["ok"], found["steps"], found["lost"], found["repeated"]) == (True, 20, 0, 0)
