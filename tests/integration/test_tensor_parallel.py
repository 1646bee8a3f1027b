"""Workers that divide matrices train as one worker with whole ones does: losses, gradient norms, scores and receipts are those of
one worker, and checkpoints load at any other layout to the bit.

The loop's own worker plays real steps of real data on ranks without Ray, as `heliostat check --numerics` does; one run is on Ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import flat_copy
from heliostat.checkpoint.agreement import together
from heliostat.config.spec import Job
from heliostat.data.dataset import plan
from heliostat.data.manifest import read as read_manifest
from heliostat.numerics import play
from heliostat.recipes.loading import load
from heliostat.runs import segments
from heliostat.runs.verify import verify
from heliostat.storage import Location
from heliostat.train.run import train
from heliostat.train.worker import deepspeed_engine, division, zero_state
from heliostat.train.worker.evaluation import HeldOut
from safetensors.torch import load_file, save_file

from tests.golden import data
from tests.integration import ranks, selection
from tests.integration.conftest import curve
from tests.integration.reference import plain_losses
from tests.unit.build_job import job

STEPS, SAVED = 4, 2
GROUPS = (1, 2, 4)
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
    changes: dict[str, Any] = {"name": str(case).replace("_", "-"), "storage": str(folder), "data.window": 64, "data.lanes": 4}
    changes |= {"data.sources": [{"path": str(folder / "causal_lm")}], "model.arch": case.arch}
    changes |= {f"model.{key}": value for key, value in MODELS[case.arch].items()}
    changes |= {"workers.count": case.workers, "train.parallel": {"tensor": case.tensor}, "train.zero.stage": case.stage}
    changes |= {"train.precision": case.precision, "train.steps": STEPS, "train.global_batch": 8, "train.micro_batch": 1}
    changes |= {"train.grad_clip": 0.5, "train.optimizer.lr": 3e-3, "train.optimizer.eps": 1e-4}
    changes |= {"evaluate": {"every": 2, "samples": 6, "fraction": 0.1}, "data.document_mask": case.thrifty}
    changes |= {"train.tiled_loss": case.thrifty, "train.activation_checkpointing": case.thrifty}
    return job(**changes)


@contextmanager
def _played(case: Case, folder: Path) -> Iterator[play.Player]:
    """A worker of a layout; behind it DeepSpeed has forgotten the groups that it had, as between attempts."""
    made = _job(case, folder)
    data_plan = plan(made, [read_manifest(location) for location in made.sources])
    if dist.get_rank() == 0:
        segments.begin(made.run_folder, data_plan, 0)
    yield play.Player(made, data_plan, load(made, [read_manifest(location) for location in made.sources]))
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
    everyone = together(player.control, lambda: (ranges, kept))
    wanted = flat_copy.layout(whole)
    found = flat_copy.as_buffer(flat_copy.size(wanted), False)
    for piece in flat_copy.pieces({rank: its for rank, (its, _) in enumerate(everyone)}, wanted):
        found[piece.target : piece.target + piece.size] = everyone[piece.rank][1][piece.source : piece.source + piece.size]
    right = flat_copy.as_buffer(len(found), False)
    flat_copy.pack(whole, wanted, right)
    return [r.name for r in wanted if not torch.equal(*(b[r.offset : r.offset + r.size] for b in (found, right)))]


def _begin(case: Case, player: play.Player, folder: Path) -> dict[str, Any]:
    """Trains to the end, saving on the way."""
    losses = player.losses(0, SAVED)
    held = play.state(player.engine)
    player.save(SAVED)
    if player.rank == 0:
        save_file(held, folder / f"{case}.safetensors")
    losses += player.losses(SAVED, STEPS)
    player.engine.eval()
    held_out = HeldOut(player.job, player.dataset, player.recipe, player.sharing)
    scores = held_out.scores(player.engine, player.device, player.control, lambda: None)
    player.engine.train()
    told = {"losses": losses, "norms": list(player.stepper.norms), "scores": scores, "chain": player.unsealed.chain}
    told["drifted"] = _drifted(player) if case.stage < 3 else []
    lost = _not_in_memory(player)
    told["lost"] = [name for names in together(player.control, lambda: lost) for name in names]
    if player.rank == 0:
        (folder / f"{case}.json").write_text(json.dumps(told))
    return told


def _go_on(saved: Case, player: play.Player, folder: Path) -> dict[str, Any]:
    """Loads what another layout saved into an engine of NaN, and trains to the end."""
    for shard in zero_state.state(player.engine, whole=True).values():
        (shard.local if isinstance(shard, zero_state.FlatShard) else shard).fill_(float("nan"))
    player.load(_job(saved, folder).run_folder, SAVED)
    expected, found = load_file(folder / f"{saved}.safetensors"), play.state(player.engine)
    unequal = sorted(expected.keys() ^ found.keys()) + [n for n in expected if not torch.equal(expected[n], found[n])]
    losses = player.losses(SAVED, STEPS)
    unbroken = json.loads((folder / f"{saved}.json").read_text())["losses"][SAVED:]
    return {"unequal": unequal, "losses": losses, "unbroken": unbroken}


def layouts(group: Any, everyone: Any, folder: str, *names: str) -> Iterator[dict[str, Any]]:
    """In every rank: trains each of these layouts of this number of workers, then goes on from what the others have saved."""
    mine = [case for case in SAVED_BY if str(case) in names and case.workers == dist.get_world_size()]
    for case in mine:
        with _played(case, Path(folder)) as player:
            told = _begin(case, player, Path(folder))
        if dist.get_rank() == 0:
            yield {"case": str(case), **told}
    everyone.wait(ranks.DEADLINE_S)
    for case in mine:
        if str(saved := SAVED_BY[case]) in names:
            with _played(case, Path(folder)) as player:
                told = _go_on(saved, player, Path(folder))
            if dist.get_rank() == 0:
                yield {"saved": str(saved), "loaded": str(case), **told}


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("matrices")
    data.build(folder)
    cases, loaded = selection.asked(request, "case"), selection.asked(request, "loaded")
    needed = dict.fromkeys([*(_first(case) for case in cases), *cases, *loaded, *(SAVED_BY[case] for case in loaded)])
    groups = tuple(n for n in GROUPS if any(case.workers == n for case in needed))
    return ranks.run(f"{__name__}:layouts", groups, str(folder), *map(str, needed), deadline_s=480)


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
    assert row["saved"] == str(SAVED_BY[loaded]) and row["unequal"] == []
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
