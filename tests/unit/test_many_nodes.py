"""Tests the keys of `train.zero` that reduce traffic between nodes: what is rejected, and what the plan counts."""

from __future__ import annotations

import math

import pytest
from heliostat.engine.engine_config import engine_config
from heliostat.errors import ConfigError
from heliostat.plan import hardware, layouts, memory, planner, traffic, zero_layout
from heliostat.plan.counts import Counts
from heliostat.plan.estimate import Planner
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit.build_job import job

FOUR = {"train.zero.stage": 3, "workers.count": 4}
GPUS = {**FOUR, "workers.gpus": 1}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"workers.count": 4, "train.zero.hpz_partition_size": 2}, "train.zero.hpz_partition_size: 2 shards weights"),
        ({"workers.count": 4, "train.zero.shard_group_size": 2, "train.zero.stage": 2},
         "train.zero.shard_group_size: 2 shards weights"),
        ({**FOUR, "train.zero.shard_group_size": 3}, "train.zero.shard_group_size: 3 doesn't divide workers.count 4. Use 3"),
        ({**FOUR, "train.zero.hpz_partition_size": 8}, "train.zero.hpz_partition_size: 8 doesn't divide workers.count 4. Use 8"),
        ({**FOUR, "train.zero.hpz_partition_size": 0}, "train.zero.hpz_partition_size: 0 is too small. Use 2 or more"),
        ({**FOUR, "train.zero.hpz_partition_size": 2, "train.zero.shard_group_size": 2},
         "train.zero.hpz_partition_size: no effect with train."),
        ({**FOUR, "train.zero.shard_group_size": 2, "train.zero.offload.optimizer": "cpu"},
         "train.zero.shard_group_size: not supported with train.zero.offload.optimizer"),
        ({**FOUR, "train.zero.shard_group_size": 2, "train.optimizer": {"name": "muon", "lr": 1e-2}},
         "train.zero.shard_group_size: not supported with train.optimizer.name 'muon'"),
        ({**FOUR, "train.zero.shard_group_size": 2, "train.parallel.sequence": 2, "train.global_batch_size": 8},
         "train.zero.shard_group_size: 2 isn't supported with train.parallel"),
        ({**FOUR, "train.zero.hpz_partition_size": 2, "train.compile": True},
         "train.zero.hpz_partition_size: 2 isn't supported with train.compile"),
        ({**FOUR, "train.zero.quantize_weights": True}, "train.zero.quantize_weights: true needs GPUs (workers.gpus is 0)"),
        ({**GPUS, "train.zero.stage": 2, "train.zero.quantize_weights": True}, "train.zero.quantize_weights: true shards"),
        ({**GPUS, "train.zero.quantize_weights": True, "train.zero.shard_group_size": 2},
         "train.zero.quantize_weights: not supported with train.zero.shard_group_size"),
        ({**GPUS, "train.zero.quantize_gradients": True}, "train.zero: quantize_gradients isn't supported: DeepSpeed's"),
        ({"train.compile": "deepcompile"}, "train.compile: deepcompile isn't supported: DeepCompile's passes begin at"),
        ({"train.zero.shard_group_size": 4, "train.zero.stage": 3, "workers.count": [1, 3]},
         "train.zero.shard_group_size: 4: no number from 1 to 3 (workers.count) is a multiple"),
    ],
)  # fmt: skip
def test_what_cannot_be_or_was_not_tried_is_one_line(changes, line):
    with pytest.raises(ConfigError) as e:
        job(**changes)
    assert str(e.value).removeprefix("job.yaml: ").startswith(line) and "\n" not in str(e.value)


def test_the_keys_reach_deepspeed_as_its_own():
    made = engine_config(job(**GPUS, **{"train.zero.hpz_partition_size": 2, "train.zero.quantize_weights": True}))[
        "zero_optimization"
    ]
    assert made["zero_hpz_partition_size"] == 2 and made["zero_quantized_weights"] is True
    assert not {"zero_hpz_partition_size", "zero_quantized_weights"} & engine_config(job(**FOUR))["zero_optimization"].keys()


@pytest.mark.parametrize("key", ["shard_group_size", "hpz_partition_size"])
def test_an_elastic_job_has_whole_groups(key):
    changes = {"train.zero.stage": 3, "workers.count": [1, 8], "train.global_batch_size": 16, "train.micro_batch_size": 1}
    assert job(**changes).worker_counts() == [1, 2, 4, 8]
    assert job(**changes, **{f"train.zero.{key}": 4}).worker_counts() == [4, 8]


@pytest.mark.parametrize(("workers", "copies"), [(4, 2), (6, 2), (6, 3), (8, 1)])
def test_groups_share_the_saving_of_what_they_all_have(workers, copies):
    """Every element has one owner. A group's slices equal those of so many workers alone."""
    shapes = {"a": (7, 13), "b": (1,), "c": (64,)}
    owned = zero_layout.slices(shapes, 3, workers, copies=copies)
    found = sorted((name, i) for rank in owned for name, start, numel in rank for i in range(start, start + numel))
    assert found == sorted((name, i) for name, shape in shapes.items() for i in range(math.prod(shape)))
    within = workers // copies
    alone = zero_layout.slices(shapes, 3, within)
    for rank, mine in enumerate(owned):
        whole = {name: (start, start + numel) for name, start, numel in alone[rank % within]}
        assert all(whole[name][0] <= start and start + numel <= whole[name][1] for name, start, numel in mine)


def test_a_second_copy_takes_its_share_of_memory():
    plain, copied = (memory.state({"a": (800,)}, frozenset(), 16, 3, "bf16", persistence=0, copied=n) for n in (None, 8))
    assert copied.weights - plain.weights == 2 * 800 // 8 and copied.moments == plain.moments


EFFICIENCY = hardware.Efficiency(0.5, 0.25, 0.2, 0.5, 0.4, 1e-5)
DEVICE = hardware.Device("H100", 80e9, 1e15, 700, 8, 450e9, 400e9, 0, 1, 2e12, EFFICIENCY)
N = 8_000_000_000


def moved(workers: int = 64, accumulation: int = 8, summed: int = 4, **given) -> traffic.Traffic:
    zero = job(**{**GPUS, "workers.count": workers, "train.global_batch_size": workers * 2, **given}).train.zero
    return traffic.of(zero, 3, N, 2, summed, workers, accumulation)


def test_what_leaves_a_node_is_counted_for_each_way():
    """For 8 nodes of 8 GPUs, 8 billion parameters in bf16, and 8 micro-batches."""
    plain, copied, divided = moved(), moved(**{"train.zero.hpz_partition_size": 8}), moved(**{"train.zero.shard_group_size": 8})
    quantized = moved(**{"train.zero.quantize_weights": True})
    one = 2 * N * 63 / 64  # all weights, or all gradients, once around
    assert plain.total == plain.between_nodes(8) == pytest.approx(24 * one)
    assert copied.between_nodes(8) == pytest.approx(9 * one)  # one gather, eight reductions
    assert copied.inside == pytest.approx(15 * 2 * N * 7 / 8)
    assert divided.inside == pytest.approx(24 * 2 * N * 7 / 8)
    assert divided.between_nodes(8) == pytest.approx(8 * 2 * (4 * N / 8) * 7 / 8)  # a part of each GPU, there and back, once
    assert quantized.between_nodes(8) == pytest.approx((16 / 2 + 8) * one)
    assert divided.between_nodes(8) < copied.between_nodes(8) < quantized.between_nodes(8) < plain.between_nodes(8)


def test_the_seconds_are_those_of_the_links_that_the_bytes_take():
    divided = moved(**{"train.zero.shard_group_size": 8})
    beside, after = divided.seconds(DEVICE)
    assert beside == pytest.approx(divided.inside / 450e9)  # in the node
    assert after == pytest.approx(divided.across * 8 / 400e9)  # eight rings through one node's network
    assert moved().seconds(DEVICE) == (pytest.approx(moved().total / 400e9), 0)


def test_the_plan_of_a_job_has_them_and_no_layout_that_the_check_refuses():
    sixteen = {**GPUS, "workers.count": 16, "train.global_batch_size": 64, "train.precision": "bf16"}
    first = planner.planners(made := job(**sixteen), CausalLM(made), None, None, hardware.table())[-1]
    keys = [{}, {"train.zero.shard_group_size": 8}, {"train.zero.hpz_partition_size": 8}, {"train.zero.quantize_weights": True}]
    counts = Counts(first.model, first.kept, first.work)
    plans = [Planner(job(**sixteen, **given), counts, first.device, first.prices) for given in keys]
    plain, divided, copied, rounded = (one.chosen() for one in plans)
    leaving = [one.communication["between_nodes"] for one in (divided, copied, rounded, plain)]
    assert leaving == sorted(leaving) and len(set(leaving)) == 4
    assert divided.memory["optimizer"] > 1.9 * plain.memory["optimizer"]
    assert copied.memory["weights"] > plain.memory["weights"] == rounded.memory["weights"]
    for one, given in zip(plans, keys, strict=True):
        for layout in layouts.candidates(one.job, 16):
            set_ = {k: v for k, v in layout.settings().items() if v is not None}
            assert job(**{**sixteen, **given, **set_}).train.zero.stage == layout.stage


def test_on_one_node_nothing_leaves_it():
    for given in ({}, {"train.zero.hpz_partition_size": 2}, {"train.zero.shard_group_size": 2}):
        assert moved(workers=8, **given).between_nodes(8) == 0 < moved(workers=8, **given).total
    assert moved(workers=8, **{"train.zero.shard_group_size": 8}) == moved(workers=8)  # one group is all workers
