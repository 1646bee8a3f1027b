"""Tests the embedder of images and captions: its batches, valid jobs, and an export that plain transformers loads."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.errors import ConfigError
from heliostat.evaluation.losses import evaluate
from heliostat.recipes import exported
from heliostat.recipes.conformance import require_abilities, require_class
from heliostat.recipes.images.embedder import ImageEmbedder
from heliostat.recipes.pretrained import from_config
from heliostat.storage.locations import Location
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.unit import build_images
from tests.unit.test_embedder import unit


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_images.digits(tmp_path_factory.mktemp("digits") / "data", 200)


def recipe(data: Path, **changes: Any) -> ImageEmbedder:
    made = ImageEmbedder(build_images.embedder(data, **changes))
    made.probe()
    made.bind([manifest.read(Location(str(data)))])
    return made


def held_out(made: ImageEmbedder, count: int) -> Any:
    rows = open_dataset(plan(made.job, made.sources))
    return rows.read(rows.order.held_out(count))


def save(made: ImageEmbedder, folder: Path) -> Any:
    """Writes an export; returns it with its model."""
    torch.manual_seed(1)
    model: Any = made.build().eval()
    made.save_config(folder)
    model.save_pretrained(folder)
    return model


def test_a_batch_knows_equal_sides_and_counts_captions_that_are_cut(data) -> None:
    made = recipe(data, **{"model.max_tokens": 3})
    rows = held_out(made, 4)
    first = rows.slice(0, 1).to_pylist()[0]
    given = [*rows.slice(0, 3).to_pylist(), {**rows.slice(3, 1).to_pylist()[0], "caption": ""}]
    given[1] |= {"caption": first["caption"]}
    given[2] |= {"image": first["image"], "caption": "x"}
    found = made.batch(type(rows).from_pylist(given, rows.schema), np.arange(4))
    (a, b, c, d), end = found["names"].tolist(), made.tokenizer.eos_token_id
    assert a[0] == b[0] != c[0] and a[1] == c[1] != b[1] and d[1] not in (a[1], b[1])
    assert found["input_ids"].shape == (4, 3) and found["input_ids"][0, 2] == end  # at max_tokens, with its end
    assert found["cut"].tolist()[0] == 1 and found["cut"].tolist()[3] == 0
    assert found["pixel_values"].shape == (4, 1, 8, 8)


def test_an_export_embeds_in_plain_transformers_as_it_was_trained_to(data, tmp_path) -> None:
    """Model, tokenizer, and image processor are exported. The logits have the job's temperature, and `evaluate` gives the run's
    scores."""
    made = recipe(data)
    model, rows = save(made, tmp_path), held_out(made, 24)
    batch = made.batch(rows, np.arange(len(rows)))
    with torch.no_grad():
        right = made.represent(model, batch)
    plain, told = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain).__name__ == "CLIPModel" and not told["missing_keys"] and not told["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    images = [Image.open(io.BytesIO(data)) for data in rows["image"].to_pylist()]
    pixels = processor(images=images, return_tensors="pt")
    texts = tokenizer(rows["caption"].to_pylist(), padding=True, return_tensors="pt")
    with torch.no_grad():
        out = plain.eval()(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"],
                           pixel_values=pixels["pixel_values"])  # fmt: skip
    torch.testing.assert_close(out.text_embeds, right["caption"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.image_embeds, right["image"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.logits_per_image, right["image"] @ right["caption"].T / 0.1, atol=1e-4, rtol=1e-4)
    exported.write(tmp_path, made.job, {"run_id": "f" * 32, "step": 1, "data_version": 2})
    expected = made.measure({name: right[name].numpy() for name in made.gathered})
    assert set(expected) == set(made.scores)
    assert evaluate(tmp_path, str(data), 24, None, None) == pytest.approx(expected, rel=1e-4)


def test_the_first_weights_are_those_of_transformers_own_class(data) -> None:
    made = recipe(data)
    torch.manual_seed(3)
    found = dict(made.build().named_parameters())
    torch.manual_seed(3)
    plain = dict(from_config(transformers.CLIPModel, made.config).named_parameters())
    assert plain.keys() - found.keys() == {"logit_scale"} and all(torch.equal(found[name], plain[name]) for name in found)


def test_a_pretrained_models_own_processor_makes_the_pixels(data, tmp_path) -> None:
    made = recipe(data)
    save(made, tmp_path)
    CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False, do_convert_rgb=False, image_mean=[0.25],
                          image_std=[0.125]).save_pretrained(tmp_path)  # fmt: skip
    again = ImageEmbedder(build_images.embedder(data, model={"pretrained": str(tmp_path), "temperature": 0.2}))
    again.probe()
    again.bind(made.sources)
    rows = held_out(made, 3)
    first, second = (one.batch(rows, np.arange(3))["pixel_values"] for one in (made, again))
    torch.testing.assert_close(second, ((first + 1) / 2 - 0.25) / 0.125)
    model: Any = again.build()
    assert float(model.logit_scale.exp()) == pytest.approx(5) and "logit_scale" not in dict(model.named_parameters())
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    other = ImageEmbedder(build_images.embedder(data, model={"pretrained": str(tmp_path)}))
    with pytest.raises(ConfigError, match="doesn't normalize pixels of 0 to 255"):
        other.probe()


@pytest.mark.parametrize(("changes", "said"), [
    ({"data.sequence_length": 64}, "data.sequence_length: only for token datasets"),
    ({"train.global_batch_size": 1, "train.micro_batch_size": 1, "data.virtual_ranks": 1},
     "train.global_batch_size: a batch of 1 pair"),
    ({"model.temperature": 0}, "model.temperature"),
    ({"model.pooling": "mean"}, "model.pooling: unknown key"),
    ({"model.max_tokens": 13}, "model.max_tokens: 13 isn't between 2 and the model's maximum 12"),
    ({"model.arch": "bert"}, "model.arch: 'bert' isn't a model of images and texts"),
    ({"model.text_config.widht": 3}, "model.text_config.widht: unknown key of CLIPTextConfig"),
    ({"model.vision_config": 3}, "model.vision_config: expected a mapping"),
    ({"model.vision_config.num_attention_heads": 3}, "model: .*16.*not a multiple of the number of attention heads .*3"),
    ({"model.vision_config.patch_size": 3}, "patch_size: 3 doesn't divide the image side of 8 pixels"),
    ({"model.vision_config.image_size": 16}, "image_size: 16 given, but the images have 8 pixels per side. Remove this key"),
    ({"model.text_config.vocab_size": 100}, "model.text_config.vocab_size: 100 is below the tokenizer's"),
    ({"model.init": {"zero_output_projections": True}}, "model.init"),
    ({"model": {"pretrained": "no/where"}}, "model.pretrained: 'no/where' isn't a model folder"),
    ({"model": {"pretrained": "no/where", "projection_dim": 3}}, "model.projection_dim: a pretrained model takes its"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_by_its_key(data, changes, said) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(data, **changes)


def test_images_that_are_no_squares_of_one_size_are_refused(data) -> None:
    made, found = recipe(data), manifest.read(Location(str(data)))
    for size in ([16, 8], [16, 16]):
        other = type(found)(**{**vars(found), "meta": {**found.meta, "size": size}})
        with pytest.raises(ConfigError, match=f"CLIP needs square images .*{size[0]} x {size[1]} pixels"):
            made.bind([found, other])


def test_measures_are_of_both_directions(data) -> None:
    made, vectors = recipe(data), unit(6).numpy()
    assert require_class("recipe", "x", ImageEmbedder) is ImageEmbedder
    require_abilities(made.job, made)
    image = vectors.copy()
    image[5] = image[0]  # which both captions find: the wrong one counts first
    told = made.measure({"caption": vectors, "image": image, "names": np.arange(12).reshape(6, 2)})
    assert told["recall_at_1"] == pytest.approx(4 / 6) and told["caption_recall_at_1"] == pytest.approx(5 / 6)
