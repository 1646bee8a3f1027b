"""Tests that workers with sharded matrices train like one worker with whole ones: losses, gradient norms, scores, and receipts
are equal.

Checkpoints load in any other configuration, to the bit. The loop's own worker runs real steps on real data on ranks without Ray,
like `heliostat check --numerics`.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from heliostat.checkpoint import flat_copy
from heliostat.checkpoint.agreement import together
from heliostat.config.spec import Job
from heliostat.engine import sharded_state
from heliostat.numerics import play
from heliostat.parallel import division

from tests.integration import layouts, selection

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


SAVED_BY = layouts.in_rings((
    [Case(1, 1, 1), Case(2, 2, 2), Case(1, 4, 2), Case(3, 1, 1), Case(1, 2, 2), Case(0, 4, 2), Case(3, 4, 1), Case(0, 2, 2)],
    [Case(1, 1, 1, "qwen3"), Case(1, 4, 4, "qwen3"), Case(2, 4, 2, "qwen3"), Case(0, 4, 4, "qwen3"), Case(3, 4, 1, "qwen3")],
    [Case(1, 1, 1, "gpt_neox"), Case(1, 2, 2, "gpt_neox")],
    [Case(1, 1, 1, precision="bf16"), Case(1, 2, 2, precision="bf16"), Case(2, 4, 2, precision="bf16")],
    [Case(1, 1, 1, thrifty=True), Case(2, 2, 2, thrifty=True)],
))  # fmt: skip
FEW = Case(1, 1, 1), Case(2, 2, 2)


def _first(case: Case) -> Case:
    return Case(1, 1, 1, case.arch, case.precision, case.thrifty)


def _job(case: Case, folder: Path) -> Job:
    changes: dict[str, Any] = {f"model.{key}": value for key, value in MODELS[case.arch].items()}
    changes |= {"model.arch": case.arch, "workers.count": case.workers, "train.parallel": {"tensor": case.tensor}}
    changes |= {"train.zero.stage": case.stage, "train.precision": case.precision, "data.document_mask": case.thrifty}
    changes |= {"train.tiled_loss": case.thrifty, "train.activation_checkpointing": case.thrifty}
    return layouts.described(case, folder, **changes)


def _drifted(player: play.Player) -> list[str]:
    """Returns the whole parameters that differ between the workers that hold them."""
    told = {
        name: hashlib.sha256(p.detach().float().numpy().tobytes()).hexdigest()
        for name, p in player.engine.module.named_parameters()
        if division.of(p).parts == 1 and p.numel()
    }
    everyone = together(player.control, lambda: told)
    return [name for name in told if len({one[name] for one in everyone}) > 1]


def _not_in_memory(player: play.Player) -> list[str]:
    """Returns the parts of this worker's state that differ when they are assembled from all workers' in-memory copies."""
    mine, whole = sharded_state.of(player.engine).tensors(), sharded_state.of(player.engine).tensors(whole=True)
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


GRID = layouts.Grid([*SAVED_BY], _job, SAVED_BY, _first, tell=_kept)


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> layouts.Rows:
    return GRID.played(request, tmp_path_factory.mktemp("matrices"))


@pytest.mark.parametrize("case", selection.kept(SAVED_BY, FEW[1]), ids=str)
def test_divided_matrices_train_as_whole_ones_do(case: Case, played: layouts.Rows) -> None:
    """Compares every step's loss, the gradient norm over all parameters, each once, scores of held-out samples, and receipts
    exactly.

    Whole parameters stay equal on all workers to the bit, and so does the state assembled from in-memory copies.
    """
    near = 1 if case.precision == "fp32" else 500  # bf16 rounds sums of parts, too
    mine, _ = GRID.trains(case, played, near)
    assert min(mine["norms"]) > 0.5  # each step is clipped
    assert mine["drifted"] == mine["lost"] == []


@pytest.mark.parametrize("loaded", selection.kept(SAVED_BY, FEW[0]), ids=str)
def test_a_run_goes_on_with_matrices_divided_otherwise(loaded: Case, played: layouts.Rows) -> None:
    """Parameters and moments are equal bit by bit, saved at another degree, stage, or number of workers. The losses then equal
    the unbroken run's."""
    GRID.goes_on(loaded, played, 1e-5 if loaded.precision == "fp32" else 1e-2)
