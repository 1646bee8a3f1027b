"""Tests averages of weights by length: their updates, and averages of other lengths that are made after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.checkpoint import layout, loading, snapshots
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.retention import Pruner
from heliostat.config.averages import Ema
from heliostat.config.spec import Checkpoint
from heliostat.errors import CheckpointError, ConfigError
from heliostat.inference import export, post_hoc
from heliostat.optim import power_averages
from heliostat.optim.power_averages import PowerProfile
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.tune.trial import clone
from safetensors.torch import load_file

from tests.unit import build_checkpoint, build_power_average
from tests.unit.build_job import job

LENGTHS = (0.05, 0.1)
STEPS, EVERY = 640, 20


def path(steps: int = STEPS) -> np.ndarray:
    """Returns a toy path of 6 weights: noise around a curve, fp64 [steps, 6]."""
    noise = np.random.default_rng(0).standard_normal((steps, 6))
    return np.sin(np.arange(1, steps + 1)[:, None] / 97 + np.arange(6)) + 0.5 * noise


@pytest.mark.parametrize("length", [0.005, 0.05, 0.1, 0.2, 0.28])
def test_updates_step_by_step_give_the_papers_profile(length: float) -> None:
    weights, average = path(), np.full(6, np.nan)
    for step, now in enumerate(weights, 1):
        rate = power_averages.rate(power_averages.exponent(length), step)
        average = now if step == 1 else average + rate * (now - average)
        if step in (1, 7, STEPS):
            expected = build_power_average.profile(length, step) @ weights[:step]
            assert average == pytest.approx(expected, rel=1e-6, abs=1e-9), step


@pytest.mark.parametrize("length", [0.02, 0.05, 0.07, 0.15, 0.25])
def test_the_combination_is_the_least_squares_fit_of_the_profiles_themselves(length: float) -> None:
    """The reference fits profiles that are sampled at 10,000 points, without closed forms."""
    known = [PowerProfile(own, step) for step in (40, 80, 120, 160) for own in LENGTHS]
    wanted = PowerProfile(length, 160)
    points = (np.arange(10_000) + 0.5) / 10_000 * 160

    def sampled(one: PowerProfile) -> np.ndarray:
        g = build_power_average.exponent(one.length)
        return np.where(points <= one.step, (g + 1) * (points / one.step) ** g / one.step, 0.0)

    columns, target = np.stack([sampled(one) for one in known], 1), sampled(wanted)
    fitted = np.linalg.lstsq(columns, target)[0]
    factors, error = power_averages.combination(known, wanted)
    assert columns @ factors == pytest.approx(columns @ fitted, abs=1e-4 * target.max())
    assert error == pytest.approx(np.linalg.norm(columns @ fitted - target) / np.linalg.norm(target), abs=1e-3)


def run_of(folder: Path, steps: int = STEPS, every: int = EVERY, workers: int = 2) -> tuple[Location, np.ndarray]:
    """Writes the snapshots and the last checkpoint of a toy run, in slices of several workers. Returns the run and its path."""
    run, weights = Location(str(folder)), path(steps)
    made = job(**{"train.ema": {"decay": None, "lengths": list(LENGTHS)}})

    def averages(step: int) -> dict[str, torch.Tensor]:
        return {
            f"{power_averages.kind(own)}.w": torch.from_numpy(build_power_average.profile(own, step) @ weights[:step]).float()
            for own in LENGTHS
        }

    for step in range(every, steps + 1, every):
        states = [build_checkpoint.slices(averages(step), rank, workers) for rank in range(workers)]
        build_checkpoint.save(run, step, states, job=made.dump())
        target = Path(run_folder.averages(run, step).path)
        target.parent.mkdir(exist_ok=True)
        Path(layout.folder(run, step).path).rename(target)
    masters = {"master.w": torch.from_numpy(weights[-1]).float(), **averages(steps)}
    states = [build_checkpoint.slices(masters, rank, workers) for rank in range(workers)]
    build_checkpoint.save(run, steps, states, job=made.dump())
    return run, weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Location, np.ndarray]:
    return run_of(tmp_path_factory.mktemp("finished") / "run")


@pytest.mark.parametrize("length", [0.05, 0.07, 0.1, 0.13, 0.2])
def test_an_export_of_another_length_is_the_average_that_training_would_have_kept(
    finished: tuple[Location, np.ndarray], tmp_path: Path, length: float
) -> None:
    run, weights = finished
    checkpoint = layout.open_checkpoint(run, STEPS)
    average = post_hoc.average(run, checkpoint, length)
    export.write_weights(checkpoint, {"w": (2, 3)}, torch.float32, tmp_path / "model", average=average)
    written = load_file(tmp_path / "model.safetensors")["w"]
    expected = build_power_average.profile(length, STEPS) @ weights
    exact = length in LENGTHS
    assert average.error < (1e-6 if exact else 0.05)
    assert written.flatten().numpy() == pytest.approx(expected, abs=1e-6 if exact else 0.02)
    assert abs(expected - weights[-1]).max() > 0.1, "the average differs from the last weights"


def test_later_snapshots_and_damaged_ones_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a return to an earlier step, snapshots of later steps may exist."""
    run, _ = run_of(tmp_path / "run", steps=160, every=20)
    before = post_hoc.average(run, layout.open_checkpoint(run, 160), 0.07)
    later = Path(run_folder.averages(run, 180).path)
    later.mkdir()
    (Path(run_folder.averages(run, 40).path) / "checkpoint.json").unlink()
    after = post_hoc.average(run, layout.open_checkpoint(run, 160), 0.07)
    assert before.steps == list(range(20, 161, 20)) and after.steps == [s for s in before.steps if s != 40]
    assert "step-00000040" in caplog.text and "leaves out" in caplog.text


@pytest.mark.parametrize(("due", "left"), [(True, [20, 40, 60, 80]), (False, [20, 40, 60])])
def test_a_save_deletes_the_snapshots_that_it_did_not_write(tmp_path: Path, due: bool, left: list[int]) -> None:
    """After a return to an earlier step, with a larger `every`, a snapshot of this step is of weights that the run left."""
    run, _ = run_of(tmp_path / "run", steps=160, every=20)
    Pruner(run, Checkpoint(every=20)).prune_snapshots(80 if due else 79)
    assert snapshots.steps(run) == left


def test_a_run_without_snapshots_prunes_nothing(tmp_path: Path) -> None:
    Pruner(Location(str(tmp_path)), Checkpoint(every=20)).prune_snapshots(80)


def test_an_average_that_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    """An average can't begin in the middle of a run: its first weights would be wrong."""
    run, _ = run_of(tmp_path / "run", steps=20, workers=1)
    state = {f"{kind}.w": torch.empty(6) for kind in ("master", "ema-050", "ema-100", "ema-200")}
    with pytest.raises(CheckpointError, match=r"has no average 'ema-200'.* Restore train\.ema as it was"):
        loading.load(layout.open_checkpoint(run, 20), state, None)


def test_a_clone_of_a_trial_has_its_donors_snapshots_and_no_other(tmp_path: Path) -> None:
    """Its own snapshots are of weights that it left."""
    (donor, _), (run, _) = run_of(tmp_path / "donor", steps=80), run_of(tmp_path / "run", steps=120, every=30)
    assert clone({"id": "1", "folder": str(donor), "step": 80}, run)
    averages = [post_hoc.average(place, layout.open_checkpoint(place, 80), 0.07) for place in (donor, run)]
    assert averages[0].steps == averages[1].steps == [20, 40, 60, 80]
    assert torch.equal(averages[0].read("w"), averages[1].read("w"))


def test_few_snapshots_give_a_warning_with_the_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = run_of(tmp_path / "run", steps=160, every=160)
    average = post_hoc.average(run, layout.open_checkpoint(run, 160), 0.25)
    assert average.error > 0.05 and f"{100 * average.error:.1f} %" in caplog.text


@pytest.mark.parametrize(("length", "said"), [(0.3, "0.3 isn't between 0.005 and 0.28"), (0.1, "keeps no averages with lengths")])
def test_what_an_export_cannot_make_is_one_error(tmp_path: Path, length: float, said: str) -> None:
    run = Location(str(tmp_path))
    build_checkpoint.save(run, 1, [{"master.w": FlatShard(torch.ones(6), 0, 6)}], job=job().dump())
    with pytest.raises(ConfigError, match=f"--ema-length: .*{said}"):
        post_hoc.average(run, layout.open_checkpoint(run, 1), length)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay": None}, "decay: null needs lengths"),
        ({"every": 10}, "every: 10 has no effect without lengths"),
        ({"lengths": [0.1234]}, "lengths: 0.1234 has more than three decimals. Use 0.123"),
        ({"lengths": [0.1, 0.1]}, "lists a length twice"),
        ({"lengths": [0.3]}, "0.28"),
        ({"lengths": [0.1], "every": 7}, "train.ema.every: 7 isn't a multiple of checkpoint.every"),
    ],
)
def test_wrong_settings_are_rejected(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        job(**{"train.ema": settings, "checkpoint.every": 2})


def test_evaluations_use_the_decaying_average_else_the_shortest_length() -> None:
    assert Ema(lengths=[0.1, 0.05]).kinds == ["ema", "ema-050", "ema-100"]
    assert Ema(decay=None, lengths=[0.1, 0.05]).kinds == ["ema-050", "ema-100"]
    assert Ema().kinds == ["ema"]
