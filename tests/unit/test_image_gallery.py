"""Tests the scores of generated images: the classifier, the grid, FID and KID, and the options of `generate`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.inference.generate import read_prompts
from heliostat.recipes import exported
from heliostat.recipes.images.distances import fid, kid
from heliostat.recipes.images.gallery import PromptGallery
from heliostat.recipes.images.generator import ImageGenerator
from heliostat.recipes.images.grids import grid, png
from heliostat.recipes.images.judge import Judge, real_images
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location
from heliostat.tracking.models import resolve
from PIL import Image

from tests.unit import build_images
from tests.unit.build_job import job

PROMPTS = [{"text": "the digit two", "label": "two"}, {"text": "anything"}, {"text": "nine, handwritten", "label": "nine"}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_images.digits(tmp_path_factory.mktemp("digits") / "data", 600)


def test_the_classifier_knows_real_digits_and_not_noise(dataset):
    """Its accuracy is that on images outside its training data. No prompt asks for noise."""
    images, labels = real_images([manifest.read(Location(str(dataset)))])
    judge = Judge(images, labels)
    assert len(judge.labels) == 10 and 0.9 < judge.accuracy < 1
    shuffled = list(np.random.default_rng(0).permutation(labels))
    assert Judge(images, shuffled).accuracy < 0.2, "with labels that mean nothing it knows nothing"
    with pytest.raises(ConfigError, match="the datasets have no labels"):
        Judge(images, [""] * len(images))


def test_real_images_of_a_damaged_chunk_are_left_out_and_it_is_said(tmp_path, caplog):
    """Otherwise a picture with a flipped bit would be used for the scores, or end the run although `on_bad_sample` is
    `replace`."""
    dataset = build_images.digits(tmp_path / "data", 80)
    made = manifest.read(Location(str(dataset)))
    shard = dataset / "shards/00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 4] ^= 1  # of the first chunk's pictures
    shard.write_bytes(data)
    seen: list[None] = []
    images, labels = real_images([made], progressed=lambda: seen.append(None))
    sizes = made.chunks["rows"].to_pylist()
    assert len(images) == len(labels) == sum(sizes[1:]) and len(seen) == len(sizes)
    assert "row group 0: cannot be read" in caplog.text and "The scores leave out the images of this row group" in caplog.text


def test_conditional_accuracy_is_the_share_of_labelled_prompts_that_are_shown(dataset):
    """Real twos and nines in place of generated ones get the full score, and swapped ones get 0. The first call reads the images
    that train the classifier, and reports each row group, so that the watchdog doesn't end the run."""
    made = TextToImage(job(**build_images.job(dataset, samples={"prompts": PROMPTS, "per_prompt": 2, "judge": True})))
    made.bind([manifest.read(Location(str(dataset)))])
    gallery = PromptGallery(made)
    assert gallery.count == 6 and gallery.item(3) == ("anything", 3) and gallery.item(4) == ("nine, handwritten", 4)
    images, labels = real_images(made.sources)
    read = list[None]()
    gallery.judge(images[: gallery.count], lambda: read.append(None))
    assert len(read) == sum(source.chunks.num_rows for source in made.sources)
    judge = gallery.judge_of()
    sure = [(i, name) for i, name, said in zip(images, labels, judge.says(images), strict=True) if name == said]
    two, nine = ([i for i, name in sure if name == wanted][:2] for wanted in ("two", "nine"))
    scores, shown = gallery.judge([*two, *two, *nine])
    assert scores["conditional_accuracy"] == 1.0 and scores["chance"] == 0.1
    assert gallery.judge([*nine, *two, *nine])[0]["conditional_accuracy"] == 0.5
    assert Image.open(io.BytesIO(shown["samples"])).size == (2 * 68, 3 * 68)


def test_judging_needs_a_labelled_prompt(dataset):
    with pytest.raises(ConfigError, match=r"model.samples.judge: needs prompts with a label"):
        TextToImage(job(**build_images.job(dataset, samples={"prompts": [{"text": "a"}], "judge": True})))


@pytest.mark.parametrize(("count", "columns", "size"), [(1, 4, (8, 8)), (4, 4, (272, 68)), (5, 2, (136, 204))])
def test_a_grid_holds_the_pictures_row_by_row(count, columns, size):
    pictures = [np.full((8, 8, 1), 10 * i, np.uint8) for i in range(count)]
    shown = Image.open(io.BytesIO(png(grid(pictures, columns))))
    assert shown.size == size and shown.mode == "L"
    side = size[0] // min(columns, max(count, 1)) if count > 1 else 8
    assert [int(np.asarray(shown)[i // columns * side, i % columns * side]) for i in range(count)] == [
        10 * i for i in range(count)
    ]


def test_fid_and_kid_of_gaussians_are_what_theory_says():
    """Equal distributions are near 0. A shift by d adds |d|^2 to FID; other deviations add (s1 - s2)^2 in each dimension."""
    rng = np.random.default_rng(0)
    one, two, shifted = (rng.normal(m, s, (40_000, 4)) for m, s in ((0, 1), (0, 1), (0.5, 2)))
    assert fid(one, two) < 0.01 and fid(one, shifted) == pytest.approx(4 * (0.25 + 1), rel=0.03)
    few = [a[:2000] for a in (one, two, shifted)]
    assert abs(kid(few[0], few[1]).value) < 0.02 < kid(few[0], few[2]).value


def test_a_folder_of_a_language_model_needs_no_record_and_a_damaged_one_is_an_error(tmp_path):
    assert not exported.is_model(tmp_path)
    with pytest.raises(ConfigError, match="is a folder without a model"):
        resolve(str(tmp_path), "sqlite:///x")
    (tmp_path / "config.json").write_text("{}")
    assert exported.read(tmp_path).recipe is CausalLM and resolve(str(tmp_path), "sqlite:///x") == tmp_path
    (tmp_path / "heliostat.json").write_text('{"recipe": 1')
    with pytest.raises(ConfigError, match=r"isn't a valid .*\. Export the model again"):
        exported.read(tmp_path)


def test_options_of_the_other_kind_of_model_are_refused_by_name(dataset, tmp_path):
    made = job(**build_images.job(dataset))
    exported.write(tmp_path, made, {"run_id": "f" * 32, "step": 1, "data_digest": "d"})
    assert exported.read(tmp_path).recipe is TextToImage
    with pytest.raises(
        ConfigError,
        match=r"generate: temperature: unknown key\. Use one of: grid, guidance, guidance_interval, guidance_rescale, height, "
        "sampler, steps, width",
    ):
        ImageGenerator(tmp_path, {"temperature": 0.5})
    with pytest.raises(
        ConfigError, match=r"generate: guidance: unknown key\. Use one of: chat, max_tokens, suffix, temperature, top_p"
    ):
        CausalLM.generator(tmp_path, {"guidance": 4.0})
    with pytest.raises(ConfigError, match="'euler' doesn't support a model with prediction 'epsilon'"):
        ImageGenerator(tmp_path, {"sampler": "euler"})


def test_where_an_image_goes_ends_in_png_on_s3_too():
    for given, expected in (("a/x", "a/x.png"), ("a/x.PNG", "a/x.PNG"), ("s3://b/x?scheme=http", "s3://b/x.png?scheme=http")):
        assert Location(given).ending(".png").uri == expected


def test_a_prompts_file_is_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("a seven\n\n  an eight \n")
    assert read_prompts(tmp_path / "p.txt") == ["a seven", "an eight"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, says in (("empty.txt", "contains no prompt"), ("gone.txt", "can't read")):
        with pytest.raises(ConfigError, match=says):
            read_prompts(tmp_path / name)
