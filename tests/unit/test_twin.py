"""Tests the CPU reference of a second device: it keeps a GPU's rules.

Every recipe computes the CPU's numbers on it, without making the host wait.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest

from tests.twin import cases, passes, rules
from tests.unit.forked import SERVER

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler (g++, or CXX)"),
]
NEAR = {"text embedder": 1e-5, "autoencoder": 1e-5}  # another order of sums in attention; elsewhere below 1e-6
BF16 = "frozen encoders in bf16"  # the same in encoders of bf16


def _lines(function: str) -> list[dict[str, Any]]:
    done = SERVER.run(function, [])
    assert done.code == 0, done.err[-5000:]
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.fixture(scope="module")
def faults() -> dict[str, str]:
    return _lines("tests.twin.rules:main")[0]


@pytest.mark.parametrize("rule", rules.RULES)
def test_the_twin_keeps_a_gpus_rules(rule: str, faults: dict[str, str]) -> None:
    assert not faults[rule], faults[rule]


@pytest.fixture(scope="module")
def compared() -> dict[str, dict[str, Any]]:
    return {row.get("case") or row["optimizer"]: row for row in _lines("tests.twin.passes:main")}


@pytest.mark.parametrize("case", cases.EVERY)
def test_a_recipe_computes_the_cpus_numbers_on_the_twin(case: str, compared: dict[str, dict[str, Any]]) -> None:
    """For loss, gradients, scores, and pictures."""
    row = compared[case]
    gradients, scores = (1e-3, 1e-2) if case == BF16 else (NEAR.get(case, 1e-6), 1e-6)
    assert row["gradients"] < gradients and row["scores"] < scores, row


@pytest.mark.parametrize("case", cases.EVERY)
def test_the_host_never_waits_in_a_micro_batch(case: str, compared: dict[str, dict[str, Any]]) -> None:
    """After the constants are on the device, there is no read, no synchronization, and no upload except from pinned memory."""
    row = compared[case]
    assert not row["waits"], f"in {row['micro_batches']} micro-batches:\n{row['waits']}"
    assert row["counts"]["upload"] >= row["micro_batches"]


@pytest.mark.parametrize("optimizer", passes.OPTIMIZERS)
def test_an_optimizer_makes_the_cpus_steps_on_the_twin_and_reads_nothing(optimizer: str, compared: Any) -> None:
    row = compared[optimizer]
    assert row["weights"] < 1e-6 and not row["waits"], row
