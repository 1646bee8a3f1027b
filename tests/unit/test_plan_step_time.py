"""Tests the plan's time of a step: arithmetic, memory, and communication follow their formulas."""

import math
from dataclasses import replace

import pytest
from heliostat.config.train_section import Zero
from heliostat.plan import estimate, hardware, step_time, traffic
from heliostat.plan.counts import ALWAYS, AT_STAGE_3, OperationWork

GIB = 1 << 30


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 5), (3, 12)])
def test_a_step_moves_what_ring_collectives_move(stage, times):
    """With four micro-batches, stages 0 and 1 reduce once, stage 2 reduces each time, and stage 3 also gathers twice each
    time."""
    assert traffic.volume(1000, 2, 4, stage, accumulation=4) == times * 1000 * 2 * 3 // 4


def test_frozen_weights_move_only_in_the_gathers_of_stage_3():
    """An adapter's base has no gradients, and only stage 3 shards its weights. Copies and quantization change the gathers."""
    zero, workers = Zero(), 4
    for stage in (0, 1, 2):
        assert traffic.of(zero, stage, 100, 2, 4, workers, 4, frozen=900) == traffic.of(zero, stage, 100, 2, 4, workers, 4)
    assert traffic.of(zero, 3, 100, 2, 4, workers, 4, frozen=900).around == (8 * 1000 + 4 * 100) * 2 * 3 // 4
    quantized, copied = zero.model_copy(update={"quantize_weights": True}), zero.model_copy(update={"hpz_partition_size": 2})
    assert traffic.of(quantized, 3, 100, 2, 4, workers, 4, frozen=900).around == (8 * 1000 + 4 * 100 * 2) * 3 // 4
    around, inside = (1000 + 4 * 100) * 2 * 3 // 4, 7 * 1000 * 2 // 2
    moved = traffic.of(copied, 3, 100, 2, 4, workers, 4, frozen=900)
    assert (moved.around, moved.inside) == (around, inside)


EFFICIENCY = hardware.Efficiency(0.5, 0.25, 0.2, 0.5, 0.4, 1e-5)
DEVICE = hardware.Device("H100", 80 * GIB, 1e15, 700, 8, 450e9, 400e9, 0, 1, 2e12, EFFICIENCY)


def test_communication_hides_behind_the_computing_that_it_can_run_beside():
    """Stage 3 gathers and reduces during the whole computation. Stage 1 reduces after the last backward pass, and gathers
    afterwards."""
    network, moved = hardware.Network(0.5, 0.8), traffic.Traffic(int(400e9), 16)
    three, one = (step_time.Setting(16, stage, 1, 2) for stage in (3, 1))
    step = step_time.step(1.0, moved, 0.0, three, DEVICE, network)
    assert (step.computing, step.communicating) == (2.0, 2.0) and step.exposed == pytest.approx(0.4)
    step = step_time.step(1.0, moved, 0.0, one, DEVICE, network)
    assert step.exposed == pytest.approx(2.0 - 2 / 3)  # 0.8 s could, and a backward pass is two thirds of a second
    assert step_time.step(0.0, moved, 0.0, three, DEVICE, network).total == 2.0  # nothing to hide behind
    alone = step_time.Setting(1, 3, 1, 2)
    assert step_time.step(1.0, moved, 0.0, alone, DEVICE, network).total == 2.0  # nobody to send to


def test_an_operation_takes_its_arithmetic_and_its_bytes():
    """Each kind has its own rates, and memory bounds small products. A launch is the minimum, except if everything is
    compiled."""
    product = OperationWork("matmul", 1, 1e12, 1e9, 1e9, 0, True)
    assert step_time.operation(product, 2, DEVICE) == pytest.approx(2e12 / 0.5e15 + 3e9 / 1e12)
    assert step_time.operation(replace(product, kind="convolution"), 1, DEVICE) == pytest.approx(1e12 / 0.25e15 + 2e9 / 1e12)
    norm = OperationWork("memory", 1, 0.0, 1e9, 0.0, 0, False)
    assert step_time.operation(norm, 1, DEVICE) == pytest.approx(1e-3)
    assert step_time.operation(norm, 1, DEVICE, compiled=True) == pytest.approx(0.4e-3)
    tiny = replace(norm, moved=8.0)
    assert step_time.operation(tiny, 1, DEVICE) == 1e-5 > step_time.operation(tiny, 1, DEVICE, compiled=True)


def test_a_ring_takes_longer_the_more_ranks_it_has():
    """This holds for any amount of data: three passes over 33 messages add seconds for 1,024 GPUs, and a millisecond for 8 in a
    node."""
    network = hardware.Network(0.8, 1.0, hop=2e-5, hop_inside=3e-6)
    calls = traffic.calls(3, 1, 33, 1)
    waits = {}
    for ranks in (8, 64, 256, 1024):
        setting = step_time.Setting(ranks, 3, 1, 1)
        waits[ranks] = step_time.step(0.0, traffic.Traffic(0, ranks, calls=calls), 0.0, setting, DEVICE, network).exposed
    assert waits == pytest.approx({ranks: 99 * (ranks - 1) * (3e-6 if ranks == 8 else 2e-5) for ranks in waits})
    parts = step_time.hops(1024, DEVICE, network, 8)  # of matrices in eight parts, each part has a ring of its own
    assert parts == pytest.approx(127 * 2e-5)
    assert (traffic.calls(1, 4, 33, 2), traffic.calls(2, 4, 33, 2), traffic.calls(3, 4, 33, 2, copied=True)) == (4, 10, 165)


def test_an_optimizer_on_the_cpu_takes_its_share_of_the_hosts_memory():
    """30 bytes for each of a billion parameters, at 45 % of an eighth of 400 GB/s. On the device, it takes half a second less."""
    device = replace(DEVICE, host_bandwidth=50e9)
    assert step_time.updating(1e9, 2, device, on_host=True) == pytest.approx(30 / (0.45 * 50))
    assert step_time.updating(1e9, 2, device) == pytest.approx(30e9 / 1e12)


def test_float8_multiplies_faster_in_layers_and_not_in_the_head():
    device = replace(DEVICE, peaks={"fp8": 2e15})
    forward, head = (
        OperationWork("matmul", 1, 1e15, 0.0, fixed, replayed, True) for fixed, replayed in ((8.0, ALWAYS), (0.0, 0))
    )
    backward = replace(forward, count=2, replayed=0)
    plain = step_time.Setting(1, 1, 1, 1)
    took = [step_time.computing([forward, backward, head], replace(plain, fp8=fp8), device) for fp8 in (False, True)]
    assert took == pytest.approx([4 / 0.5, 3 / (2 * 0.8) + 1 / 0.5])


def test_checkpointing_plays_again_what_is_in_layers():
    inside, outside, last = (OperationWork("matmul", 3, 1e12, 0.0, 0.0, replayed, True) for replayed in (ALWAYS, 0, AT_STAGE_3))
    plain = step_time.Setting(1, 1, 1, 1)
    took = [step_time.computing([inside, outside], replace(plain, replayed=r), DEVICE) for r in (0.0, 0.5, 1.0)]
    assert took == pytest.approx([12e-3, 15e-3, 18e-3])
    took = [step_time.computing([last], replace(plain, replayed=1.0, stage=stage), DEVICE) for stage in (2, 3)]
    assert took == pytest.approx([6e-3, 12e-3])
    both = [inside, replace(inside, dear=False)]
    assert step_time.computing(both, replace(plain, replayed=1.0, selective=True), DEVICE) == pytest.approx(18e-3)


def test_young_dalys_interval_wastes_least():
    """No nearby interval is better, and it is never shorter than an upload."""
    between, blocked, restart = estimate.mean_time_between(50_700, 64), 5.0, 180.0
    best = estimate.best_interval(blocked, between)
    assert best == pytest.approx(math.sqrt(2 * 5 * 50_700 / 64 * 3600))
    least = estimate.waste(best, blocked, between, restart)
    assert all(estimate.waste(best * f, blocked, between, restart) > least for f in (0.5, 0.9, 1.1, 2.0))
    assert estimate.best_interval(1e-9, between, upload_s=60) == 60
