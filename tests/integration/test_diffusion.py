"""Tests text to image in whole runs: losses, averages, restarts, buckets, latents, exports, and their images.

The golden curves cover every ZeRO stage and worker count, and test_optimizers the averages in every configuration.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from heliostat.checkpoint import saver as checkpoint
from heliostat.config.spec import Job
from heliostat.curation.prepare import prepare
from heliostat.data import manifest
from heliostat.engine import deepspeed_engine
from heliostat.errors import ConfigError
from heliostat.evaluation.losses import evaluate
from heliostat.inference import post_hoc
from heliostat.inference.generate import generate
from heliostat.inference.many import generate_many
from heliostat.recipes import exported
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.tracking.models import resolve
from heliostat.training.run import train
from PIL import Image

from tests.integration import ranks
from tests.integration.conftest import curve
from tests.integration.reference import plain_losses
from tests.unit import build_extractors, build_images
from tests.unit.build_images import TEXT, UNET
from tests.unit.build_text_to_image import clip

PROMPTS = [{"text": f"the digit {word}", "label": word} for word in ("zero", "two", "five")]


def tiny_job(dataset: Path, tracking: str, folder: Path, **model: Any) -> dict[str, Any]:
    samples = {"prompts": PROMPTS, "per_prompt": 2, "steps": 3, "judge": True}
    return {
        "name": "tiny", "recipe": "heliostat.recipes:TextToImage",
        "model": {"backbone": UNET, "text": TEXT, "objective": {"prediction": "v"}, "samples": samples, **model},
        "data": {"sources": [{"path": str(dataset)}], "seed": 5},
        "train": {
            "steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "optimizer": {"lr": 3e-3}, "precision": "fp32",
            "zero": {"stage": 2},
            "schedule": {"name": "cosine", "warmup_steps": 2}, "ema": {"decay": 0.9, "lengths": [0.1, 0.2]}, "seed": 1,
            # tiny parameters would otherwise stay gathered, and hide faults of stage 3
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        },
        "evaluate": {"every": 6, "samples": 16, "fraction": 0.1},
        "checkpoint": {"every": 6},
        "workers": {"count": 2},
        "storage": str(folder / "runs"),
        "mlflow": {"uri": tracking, "experiment": "diffusion"},
    }  # fmt: skip


def write(path: Path, job: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({**job, "name": path.stem}))
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_images.digits(tmp_path_factory.mktemp("digits") / "data")


def _module(job: Job) -> torch.nn.Module:
    recipe = TextToImage(job)
    recipe.bind([manifest.read(location) for location in job.sources])
    return deepspeed_engine.build_engine(job, recipe).module


def beginnings(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Yields the distance between the initial weights of stage 3 and stage 0, on each rank."""
    import deepspeed

    for backbone in ("UNET", "PIXART"):
        raw = yaml.safe_load((Path(folder) / "job.yaml").read_text())
        raw["model"]["backbone"] = getattr(build_images, backbone)
        jobs = (Job.model_validate({**raw, "train": {**raw["train"], "zero": {"stage": s}}}) for s in (0, 3))
        whole, divided = map(_module, jobs)
        with deepspeed.zero.GatheredParameters(list(divided.parameters())):
            pairs = zip(whole.named_parameters(), divided.parameters(), strict=True)
            far = {name: float((a - b.view_as(a)).abs().max()) for (name, a), b in pairs}
        zeros = sum(not p.any() for n, p in whole.named_parameters() if n.endswith("weight"))
        yield {"backbone": backbone, "far": max(far.values()), "parameters": len(far), "zeros": zeros}


@pytest.mark.ci
def test_a_backbone_begins_alike_whether_zero_has_divided_it_or_not(digits, tmp_path) -> None:
    """The authors' initial weights, to the last bit: zeros and random weights reach the parts of every rank."""
    write(tmp_path / "job.yaml", tiny_job(digits, "sqlite:////dev/null", tmp_path))
    rows = ranks.run(f"{__name__}:beginnings", (2,), str(tmp_path))
    assert len(rows) == 4 and all(row["far"] == 0.0 and row["parameters"] > 40 and row["zeros"] > 2 for row in rows)


# whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(ray_session: None, digits: Path, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("finished")
    job = tiny_job(digits, tracking, folder)
    job["mlflow"]["register"] = "digits"
    extractor = build_extractors.image_model(folder / "vit")
    clip_folder = build_extractors.clip_model(folder / "clip-model", digits)
    job["model"]["samples"] |= {"features": {"extractor": str(extractor)}, "clip": {"pretrained": str(clip_folder)}}
    path = write(folder / "whole.yaml", job)
    return folder, path, train(path)


def test_a_whole_run_gives_the_plain_loops_losses_and_shows_what_it_draws(finished, tracking, tmp_path) -> None:
    """Losses equal those of one plain process, MLflow has sample grids and scores, and the receipts pass."""
    from mlflow import MlflowClient

    folder, path, result = finished
    assert curve(tracking, result["run_id"]) == pytest.approx(plain_losses(path, []), abs=1e-4)
    client = MlflowClient(tracking_uri=tracking)
    grids = client.list_artifacts(result["run_id"], "images/samples")
    assert [Path(g.path).name for g in grids] == ["step-00000006.png", "step-00000012.png"]
    shown = Image.open(client.download_artifacts(result["run_id"], grids[0].path, str(tmp_path)))
    assert shown.size == (2 * 68, 3 * 68)
    nearest = client.list_artifacts(result["run_id"], "images/nearest")
    assert [Path(g.path).name for g in nearest] == [Path(g.path).name for g in grids]
    report = Path(client.download_artifacts(result["run_id"], "report.html", str(tmp_path))).read_text()
    assert report.count("class='series'") == 2 and report.count("class='shot'") == 4
    scores = result["eval"]
    assert scores["real_images"] + scores["training_images"] == 400 and scores["generated_images"] == 6
    assert scores["kid_low"] < scores["kid"] < scores["kid_high"] and 0 <= scores["memorized"] <= 1 and "fid" not in scores
    assert scores["chance"] == 0.1 and scores["classifier_accuracy"] > 0.85 and 0 <= scores["conditional_accuracy"] <= 1
    assert scores["loss"] < 1.2 and all(f"loss_t{i}" in scores for i in range(4)) and result["unit"] == "samples"
    report = verify(Location(str(folder / "runs" / "whole")))
    assert report["ok"] and report["samples"] == 12 * 8


@pytest.mark.ci
def test_it_resumes_on_another_worker_count_with_its_average(finished, tracking, tmp_path) -> None:
    """From step 6, on one worker at stage 3 instead of 2 at stage 2: the curve, the scores, and the average continue."""
    folder, path, result = finished
    later = shutil.ignore_patterns("*00000012*", "result.json", "run.json")
    shutil.copytree(folder / "runs/whole", tmp_path / "runs/whole", ignore=later)
    settings = [f"storage={tmp_path / 'runs'}", "workers.count=1", "train.zero.stage=3", "mlflow.register=null"]
    again = train(path, settings, resume=True)
    from mlflow import MlflowClient

    points = sorted(
        (m.step, m.value) for m in MlflowClient(tracking_uri=tracking).get_metric_history(again["run_id"], "train/loss")
    )
    assert [s for s, _ in points] == list(range(1, 13))  # those before it was stopped lay beside the checkpoint
    assert [v for _, v in points[6:]] == pytest.approx(curve(tracking, result["run_id"])[6:], abs=1e-4)
    assert again["eval"]["loss"] == pytest.approx(result["eval"]["loss"], abs=1e-3)
    one, two = (checkpoint.open_checkpoint(Location(str(f / "runs/whole")), 12) for f in (folder, tmp_path))
    for kind in ("ema", "ema-100", "ema-200"):
        for name in one.names(kind):
            assert torch.allclose(one.read(f"{kind}.{name}"), two.read(f"{kind}.{name}"), atol=1e-3)
    name = one.names("ema")[0]
    made = [post_hoc.average(Location(str(f / "runs/whole")), c, 0.15) for f, c in ((folder, one), (tmp_path, two))]
    assert all(average.steps == [6, 12] for average in made)
    assert torch.allclose(made[0].read(name), made[1].read(name), atol=1e-3)
    kept = post_hoc.average(Location(str(folder / "runs/whole")), one, 0.2)
    assert torch.allclose(kept.read(name), one.read(f"ema-200.{name}"), atol=1e-6) and kept.error < 1e-6
    assert verify(Location(str(tmp_path / "runs/whole")))["ok"]


def test_the_registered_model_draws_scores_and_loads_with_plain_diffusers(finished, digits, tracking, tmp_path) -> None:
    """`generate` and `evaluate` find the recipe in the export. The average was exported, and plain diffusers draws the same."""
    from diffusers import DiffusionPipeline

    folder, _, result = finished
    model = resolve(result["model_uri"], tracking)
    made = checkpoint.open_checkpoint(Location(str(folder / "runs/whole")), 12)
    from safetensors.torch import load_file

    name = "conv_in.weight"
    held = load_file(model / "unet/diffusion_pytorch_model.safetensors")[name]
    assert torch.equal(held.flatten(), made.read(f"ema.unet.{name}")) and exported.read(model).recipe is TextToImage
    out = tmp_path / "x.png"
    answer = generate(model, "the digit two", {"steps": 4, "guidance": 2.0, "sampler": "dpm++"}, 7, str(out))
    assert answer.facts["file"] == str(out) and Image.open(out).size == (8, 8)
    generate(model, "the digit two", {"steps": 4}, 7, str(out))
    pipeline: Any = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
    drawn = pipeline("the digit two", num_inference_steps=4, guidance_scale=4.0, generator=torch.Generator("cpu").manual_seed(7))
    assert np.asarray(drawn.images[0]).tolist() == np.asarray(Image.open(out)).tolist()
    generate(model, "the digit two", {"steps": 4, "grid": 4}, 7, str(tmp_path / "grid.png"))
    assert Image.open(tmp_path / "grid.png").size == (272, 68)
    scores = evaluate(model, str(digits), 16, None, None)
    assert scores["loss"] == pytest.approx(result["eval"]["loss"], abs=1e-5)
    trained = {name: value for name, value in result["eval"].items() if name in ("kid", "cmmd", "clip_score", "real_images")}
    assert len(trained) == 4 and {name: scores[name] for name in trained} == pytest.approx(trained, rel=1e-2, abs=1e-3)

    prompts = ["the digit two"] * 3 + ["zero, handwritten"] * 2
    assert generate_many(model, prompts, {"steps": 4}, 5, str(tmp_path / "many"), 2) == 5
    rows = [json.loads(line) for line in (tmp_path / "many/results.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["seed"]) for r in rows] == [(p, 5 + i) for i, p in enumerate(prompts)]
    third = np.asarray(Image.open(tmp_path / "many/00002.png")).astype(int)  # the seed is 7
    assert np.abs(third - np.asarray(Image.open(out)).astype(int)).max() <= 1
    (tmp_path / "many/00003.png").unlink()
    assert generate_many(model, prompts, {"steps": 4}, 5, str(tmp_path / "many"), 2) == 5
    assert Image.open(tmp_path / "many/00003.png").size == (8, 8), "what is missing is drawn again"
    with pytest.raises(ConfigError, match="contains answers of another set of prompts"):
        generate_many(model, prompts[1:], {"steps": 4}, 5, str(tmp_path / "many"), 2)


@pytest.mark.ci
def test_latents_a_frozen_text_encoder_and_checkpointing_train_at_stage_3(ray_session, digits, tracking, tmp_path) -> None:
    """An autoencoder is trained, and its export makes latents in the pipeline. A U-Net is trained on them at ZeRO-3 with
    activation checkpointing and a frozen CLIP.

    The losses equal those of one plain process, and the export is a StableDiffusionPipeline.
    """
    from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline

    coder = tiny_job(digits, tracking, tmp_path)
    coder |= {
        "recipe": "heliostat.recipes:Autoencoder",
        "model": {"block_out_channels": [8, 16], "norm_num_groups": 4},
        "checkpoint": {"every": 12},
    }
    coder["evaluate"]["every"] = 12
    coded = train(write(tmp_path / "coder.yaml", coder))
    assert coded["eval"]["psnr"] > 3
    vae = tmp_path / "vae"
    shutil.copytree(resolve(coded["model_uri"], tracking), vae)
    assert AutoencoderKL.from_pretrained(vae).config.scaling_factor != 0.18215
    pipeline = {
        "name": "latents", "pipeline": "heliostat.pipelines:ImagePipeline", "input": "sklearn:digits",
        "output": str(tmp_path / "data"), "resolution": 8, "channels": 1,
        "latents": {"autoencoder": str(vae), "text_encoder": str(clip(tmp_path / "clip", digits)), "length": 8},
    }  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    prepare(tmp_path / "pipeline.yaml", [])
    job = tiny_job(
        tmp_path / "data", tracking, tmp_path, text={"pretrained": str(tmp_path / "clip"), "length": 8},
        autoencoder={"pretrained": str(vae)}, samples={"prompts": PROMPTS[:1], "per_prompt": 2, "steps": 2},
    )  # fmt: skip
    job["train"] |= {"zero": {"stage": 3}, "activation_checkpointing": True, "steps": 16, "optimizer": {"lr": 1e-2}}
    job["evaluate"]["every"] = job["checkpoint"]["every"] = 8
    path = write(tmp_path / "latent.yaml", job)
    result = train(path)
    losses = curve(tracking, result["run_id"])
    assert losses == pytest.approx(plain_losses(path, []), abs=2e-4)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    plain = DiffusionPipeline.from_pretrained(resolve(result["model_uri"], tracking))
    assert type(plain) is StableDiffusionPipeline and verify(Location(str(tmp_path / "runs/latent")))["ok"]


@pytest.mark.ci
def test_buckets_train_in_batches_of_one_size_on_any_workers(ray_session, tracking, tmp_path) -> None:
    """For a collection of three sizes and any number of workers: the plain loop's losses, and receipts that pass."""
    from tests.integration.test_images import make_input, make_yaml

    make_input(tmp_path / "in")
    prepare(make_yaml(tmp_path), [])
    job = tiny_job(tmp_path / "out", tracking, tmp_path, samples={})
    job["evaluate"]["fraction"] = 0.2
    job["data"]["virtual_ranks"] = 4
    path = write(tmp_path / "buckets.yaml", job)
    result = train(path)
    assert curve(tracking, result["run_id"]) == pytest.approx(plain_losses(path, ["train.micro_batch_size=2"]), abs=1e-4)
    report = verify(Location(str(tmp_path / "runs/buckets")))
    assert report["ok"] and report["samples"] == 96
