"""Tests the plan of image models: the layers that activation checkpointing wraps, and the FLOPs of each family of backbones."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from heliostat.plan import model_stats
from heliostat.recipes.protocol import Loss
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.build_images import job
from tests.unit.build_job import job as job_of
from tests.unit.build_text_encoders import texts
from tests.unit.build_text_to_image import BACKBONES, recipe, rows

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("arch", ["flux", "lumina"])
def test_the_plan_counts_what_a_checkpointed_backbone_keeps(arch, digits, tmp_path):
    """autograd keeps the same bytes for the real model, whose class chooses the wrapped layers, as the plan counts on fakes
    without checkpointing: everything outside these layers, and their inputs. FLUX wraps two lists, and Lumina one of three."""
    (text,) = texts(["t5"], tmp_path, digits)
    keys = {"backbone": BACKBONES[arch], "text": {**text, "padding": "kept"}}
    made = recipe(digits, **keys)
    planned = job_of(**job(digits, **keys))
    counted = model_stats.activations(planned, made, model_stats.build(made), rows(digits, 1))
    made.parts.checkpointing = True
    torch.manual_seed(0)
    model = made.build()
    batch = made.complete(made.batch(rows(digits, 1), np.zeros(1, np.int64)))
    with model_stats.Meter(model, []) as meter:
        made.loss(model, batch)
    kept = counted.outside + counted.inputs(len(counted.layers))
    assert len(counted.layers) > 1 and meter.total == pytest.approx(kept, rel=0.03)


DEEP = {"sd3": {"num_layers": 5}, "flux": {"num_layers": 4, "num_single_layers": 3}, "lumina": {"num_layers": 4},
        "pixart": {"num_layers": 4}, "sana": {"num_layers": 4, "sample_size": 8}, "prx": {"depth": 4}}  # fmt: skip


@pytest.mark.parametrize("arch", DEEP)
def test_the_work_of_a_few_layers_stands_for_that_of_all(arch, digits, monkeypatch):
    """Equal layers of each list are counted once and multiplied. The result equals a count of every layer."""
    keys = {"backbone": {**BACKBONES[arch], **DEEP[arch]}}
    made, planned, contents = recipe(digits, **keys), job_of(**job(digits, **keys)), (rows(digits, 2), rows(digits, 3))
    whole = model_stats.build(made)
    assert sum(len(stack) for stack in model_stats._stacks(whole)) == 4 + (arch == "sd3") + 3 * (arch == "flux")
    few = model_stats.work(planned, made, whole, contents)
    monkeypatch.setattr(model_stats, "_stacks", lambda model: [])
    every = model_stats.work(planned, made, model_stats.build(made), contents)
    assert sorted(map(astuple, few)) == sorted(map(astuple, every))


@pytest.mark.parametrize("arch", ["unet", "sana"])
def test_the_plans_operations_have_the_flops_that_torch_counts(arch, digits):
    """Forward and backward. Sana has convolutions of one channel per group, of which torch's counter counts too many FLOPs
    backward: the reference there is twice the forward pass."""
    made = recipe(digits, backbone={**BACKBONES[arch], **({"sample_size": 8} if arch == "sana" else {})})
    planned = job_of(**job(digits, backbone=BACKBONES[arch]))
    work = model_stats.work(planned, made, model_stats.build(made), (rows(digits, 2), rows(digits, 3)))
    torch.manual_seed(0)
    model, batch = made.build(), made.batch(rows(digits, 2), np.zeros(2, np.int64))
    with FlopCounterMode(display=False) as forward:
        loss: Loss = made.loss(model, batch)
    with FlopCounterMode(display=False) as backward:
        loss.sum.backward()
    said = 2 * sum(w.count * w.flops for w in work)
    exact = forward.get_total_flops() + (2 * forward.get_total_flops() if arch == "sana" else backward.get_total_flops())
    assert said == pytest.approx(exact, rel=0.05 if arch == "unet" else 0.1)  # fused attention recomputes a product backward
