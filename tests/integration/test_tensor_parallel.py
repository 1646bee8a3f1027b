"""Workers that divide matrices train as one worker with whole ones does: losses, gradient norms, scores and receipts are those of
one worker, and checkpoints load at any other layout to the bit.

The loop's own worker plays real steps of real data on ranks without Ray, as `heliostat check --numerics` does; one run is on Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import flat_copy
from heliostat.checkpoint.agreement import together
from heliostat.config.spec import Job
from heliostat.engine import deepspeed_engine, zero_state
from heliostat.numerics import play
from heliostat.parallel import division
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.run import train

from tests.golden import data
from tests.integration import layouts, ranks, selection
from tests.integration.conftest import curve
from tests.integration.reference import plain_losses

MODELS = {"llama": {}, "qwen3": {"num_key_value_heads": 4, "head_dim": 8}, "gpt_neox": {"num_key_value_heads": None}}


@dataclass(frozen=True)
class Case:
    stage: int
    workers: int
    tensor: int
    arch: str = "llama"
    precision: str = "fp32"
    thrifty: bool = False  # tiled loss, checkpointed activations, masked documents

    def __str__(self) -> str:
        more = f"-{self.precision}" * (self.precision != "fp32") + "-thrifty" * self.thrifty
        return f"{self.arch}-zero{self.stage}-{self.workers}-by-{self.tensor}{more}"


RINGS = (  # each goes on from what the next of its ring has saved
    [Case(1, 1, 1), Case(2, 2, 2), Case(1, 4, 2), Case(3, 1, 1), Case(1, 2, 2), Case(0, 4, 2), Case(3, 4, 1), Case(0, 2, 2)],
    [Case(1, 1, 1, "qwen3"), Case(1, 4, 4, "qwen3"), Case(2, 4, 2, "qwen3"), Case(0, 4, 4, "qwen3"), Case(3, 4, 1, "qwen3")],
    [Case(1, 1, 1, "gpt_neox"), Case(1, 2, 2, "gpt_neox")],
    [Case(1, 1, 1, precision="bf16"), Case(1, 2, 2, precision="bf16"), Case(2, 4, 2, precision="bf16")],
    [Case(1, 1, 1, thrifty=True), Case(2, 2, 2, thrifty=True)],
)
SAVED_BY = {case: ring[(at + 1) % len(ring)] for ring in RINGS for at, case in enumerate(ring)}
FEW = Case(1, 1, 1), Case(2, 2, 2)


def _first(case: Case) -> Case:
    return Case(1, 1, 1, case.arch, case.precision, case.thrifty)


def _job(case: Case, folder: Path) -> Job:
    changes: dict[str, Any] = {f"model.{key}": value for key, value in MODELS[case.arch].items()}
    changes |= {"model.arch": case.arch, "workers.count": case.workers, "train.parallel": {"tensor": case.tensor}}
    changes |= {"train.zero.stage": case.stage, "train.precision": case.precision, "data.document_mask": case.thrifty}
    changes |= {"train.tiled_loss": case.thrifty, "train.activation_checkpointing": case.thrifty}
    return layouts.described(case, folder, **changes)


@contextmanager
def _played(case: Case, folder: Path) -> Iterator[play.Player]:
    """A worker of a layout; behind it DeepSpeed has forgotten the groups that it had, as between attempts."""
    yield layouts.player(_job(case, folder))
    deepspeed_engine.destroy_engines()
    deepspeed_engine.forget_groups()


def _drifted(player: play.Player) -> list[str]:
    """What workers that all have a parameter whole have of it that is not the same."""
    told = {
        name: hashlib.sha256(p.detach().float().numpy().tobytes()).hexdigest()
        for name, p in player.engine.module.named_parameters()
        if division.of(p).parts == 1 and p.numel()
    }
    everyone = together(player.control, lambda: told)
    return [name for name in told if len({one[name] for one in everyone}) > 1]


def _not_in_memory(player: play.Player) -> list[str]:
    """What of this worker's state is not as it was when it is put together from the copies that all workers keep in memory."""
    mine, whole = zero_state.state(player.engine), zero_state.state(player.engine, whole=True)
    ranges = flat_copy.layout(mine)
    kept = flat_copy.as_buffer(flat_copy.size(ranges), False)
    flat_copy.pack(mine, ranges, kept)
    everyone = together(player.control, lambda: ([astuple(r) for r in ranges], kept))
    wanted = flat_copy.layout(whole)
    found = flat_copy.as_buffer(flat_copy.size(wanted), False)
    for piece in flat_copy.pieces(
        {rank: [flat_copy.FlatRange(*r) for r in its] for rank, (its, _) in enumerate(everyone)}, wanted
    ):
        found[piece.target : piece.target + piece.size] = everyone[piece.rank][1][piece.source : piece.source + piece.size]
    right = flat_copy.as_buffer(len(found), False)
    flat_copy.pack(whole, wanted, right)
    return [r.name for r in wanted if not torch.equal(*(b[r.offset : r.offset + r.size] for b in (found, right)))]


def _kept(player: play.Player) -> dict[str, Any]:
    lost = _not_in_memory(player)
    return {
        "drifted": _drifted(player) if player.job.train.zero.stage < 3 else [],
        "lost": [name for names in together(player.control, lambda: lost) for name in names],
    }


def played_in_ranks(group: Any, everyone: Any, folder: str, *names: str) -> Iterator[dict[str, Any]]:
    """In every rank: trains each of these layouts of this number of workers, then goes on from what the others have saved."""
    mine = [case for case in SAVED_BY if str(case) in names and case.workers == dist.get_world_size()]
    for case in mine:
        with _played(case, Path(folder)) as player:
            told = layouts.begin(player, Path(folder), tell=_kept)
        if dist.get_rank() == 0:
            yield {"case": str(case), **told}
    everyone.wait(ranks.DEADLINE_S)
    for case in mine:
        if str(saved := SAVED_BY[case]) in names:
            with _played(case, Path(folder)) as player:
                told = layouts.go_on(player, _job(saved, Path(folder)), Path(folder))
            if dist.get_rank() == 0:
                yield {"saved": str(saved), "loaded": str(case), **told}


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("matrices")
    data.build(folder)
    cases, loaded = selection.asked(request, "case"), selection.asked(request, "loaded")
    needed = dict.fromkeys([*(_first(case) for case in cases), *cases, *loaded, *(SAVED_BY[case] for case in loaded)])
    groups = tuple(n for n in layouts.GROUPS if any(case.workers == n for case in needed))
    return ranks.run(f"{__name__}:played_in_ranks", groups, str(folder), *map(str, needed), deadline_s=480)


@pytest.mark.parametrize("case", selection.kept(SAVED_BY, FEW[1]), ids=str)
def test_divided_matrices_train_as_whole_ones_do(case: Case, played: list[dict[str, Any]]) -> None:
    """Every step's loss, and the gradient norm over all parameters, once each; scores of held-out samples; receipts exactly; and
    what all workers have whole stays the same on all to the bit, as does what is put together from copies in memory."""
    begun = {row["case"]: row for row in played if "case" in row}
    right, found = begun[str(_first(case))], begun[str(case)]
    near = 1 if case.precision == "fp32" else 500  # bf16 rounds sums of parts, too
    assert found["losses"] == pytest.approx(right["losses"], rel=2e-5 * near)
    assert found["norms"] == pytest.approx(right["norms"], rel=1e-4 * near) and min(found["norms"]) > 0.5  # each step is clipped
    assert found["scores"] == pytest.approx(right["scores"], rel=2e-5 * near)
    assert found["chain"] == right["chain"] and found["drifted"] == found["lost"] == []


@pytest.mark.parametrize("loaded", selection.kept(SAVED_BY, FEW[0]), ids=str)
def test_a_run_goes_on_with_matrices_divided_otherwise(loaded: Case, played: list[dict[str, Any]]) -> None:
    """Parameters and moments bit by bit, saved at another degree, stage or number of workers; then the losses of the unbroken
    run."""
    (row,) = (row for row in played if row.get("loaded") == str(loaded))
    assert row["saved"] == str(SAVED_BY[loaded]) and row["unequal"] == [] and row["chain"]
    assert row["losses"] == pytest.approx(row["unbroken"], rel=1e-5 if loaded.precision == "fp32" else 1e-2)


@pytest.mark.ci
def test_a_run_changes_how_many_workers_divide_its_matrices(job_file, tracking) -> None:
    """On Ray, with an average of the weights: ten steps of two workers that have half of each matrix, then ten of one; it is the
    plain loop's run."""
    path = job_file("matrices")
    average = ["train.ema.decay=0.9", "model.num_key_value_heads=2", "train.zero.stage=2"]
    train(path, [*average, "train.parallel.tensor=2", "train.stop_after=10"])
    assert verify(Location(f"{path.parent}/runs/matrices"))["ok"]
    result = train(path, [*average, "workers.count=1"], resume=True)
    assert curve(tracking, result["run_id"]) == pytest.approx(plain_losses(path, average), abs=1e-4)
    found = verify(Location(f"{path.parent}/runs/matrices"))
    assert (found["ok"], found["steps"], found["lost"], found["repeated"]) == (True, 20, 0, 0)
