"""Tests datasets that store pixels with the embeddings of a frozen text encoder, and the models that train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from heliostat.curation.images.latents import packed
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.recipes.images.pipeline import Guidance, denoise, encode, tokenize
from heliostat.recipes.images.stored_arrays import ArrayFormat

from tests.unit import build_images
from tests.unit.build_images import folder_of, image, prepared
from tests.unit.build_text_to_image import bert, clip, export, recipe, woken

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, WIDTH = 12, 24


def dataset_of(place: Path, latents: dict[str, Any]) -> manifest.Manifest:
    captions = ("one", "the digit three", "a handwritten seven", "eight")
    pictures = [(f"{i}.png", image(8, 8, seed=i), {"caption": caption}) for i, caption in enumerate(captions)]
    folder_of(place / "in", pictures)
    keys = {"name": "test", "input": str(place / "in"), "output": str(place / "out"), "resolution": 8, "latents": latents}
    return prepared(keys)[0]


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_stored_embeddings_train_as_the_encoder_itself_does_and_draw_the_same_after_the_export(pooling, digits, tmp_path):
    """Of BERT, with pixels. Training gets what it gets if the encoder embeds the captions in every step, within float16."""
    folder = bert(tmp_path / "bert", digits, LENGTH, WIDTH)
    text: dict[str, Any] = {"pretrained": str(folder), "length": LENGTH} | ({"pooling": pooling} if pooling else {})
    made = dataset_of(tmp_path, {"text_encoder": str(folder), "length": LENGTH, "pooling": pooling})
    place = tmp_path / "out"
    assert made.meta["content"] == "images" and made.meta["text"] == [1 if pooling else LENGTH, WIDTH]
    stored = pq.read_table(place / next(iter(set(made.paths))))
    assert {"image", "embedding"} <= set(stored.column_names) and "latent" not in stored.column_names

    trained = recipe(place, text=text)
    prepared({"name": "test", "input": str(tmp_path / "in"), "output": str(tmp_path / "plain"), "resolution": 8})
    recipes = {"stored": trained, "computed": recipe(tmp_path / "plain", text=text)}
    batches = {name: one.complete(one.batch(stored, np.arange(4))) for name, one in recipes.items()}
    for name, computed in batches["computed"].items():
        assert torch.allclose(batches["stored"][name], computed, atol=2e-3 if name == "caption" else 0), name

    torch.manual_seed(0)
    model = woken(trained.build()).eval()
    plain: Any = DiffusionPipeline.from_pretrained(export(trained, model, tmp_path / "export"), trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    prompt, scheduler = "the digit three", trained.process.scheduler(trained.sampler, clip=True)
    drawn = plain(prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(1)).images[0]
    with torch.no_grad():
        say = trained.sampler_of(model, "cpu")([prompt])
        sampled = denoise(say, scheduler, (1, 3, 8, 8), 3, Guidance(4.0), [torch.Generator().manual_seed(1)], "cpu")
    assert np.abs(trained.pixels_of(sampled)[0].astype(int) - np.asarray(drawn).astype(int)).max() <= 1


def test_the_rows_of_berts_padding_are_zero_and_no_other_row_is(digits, tmp_path):
    """So a reader of the dataset knows the padding without the captions."""
    folder = bert(tmp_path / "bert", digits, LENGTH, WIDTH)
    made = dataset_of(tmp_path, {"text_encoder": str(folder), "length": LENGTH})
    from heliostat.recipes.images import config

    tokenizer, encoder = config.frozen_tokenizer(str(folder), LENGTH), config.frozen_text_encoder(str(folder))
    table = pq.read_table(tmp_path / "out" / next(iter(set(made.paths))))
    tokens = tokenize(tokenizer, table["caption"].to_pylist())
    found = np.stack([np.frombuffer(row, np.float16).reshape(LENGTH, WIDTH) for row in table["embedding"].to_pylist()])
    assert np.array_equal(found.any(-1), tokens.attention_mask.numpy().astype(bool)) and not found.any(-1).all()
    with torch.no_grad():  # padding changes no embedding of a token
        alone = [encoder(input_ids=ids[None, : int(mask.sum())])[0][0] for ids, mask in zip(*tokens.values(), strict=True)]
        pooled = encode(encoder, tokens.input_ids, tokens.attention_mask, "mean").tokens
    for row, mean, exact in zip(found, pooled, alone, strict=True):
        assert np.abs(row[: len(exact)] - exact.numpy()).max() < 2e-3
        assert torch.allclose(mean[0], exact.mean(0), atol=1e-5)


def test_wrong_keys_are_rejected_before_anything_is_computed(digits, tmp_path):
    folder = clip(tmp_path / "clip", digits)
    with pytest.raises(ConfigError, match=r"^latents: has no encoder\. Set at least one of these keys: autoencoder, "):
        dataset_of(tmp_path / "a", {"length": 8})
    with pytest.raises(ConfigError, match=r"^latents\.pooling: needs a text encoder"):
        dataset_of(tmp_path / "b", {"autoencoder": str(folder), "pooling": "mean"})
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"^latents\.text_encoder: a model of type 'gpt2' isn't a supported text encoder"):
        dataset_of(tmp_path / "c", {"text_encoder": str(folder), "length": 8})
    with pytest.raises(ConfigError, match=r"pooling needs a pretrained encoder"):
        recipe(digits, text={**build_images.TEXT, "pooling": "mean"})
    folder = bert(tmp_path / "bert", digits, LENGTH, WIDTH)
    dataset_of(tmp_path / "d", {"text_encoder": str(folder), "length": LENGTH, "pooling": "mean"})
    with pytest.raises(ConfigError, match=r"^model\.text\.pooling: captions have 12 embeddings of width 24, but 1 of width 24"):
        recipe(tmp_path / "d/out", text={"pretrained": str(folder), "length": LENGTH})


def test_embeddings_beyond_float16_are_one_error() -> None:
    """Stored infinities would make the loss infinite in every step."""
    half, eight = ArrayFormat((2,)), ArrayFormat((2,), "int8")
    assert packed("latents.text_encoder", half, torch.tensor([[65504.0, 0.0]]), ("embedding",))[1]["embedding"].missed == 0
    for form, value in ((half, 7e4), (half, np.nan), (eight, np.inf), (eight, np.nan)):
        with pytest.raises(ConfigError, match=rf"^latents\.text_encoders\.1: outputs aren't finite in {form.dtype}"):
            packed("latents.text_encoders.1", form, torch.tensor([[1.0, value]]), ("a", "b"))
