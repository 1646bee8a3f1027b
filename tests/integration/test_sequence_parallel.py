"""Samples that several workers share train as whole ones do: losses, gradient norms, scores, receipts and checkpoints are those
of one worker, whatever the ZeRO stage, the number of workers and how many of them share a sample.

The loop's own worker plays real steps of real data on ranks without Ray, as `heliostat check --numerics` does; one run is on Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.run import train

from tests.golden import data
from tests.integration import layouts, ranks, selection
from tests.integration.conftest import curve
from tests.integration.reference import plain_losses
from tests.unit.build_job import BASE

TILE = 7  # tokens of an MLP's tile: a worker's stretch has several
SHAPES = ((1, 1), (2, 2), (4, 2), (4, 4))  # workers, and how many share a sample; the model has 2 heads of keys


@dataclass(frozen=True)
class Case:
    stage: int
    workers: int
    sequence: int
    extra: str = ""  # "documents" are kept apart; see EXTRAS

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.workers}-by-{self.sequence}{self.extra and '-' + self.extra}"


PLAIN = [Case(stage, *layout) for stage in range(4) for layout in SHAPES]
EXTRAS: dict[str, dict[str, Any]] = {
    "checkpointed": {"train.activation_checkpointing": True},
    "offloaded": {"train.activation_checkpointing": True, "train.activation_offload": True},
    "tiled": {"train.tiled_loss": True},
    "tiled-mlp": {"train.tiled_mlp": True},
    "all": {
        "train.tiled_loss": True,
        "train.tiled_mlp": True,
        "train.activation_checkpointing": 1,
        "train.activation_offload": True,
    },
}
EXTRA = [Case(2, 1, 1, "documents"), Case(2, 4, 2, "documents"), Case(3, 2, 2, "checkpointed"), Case(3, 2, 2, "offloaded"),
         Case(3, 2, 2, "tiled"), Case(1, 2, 2, "tiled-mlp"), Case(2, 2, 1, "tiled-mlp"), Case(3, 2, 1, "tiled-mlp"),
         Case(3, 2, 2, "all")]  # fmt: skip
CASES = PLAIN + EXTRA
ALONE, APART = Case(1, 1, 1), Case(2, 1, 1, "documents")  # whose losses are right
FEW = ALONE, Case(2, 2, 2), Case(3, 2, 2, "all")


def _job(case: Case, folder: Path) -> Job:
    changes: dict[str, Any] = {"workers.count": case.workers, "train.parallel": {"sequence": case.sequence}}
    changes |= {"train.zero.stage": case.stage, "data.document_mask": case.extra == "documents"}
    changes |= {"model": {**BASE["model"], "vocab_size": 96}, **EXTRAS.get(case.extra, {})}
    changes["train.deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return layouts.described(case, folder, batch=4, **changes)


def _tiled(recipe: Any) -> None:
    recipe.tile = TILE


def _others(case: Case) -> list[Case]:
    """What a case goes on from: another layout, at another stage; each layout is loaded by one other."""
    if case.extra:
        return []
    at = SHAPES.index((case.workers, case.sequence))
    return [Case(3 - case.stage, *SHAPES[(at + 1) % len(SHAPES)])]


def played_in_ranks(group: Any, everyone: Any, folder: str, *names: str) -> Iterator[dict[str, Any]]:
    """In every rank: trains each of these layouts of this number of workers, then goes on from what the others have saved."""
    mine = [case for case in CASES if str(case) in names and case.workers == dist.get_world_size()]
    players = {case: layouts.player(_job(case, Path(folder)), _tiled) for case in mine}
    for case, player in players.items():
        told = layouts.begin(player, Path(folder))
        if player.rank == 0:
            yield {"case": str(case), **told}
    everyone.wait(ranks.DEADLINE_S)
    for case, player in players.items():
        for saved in (other for other in _others(case) if str(other) in names):
            told = layouts.go_on(player, _job(saved, Path(folder)), Path(folder))
            if player.rank == 0:
                yield {"saved": str(saved), "loaded": str(case), **told}


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sequence")
    data.build(folder)
    loaded = selection.asked(request, "loaded")
    needed = [ALONE, APART, *selection.asked(request, "case"), *loaded, *(saved for case in loaded for saved in _others(case))]
    return ranks.run(f"{__name__}:played_in_ranks", layouts.GROUPS, str(folder), *dict.fromkeys(map(str, needed)), deadline_s=480)


@pytest.mark.parametrize("case", selection.kept(CASES, *FEW), ids=str)
def test_a_layout_trains_as_one_worker_does(case: Case, played: list[dict[str, Any]]) -> None:
    """Every step's loss and gradient norm, and the scores of held-out samples; the receipts are the same to the last bit."""
    begun = {row["case"]: row for row in played if "case" in row}
    right, found = begun[str(APART if case.extra == "documents" else ALONE)], begun[str(case)]
    assert found["losses"] == pytest.approx(right["losses"], rel=2e-5)
    assert found["norms"] == pytest.approx(right["norms"], rel=1e-4)
    assert found["scores"] == pytest.approx(right["scores"], rel=2e-5)
    assert found["chain"] == right["chain"]


@pytest.mark.ci
def test_offloaded_activations_give_the_same_losses_to_the_bit(played: list[dict[str, Any]]) -> None:
    found = [row for row in played if row.get("case") in ("zero3-2-by-2-checkpointed", "zero3-2-by-2-offloaded")]
    assert len(found) == 2
    assert found[0]["losses"] == found[1]["losses"] and found[0]["norms"] == found[1]["norms"]


@pytest.mark.parametrize("loaded", selection.kept(PLAIN, ALONE), ids=str)
def test_a_run_goes_on_in_another_layout(loaded: Case, played: list[dict[str, Any]]) -> None:
    """Parameters and moments bit by bit, saved in other layouts and at another stage; then the losses of the unbroken run."""
    rows = [row for row in played if row.get("loaded") == str(loaded)]
    assert [row["saved"] for row in rows] == [str(saved) for saved in _others(loaded)]
    for row in rows:
        assert row["unequal"] == [] and row["chain"], row["saved"]
        assert row["losses"] == pytest.approx(row["unbroken"], rel=1e-5), row["saved"]


@pytest.mark.ci
def test_a_run_changes_how_many_workers_share_a_sample(job_file, tracking) -> None:
    """On Ray: ten steps of two workers that share samples, then ten of one; it is the plain loop's run, and its receipts hold."""
    path = job_file("shared")
    first = train(path, ["train.parallel.sequence=2", "train.stop_after=10"])
    assert verify(Location(f"{path.parent}/runs/shared"))["ok"]
    result = train(path, ["workers.count=1"], resume=True)
    losses = curve(tracking, result["run_id"])
    assert first["run_id"] == result["run_id"] and losses == pytest.approx(plain_losses(path, []), abs=1e-4)
    found = verify(Location(f"{path.parent}/runs/shared"))
    assert (found["ok"], found["steps"], found["lost"], found["repeated"]) == (True, 20, 0, 0)
