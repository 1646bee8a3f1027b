"""Tests training of adapters on ranks without Ray: every ZeRO stage and worker count trains like a plain loop with peft, and
checkpoints contain only the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import heliostat
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
import yaml
from heliostat.checkpoint import layout
from heliostat.config.spec import Job
from heliostat.data.manifest import read as read_manifest
from heliostat.engine import sharded_state
from heliostat.errors import CheckpointError, ConfigError
from heliostat.numerics import play
from heliostat.recipes import adapters
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location
from heliostat.tracking.models import resolve
from heliostat.training.run import train
from peft import PeftModel

from tests.golden import data
from tests.integration import layouts, ranks, selection
from tests.integration.conftest import curve
from tests.unit import build_images, build_text_to_image
from tests.unit.build_job import job
from tests.unit.page import client, opened


@dataclass(frozen=True)
class Case:
    stage: int
    workers: int
    method: str = "lora"
    precision: str = "fp32"
    thrifty: bool = False  # tiled loss, checkpointed activations, an average of the weights
    images: bool = False  # a U-Net on digits, with a frozen text encoder
    packed: bool = False  # the base in 4 bits

    def __str__(self) -> str:
        more = f"-{self.precision}" * (self.precision != "fp32") + "-thrifty" * self.thrifty + "-images" * self.images
        more += "-nf4" * self.packed
        return f"{self.method}-zero{self.stage}-{self.workers}{more}"


SAVED_BY = layouts.in_rings((
    [Case(0, 1), Case(3, 2), Case(1, 2), Case(3, 1), Case(2, 2)],
    [Case(0, 1, "dora"), Case(3, 2, "dora")],
    [Case(1, 1, precision="bf16"), Case(3, 2, precision="bf16")],
    [Case(1, 1, thrifty=True), Case(3, 2, thrifty=True)],
    [Case(0, 1, images=True), Case(3, 2, images=True)],
    [Case(0, 1, packed=True), Case(2, 2, packed=True), Case(1, 2, packed=True)],
    [Case(0, 1, packed=True, images=True), Case(2, 2, packed=True, images=True)],
))  # fmt: skip
FEW = Case(3, 2), Case(3, 2, "dora")
PLAIN = {"lora": (0, 1, 2, 3), "dora": (0, 3), "rslora": (1,), "nf4": (0, 1, 2)}  # stages that are compared with a plain loop


def _first(case: Case) -> Case:
    return replace(case, stage=1 if case.precision == "bf16" or case.thrifty else 0, workers=1)


def _base(folder: Path) -> Path:
    """Writes a small language model with random weights, in bf16, and the tokenizer of the golden text."""
    recipe = CausalLM(job())
    recipe.bind([read_manifest(Location(str(folder / "causal_lm")))])
    torch.manual_seed(0)
    recipe.build().to(torch.bfloat16).save_pretrained(folder / "base")
    recipe.save_config(folder / "base")
    return folder / "base"


def _job(case: Case, folder: Path) -> Job:
    model = {"pretrained": str(folder / "base"), "adapter": {"method": case.method, "rank": 4, "alpha": 6.0, **_bits(case)}}
    changes: dict[str, Any] = {"model": model, "workers.count": case.workers, "train.zero.stage": case.stage}
    changes |= {"train.precision": case.precision, "train.deepspeed": layouts.SMALL_STAYS_DIVIDED}
    if case.images:
        changes |= {"recipe": "heliostat.recipes:TextToImage", "data.sequence_length": None, "model": _image_model(case, folder)}
        changes |= {"data.sources": [{"path": str(folder / "text_to_image")}]}
    if case.thrifty:
        changes |= {"train.tiled_loss": True, "train.activation_checkpointing": True, "train.ema": {"decay": 0.9}}
    return layouts.described(case, folder, **{**changes, "train.optimizer.lr": 0.02, "train.optimizer.eps": 1e-8})


def _bits(case: Case) -> dict[str, str]:
    return {"base": "nf4"} if case.packed else {}


def _image_model(case: Case, folder: Path) -> dict[str, Any]:
    adapter = {"method": case.method, "rank": 2, "targets": ["to_q", "to_v", "ff.net.2"], **_bits(case)}
    text = {"pretrained": str(folder / "clip"), "length": 8}
    return {"backbone": {"pretrained": str(folder / "unet")}, "text": text, "adapter": adapter}


def _image_base(folder: Path) -> None:
    """Writes a U-Net with random weights, and a text encoder."""
    build_images.digits(folder / "text_to_image", 120)
    build_text_to_image.clip(folder / "clip", folder / "text_to_image")
    keys = {**{key: value for key, value in build_images.UNET.items() if key != "arch"}, "cross_attention_dim": 16}
    torch.manual_seed(1)
    made = diffusers.UNet2DConditionModel(in_channels=1, out_channels=1, sample_size=8, **keys)
    build_text_to_image.woken(made).save_pretrained(folder / "unet")


def _saved(player: play.Player) -> dict[str, Any]:
    index = layout.open_checkpoint(player.job.run_folder, layouts.SAVED).index
    return {"tensors": sorted(index.tensors), "frozen": index.frozen, "base": index.base}


GRID = layouts.Grid([*SAVED_BY], _job, SAVED_BY, _first, tell=_saved)


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> layouts.Rows:
    folder = tmp_path_factory.mktemp("adapters")
    data.tokens(folder / "made" / "causal_lm")
    _base(folder / "made").rename(folder / "base")
    _image_base(folder / "made")
    for name in ("clip", "unet"):
        (folder / "made" / name).rename(folder / name)
    return GRID.played(request, folder)


@pytest.mark.parametrize("case", selection.kept(SAVED_BY, *FEW), ids=str)
def test_every_stage_and_worker_count_trains_like_one_worker_and_saves_only_the_adapter(case: Case, played: layouts.Rows) -> None:
    mine, right = GRID.trains(case, played, near=500 if case.precision == "bf16" else 1)
    assert case.images or mine["losses"][-1] < mine["losses"][0], "the noise of four steps hides what a diffusion model learns"
    assert mine["tensors"] == right["tensors"] and all(".lora_" in name for name in mine["tensors"])
    assert mine["frozen"] is None and mine["base"] == right["base"] is not None


@pytest.mark.parametrize("loaded", selection.kept(SAVED_BY, *FEW), ids=str)
def test_an_adapter_resumes_in_another_configuration(loaded: Case, played: layouts.Rows) -> None:
    GRID.goes_on(loaded, played, rel=1e-2 if loaded.precision == "bf16" else 1e-5)


# a plain loop with peft -----------------------------------------------------------------------------------------------


def plain(made: Job, recipe: CausalLM, content: np.ndarray) -> dict[str, torch.Tensor]:
    """Returns the gradients of an adapter that peft itself adds to the base, for one batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    assert recipe.adapter
    own, method = dict(recipe.build().named_parameters()), recipe.adapter.method
    base = AutoModelForCausalLM.from_pretrained(recipe.base(), dtype=torch.float32)
    adapters.round_base(recipe.adapter, base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=method == "rslora", use_dora=method == "dora")
    model = get_peft_model(base, config)
    trained = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {name for name, p in own.items() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            assert p.shape == own[name].shape and p.any() == own[name].any()
            p.copy_(own[name])
    tokens = torch.from_numpy(content.astype(np.int64))
    logits = model(input_ids=tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in trained.items() if p.grad is not None}


def against_peft(group: Any, everyone: Any, place: str) -> Iterator[dict[str, Any]]:
    """Yields the largest relative difference between an engine's gradient and that of a plain loop."""
    for method, stages in PLAIN.items():
        for stage in stages:
            packed = method == "nf4"
            case = Case(stage, dist.get_world_size(), "lora" if packed else method, packed=packed)
            made = _job(case, Path(place))
            with layouts._alone(GRID, case, Path(place)) as one:
                content = one.dataset.read(one.dataset.order.locate(one.dataset.order.step(0).ravel()))
                kept = list[dict[str, torch.Tensor]]()
                play.watch(one.engine, kept.append)
                one.losses(0, 1)
                right = plain(made, one.recipe, content)  # type: ignore[attr-defined]
            (mine,) = kept
            assert set(mine) == set(right)
            worst = max(float((mine[n] - right[n]).abs().max() / right[n].abs().max().clamp(min=1e-9)) for n in right)
            zero = [n for n in right if not right[n].any() and not n.endswith(adapters.DOWN)]
            yield {"method": method, "stage": stage, "worst": worst, "zero": zero}


@pytest.mark.ci
def test_gradients_equal_those_of_a_plain_loop_with_peft(tmp_path: Path) -> None:
    """In fp32, with one and two workers."""
    data.tokens(tmp_path / "causal_lm")
    _base(tmp_path)
    told = ranks.run(f"{__name__}:against_peft", (1, 2), str(tmp_path))
    assert len(told) == 3 * sum(map(len, PLAIN.values()))
    assert [row for row in told if not row["worst"] < 1e-6 or row["zero"]] == []


# planted faults -------------------------------------------------------------------------------------------------------


def spoiled(fault: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns what a save would contain if it read the parameters of ZeRO-3 without gathering them, or lost some."""
    adapter = {name: shard for name, shard in tensors.items() if name.startswith("master.")}
    return tensors | {
        "empty": {name: sharded_state.FlatShard(shard.local[:0], 0, 0) for name, shard in adapter.items()},
        "zeros": {name: shard.holding(torch.zeros_like(shard.local)) for name, shard in adapter.items()},
        "no B": {n: sharded_state.FlatShard(s.local[:0], 0, 0) for n, s in adapter.items() if n.endswith(adapters.UP)},
        "none": {},
    }[fault]  # fmt: skip


def spoiled_saves(group: Any, everyone: Any, place: str) -> Iterator[dict[str, Any]]:
    with layouts._alone(GRID, Case(3, 2), Path(place)) as one:
        one.losses(0, 1)
        tensors = one.state.tensors
        for fault in ("empty", "zeros", "no B", "none"):
            one.state.tensors = lambda whole=False, fault=fault: spoiled(fault, tensors(whole))  # type: ignore[method-assign]
            try:
                one.save(1)
                said = ""
            except CheckpointError as e:
                said = str(e)
            found = layout.latest(one.job.run_folder)
            yield {"fault": fault, "said": said, "step": found and found.step}


@pytest.mark.ci
def test_an_adapter_that_is_saved_empty_at_zero_3_is_no_checkpoint(tmp_path: Path) -> None:
    data.tokens(tmp_path / "causal_lm")
    _base(tmp_path)
    rows = ranks.run(f"{__name__}:spoiled_saves", (2,), str(tmp_path))
    assert len(rows) == 8
    for row in rows:
        if row["fault"] == "none":
            assert (row["said"], row["step"]) == ("", 1)
        else:
            assert "all its values are zero or missing" in row["said"] and row["step"] is None, row


# a run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_a_run_resumes_in_another_configuration_exports_and_is_served(
    ray_session: None, corpus: str, job_file: Callable[..., Path], tracking: str, tmp_path: Path
) -> None:
    """The registered model is merged, plain peft computes the same from the exported adapter, and another base is rejected."""
    sources = [read_manifest(Location(corpus))]
    recipe = CausalLM(job(**{"data.sequence_length": 64, "model.vocab_size": None, "train.precision": "fp32"}))
    recipe.bind(sources)
    recipe.build().save_pretrained(tmp_path / "base")
    recipe.save_config(tmp_path / "base")
    path = job_file("lora")
    made = yaml.safe_load(path.read_text())
    made |= {
        "model": {"pretrained": str(tmp_path / "base"), "adapter": {"rank": 4}},
        "mlflow": {**made["mlflow"], "register": "lora-lm"},
    }
    path.write_text(yaml.safe_dump(made))
    train(path, ["train.zero.stage=3", "train.stop_after=10", "mlflow.register=null"])
    weights, kept = tmp_path / "base/model.safetensors", (tmp_path / "base/model.safetensors").read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="this adapter was trained on another base than"):
        train(path, ["workers.count=1"], resume=True)
    weights.write_bytes(kept)
    with pytest.raises(ConfigError, match=r"^model\.adapter\.alpha: the run's checkpoint has 4, got 9\. Set it to 4"):
        train(path, ["model.adapter.alpha=9"], resume=True)
    result = train(path, ["workers.count=1", "train.zero.stage=1"], resume=True)
    losses = curve(tracking, result["run_id"])
    assert len(losses) == 20 and losses[-1] < losses[0]
    run = tmp_path / "runs/lora"
    sizes = [sum(f.stat().st_size for f in (run / "checkpoints" / step).iterdir()) for step in ("step-00000010", "step-00000020")]
    assert max(sizes) < len(kept), "master weights and moments of the adapter are smaller than the base"
    merged = transformers.AutoModelForCausalLM.from_pretrained(resolve(result["model_uri"], tracking))
    heliostat.Run(run).export(tmp_path / "adapter", adapter=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        right = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(input_ids=tokens).logits
        torch.testing.assert_close(merged(input_ids=tokens).logits, right, atol=2e-5, rtol=1e-4)
    assert (before - right).abs().max() > 1e-3
    greedy = {"max_tokens": 8, "temperature": 0}
    with opened(tmp_path / "base", adapters=[f"mine={tmp_path / 'adapter'}"]) as url:
        text = client(url).completions.create(model="mine", prompt="def f", **greedy).choices[0].text
    answer = heliostat.generate(resolve(result["model_uri"], tracking), "def f", **greedy)
    assert answer.facts["text"] == text
