"""Tests the plan's memory for weights, gradients, and optimizer state, and how each ZeRO stage shards them."""

import math

import pytest
from heliostat.plan import memory, planner, zero_layout
from heliostat.plan.model_stats import build, stats_of
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit.build_job import job

pytestmark = pytest.mark.usefixtures("in_repository")


def test_an_average_of_the_weights_is_one_more_fp32_copy_in_memory_and_in_checkpoints():
    shapes = {"w": (1024, 64)}
    plain, averaged = (memory.state(shapes, frozenset(), 4, 2, "bf16", averages=n) for n in (0, 1))
    assert averaged.device - plain.device == 4 * 1024 * 64 // 4
    j = job(**{"train.ema": {"decay": 0.99}})
    recipe = CausalLM(j)
    assert planner.plan(j, recipe)["checkpoint"]["bytes"] == 16 * stats_of(recipe, build(recipe)).parameters


def test_state_is_rajbhandaris_sixteen_bytes_a_parameter():
    """Mixed-precision Adam (arXiv 1910.02054, figure 1): 7.5 billion parameters on 64 workers, with gradients in low
    precision."""
    shapes = {"w": (7_500_000_000,)}
    gb = {s: memory.state(shapes, frozenset(), 64, s, "bf16", persistence=0, accumulates=False).device / 1e9 for s in (1, 2, 3)}
    assert gb == pytest.approx({1: 31.4, 2: 16.6, 3: 1.88}, abs=0.05)  # the paper's numbers
    one = memory.state(shapes, frozenset(), 1, 2, "bf16", sums_fp32=False)
    assert one.device == 16 * 7_500_000_000


def test_offload_moves_state_and_loses_none():
    """State that leaves the device is on the host (with the fp32 gradients of the master weights) or on disk."""
    shapes = {"w": (1024, 1024)}
    n = 1024 * 1024
    there = memory.state(shapes, frozenset(), 4, 2, "bf16", offload_optimizer=True)
    assert (there.weights, there.gradients, there.masters, there.moments, there.host) == (2 * n, 0, 0, 0, 16 * n // 4)
    disk = memory.state(shapes, frozenset(), 4, 3, "bf16", offload_param="nvme", persistence=0)
    assert (disk.weights, disk.disk) == (0, 2 * n // 4)


def test_sums_of_micro_batches_in_fp32_take_four_bytes_of_what_a_worker_sums():
    """At stage 1 for all parameters; above, for its share; with one micro-batch, none. Stage 1 also keeps the micro-batch's own
    gradients in fp16, and frees each in bf16."""
    shapes = {"a": (1000,), "b": (3000,)}
    held = {s: memory.state(shapes, frozenset(), 4, s, "bf16", persistence=0).gradients for s in (1, 2, 3)}
    assert held == {1: 4 * 4000, 2: 4 * 1000, 3: 4 * 1000}
    assert memory.state(shapes, frozenset(), 4, 1, "fp16", persistence=0).gradients == 6 * 4000
    once = [memory.state(shapes, frozenset(), 4, s, "bf16", persistence=0, accumulates=False).gradients for s in (1, 2, 3)]
    assert once == [2 * 4000, 2 * 1000, 2 * 1000]


def test_frozen_parameters_have_weights_alone():
    state = memory.state({"a": (100,), "b": (300,)}, frozenset("b"), 1, 1, "bf16", sums_fp32=False)
    assert (state.weights, state.gradients, state.masters, state.moments) == (800, 200, 400, 800)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("workers", [1, 3, 7, 64])
def test_slices_are_every_element_once(stage, workers):
    """Sizes include those that no number of workers divides, and a single element."""
    shapes = {"a": (7, 13), "b": (13,), "c": (1,), "d": (11, 13), "e": (3,)}
    seen = {n: [0] * math.prod(s) for n, s in shapes.items()}
    for rank in zero_layout.slices(shapes, stage, workers):
        for name, start, numel in rank:
            for i in range(start, start + numel):
                seen[name][i] += 1
    assert all(set(counts) == {1} for counts in seen.values())
