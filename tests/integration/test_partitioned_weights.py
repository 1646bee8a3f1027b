"""Tests that at ZeRO stage 3, a pretrained folder streams into the workers' shards: no process holds the model, and every weight
arrives."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from heliostat.config.spec import Job
from heliostat.engine import deepspeed_engine, partitioned_weights
from heliostat.engine.engine_config import engine_config
from heliostat.recipes import building
from heliostat.recipes.text.causal_lm import CausalLM

from tests.integration import ranks
from tests.unit.build_job import BASE, job

DEEP = {**BASE["model"], "hidden_size": 512, "intermediate_size": 16384, "num_hidden_layers": 8}  # 800 MiB in fp32
KINDS = {
    "full": {},
    "adapter": {"adapter": {"rank": 4}},
    "dora": {"adapter": {"rank": 4, "method": "dora"}},
    "changed": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def _mib(what: str) -> float:
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def _peak_mib(work: Callable[[], torch.nn.Module]) -> tuple[float, torch.nn.Module]:
    """Returns the peak of additional memory during the work, and its result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _mib("VmRSS")
    made = work()
    return _mib("VmHWM") - before, made


def _job(model: dict[str, Any], precision: str) -> Job:
    return job(model=model, **{"workers.count": 2, "train.zero.stage": 3, "train.precision": precision})


def built(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In both ranks, yields the number of weights that differ from those that the library loads, and the peak of memory."""
    from deepspeed import zero

    said: list[str] = []
    partitioned_weights.log.addFilter(lambda record: said.append(record.getMessage()) or False)
    for case, changes in KINDS.items():
        made = job(
            model={"pretrained": f"{folder}/small", **changes},
            **{"workers.count": 2, "train.zero.stage": 3, "train.precision": "fp32"},
        )
        recipe = CausalLM(made)
        torch.manual_seed(made.train.seed)
        right = dict(building.build(recipe).named_parameters())
        model = deepspeed_engine.build_model(made, recipe, engine_config(made))
        differ = []
        for name, p in model.named_parameters():
            with zero.GatheredParameters([p]):
                differ += [] if torch.equal(p.detach(), right[name].detach()) else [name]
        yield {
            "case": case,
            "differ": differ,
            "names": sorted(right) == sorted(n for n, _ in model.named_parameters()),
            "said": said,
        }
    made = _job({"pretrained": f"{folder}/deep"}, "bf16")
    recipe = CausalLM(made)
    mib, model = _peak_mib(lambda: deepspeed_engine.build_model(made, recipe, engine_config(made)))
    yield {"case": "memory", "mib": mib, "whole": 4 * sum(p.ds_numel for p in model.parameters()) / 2**20}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(7)
    CausalLM(job(model={**BASE["model"], "vocab_size": 96})).build().save_pretrained(folder / "small")
    CausalLM(job(model=DEEP)).build().save_pretrained(folder / "deep", max_shard_size="500MB")
    return ranks.run(f"{__name__}:built", (2,), str(folder))


@pytest.mark.parametrize("case", KINDS)
def test_the_shards_have_the_weights_of_the_folder(case, told) -> None:
    """To the bit those that the library loads, and of an adapter those that a job without shards begins with."""
    rows = [row for row in told if row["case"] == case]
    assert len(rows) == 2
    for row in rows:
        assert (row["names"], row["differ"], row["said"]) == (True, [], []), row


def test_no_worker_holds_the_model(told) -> None:
    """Two workers have half of the model each, and the first one reads one matrix at a time. Before, both had all of it."""
    for row in told:
        if row["case"] == "memory":
            assert row["whole"] > 750 and row["mib"] < 0.5 * row["whole"], row  # a quarter is its half in bf16
