"""Tests REPA: the alignment of a block's output with stored features of an image model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.errors import ConfigError
from heliostat.recipes.images import alignment, blocks
from heliostat.storage.locations import Location

from tests.unit import build_aids, build_images
from tests.unit.build_aids import DEEP, recipe
from tests.unit.build_job import job
from tests.unit.build_text_to_image import woken

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["float16", "int8"])
def featured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_aids.featured(tmp_path_factory.mktemp("featured"), request.param)


def rows(dataset: Path, count: int) -> Any:
    made = plan(job(**build_images.job(dataset)), [manifest.read(Location(str(dataset)))])
    data = open_dataset(made)
    return data.read(data.order.locate(np.arange(count)))


def similarity(weights: list[tuple[torch.Tensor, torch.Tensor]], hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Returns the mean similarity of one sample patch by patch, fp64: equation (8) of the paper, without its sign."""
    rows, columns, _ = features.shape
    found = []
    for i in range(rows):
        for j in range(columns):
            total, area = torch.zeros(hidden.shape[2], dtype=torch.float64), 0.0
            for y in range(hidden.shape[0]):  # the tokens that the patch covers, by the area that they share
                for x in range(hidden.shape[1]):
                    down = min((y + 1) / hidden.shape[0], (i + 1) / rows) - max(y / hidden.shape[0], i / rows)
                    right = min((x + 1) / hidden.shape[1], (j + 1) / columns) - max(x / hidden.shape[1], j / columns)
                    share = max(0.0, down) * max(0.0, right)
                    total, area = total + share * hidden[y, x], area + share
            value = total / area
            for n, (matrix, bias) in enumerate(weights):
                value = matrix @ value + bias
                value = value / (1 + torch.exp(-value)) if n + 1 < len(weights) else value
            target = features[i, j]
            found.append((value @ target) / math.sqrt(float(target @ target)) / (value @ value).sqrt())
    return torch.stack(found).mean()


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (3, 5), (6, 2)])
def test_the_similarity_and_its_gradients_are_those_of_a_loop_over_patches_in_fp64(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    projector = alignment.Projector(8, 16, 6).double()
    hidden = torch.randn(3, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    features = torch.randn(3, *grid, 6, dtype=torch.float64)
    weights = [(m.weight, m.bias) for m in projector.layers if isinstance(m, torch.nn.Linear)]
    expected = torch.stack([similarity(weights, h, f) for h, f in zip(hidden, features, strict=True)])
    wanted = torch.autograd.grad(expected.sum(), [hidden, *projector.parameters()])
    single = alignment.Projector(8, 16, 6)
    single.load_state_dict(projector.state_dict())
    mine = hidden.detach().float().requires_grad_()
    answer = single(mine, features.float())
    assert answer.detach().numpy() == pytest.approx(expected.detach().numpy(), abs=1e-6)
    for got, right in zip(torch.autograd.grad(answer.sum(), [mine, *single.parameters()]), wanted, strict=True):
        assert torch.allclose(got.double(), right, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("arch", "layer"), [("unet", 1), ("unet", 3), ("unet", 5), ("pixart", 1), ("pixart", 4), ("sd3", 2)])
def test_the_loss_adds_the_alignment_of_the_blocks_output(arch: str, layer: int, checkpointing: bool, featured: Path) -> None:
    """The block's output is read by another hook, and the loss without the key stays the same."""
    changes = {"train.activation_checkpointing": checkpointing}
    made = recipe(featured, arch, changes, repa={"layer": layer, "weight": 0.5, "width": 16})
    plain = recipe(featured, arch, changes)
    torch.manual_seed(3)
    model = woken(made.build())
    batch = made.batch(rows(featured, 4), np.arange(4))
    read: list[torch.Tensor] = []
    backbone = getattr(model, made.parts.name)

    def spy(module: object, args: object, output: Any) -> None:
        whole = output if not isinstance(output, tuple) else output[1 if arch == "sd3" else 0]
        read.append(whole.permute(0, 2, 3, 1) if whole.dim() == 4 else whole.unflatten(1, (4, 4)))

    blocks.blocks("", backbone)[layer - 1].register_forward_hook(spy)
    loss = made.loss(model, batch)
    features = made.complete(batch)["features"]
    weights = [(m.weight.double(), m.bias.double()) for m in model.projector.layers if isinstance(m, torch.nn.Linear)]
    expected = -torch.stack([similarity(weights, h.double(), f.double()) for h, f in zip(read[0], features, strict=True)]).mean()
    part = loss.parts["repa"]
    assert part.weight == 0.5 and float(part.value) == pytest.approx(float(expected), abs=1e-5)
    assert float(loss.sum) == pytest.approx(float(plain.loss(model, plain.batch(rows(featured, 4), np.arange(4))).sum), rel=1e-6)
    (loss.sum / 4 + part.weight * part.value).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(g.any() for n, g in grads.items() if n.startswith("projector"))


def test_the_alignment_ends_after_its_last_step_and_is_still_logged(featured: Path) -> None:
    """By the samples' keys, so the same on any number of workers, also in the middle of a micro-batch."""
    made = recipe(featured, repa={"layer": 2, "width": 16, "until_step": 3})
    size = made.global_batch
    keys = np.array([3 * size - 1, 3 * size])
    torch.manual_seed(3)
    model = woken(made.build())
    each = []
    for i in range(2):
        model.zero_grad()
        part = made.loss(model, made.batch(rows(featured, 2).slice(i, 1), keys[i : i + 1])).parts["repa"]
        each.append(float(part.value))
        if part.value.requires_grad:
            part.value.backward()
        assert any(p.grad is not None and p.grad.any() for p in model.projector.parameters()) == (i == 0)
    both = made.loss(model, made.batch(rows(featured, 2), keys)).parts["repa"]
    assert float(both.value) == pytest.approx(sum(each) / 2, abs=1e-6)


def test_evaluation_and_sampling_use_no_projector_and_exports_leave_it_out(featured: Path) -> None:
    made, plain = recipe(featured, repa={"layer": 2, "width": 16}), recipe(featured)
    torch.manual_seed(3)
    model = made.build()
    torch.manual_seed(3)
    without = plain.build()
    held = dict(model.named_parameters())
    assert all(torch.equal(p, held[n]) for n, p in without.named_parameters()), "the same first weights"
    woken(model)
    without.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("projector.")})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    written = {s for tensors in made.tensors(shapes).values() for w in tensors.values() for s in w.sources}
    assert shapes.keys() - written == {n for n in shapes if n.startswith("projector.")} != set()
    batch = made.batch(rows(featured, 4), np.arange(4))
    with torch.no_grad():
        pairs = zip(made.evaluate(model, batch).values(), plain.evaluate(without, batch).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert made.flops_per_sample(model) > plain.flops_per_sample(model)


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ({"repa": {"layer": 5}}, {}, r"^model\.repa\.layer: 5 given, but the backbone has 4 blocks\. Use at most 4"),
        ({"repa": {"layer": 3}, "tread": {"from": 2, "to": 4}}, {}, r"^model\.repa\.layer: 3 is inside model\.tread \(2 to 4\)"),
        ({"repa": {"layer": 3}}, {"train.compile": True}, r"^model\.repa: not supported with train\.compile"),
        ({"repa": {"layer": 0}}, {}, r"^model\.repa\.layer: 0 is too small"),
    ],
)
def test_what_does_not_fit_is_one_error(model: dict, changes: dict, said: str, featured: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(featured, "pixart", changes, **model)


def test_a_dataset_without_features_is_one_error(digits: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.repa: the datasets have no features .* Prepare them with latents\.features"):
        recipe(digits, repa={"layer": 1})
    assert set(DEEP) == {"unet", "pixart", "sd3"}
