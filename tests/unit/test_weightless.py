"""Models that are built without weights have the shape of those with them, and take no memory for weights until they get it on
the device that trains.
"""

import numpy as np
import pytest
import torch
from heliostat.data import manifest
from heliostat.engine import first_weights
from heliostat.recipes import building, weightless
from heliostat.recipes.loading import load
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit import build_images
from tests.unit.build_job import BASE, job


class Group:
    """Stands for torch.distributed in a worker. `sent`: bytes that went to the others."""

    def __init__(self, rank: int, world: int = 8) -> None:
        self.rank, self.world, self.sent = rank, world, 0
        self.is_initialized, self.new_group = (lambda: True), (lambda backend: None)

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        assert tensor.dtype == torch.uint8 and source == 0 and tensor.is_contiguous()
        self.sent += tensor.numel()


def test_one_of_eight_workers_of_a_node_has_the_weights_in_host_memory(monkeypatch):
    """All had, in fp32: 8 x 32 GB of a model of 8 billion parameters. What is sent is in the precision that trains."""
    made, held = job(**{"train.zero.stage": 1, "train.precision": "bf16"}), dict[int, int]()
    monkeypatch.setattr(first_weights, "agreed", lambda group, work: work())
    build = building.build

    for rank in range(8):

        def noted(recipe, rank=rank):
            model = build(recipe)
            held[rank] = sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.is_meta)
            return model

        monkeypatch.setattr(building, "build", noted)
        monkeypatch.setattr(first_weights, "dist", group := Group(rank))
        model = first_weights.build(made, CausalLM(made))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert group.sent == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert held == {0: 4 * sum(p.numel() for p in model.parameters()), **dict.fromkeys(range(1, 8), 0)}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "qwen3"])
def test_a_model_without_weights_is_shaped_as_one_with_them(arch):
    """Names, shapes, tied weights, and buffers, which have their values."""
    given = {"arch": arch, "vocab_size": 96, "tie_word_embeddings": True}
    given |= (
        {"n_embd": 32, "n_layer": 2, "n_head": 4} if arch == "gpt2" else {k: v for k, v in BASE["model"].items() if k != "arch"}
    )
    recipe = CausalLM(job(model=given))
    right = building.build(recipe)
    with weightless.building():
        model = building.build(recipe)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    weightless.materialize(model, torch.device("cpu"), torch.bfloat16)
    shapes = [{n: (tuple(p.shape), p.requires_grad) for n, p in m.named_parameters()} for m in (model, right)]
    assert shapes[0] == shapes[1] and model.state_dict().keys() == right.state_dict().keys()
    assert model.training == right.training and all(p.dtype == torch.bfloat16 for p in model.parameters())
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, right)]
    assert tied[0] == tied[1]
    assert all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in right.named_buffers())
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"  # and what is built behind it has weights


def test_image_models_are_built_without_weights_too(tmp_path):
    from heliostat.recipes.images.text_to_image import TextToImage

    made = job(**build_images.job(build_images.digits(tmp_path / "images", 40)))
    recipe = load(made, [manifest.read(location) for location in made.sources])
    assert isinstance(recipe, TextToImage)
    right = building.build(recipe)
    with weightless.building():
        model = building.build(recipe)
    weightless.materialize(model, torch.device("cpu"), torch.float32)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in right.named_parameters()}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_the_first_workers_weights_are_sent_as_they_are_drawn(monkeypatch):
    """In the precision that trains; the host's copy in fp32 is given up as they are sent."""
    made = job(**{"train.zero.stage": 1, "train.precision": "bf16"})
    monkeypatch.setattr(first_weights, "dist", Group(0))
    monkeypatch.setattr(first_weights, "agreed", lambda group, work: work())
    torch.manual_seed(3)
    right = building.build(CausalLM(made))
    torch.manual_seed(3)
    model = first_weights.build(made, CausalLM(made))
    for p, expected in zip(model.parameters(), right.parameters(), strict=True):
        assert torch.equal(p, expected.bfloat16())
    assert np.isfinite(sum(float(p.float().sum()) for p in model.parameters()))


class Own(CausalLM):
    def build(self) -> torch.nn.Module:
        model = super().build()
        assert not any(p.is_meta for p in model.parameters())
        return model


@pytest.mark.parametrize(("recipe", "changes"), [(Own, {}), (CausalLM, {"train.parallel.tensor": 2, "workers.count": 2})])
def test_who_may_read_the_weights_builds_them_in_every_worker(recipe, changes, monkeypatch):
    """A `build` of one's own; and workers that divide matrices, who have other parts of them."""
    made = job(**{"train.zero.stage": 1, **changes})
    monkeypatch.setattr(first_weights, "dist", Group(1, 2))
    assert not any(p.is_meta for p in first_weights.build(made, recipe(made)).parameters())
