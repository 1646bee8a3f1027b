"""Tests the pure parts of `check --numerics` and `train.sdc_check`: distances, causes, votes, digests, and the small job."""

from __future__ import annotations

import math

import pytest
import torch
from heliostat.errors import CorruptionError, LossSpikeError
from heliostat.numerics import compare, small
from heliostat.numerics.rows import DifferenceRow
from heliostat.training.driver.recovery import Budget, classify
from heliostat.training.worker.recheck import digest, outvoted

from tests.unit import command_line
from tests.unit.build_job import job, write

DRAW = torch.Generator().manual_seed(0)
PARTS = [torch.randn(40, generator=DRAW) for _ in range(2)]
RIGHT, BEFORE = PARTS[0] + PARTS[1], torch.randn(40, generator=DRAW)


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (0.5 * RIGHT, "is 0.5 times the right gradient: a wrong scale"),
        (PARTS[0], "is one worker's share: the gradient wasn't reduced over the workers"),
        (2 * PARTS[1], "is one worker's share: the gradient wasn't reduced over the workers"),
        (
            torch.cat([2 * PARTS[0][:20], 2 * PARTS[1][20:]]),
            "is one worker's share: the gradient wasn't reduced over the workers",
        ),
        (BEFORE, "is the gradient of the previous step: a stale buffer"),
        (RIGHT + BEFORE, "includes the gradient of the previous step: a stale buffer, not cleared"),
        (torch.zeros(40), "is zero: the parameter gets no gradient"),
        (torch.randn(40, generator=DRAW), ""),
    ],
)
def test_the_cause_of_a_wrong_gradient_is_told_and_none_where_there_is_none(found, cause) -> None:
    assert compare.explain_gradient(found, RIGHT, PARTS, BEFORE, 1e-3) == cause


def test_a_gradient_that_is_only_rounding_is_measured_by_what_its_size_has_in_the_whole() -> None:
    gradients = {"large": torch.ones(100), "cancelled": torch.full((4,), 1e-9)}
    least = compare.floors(gradients, 1e-2)
    noise = torch.full((4,), -1e-9)
    assert compare.relative(noise, gradients["cancelled"]) == pytest.approx(2)
    assert compare.relative(noise, gradients["cancelled"], least["cancelled"]) < 1e-6
    assert compare.relative(0.9 * gradients["large"], gradients["large"], least["large"]) == pytest.approx(0.1)


def test_a_number_that_is_none_is_beyond_every_limit() -> None:
    row = DifferenceRow("loss", 1e-5)
    row.add(1, "", 0.0)
    row.add(2, "w", compare.relative(torch.tensor([math.nan]), torch.ones(1)), lambda: "why")
    assert (row.where, row.worst) == ("w, step 2", math.inf)
    assert [str(fault) for fault in row.faults] == ["loss: w, step 2: differs by inf: why"]


def test_every_single_flipped_bit_changes_a_digest() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.int64):
        whole = torch.arange(24).to(kind).view(4, 6)
        known, view = digest(whole), {2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()]
        for place in range(24):
            for bit in range(8 * whole.element_size()):
                changed = whole.clone()
                mask = torch.tensor(1).bitwise_left_shift(bit).to(view)
                changed.view(-1).view(view)[place] ^= mask
                assert digest(changed) != known
        assert digest(whole.t().contiguous().t()) == known  # of the values in order, wherever they lie
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize(
    ("told", "odd"),
    [
        ("a1 a1 a1", []),
        ("a1 a2 a1", [1]),
        ("a1 a2", [0, 1]),
        ("a1 a1 a2 a2", [0, 1, 2, 3]),
        ("a1 a1 b2 b2", []),  # another kind of device has other bits
        ("a1 b2", []),
        ("a1 a1 b2 b3 b2", [3]),
    ],
)
def test_the_majority_of_one_kind_of_device_is_right(told, odd) -> None:
    assert outvoted([(one[0], (int(one[1]),)) for one in told.split()]) == odd


def test_corruption_is_a_failure_like_others_and_ends_as_what_it_is() -> None:
    error = CorruptionError("worker 1 differs", ["n1"], 40)
    assert classify(error) == "failure"
    for failure in (error, LossSpikeError("high", 3)):
        budget = Budget(job(**{"retries.max": 0}).retries)
        with pytest.raises(type(failure), match="Giving up after 0 retries"):
            budget.spend(failure, 0)


def test_the_small_job_keeps_the_layout_and_what_is_tried(tmp_path) -> None:
    changes = {
        "train.global_batch_size": 512,
        "train.micro_batch_size": 8,
        "train.zero.stage": 3,
        "workers.count": 4,
    }
    changes |= {
        "train.optimizer": {"name": "sgd", "lr": 0.1},
        "train.schedule": {"warmup_steps": 9},
        "train.ema": {},
        "train.grad_clip": 0.5,
    }
    large = job(**{**changes, "data.sequence_length": 4096, "train.grad_accum_dtype": "same"})
    made = small.small_job(large, tmp_path, False, 48)
    assert made.accumulation == 2 and made.train.global_batch_size == 2 * 2 * made.train.micro_batch_size
    assert (made.train.zero.stage, made.train.optimizer, made.train.grad_clip) == (3, large.train.optimizer, 0.5)
    assert (made.train.grad_accum_dtype, made.train.schedule.name, made.data.sequence_length) == ("same", "constant", 48)
    other = small.elsewhere(made)
    assert (other.workers.count, other.train.zero.stage) == (1, 1)
    own = job(**{"workers.count": 2})
    assert small.small_job(own, tmp_path, False, 512).train.global_batch_size == own.train.global_batch_size


def test_what_two_workers_cannot_play_is_named_and_the_second_copy_is_played(tmp_path) -> None:
    asked = {"workers.count": 8, "workers.gpus": 1, "train.zero.stage": 3, "train.global_batch_size": 64}
    copied = job(**asked, **{"train.zero.hpz_partition_size": 8})
    assert small.small_job(copied, tmp_path, False, 48).train.zero.hpz_partition_size == 2 and small.left_out(copied) == ""
    divided = job(**asked, **{"train.zero.shard_group_size": 8, "train.ema.decay": 0.99})
    assert small.small_job(divided, tmp_path, False, 48).train.zero.shard_group_size is None
    assert small.left_out(divided) == ", without train.ema, train.zero.shard_group_size"
    quantized = job(**asked, **{"train.zero.quantize_weights": True})
    assert small.left_out(quantized) == ", without train.zero.quantize_weights"


def test_numerics_needs_the_datasets(tmp_path, monkeypatch, capsys) -> None:
    code, _, said = command_line.run(monkeypatch, capsys, "check", str(write(tmp_path)), "--numerics", "--offline")
    assert code == 2 and "--numerics" in said and "--offline" in said
