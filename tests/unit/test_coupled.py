"""Tests that workers share a loss over all samples of a step.

No worker holds the matrix of all pairs. The loss and its gradients equal those of a plain loss over all pairs in one process, for
any number of workers.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from heliostat.numerics.plain import PlainLoop
from heliostat.recipes import contrastive
from heliostat.recipes.protocol import CouplesSamples, Loss
from heliostat.recipes.text.embedder import Embedder
from heliostat.training.worker import coupled
from heliostat.training.worker.micro_batches import Micro

from tests.unit import build_pairs
from tests.unit.test_document_attention import Largest

PAIRS, WIDTH = 37, 8


class Group:
    """Replaces torch.distributed in one of several workers. All workers have the same samples, so a gather returns only the
    worker's own."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.summed: list[torch.Tensor] = []

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.summed.append(tensor)


def pairs(number: int = PAIRS) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {side: F.normalize(torch.randn(number, WIDTH), dim=-1) for side in ("query", "text")}
    names = torch.stack([torch.arange(number) % (number - 3), torch.arange(number) // 2], dim=1)  # some share a side
    return {**found, "names": names, "cut": (torch.arange(2 * number) % 5 == 0).long().view(number, 2)}


def recipe(tmp_path: Any) -> Embedder:
    return Embedder(build_pairs.embedder(build_pairs.dataset(tmp_path / "texts"), **{"model.temperature": 0.3}))


def plain_clip(found: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """Computes CLIP's loss in both directions, from its definition."""
    scores, names = found["query"] @ found["text"].T / temperature, found["names"]
    alike = (names[:, None] == names[None]).any(-1) & ~torch.eye(len(names), dtype=torch.bool)
    weights = scores.exp() * ~alike
    return -(scores.diagonal() - (weights.sum(0).log() + weights.sum(1).log()) / 2).sum()


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("block", [3, 36])
def test_what_workers_compute_adds_up_to_the_plain_loss_and_its_gradients(workers, block, tmp_path, monkeypatch):
    made, found = recipe(tmp_path), pairs()
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in found.items()}
    loss = plain_clip(leaves, 0.3)
    right = dict(zip(("query", "text"), torch.autograd.grad(loss / PAIRS, [leaves["query"], leaves["text"]]), strict=True))
    whole = made.couple(found)
    assert float(whole.sum) == pytest.approx(float(loss.detach()), rel=1e-5)

    monkeypatch.setattr(coupled, "SHARED_FROM", block)
    told, gradients = torch.zeros(4), {name: torch.zeros_like(g) for name, g in right.items()}
    for rank in range(workers):
        monkeypatch.setattr(coupled, "dist", Group(rank, workers))
        mine = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in found.items()}
        one, its = coupled._shared(made, mine, lambda loss, _: loss, PAIRS)
        told += torch.stack([one.sum, *(part.value for part in one.parts.values())])
        for name, g in its.items():
            gradients[name] += g
    expected = [whole.sum, *(part.value for part in whole.parts.values())]
    assert told.tolist() == pytest.approx([float(x) for x in expected], rel=1e-5) and told[2] > 0 and told[3] > 0
    for name, g in right.items():
        assert torch.allclose(gradients[name], g, rtol=1e-4, atol=1e-6)


def test_no_worker_holds_the_matrix_of_all_pairs(tmp_path, monkeypatch):
    """For 4,096 pairs, the matrix has 64 MiB in fp32; a worker's first pass held several of them."""
    number, made = 4096, recipe(tmp_path)
    monkeypatch.setattr(made, "represent", lambda engine, batch: pairs(number))
    monkeypatch.setattr(coupled, "_from_all", lambda tensor: tensor)
    monkeypatch.setattr(coupled, "seeded", lambda micros, *given: [(micros[0], {})])
    monkeypatch.setattr(coupled, "dist", Group(1, 4))
    monkeypatch.setattr(coupled, "SHARED_FROM", 256, raising=False)
    micro, engine = Micro(0, np.arange(number), {}), type("Engine", (), {"device": torch.device("cpu")})
    with Largest() as largest:
        coupled.first_pass(made, engine, [micro], lambda loss, *_: loss, number, lambda: None)
    assert largest.bytes <= 4 * 256 * number  # a block's scores


def test_held_out_pairs_are_scored_in_blocks(tmp_path, monkeypatch):
    """The loss and the ranks equal those of one matrix."""
    arrays = {name: x.numpy() for name, x in pairs().items() if name != "cut"}
    made = recipe(tmp_path)
    whole = made.measure(arrays)
    blocks = contrastive.blocks
    monkeypatch.setattr(contrastive, "blocks", lambda number: blocks(number, 5))
    monkeypatch.setattr(contrastive, "BLOCK", 5)
    assert made.measure(arrays) == pytest.approx(whole, rel=1e-6) and blocks(1024) == [None]


class Own(CouplesSamples):
    """Defines a user's recipe whose loss has no shares."""

    def couple(self, found: dict[str, torch.Tensor]) -> Loss:
        return Loss(found["x"].square().sum() ** 2)


def test_a_loss_that_has_no_shares_is_computed_whole():
    """This also holds if a class overrides only `couple`: the inherited shares belong to another loss."""

    class Other(Embedder):
        def couple(self, found: dict[str, torch.Tensor]) -> Loss:
            return Loss(found["query"].sum())

    assert Embedder.shares_coupling() and not Own.shares_coupling() and not Other.shares_coupling()
    assert not hasattr(Own, "couple_some")


def test_who_represents_samples_without_the_engine_completes_their_batch():
    """The engine does so, and `loss` and `evaluate` of a recipe promise it. `numerics` compares the engine with plain torch."""

    class Completes(Own):
        build = batch = None

        def complete(self, batch):
            assert not torch.is_grad_enabled() or "plain" not in batch
            return {"vectors": torch.ones(3, 2)}

        def represent(self, model, batch):
            return {"vectors": model(batch["vectors"])}

        def couple(self, vectors):
            return Loss(vectors["vectors"].sum())

    made, model = object.__new__(Completes), torch.nn.Linear(2, 1)
    whole = made.loss(model, {}).sum.detach()
    plain: Any = object.__new__(PlainLoop)
    plain.recipe, plain.model, plain.trained = made, model, dict(model.named_parameters())
    plain.job = SimpleNamespace(replicas=1)
    loss, (gradients,) = plain._coupled(made, [(0, {"plain": torch.zeros(())})], 3)
    assert loss == pytest.approx(float(whole) / 3) and gradients["weight"].tolist() == [[1.0, 1.0]]
