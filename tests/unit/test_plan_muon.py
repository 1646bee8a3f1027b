"""Tests the costs of Muon in a plan: the bytes that gather whole matrices, as its exchange sends them, and products."""

import math
from itertools import pairwise

import pytest
import torch
from heliostat.optim import whole_matrices
from heliostat.optim.muon import newton_schulz
from heliostat.plan import hardware, planner, step_time
from heliostat.recipes.text.causal_lm import CausalLM
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.build_job import job

SIDES = [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)] * 6


def spans(stage: int, workers: int) -> list[whole_matrices.Matrix]:
    """Returns the matrices as ZeRO splits them: at stage 3 each in equal parts, else all of them end to end."""
    total, at, made = sum(map(math.prod, SIDES)), 0, []
    for rows, columns in SIDES:
        size = rows * columns
        ends = [size * i // workers if stage == 3 else min(size, max(0, total * i // workers - at)) for i in range(workers + 1)]
        made.append(whole_matrices.Matrix(rows, columns, tuple((a, b - a) for a, b in pairwise(ends)), 0))
        at += size
    return made


def sent(stage: int, workers: int) -> list[int]:
    """Returns the bytes that each worker sends, both ways, by the exchange's own division."""
    found = [0] * workers
    for batch in whole_matrices.batches(spans(stage, workers), workers):
        for matrix, owner in batch:
            for worker, (_, numel) in enumerate(matrix.spans):
                if worker != owner:
                    found[worker] += 4 * numel  # its slice to the owner
                    found[owner] += 4 * numel  # and the result back
    return found


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("stage", [1, 3])
def test_the_plan_sends_what_the_exchange_sends(stage, workers):
    planned = step_time.momenta_sent(sum(map(math.prod, SIDES)), workers, stage)
    real = sent(stage, workers)
    assert sum(real) / workers == pytest.approx(planned, rel=0.01 if stage == 3 else 0.25)


def test_products_are_those_that_torch_counts():
    for sides in ((48, 32), (32, 80), (64, 64)):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.randn(*sides), torch.float32)
        assert step_time.newton_schulz([sides]) == counter.get_total_flops()


def planned(**changes):
    made = job(**{"workers.gpus": 1, "workers.count": 8, "train.precision": "bf16", "train.global_batch_size": 16} | changes)
    return made, planner.plan(made, CausalLM(made))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_sends_more_than_adamw_at_every_stage(stage):
    muon = {"train.optimizer": {"name": "muon", "lr": 1e-3}}
    (_, plain), (made, found) = (planned(**{"train.zero.stage": stage} | more) for more in ({}, muon))
    with torch.device("meta"):
        hidden = sum(p.numel() for name, p in CausalLM(made).build().named_parameters() if p.dim() == 2 and "layers" in name)
    more = found["communication"]["bytes_per_step"] - plain["communication"]["bytes_per_step"]
    assert more == 2 * 4 * hidden * 7 // 64
    assert found["speed"]["step_s"] > plain["speed"]["step_s"]


def test_orthogonalizing_in_fp32_is_slower_than_in_bf16():
    steps = [
        planned(**{"train.optimizer": {"name": "muon", "lr": 1e-3, "newton_schulz": p}})[1]["speed"]["step_s"]
        for p in ("fp32", "bf16")
    ]
    assert steps[0] > steps[1]
    assert hardware.resolve(planned()[0], hardware.table()).peaks["fp32"] < hardware.resolve(planned()[0], hardware.table()).flops
