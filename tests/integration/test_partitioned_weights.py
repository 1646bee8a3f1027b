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
from diffusers import SD3Transformer2DModel
from heliostat.config.spec import Job
from heliostat.engine import deepspeed_engine, partitioned_weights
from heliostat.engine.engine_config import engine_config
from heliostat.recipes import building
from heliostat.recipes.images.config import load_or_build
from heliostat.recipes.text.causal_lm import CausalLM

from tests.integration import ranks
from tests.unit.build_job import BASE, job

DEEP = {**BASE["model"], "hidden_size": 512, "intermediate_size": 16384, "num_hidden_layers": 8}  # 800 MiB in fp32
KINDS = {
    "full": {},
    "adapter": {"adapter": {"rank": 4}},
    "dora": {"adapter": {"rank": 4, "method": "dora"}},
    "backbone": {},
    "changed": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


class Backbone(CausalLM):
    """Builds an image backbone of diffusers from its folder."""

    def build(self) -> Any:
        return load_or_build(SD3Transformer2DModel, Path(self.job.model["pretrained"]).with_name("backbone")).train()


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
        made = _job({"pretrained": f"{folder}/small", **changes}, "fp32")
        recipe = Backbone(made) if case == "backbone" else CausalLM(made)
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
            "names": [name for name, _ in model.named_parameters()] == list(right),
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
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    ).save_pretrained(folder / "backbone")  # fmt: skip
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
    """Two workers have half of the model each, in bf16, and the first one reads one matrix at a time. Before, the first one
    had 1.4 times the model in fp32."""
    for row in told:
        if row["case"] == "memory":
            assert row["whole"] > 750 and row["mib"] < 0.7 * row["whole"], row
