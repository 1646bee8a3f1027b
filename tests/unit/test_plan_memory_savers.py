"""Tests the plan for MLPs in tiles, checkpoints of some layers, and their inputs on the host: memory and time."""

import weakref
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from heliostat.plan import hardware, layouts, planner
from heliostat.plan.counts import Activations, Tile
from heliostat.plan.estimate import Planner
from heliostat.plan.layouts import Layout
from heliostat.plan.model_stats import Meter, activations, build, stats_of, work
from heliostat.recipes.text.causal_lm import CausalLM
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.build_job import ROOT, job

GIB = 1 << 30
WHICH, OFFLOAD, TILED = "train.activation_checkpointing", "train.activation_offload", "train.tiled_mlp"
LONG = {"train.precision": "fp32", "data.sequence_length": 256, "model.num_hidden_layers": 4}
pytestmark = pytest.mark.usefixtures("in_repository")


def real(changes: dict) -> int:
    """Returns the bytes that a real forward pass keeps on the device."""
    j = job(**LONG, **changes)
    recipe = CausalLM(j)
    model = recipe.build()
    with Meter(model) as meter:
        recipe.loss(model, recipe.batch(planner.sample(j, recipe)))
    return meter.total


@pytest.mark.parametrize(("first", "offload", "tiled"), [(1, False, False), (3, True, True)])
def test_what_is_kept_behind_the_forward_pass_is_what_a_real_one_keeps(first, offload, tiled):
    """Recomputed layers keep their inputs; of those on the host, only the one that comes back is on the device. Other layers keep
    everything."""
    j = job(**LONG, **{TILED: tiled})
    recipe = CausalLM(j)
    counted = activations(j, recipe, build(recipe), planner.sample(j, recipe))
    behind = replace(
        counted, layers=tuple((given, 0 if i < first else kept, 0) for i, (given, kept, _) in enumerate(counted.layers))
    )
    kept = real({WHICH: first, OFFLOAD: offload, TILED: tiled})
    assert behind.held(first, offload) == pytest.approx(kept + offload * counted.inputs(1), rel=0.04)  # layers share a little


def test_what_is_held_at_most_is_either_of_two_moments():
    """The peak is either after the forward pass, with the activations of the last layers, or later, when one layer is
    recomputed."""
    counted = Activations(1000, ((10, 100, 40), (10, 300, 40), (10, 50, 40), (10, 50, 60)), 0)
    assert [counted.held(n) for n in range(5)] == [1500, 1410, 1320, 1330, 1340]
    assert [counted.held(n, offload=True) for n in range(5)] == [1500, 1410, 1310, 1310, 1310]
    assert (counted.kept, counted.checkpointed, counted.inputs(3)) == (1500, 1340, 30)
    assert counted.selective() == 1040 + 40 + 300  # one in front of the second, which is played again
    assert replace(counted, layers=counted.layers[2:]).selective() == 1020 + 40 + 60  # behind the forward pass


def test_a_tile_is_counted_once_with_no_more_tokens_than_there_are():
    tile = Tile(100, 8, 5000)
    assert (tile.held(40), tile.held(100), tile.held(10**6)) == (5320, 5800, 5800)


def test_the_backward_pass_of_an_mlp_holds_no_more_than_the_tile_that_is_counted():
    """Measures live tensors with the inner width of the MLP, and sums of its gradients, in a real backward pass."""
    j = job(**{**LONG, TILED: True, "model.intermediate_size": 61, "model.num_hidden_layers": 1})
    recipe = CausalLM(j)
    tile = activations(j, recipe, build(recipe), planner.sample(j, recipe)).tile
    assert tile is not None and tile.rows == 32  # as many as the model is wide

    class Live(TorchDispatchMode):
        seen: ClassVar[list[weakref.ref]] = []
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view and out.dim() > 1 and out.shape[-2:] == (32, 61):
                self.seen = [ref for ref in self.seen if ref() is not None] + [weakref.ref(out)]
                alive = {t.untyped_storage().data_ptr(): t.nbytes for ref in self.seen if (t := ref()) is not None}
                self.most = max(self.most, sum(alive.values()))
            return out

    model = recipe.build()
    loss = recipe.loss(model, recipe.batch(np.zeros((1, 256), dtype=np.int32))).sum
    with Live() as live:
        loss.backward()
    assert 0 < live.most <= tile.held(10**6)


def test_stage_3_gathers_an_mlp_in_tiles_as_a_whole():
    plain, tiled = (CausalLM(job(**LONG, **{TILED: on})) for on in (False, True))
    assert stats_of(plain, build(plain)).layer == 96 * 32
    assert stats_of(tiled, build(tiled)).layer == 3 * 64 * 32


def test_an_mlp_in_tiles_is_computed_once_more_and_not_with_its_layer():
    """This adds a third of its products. Checkpointing doesn't add more."""
    found = {}
    for on in (False, True):
        j = job(**LONG, **{TILED: on, "workers.gpus": 1})
        recipe = CausalLM(j)
        found[on] = work(j, recipe, build(recipe), tuple(planner.sample(j, recipe, n) for n in (2, 3)))
    total, again = ({on: sum(w.count * w.flops for w in found[on] if w.kind == "matmul" and w.replayed >= only) for on in found}
                    for only in (False, True))  # fmt: skip
    mlps = 4 * 3 * 2 * 256 * 64 * 32
    assert total[True] - total[False] == mlps
    assert again[False] - again[True] == mlps


def estimates(**changes) -> Planner:
    keys = {"workers.gpus": 1, "workers.count": 4, "train.global_batch_size": 16, **LONG, "train.precision": "bf16"}
    return planner.planners(job(**{**keys, **changes}), CausalLM(job(**keys)), None, None, hardware.table())[-1]


def test_fewer_layers_take_more_memory_and_less_time():
    one = estimates()
    found = [one.candidate(Layout(3, 4, which, False)) for which in (False, 1, 2, 3, True)]
    kept, replaying = ([f.memory["activations"] for f in found], [f.parts["replaying"] for f in found])
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert kept[4] - kept[3] == 4 * 256 * 32 * 2  # the last one's input, and as much room to play a layer again
    assert replaying == pytest.approx([n / 4 * replaying[-1] for n in range(5)]) and replaying[-1] > 0


def test_the_batches_of_two_steps_are_on_the_host():
    """For images, these are gigabytes. One of four workers has a quarter of each step's samples."""
    one = estimates()
    recipe = CausalLM(one.job)
    sample = sum(values.nbytes for values in recipe.batch(planner.sample(one.job, recipe), np.zeros(1, np.int64)).values())
    assert sample >= 256 * 8
    assert {one.candidate(Layout(2, micro, False, False)).memory["host"] for micro in (1, 4)} == {2 * 16 // 4 * sample}


def test_offload_moves_inputs_to_the_host_and_takes_the_time_of_two_copies():
    plain, moved = (estimates(**{WHICH: True, **more}) for more in ({}, {OFFLOAD: True}))
    layout = layouts.of(plain.job)
    here, there = plain.candidate(layout), moved.candidate(layout)
    inputs = 4 * 256 * 32 * 2 * layout.micro_batch_size  # of four layers
    assert there.memory["host"] - here.memory["host"] == inputs
    assert here.memory["activations"] - there.memory["activations"] == inputs * 3 // 4
    accumulation = 16 // (4 * layout.micro_batch_size)
    rate = hardware.table()["storage"]["host_copy"] * 1e9
    assert there.parts["copying"] - here.parts["copying"] == pytest.approx(2 * inputs * accumulation / rate)
    assert all(one.checkpointing is not False for one in layouts.candidates(moved.job, 4))


def test_the_fewest_layers_that_fit_are_found():
    """One layer fewer doesn't fit. If all layers fit whole, or none does, there is no choice."""
    one, layout = estimates(), Layout(3, 4, True, False)
    need = [one.candidate(replace(layout, checkpointing=n)).memory["total"] for n in range(4)]
    for least in (1, 2):
        one.device = replace(one.device, memory=(need[least] + need[least - 1]) / 2)
        assert list(one.partly(layout)) == [replace(layout, checkpointing=least)]
    one.device = replace(one.device, memory=need[0])
    assert list(one.partly(layout)) == [] == list(one.partly(replace(layout, checkpointing=False)))
    one.device = replace(one.device, memory=1)
    assert list(one.partly(layout)) == []


def test_a_number_of_layers_is_a_setting_of_its_own():
    j = job(**{WHICH: 1})
    assert layouts.changes(j, layouts.of(j)) == []
    assert layouts.changes(j, replace(layouts.of(j), checkpointing=True)) == [f"{WHICH}=true"]
    families = {replace(layouts.of(j), checkpointing=which).family for which in (False, 1, 2, True)}
    assert len(families) == 3  # one and two are alike


def of_the_job(*settings: str) -> Planner:
    j, recipe, _ = planner.prepare(ROOT / "jobs" / "long-context-128k.yaml", ["data.path=nowhere", *settings])
    return planner.planners(j, recipe, None, None, hardware.table())[-1]


@pytest.mark.ci
def test_what_makes_128k_tokens_fit():
    """The job fits as it is, without recomputation. With whole MLPs it must checkpoint its layers, and takes longer."""
    as_it_is, whole = of_the_job(), of_the_job(f"{TILED}=false")
    mine, layout = as_it_is.chosen(), layouts.of(as_it_is.job)
    assert mine.fits and mine.parts["replaying"] == 0 and as_it_is.job.train.tiled_mlp
    assert not whole.chosen().fits and whole.chosen().memory["activations"] > 2 * mine.memory["activations"]
    assert whole.candidate(replace(layout, checkpointing=True)).speed["step_s"] > 1.2 * mine.speed["step_s"]
