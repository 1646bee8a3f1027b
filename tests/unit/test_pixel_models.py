"""Tests models in pixels that get one embedding per caption: patches, white captions, Muon for filters, held-out pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from heliostat.curation.images import drawings
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.optim.optimizers import Muon
from heliostat.recipes import building
from heliostat.recipes.images import held_out, neighbors, patches, quality, whitening
from heliostat.recipes.images.gallery import png
from heliostat.recipes.images.pipeline import Guidance, decode, denoise, generators
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location

from tests.unit import build_images
from tests.unit.build_images import prepared
from tests.unit.build_job import job
from tests.unit.build_text_to_image import bert, export, recipe, woken

pytestmark = pytest.mark.usefixtures("one_thread")
SUBJECTS = "🐜 ant, 🐻 bear, 🚗 automobile, 🍎 apple, 🔑 key, ⭐ star"
WIDTH, OUTPUTS = 24, 8
BACKBONE: dict[str, Any] = {
    "arch": "unet", "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2D", "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4,
    "cross_attention_dim": OUTPUTS, "encoder_hid_dim_type": "text_proj", "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, digits):
    """Returns the folder of a text encoder, and the folders of six drawings in eight styles, for training and held out."""
    place = tmp_path_factory.mktemp("drawings")
    folder = bert(place / "bert", digits, 12, WIDTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawings, "SUBJECTS", SUBJECTS)
        for part in ("train", "held-out"):
            prepared({"name": part, "input": f"drawings:openmoji/{part}", "output": str(place / part), "resolution": 16,
                      "latents": {"text_encoder": str(folder), "length": 12, "pooling": "mean"}})  # fmt: skip
    return folder, place / "train", place / "held-out"


def model_keys(places: tuple[Path, Path, Path], **changes: Any) -> dict[str, Any]:
    text = {"pretrained": str(places[0]), "length": 12, "pooling": "mean", "whiten": True}
    return {"backbone": BACKBONE, "text": text, "patch": 2, "objective": {"prediction": "x"}, **changes}


def test_white_captions_have_mean_zero_and_unit_covariance(places):
    """In fp64, for correlated vectors and for the projection of a new model. Too few directions are an error."""
    rng = np.random.default_rng(3)
    vectors = (rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)).astype(np.float32)
    matrix, bias = whitening.whitening(vectors, 4)
    white = vectors.astype(np.float64) @ matrix.T.astype(np.float64) + bias
    assert np.abs(white.mean(0)).max() < 1e-5 and np.abs(white.T @ white / len(white) - np.eye(4)).max() < 1e-5
    again = whitening.whitening(vectors[::-1], 4)[0]
    assert np.abs(again - matrix).max() < 1e-4  # the order of the captions doesn't matter
    flat = np.repeat(vectors[:, :2], 3, axis=1)
    with pytest.raises(ConfigError, match=r"^model\.backbone\.cross_attention_dim: .* fewer than 4 directions\. Lower"):
        whitening.whitening(flat, 4)

    made = recipe(places[1], **model_keys(places))
    projection: Any = made.build().unet.encoder_hid_proj
    stored = torch.from_numpy(whitening.embeddings(made.sources, *made.parts.stored_columns()["text"]))
    white = projection(stored).detach().double().numpy()
    assert white.shape == (len(stored), OUTPUTS) and np.abs(white.T @ white / len(white) - np.eye(OUTPUTS)).max() < 1e-3


def test_a_pretrained_backbone_keeps_its_projection_of_captions(places, tmp_path):
    """`whiten` initializes a new projection, so it is rejected there. An export is scored without it."""
    made = recipe(places[1], **model_keys(places))
    torch.manual_seed(0)
    folder = export(made, made.build(), tmp_path)
    pretrained = {"pretrained": str(folder / "unet")}
    with pytest.raises(ConfigError, match=r"^model\.text\.whiten: not supported with a pretrained backbone.*Remove this key"):
        recipe(places[1], **model_keys(places, backbone=pretrained))
    scored = TextToImage.exported(folder, made.job.model)
    assert recipe(places[1], **scored).model.backbone == pretrained


def test_patches_lose_nothing_and_noise_is_added_to_them(places):
    pixels = torch.randn(3, 3, 16, 8).clamp(-1, 1)
    cut = patches.cut(pixels, 4)
    assert tuple(cut.shape[1:]) == patches.shape(4, 3, (8, 16)) and torch.equal(decode(None, cut, 4), pixels)
    made = recipe(places[1], **model_keys(places))
    assert made.parts.shape() == (12, 8, 8)
    table = held_out.Chunks(made.sources, None).read(0, 0).slice(0, 2)
    completed = made.complete(made.batch(table, np.arange(2)))
    assert completed["image"].shape == completed["noise"].shape == (2, 12, 8, 8)
    with pytest.raises(ConfigError, match=r"^model\.patch: 3 doesn't divide the image side of 16x16 pixels"):
        recipe(places[1], **model_keys(places, patch=3))


def test_an_export_with_patches_and_white_captions_draws_the_same_with_plain_diffusers(places, tmp_path):
    made = recipe(places[1], **model_keys(places))
    torch.manual_seed(0)
    model = woken(made.build()).eval()
    plain: Any = DiffusionPipeline.from_pretrained(export(made, model, tmp_path), trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    theirs = plain("a key on yellow", num_inference_steps=4, guidance_scale=2.0, generator=generators([5])).images[0]
    with torch.no_grad():
        sampled = denoise(made.sampler_of(model, "cpu")(["a key on yellow"]), made.process.scheduler("euler"), (1, 12, 8, 8), 4,
                          Guidance(2.0), generators([5]), "cpu", True, clip=True)  # fmt: skip
    ours = made.pixels_of(sampled)[0]
    assert theirs.size == (16, 16) and np.abs(np.asarray(theirs).astype(int) - ours.astype(int)).max() <= 1


def test_muon_orthogonalizes_filters_as_matrices_with_a_row_per_output(places):
    """Only filters between hidden layers, and only if the job asks for it. The update is the reference's, in fp64."""
    made = recipe(places[1], **model_keys(places))
    before = building.hidden_matrices(made, made.build())
    muon = {"train.optimizer": {"name": "muon", "lr": 0.02}}
    wanted = job(**{**build_images.job(places[1], **model_keys(places, orthogonal_filters=True)), **muon})
    filters = TextToImage(wanted)
    filters.bind(made.sources)
    model = filters.build()
    new = building.hidden_matrices(filters, model) - before
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert new == {n for n, s in shapes.items() if len(s) == 4 and "conv_in" not in n and "conv_out" not in n} and len(new) > 8
    with pytest.raises(ConfigError, match=r"^model\.orthogonal_filters: not supported by train\.optimizer\.name 'adamw'"):
        recipe(places[1], **model_keys(places, orthogonal_filters=True))

    torch.manual_seed(1)
    weight, grad = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    optimizer = Muon(name="muon", lr=0.1, scale="spectral", weight_decay=0.0).build(
        [{"params": [parameter], "weight_decay": 0.0, "lr_scale": 1.0, "orthogonal": True}]
    )
    optimizer.step()
    direction = (grad * (1 - 0.95) * 0.95 + grad * (1 - 0.95)).double().view(6, 36)
    direction = direction / direction.norm()
    for _ in range(5):
        gram = direction @ direction.T
        direction = 3.4445 * direction + (-4.775 * gram + 2.0315 * gram @ gram) @ direction
    expected = weight.double() - 0.1 * direction.view(6, 4, 3, 3)
    assert (parameter.double() - expected).abs().max() < 1e-4


def test_held_out_captions_are_drawn_and_compared_with_their_real_pictures(places, tmp_path, monkeypatch):
    """Real pictures in place of drawn ones score what the judge can reach. A job that trains on the held-out dataset is
    rejected."""
    samples = {"held_out": str(places[2]), "steps": 2}
    made = recipe(places[1], **model_keys(places, samples=samples))
    gallery = made.gallery()
    assert isinstance(gallery, held_out.HeldOutGallery) and gallery.count == manifest.read(Location(str(places[2]))).rows
    drawn = gallery.draw(woken(made.build()).eval(), "cpu", [0, 1])
    assert drawn[0].shape == (16, 16, 3) and not np.array_equal(drawn[0], drawn[1])
    scaled, scale = list[int](), held_out.thumbnails
    monkeypatch.setattr(held_out, "thumbnails", lambda pictures, side: scaled.append(len(pictures)) or scale(pictures, side))
    scores, images = gallery.judge(list(gallery.real.pictures))
    assert {name for name in made.scores if not name.startswith("loss")} == set(scores)
    assert all(scores[name] == scores[f"real_{name}"] for name in held_out.SCORES) and scores["top5"] == 1.0
    noise = list(np.random.default_rng(0).integers(0, 256, gallery.real.pictures.shape).astype(np.uint8))
    assert gallery.judge(noise)[0]["top1"] < 0.6
    trained = sum(source.rows for source in made.sources)
    assert scaled.count(trained) == 1 and sum(scaled) == trained + 4 * gallery.count, "training pictures are scaled once per run"
    training = held_out.labeled(made.sources).pictures
    near = neighbors.nearest(*(scale(list(one), held_out.PIXELS) for one in (gallery.real.pictures, training)))
    rows = [list(gallery.real.pictures), list(gallery.real.pictures), list(training[near.index])]
    assert images["held_out"] == png(held_out.in_rows(rows))
    share = float(np.mean(near.distance <= np.quantile(near.distance, 0.05)))
    copies = [training[i % len(training)] for i in range(gallery.count)]
    assert scores["memorized_pixels"] == share < 0.2 and gallery.judge(copies)[0]["memorized_pixels"] == 1.0
    torch.manual_seed(0)
    shown = gallery.demonstrate(export(made, woken(made.build()), tmp_path))
    assert [prompt for prompt, _ in shown] == gallery.prompts[: held_out.SHOWN]
    rescaled = recipe(
        places[1], **model_keys(places, samples={**samples, "guidance_rescale": 0.7, "guidance_interval": [0, 0.5]})
    )
    expected = {"guidance_scale": 4.0, "guidance_interval": (0.0, 0.5), "guidance_rescale": 0.7}
    assert rescaled.gallery().guidance == expected, "the export draws with the guidance of the samples"

    for key, value in {"prompts": [{"text": "a key"}], "per_prompt": 9, "clip": {"pretrained": "clip"}}.items():
        with pytest.raises(ConfigError, match=rf"held_out brings its own prompts and scores.*remove {key}"):
            recipe(places[1], **model_keys(places, samples={**samples, key: value}))


@pytest.mark.parametrize(
    ("dataset", "held", "message"),
    [
        ("train", "nowhere", ".*/nowhere"),
        ("held-out", "held-out", "the job trains on this dataset"),
        ("train", "digits", r"needs images of one size \(.*digits"),
        ("train", "unlabeled", r"needs a label for every image, but .*unlabeled has images without one\. Prepare"),
        ("unstyled", "held-out", r"needs a style for every image, but .*unstyled has"),
        ("one-style", "held-out", "needs at least two styles, but the job's datasets have one"),
    ],
)
def test_the_check_sees_that_held_out_pictures_cannot_be_scored(places, digits, dataset, held, message, tmp_path):
    """`check` binds the recipe, and starts nothing. The statistics of the shards show missing labels and styles."""
    changes: dict[str, dict[str, Any]] = {"unlabeled": {"label": ""}, "unstyled": {"style": None}, "one-style": {"style": "blue"}}
    made = {"digits": digits, "nowhere": tmp_path / "nowhere"} | {name: relabeled(places[1], tmp_path / name, **columns)
                                                                 for name, columns in changes.items()}  # fmt: skip
    found = {"train": places[1], "held-out": places[2], **made}
    with pytest.raises(ConfigError, match=rf"^model\.samples\.held_out: ({message})"):
        recipe(found[dataset], **model_keys(places, samples={"held_out": str(found[held])}))


def relabeled(source: Path, folder: Path, **columns: str | None) -> Path:
    """Copies a dataset. In the copy, the first row has other values in these columns; a text that isn't empty is in all rows."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("manifest*"))
    opened = manifest.read(Location(str(source)))
    place = folder / opened.paths[0]
    table = pq.read_table(place)
    for name, value in columns.items():
        kept = table[name].to_pylist()[1:] if not value else []
        values = pa.array([value] * (len(table) - len(kept)) + kept, table[name].type)
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, place, row_group_size=opened.chunks["rows"][0].as_py())
    location = Location(str(folder))
    manifest.write(location, manifest.read_footer(location, opened.paths[0], None), opened.meta)
    return folder


def test_an_export_is_scored_without_the_held_out_pictures(caplog):
    """Their judge needs the training dataset, which may be elsewhere. One line reports what is left out."""
    kept = quality.of_export({"held_out": "/nowhere", "steps": 2})
    assert kept == {"steps": 2} and len(caplog.messages) == 1
    assert caplog.messages[0].startswith("model.samples.held_out: left out, because its scores need the training dataset")


def test_a_plan_knows_the_pixels_of_a_dataset_that_does_not_exist(places, tmp_path):
    """A position of the backbone has four pixels of three channels."""
    from heliostat.plan import planner

    backbone = {**BACKBONE, "sample_size": 8, "in_channels": 12, "out_channels": 12, "encoder_hid_dim": WIDTH}
    wanted = job(**build_images.job(tmp_path / "nowhere", **model_keys(places, backbone=backbone)))
    _, made, _ = planner.bound(wanted, TextToImage(wanted))
    assert made.parts.facts.size == (16, 16) and made.parts.facts.channels == 3


def test_a_job_that_also_trains_on_small_pictures_scores_with_a_judge_of_the_final_size(places, tmp_path):
    """As with progressive resolution: the first dataset has the final size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawings, "SUBJECTS", SUBJECTS)
        latents = {"text_encoder": str(places[0]), "length": 12, "pooling": "mean"}
        small, _ = prepared({"name": "small", "input": "drawings:openmoji/train", "output": str(tmp_path / "small"),
                             "resolution": 8, "latents": latents})  # fmt: skip
    made = recipe(places[1], **model_keys(places, samples={"held_out": str(places[2])}))
    alone = made.gallery()
    made.sources = [*made.sources, small]
    both = made.gallery()
    noise = list(np.random.default_rng(0).integers(0, 256, both.real.pictures.shape).astype(np.uint8))
    assert both.judge(noise)[0] == alone.judge(noise)[0]
