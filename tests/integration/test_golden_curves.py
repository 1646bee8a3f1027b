"""Tests that losses and gradient norms equal, step by step, those in tests/golden/*.txt."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
from heliostat.errors import ConfigError

from tests.golden import curves
from tests.golden.curves import ALIKE, CASES, FILES, RECIPES, STAGES, STEPS, TOLERANCE, Case, Curves
from tests.integration import selection

OF_EACH = pytest.mark.parametrize("file", selection.kept(FILES, "causal_lm-fp32", "causal_lm-bf16", "causal_lm_documents-fp32"))


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    return curves.play_all(tmp_path_factory.mktemp("golden"), selection.asked(request, "file"))


def apart(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Returns the largest relative difference of a loss or a gradient norm between two curves."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    return max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs)


def test_there_is_a_golden_curve_of_every_recipe_precision_stage_and_number_of_workers(tmp_path: Path) -> None:
    """Of finite numbers, for jobs that are allowed (DeepSpeed trains bf16 wrongly at stage 0), and with falling losses."""
    golden, environments = curves.read()
    assert set(golden) == set(CASES) and set(environments) == {case.file for case in CASES}
    assert all(len(points) == STEPS and all(map(math.isfinite, sum(points, ()))) for points in golden.values())
    for case, points in golden.items():
        assert sum(loss for loss, _ in points[-5:]) < sum(loss for loss, _ in points[:5]), case
    assert {p: set(range(4)) - set(STAGES[p]) for p in STAGES} == {"fp32": set(), "bf16": {0}}
    for recipe in RECIPES:
        with pytest.raises(ConfigError, match="trains wrongly in DeepSpeed"):
            curves.job_of(Case(recipe, "bf16", 0, 1), tmp_path)


@OF_EACH
def test_no_loss_or_gradient_norm_has_changed(file: str, played: Curves) -> None:
    """To the last bit in the environment of the file. In another one, within TOLERANCE, and with a warning."""
    golden, environments = curves.read()
    other, mine = curves.differences(environments[file]), [case for case in CASES if case.file == file]
    if other:
        limit = TOLERANCE[mine[0].precision]
        far = {case.name: gap for case in mine if (gap := apart(golden[case], played[case])) > limit}
        assert not far, f"further from the golden curves than {limit:g}, in another environment ({'; '.join(other)})"
        worst = max(apart(golden[case], played[case]) for case in mine)
        warnings.warn(f"golden curves of {file} not compared bitwise, but within {limit:g} (apart: {worst:.1e}), because the "
                      f"environment is another: {'; '.join(other)}", stacklevel=1)  # fmt: skip
        return
    changed = {case.name: next(i for i in range(STEPS) if golden[case][i] != played[case][i])
               for case in mine if golden[case] != played[case]}  # fmt: skip
    assert not changed, f"curve: first step that differs; if it must, run python -m tests.golden.write --overwrite\n{changed}"


@OF_EACH
def test_stages_and_worker_counts_differ_by_rounding_alone(file: str, played: Curves) -> None:
    """Each curve is within ALIKE of that of the lowest stage on one worker."""
    mine = [case for case in CASES if case.file == file]
    gaps = {case.name: apart(played[mine[0]], played[case]) for case in mine}
    assert max(gaps.values()) <= ALIKE[mine[0].precision], gaps


def test_a_written_curve_is_read_to_the_last_bit(tmp_path: Path) -> None:
    made = {case: [(1 / (3 + i + j), 2.0 ** (-i) / 7) for i in range(STEPS)] for j, case in enumerate(CASES)}
    curves.write(made, tmp_path)
    read, environments = curves.read(tmp_path)
    assert read == made and all(curves.differences(environments[name]) == [] for name in environments)
    environments["causal_lm-fp32"]["torch"] = "1.0"
    assert curves.differences(environments["causal_lm-fp32"])[0].startswith("torch: 1.0 -> ")
