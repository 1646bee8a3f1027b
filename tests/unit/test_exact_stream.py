"""Tests the exact stream for a user's own trainer: its folder resumes by its plan, and impossible settings give one line."""

from __future__ import annotations

import json
from pathlib import Path

import heliostat
import pytest
import torch.distributed as dist
from heliostat.data import receipt
from heliostat.errors import ConfigError
from heliostat.runs import segments
from heliostat.storage.locations import Location
from ray import cloudpickle

from tests.unit.test_dataset import make_dataset


@pytest.fixture
def data(tmp_path) -> dict:
    make_dataset(tmp_path / "data", seed=3)
    return {"sources": [{"path": str(tmp_path / "data")}], "sequence_length": 16, "seed": 5, "virtual_ranks": 4}


@pytest.fixture
def alone(tmp_path):
    """Creates a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stream(data: dict, folder: Path, **more) -> heliostat.ExactStream:
    return heliostat.datasets(data, **{"steps": 12, "global_batch_size": 8, "folder": str(folder), **more})


def test_it_travels_to_workers_and_says_how_many_there_may_be(data, tmp_path):
    made = stream(data, tmp_path / "run")
    assert cloudpickle.loads(cloudpickle.dumps(made)) == made
    assert (made.steps, made.workers, made.plan.shape.batch) == (12, [1, 2, 4], 8)
    assert stream({**data, "virtual_ranks": None}, tmp_path / "other").workers == [1, 2, 4, 8]


def test_what_is_held_out_is_of_the_plan(data, tmp_path):
    assert (
        stream(data, tmp_path / "a").plan.held_fraction == 0
        and stream(data, tmp_path / "b", held_out=0.1).plan.held_fraction == 0.1
    )


def test_a_folder_goes_on_by_its_plan_and_refuses_other_samples(data, tmp_path):
    """It also keeps the version of the dataset that it began with. More steps don't change the samples."""
    made = stream(data, tmp_path / "run")
    segments.begin(Location(made.folder), made.plan, 0)
    assert stream(data, tmp_path / "run", steps=20).plan == made.plan
    for change in ({"seed": 6}, {"virtual_ranks": 2}, {"sequence_length": 8}):
        with pytest.raises(ConfigError, match=rf"run: has a data plan for other samples(.|\n)*data\.{next(iter(change))}"):
            stream({**data, **change}, tmp_path / "run")


def test_outside_a_trainer_it_says_where_it_belongs(data, tmp_path):
    with pytest.raises(ConfigError, match="outside a TorchTrainer"):
        stream(data, tmp_path / "run").start()


def test_it_goes_on_only_where_a_receipt_ends_and_leaves_the_folder_as_it_was(data, tmp_path, alone):
    """Otherwise the chain would cover other steps than the trained ones."""
    made = stream(data, tmp_path / "run")
    folder = Location(made.folder)
    segments.begin(folder, made.plan, 0)
    digests = ["0" * 32] * 4
    folder.join("receipts", "step-00000004.json").write(receipt.seal(0, digests, receipt.extend("", digests), made.plan.digest))
    with pytest.raises(ConfigError, match=r"no receipt in .*run ends at step 3\. Continue from one of 0, 4$"):
        made.start(3)
    with pytest.raises(ConfigError, match=r"step 13 isn't between 0 and the stream's last step, 12"):
        made.start(13)
    assert json.loads(folder.join("receipts", "step-00000004.json").read())["first"] == 0
