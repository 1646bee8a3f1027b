"""Tests that at ZeRO stage 3, a pretrained backbone of diffusers is read tensor by tensor: no worker has the complete model, and
only the first worker reads the folder."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.data.manifest import read as read_manifest
from heliostat.engine import deepspeed_engine, zero_state
from heliostat.engine.engine_config import engine_config
from heliostat.recipes.folder_weights import Stored
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location

from tests.integration import ranks
from tests.integration.layouts import SMALL_STAYS_DIVIDED
from tests.integration.test_first_weights import peak_mib
from tests.unit import build_images, build_text_to_image
from tests.unit.build_images import PIXART, UNET
from tests.unit.build_job import job

pytestmark = pytest.mark.ci
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDE = {**UNET, "block_out_channels": [64, 512], "norm_num_groups": 8}
CASES = [("unet", "fp32"), ("unet", "bf16"), ("pixart", "bf16"), ("unreadable", "fp32")]


def _bound(case: str, precision: str, folder: Path) -> tuple[Job, TextToImage]:
    text = {"pretrained": str(folder / "clip"), "length": 8}
    changes: dict[str, Any] = build_images.job(folder / "digits", backbone={"pretrained": str(folder / case)}, text=text)
    zero = {"train.zero.stage": 3, "train.precision": precision, "workers.count": 2}
    made = job(**{**changes, **zero, "train.deepspeed": SMALL_STAYS_DIVIDED})
    recipe = TextToImage(made)
    recipe.bind([read_manifest(Location(str(folder / "digits")))])
    return made, recipe


def built(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In both ranks, yields how many tensors differ from those of one process, the number of tensors that the rank read, whether
    it loaded the complete model, and what it logged. At last, yields the peak of host memory."""
    reads, loads, said = list[int](), list[str](), list[str]()
    read, load = Stored.read, diffusers.ModelMixin.from_pretrained.__func__
    Stored.read = lambda self: reads.append(1) or read(self)
    diffusers.ModelMixin.from_pretrained = classmethod(lambda cls, *a, **k: loads.append(cls.__name__) or load(cls, *a, **k))
    logging.getLogger("heliostat.engine.partitioned_weights").addFilter(lambda record: said.append(record.getMessage()) or False)
    for case, precision in CASES:
        made, recipe = _bound(case, precision, Path(folder))
        for counts in (reads, loads, said):
            counts.clear()
        dist.barrier(group)
        engine = deepspeed_engine.build_engine(made, recipe)
        row = {"case": case, "precision": precision, "reads": len(reads), "loads": [*loads], "said": [*said]}
        right = recipe.build()
        differ, buffers, low = 0, 0, TYPES[precision]
        for (name, p), (other, wanted) in zip(engine.module.named_parameters(), right.named_parameters(), strict=True):
            assert (
                name == other
                and zero_state.shape(p) == tuple(wanted.shape)
                and zero_state.part(p).numel() <= wanted.numel() // 2 + 1
            )
            with engine.sharded_state.gathered(p):
                differ += not torch.equal(p.detach(), wanted.detach().to(low))
        for name, wanted in right.named_buffers():
            buffers += not torch.equal(engine.module.get_buffer(name), wanted.to(low))
        yield row | {"differ": differ, "buffers": buffers, "tensors": len([*right.state_dict()])}
        del engine, right
        deepspeed_engine.destroy_engines()
        deepspeed_engine.forget_groups()
    made, recipe = _bound("wide", "bf16", Path(folder))
    mib, model = peak_mib(lambda: deepspeed_engine.build_model(made, recipe, engine_config(made)))
    yield {"case": "memory", "mib": mib, "whole_mib": sum(4 * math.prod(zero_state.shape(p)) for p in model.parameters()) / 2**20}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("partitioned")
    build_images.digits(folder / "digits", 40)
    build_text_to_image.clip(folder / "clip", folder / "digits")
    torch.manual_seed(1)
    for name, keys in (("unet", UNET), ("wide", WIDE)):
        own = {key: value for key, value in keys.items() if key != "arch"}
        unet = diffusers.UNet2DConditionModel(in_channels=1, out_channels=1, sample_size=8, cross_attention_dim=16, **own)
        unet.save_pretrained(folder / name)
    recipe = build_text_to_image.recipe(
        folder / "digits", backbone=PIXART, text={"pretrained": str(folder / "clip"), "length": 8}
    )
    recipe.parts.backbone(recipe.build()).save_pretrained(folder / "pixart")
    shutil.copytree(folder / "unet", folder / "unreadable")
    (folder / "unreadable/adapter_config.json").write_text("{}")
    return ranks.run(f"{__name__}:built", (2,), str(folder))


def _row(told: list[dict[str, Any]], case: tuple[str, str], rank: int) -> dict[str, Any]:
    (row,) = [row for row in told if (row["case"], row.get("precision"), row["rank"]) == (*case, rank)]
    return row


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_workers_begin_with_the_weights_in_the_folder(case: tuple[str, str], told: list[dict[str, Any]]) -> None:
    """To the bit, in the precision of training, also if heliostat can't read the folder tensor by tensor."""
    for rank in (0, 1):
        row = _row(told, case, rank)
        assert (row["differ"], row["buffers"]) == (0, 0)
        streams = case[0] != "unreadable"
        assert row["loads"] == ([] if streams else ["UNet2DConditionModel"])
        assert row["reads"] == (row["tensors"] if streams and rank == 0 else 0), "only the first worker reads weights"
        assert bool(row["said"]) != streams and all("can't read them one by one" in line for line in row["said"])


def test_no_worker_has_the_complete_model(told: list[dict[str, Any]]) -> None:
    """Each has its half in bf16, which is a quarter of the size in fp32, and one tensor. Before, each began with all in fp32."""
    for row in (row for row in told if row["case"] == "memory"):
        assert row["whole_mib"] > 150 and row["mib"] < 0.6 * row["whole_mib"]
