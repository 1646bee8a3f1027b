"""Tests that a job reports, before it starts, a held-out set that differs from the request, and is rejected if the set would be
empty."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from heliostat.data.chunks import Gathered
from heliostat.data.dataset import make_order, plan
from heliostat.data.manifest import Manifest, read
from heliostat.errors import ConfigError, DataError
from heliostat.recipes import exported
from heliostat.storage.locations import Location
from heliostat.training.worker import evaluation
from heliostat.validation import check

from tests.unit.build_images import digits
from tests.unit.build_job import job
from tests.unit.test_dataset import make_dataset
from tests.unit.test_split import prepared


def faults(*sources: Manifest, **evaluate: float) -> list[str]:
    made = job(**{"data.sources": [{"path": str(s.location)} for s in sources], "data.sequence_length": 16},
               **{f"evaluate.{key}": value for key, value in evaluate.items()})  # fmt: skip
    return check.held_out_faults(made, make_order(plan(made, [*sources]), [*sources]), [*sources])


def test_a_number_of_samples_that_cannot_be_met_is_said(tmp_path: Path):
    """The message has only the numbers and the fix. A possible number gives no message."""
    source = prepared(tmp_path, 2000)
    (line,) = faults(source, samples=1_000_000, fraction=0.05)
    held = int(line.split("set evaluate.samples to ")[1])
    assert line.startswith(
        f"evaluate.samples: only {held:,} held-out samples can be scored, not 1,000,000. evaluate.fraction 0.05"
    )
    assert held > 100 and faults(source, samples=held, fraction=0.05) == []


def test_shares_that_are_rounded_are_no_fault(tmp_path: Path):
    """Three equal sources are to give 85 of 256 each. If they have enough samples, there is no message."""
    sources = [prepared(tmp_path / name, 2000) for name in "abc"]
    assert faults(*sources, samples=64, fraction=0.1) == []


def test_a_share_that_is_far_from_the_fraction_is_said(tmp_path: Path):
    """About ten row groups can't give a twentieth each. The message names the source."""
    coarse, fine = make_dataset(tmp_path / "a", 5, shards=2), prepared(tmp_path / "b", 2000)
    lines = faults(fine, coarse, samples=1, fraction=0.05)
    assert len(lines) == 1 and "of data.sources.1 is held out, not 0.05: the dataset has no document boundaries" in lines[0]


def test_a_share_that_is_rounded_down_names_the_exact_fractions(tmp_path: Path):
    """An image dataset knows its images' positions, but a row group ends only at exact fractions and at its size."""
    source = read(Location(str(digits(tmp_path / "digits", 300, chunk=300))))
    (line,) = faults(source, samples=1, fraction=0.19)
    assert "of data.sources.0 is held out, not 0.19: heliostat holds out whole documents and images, and rounds down" in line
    assert line.endswith("unlike 0.01, 0.02, and 0.05 (docs/data-order.md#exact-fractions)")
    assert faults(source, samples=1, fraction=0.2) == []


def test_a_dataset_of_which_nothing_can_be_held_out_is_refused(tmp_path: Path):
    """The line has the reason, the number of row groups, and both fixes."""
    source = make_dataset(tmp_path, 1, shards=1)
    chunks = len(source.chunks)
    why = rf"data\.sources\.0 has no document boundaries, so only whole row groups can be held out \({chunks}\)"
    with pytest.raises(
        ConfigError, match=rf"evaluate\.fraction: 0\.0001 holds out none of [\d,]+ samples\. {why}\. Prepare the dataset again"
    ):
        faults(source, fraction=0.0001)


def test_a_recorded_run_keeps_what_it_held_out(tmp_path: Path):
    """After a resume, a rerun, or a change of data, it keeps its version of the plan. Only a new run takes the newest."""
    source = prepared(tmp_path, 400)
    made = job(**{"data.sources.0.path": str(source.location), "data.sequence_length": 16})
    new = plan(made, [source])
    old = dataclasses.replace(new, version=1)
    assert new.version == 2 and plan(made, [source], old) == old and plan(made, [source], new) == new
    assert plan(made, [source], old, first_step=20).version == 1
    assert make_order(old, [source]).held_out(99).chunk.tolist() != make_order(new, [source]).held_out(99).chunk.tolist()


def test_a_model_is_scored_on_what_its_own_run_held_out(tmp_path: Path):
    """An export records the version of its data plan. An export without one is older than the other versions."""
    exported.write(tmp_path, job(), {"run_id": "r", "step": 1})
    assert exported.read(tmp_path).data_version == 1
    exported.write(tmp_path, job(), {"run_id": "r", "step": 1, "data_version": 2})
    assert exported.read(tmp_path).data_version == 2
    (tmp_path / exported.RECORD).unlink()
    assert exported.read(tmp_path).data_version is None


def test_no_recipe_meets_a_bad_held_out_row():
    """A good row of its micro-batch replaces it. A micro-batch without a good row becomes one row; only if all rows are bad, the
    reason is reported."""
    rows = pa.table({"image": [b"a", None, b"c", None, None, None]})
    why = "shards/0: row group 0: cannot be read"
    found = Gathered(rows, dict.fromkeys((1, 3, 4, 5), why))
    assert evaluation.whole(found, 2, pytest.fail)["image"].to_pylist() == [b"a", b"a", b"c", b"c", b"a", b"a"]
    mine = Gathered(pa.table({"image": pa.array([None, None], pa.binary())}), dict.fromkeys((0, 1), why))
    assert evaluation.whole(mine, 2, lambda: found)["image"].to_pylist() == [b"a", b"a"]
    with pytest.raises(
        DataError, match=r"^shards/0: row group 0: cannot be read\. All held-out samples are bad, so none can be scored"
    ):
        evaluation.whole(mine, 2, lambda: mine)
    tokens = np.zeros((2, 4), np.int32)
    assert evaluation.whole(Gathered(tokens, {0: "x"}), 2, pytest.fail) is tokens
