"""Tests that at ZeRO stage 3, a pretrained model is read tensor by tensor into the workers' parts: no worker has the complete
model, only the first worker of each shard group reads the folder, and every value arrives."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer
from heliostat.config.spec import Job
from heliostat.data.manifest import read as read_manifest
from heliostat.engine import deepspeed_engine, partitioned_weights, zero_state
from heliostat.engine.engine_config import engine_config
from heliostat.recipes.folder_weights import Stored
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.recipes.partitioning import assign
from heliostat.recipes.protocol import Recipe
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location

from tests.integration import ranks
from tests.integration.layouts import SMALL_STAYS_DIVIDED
from tests.integration.test_first_weights import peak_mib
from tests.unit import build_images, build_text_to_image
from tests.unit.build_images import PIXART, UNET
from tests.unit.build_job import BASE, job

pytestmark = pytest.mark.ci
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEEP = {**BASE["model"], "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}  # 232 MiB in fp32
TEXTS: dict[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"adapter": {"rank": 4}},
    "dora": {"adapter": {"rank": 4, "method": "dora"}},
    "changed": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "own": {},
    "groups": {},
    "copied": {},
    "quantized": {},
}
GROUPED = {"groups": "train.zero.shard_group_size", "copied": "train.zero.hpz_partition_size"}  # two groups of two workers
CASES = [
    *((name, "fp32") for name in TEXTS),
    ("full", "bf16"),
    ("unet", "fp32"),
    ("pixart", "bf16"),
    ("unreadable", "fp32"),
]


class Quantizer:
    """Stands for DeepSpeed's CUDA kernels of ZeRO++ qwZ: 8 bits per weight, and a scale per group, with zero in the middle."""

    Symmetric = 0
    quantized = 0  # tensors

    def quantize(self, values: torch.Tensor, groups: int, bits: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.quantized += 1
        rows = values.float().view(groups, -1)
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return (rows / scale).round().to(torch.int8).view(values.shape), scale.flatten()

    def dequantize(self, stored: torch.Tensor, scale: torch.Tensor, groups: int, bits: int, kind: int) -> torch.Tensor:
        return (stored.float().view(groups, -1) * scale.view(groups, 1)).view(stored.shape)


class Changed(CausalLM):
    """Changes a weight after it is loaded."""

    def build(self) -> Any:
        model = super().build()
        assign(model.model.norm.weight, torch.tensor(0.5))
        return model


def _bound(case: str, precision: str, folder: Path) -> tuple[Job, Recipe]:
    workers = 4 if case in GROUPED else 2
    changes = {"train.zero.stage": 3, "train.precision": precision, "workers.count": workers}
    changes |= {"train.deepspeed": SMALL_STAYS_DIVIDED, "train.global_batch_size": 4, "train.micro_batch_size": 1}
    if case in TEXTS or case == "deep":
        model = {"pretrained": str(folder / ("deep" if case == "deep" else "small")), **TEXTS.get(case, {})}
        made = job(model=model, **changes, **({GROUPED[case]: 2} if case in GROUPED else {}))
        if case == "quantized":  # which a job needs GPUs for
            zero = made.train.zero.model_copy(update={"quantize_weights": True})
            made = made.model_copy(update={"train": made.train.model_copy(update={"zero": zero})})
        return made, (Changed if case == "own" else CausalLM)(made)
    text = {"pretrained": str(folder / "clip"), "length": 8}
    made = job(**{**build_images.job(folder / "digits", backbone={"pretrained": str(folder / case)}, text=text), **changes})
    recipe = TextToImage(made)
    recipe.bind([read_manifest(Location(str(folder / "digits")))])
    return made, recipe


def built(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In each rank, yields the tensors that differ from those of one process, the number of tensors that the rank read, the
    classes whose models it loaded completely, and what it logged. At last, yields the peak of host memory."""
    reads, loads, said = list[int](), list[str](), list[str]()
    read = Stored.read
    Stored.read = lambda self: reads.append(1) or read(self)
    for library in (diffusers.ModelMixin, transformers.PreTrainedModel):
        load = library.from_pretrained.__func__
        counted = classmethod(lambda cls, *a, load=load, **k: loads.append(cls.__name__) or load(cls, *a, **k))
        library.from_pretrained = counted
    CUDAQuantizer.quantizer_cuda_module = quantizer = Quantizer()
    partitioned_weights.log.addFilter(lambda record: said.append(record.getMessage()) or False)
    world = dist.get_world_size()
    for case, precision in (one for one in CASES if (one[0] in GROUPED) == (world == 4)):
        made, recipe = _bound(case, precision, Path(folder))
        for counts in (reads, loads, said):
            counts.clear()
        dist.barrier(group)
        engine = deepspeed_engine.build_engine(made, recipe)
        row = {"case": case, "precision": precision, "reads": len(reads), "loads": [*loads], "said": [*said]}
        torch.manual_seed(made.train.seed)
        right, low = recipe.build(), TYPES[precision]
        differ = list[str]()
        for (name, p), (other, wanted) in zip(engine.module.named_parameters(), right.named_parameters(), strict=True):
            assert (name, zero_state.shape(p), p.requires_grad) == (other, tuple(wanted.shape), wanted.requires_grad)
            assert zero_state.part(p).numel() <= wanted.numel() // 2 + 1
            flat, part = wanted.detach().to(low).flatten(), zero_state.part(p)
            own = flat[dist.get_rank() * len(part) :][: len(part)] if case in ("copied", "quantized") else flat[:0]
            differ += [] if torch.equal(part[: len(own)], own) else [f"part of {name}"]
            if case == "copied":
                copy, rank = p.ds_secondary_tensor.detach(), dist.get_rank() % 2
                differ += (
                    [] if torch.equal(copy[: len(half := flat[rank * len(copy) :][: len(copy)])], half) else [f"copy of {name}"]
                )
            with engine.sharded_state.gathered(p):
                differ += [] if torch.equal(p.detach(), wanted.detach().to(low)) else [name]
        for name, wanted in right.named_buffers():  # those of transformers, such as rotary positions, stay in fp32
            value = wanted.to(low) if wanted.is_floating_point() and case not in TEXTS else wanted
            buffer = engine.module.get_buffer(name)
            differ += [] if buffer.dtype == value.dtype and torch.equal(buffer, value) else [name]
        row |= {"differ": differ, "tensors": len([*right.parameters()])}
        if case in ("copied", "quantized"):
            tokens = torch.arange(8).view(1, 8)
            with torch.no_grad():
                logits, exact = (model(input_ids=tokens).logits for model in (engine.module, right))
            row |= {"error": float((logits - exact).abs().max() / exact.std()), "quantized": quantizer.quantized}
        yield row
        del engine, right
        deepspeed_engine.destroy_engines()
        deepspeed_engine.forget_groups()
    for case in ("deep", "wide") if world == 2 else ():
        made, recipe = _bound(case, "bf16", Path(folder))
        mib, model = peak_mib(lambda made=made, recipe=recipe: deepspeed_engine.build_model(made, recipe, engine_config(made)))
        whole = sum(4 * math.prod(zero_state.shape(p)) for p in model.parameters()) / 2**20
        yield {"case": case, "mib": mib, "whole_mib": whole}
        del model


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("partitioned")
    torch.manual_seed(7)
    CausalLM(job(model={**BASE["model"], "vocab_size": 96})).build().save_pretrained(folder / "small")
    CausalLM(job(model=DEEP)).build().save_pretrained(folder / "deep", max_shard_size="100MB")
    build_images.digits(folder / "digits", 40)
    build_text_to_image.clip(folder / "clip", folder / "digits")
    for name, widths in (("unet", {}), ("wide", {"block_out_channels": [64, 512], "norm_num_groups": 8})):
        own = {key: value for key, value in {**UNET, **widths}.items() if key != "arch"}
        unet = diffusers.UNet2DConditionModel(in_channels=1, out_channels=1, sample_size=8, cross_attention_dim=16, **own)
        unet.save_pretrained(folder / name)
    text = {"pretrained": str(folder / "clip"), "length": 8}
    recipe = build_text_to_image.recipe(folder / "digits", backbone=PIXART, text=text)
    recipe.parts.backbone(recipe.build()).save_pretrained(folder / "pixart")
    shutil.copytree(folder / "unet", folder / "unreadable")
    (folder / "unreadable/adapter_config.json").write_text("{}")
    return ranks.run(f"{__name__}:built", (2, 4), str(folder))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_workers_begin_with_the_values_that_one_process_has(case: tuple[str, str], reported: list[dict[str, Any]]) -> None:
    """To the bit, in the precision of training, of weights, adapters, and buffers, however the weights are read."""
    rows = [row for row in reported if (row["case"], row.get("precision")) == case]
    assert len(rows) == (4 if case[0] in GROUPED else 2) and not any(row["differ"] for row in rows), [
        row["differ"] for row in rows
    ]
    for row in rows:  # of a forward pass, which gathers in 8 bits, and so differs by the rounding of the weights
        assert case[0] != "copied" or (row["error"] < 1e-5 and not row["quantized"])
        assert case[0] != "quantized" or (1e-5 < row["error"] < 0.1 and row["quantized"] >= row["tensors"])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_only_the_first_worker_of_a_shard_group_reads(case: tuple[str, str], reported: list[dict[str, Any]]) -> None:
    """A folder that can't be read tensor by tensor is one warning, and then each worker loads the model. So does a `build` that
    isn't heliostat's, because it may change weights."""
    for row in (row for row in reported if (row["case"], row.get("precision")) == case):
        streams, first = case[0] not in ("unreadable", "own"), row["rank"] % (2 if case[0] == "groups" else 4) == 0
        assert bool(row["loads"]) != streams
        assert bool(row["reads"]) == (streams and first)
        if case[0] in ("full", "groups", "unet", "pixart") and row["reads"]:
            assert row["reads"] == row["tensors"]
        assert len(row["said"]) == (case[0] == "unreadable" and first)
        assert all("can't load them tensor by tensor" in line for line in row["said"])


@pytest.mark.parametrize("case", ["deep", "wide"])
def test_no_worker_has_the_complete_model(case: str, reported: list[dict[str, Any]]) -> None:
    """Each has its half in bf16, which is a quarter of the size in fp32, and one tensor."""
    rows = [row for row in reported if row["case"] == case]
    assert len(rows) == 2
    for row in rows:
        assert row["whole_mib"] > 150 and row["mib"] < 0.5 * row["whole_mib"], row
