"""Tests several frozen text encoders: their embeddings are joined as the family's own pipeline does, padding is masked, and
stored embeddings train the same model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.recipes.images.pipeline import Guidance, denoise, generators
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location

from tests.unit import build_images
from tests.unit.build_images import FLUX, LUMINA, PIXART, PRX, SANA, SD3, UNET, folder_of, image, prepared
from tests.unit.build_job import job
from tests.unit.build_text_encoders import texts
from tests.unit.build_text_to_image import autoencoder, export, recipe, rows, woken

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["the digit one", "seven, handwritten"]
JOINED: dict[str, tuple[dict[str, Any], list[str], list[int], list[int]]] = {  # backbone, encoders, lengths, widths
    "sd3": (SD3, ["clip+", "clip+", "t5"], [8, 8, 12], [16, 16, 48]),
    "flux": (FLUX, ["clip", "t5"], [8, 12], [16, 24]),
    "unet": (UNET, ["clip", "clip+"], [8, 8], [16, 24]),
}


def built(made: TextToImage) -> torch.nn.Module:
    torch.manual_seed(0)
    return woken(made.build()).eval()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_captions_are_joined_as_the_familys_own_pipeline_joins_them(family, digits, tmp_path):
    """The reference is diffusers' `encode_prompt` with the same encoders."""
    import diffusers

    backbone, kinds, lengths, widths = JOINED[family]
    made = recipe(
        digits, backbone=backbone, text=texts(kinds, tmp_path, digits, lengths, widths), objective={"prediction": "flow"}
    )
    parts = made.parts
    models = {part.name: parts.frozen(part.name) for part in parts.frozen_texts}
    models |= {
        part.name.replace("text_encoder", "tokenizer"): t for part, t in zip(parts.frozen_texts, parts.tokenizers, strict=True)
    }
    cls: Any = diffusers.StableDiffusion3Pipeline if family == "sd3" else diffusers.FluxPipeline
    theirs = cls(transformer=parts.backbone(made.build()), scheduler=made.process.scheduler("euler"), vae=None, **models)
    with torch.no_grad():
        if family == "sd3":
            tokens, _, pooled, _ = theirs.encode_prompt(
                PROMPTS, None, None, max_sequence_length=12, do_classifier_free_guidance=False
            )
        else:
            tokens, pooled, _ = theirs.encode_prompt(PROMPTS, None, max_sequence_length=12)
    ours = parts.conditioning(parts.tokens(PROMPTS))
    assert torch.allclose(ours["caption"], tokens, atol=1e-6) and torch.allclose(ours["pooled"], pooled, atol=1e-6)
    assert (tokens.shape[1:], pooled.shape[1]) == ((parts.text_shape.tokens, parts.text_shape.width), parts.text_shape.pooled)


@pytest.mark.parametrize("family", JOINED)
def test_a_job_with_several_encoders_trains_is_exported_and_draws_the_same(family, digits, tmp_path):
    backbone, kinds, lengths, widths = JOINED[family]
    made = recipe(
        digits, backbone=backbone, text=texts(kinds, tmp_path, digits, lengths, widths), objective={"prediction": "flow"}
    )
    model = built(made)
    made.loss(model, made.batch(rows(digits), np.arange(4).repeat(3))).sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "pos_embed" not in n)
    plain: Any = DiffusionPipeline.from_pretrained(export(made, model, tmp_path / "out"), trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    theirs = plain(PROMPTS, num_inference_steps=3, guidance_scale=2.0, generator=generators([5, 6])).images
    with torch.no_grad():
        said = made.sampler_of(model, "cpu")(PROMPTS)
        euler, guidance = made.process.scheduler("euler"), Guidance(2.0)
        drawn = made.pixels_of(denoise(said, euler, (2, 1, 8, 8), 3, guidance, generators([5, 6]), "cpu"))
    assert all(np.abs(drawn[i][:, :, 0].astype(int) - np.asarray(theirs[i]).astype(int)).max() <= 1 for i in range(2))


@pytest.mark.parametrize(("backbone", "kind"), [(PIXART, "t5"), (UNET, "t5"), (LUMINA, "gemma"), (SANA, "gemma"), (PRX, "gemma")])
def test_masked_padding_changes_no_prediction(backbone, kind, digits, tmp_path):
    """A caption gives the same prediction for any length of its padding, and another prediction if padding isn't masked."""
    predictions = {}
    for length, padding in ((8, "masked"), (13, "masked"), (8, "seen"), (13, "seen")):
        (text,) = texts([kind], tmp_path / f"{length}", digits, [length])
        made = recipe(digits, backbone={**backbone, "sample_size": 8}, text={**text, "padding": padding})
        captions = made.parts.conditioning(made.parts.tokens(["one", "the digit five"]))
        assert ("mask" in captions) == (padding == "masked")
        noise = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            said = built(made)(noise, torch.tensor([100.0, 700.0]), captions["caption"], **made.parts.beside(captions))
        predictions[length, padding] = said
    scale = float(predictions[8, "masked"].std())
    assert float((predictions[8, "masked"] - predictions[13, "masked"]).abs().max()) < 1e-4 * scale
    assert float((predictions[8, "seen"] - predictions[13, "seen"]).abs().max()) > 1e-3 * scale


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_lengths_of_captions_are_known_without_a_read_of_the_mask(version, pooling, digits, tmp_path):
    """For dropped captions, in training alone, and for stored embeddings: the lengths on the host are the sums of the mask."""
    (text,) = texts(["t5"], tmp_path, digits, [12])
    text |= {"pooling": pooling} if pooling else {}
    described = [(f"{i}.png", image(8, 8, seed=i), {"caption": "a " * i + "digit"}) for i in range(12)]
    folder_of(tmp_path / "in", described)
    keys = {"name": "t", "input": str(tmp_path / "in"), "resolution": 8}
    prepared({**keys, "output": str(tmp_path / "texts")})
    stored = {key: value for key, value in text.items() if key != "pretrained"}
    stored |= {"text_encoder": text["pretrained"], "padding": "zero", "layer": "penultimate"}
    prepared({**keys, "output": str(tmp_path / "stored"), "latents": {"text_encoders": [stored]}})
    for name, padding in (("texts", {}), ("stored", {"padding": "masked"})):
        wanted = build_images.job(tmp_path / name, backbone=LUMINA, text={**text, **padding}, caption_dropout=0.5)
        made = TextToImage(job(**wanted, **{"train.recipe_version": version}))
        made.bind([manifest.read(Location(str(tmp_path / name)))])
        table = pq.read_table(next((tmp_path / name / "shards").rglob("*.parquet")))
        seen = set[int]()
        for training in (True, False):
            batch = made._completed(made.batch(table, np.arange(len(table))), training)
            assert torch.equal(batch["host_lengths"], batch["mask"].sum(1))
            seen |= set(batch["host_lengths"].tolist())
        assert seen == {1} if pooling else len(seen) > 5


@pytest.mark.ci
def test_padding_is_masked_by_default_only_where_no_earlier_job_trained_without_it(digits, tmp_path):
    """So a job without the key trains as before: CLIP and T5 with U-Net, PixArt, and SD3."""
    found = {}
    for name, backbone in {"unet": UNET, "pixart": PIXART, "sd3": SD3, "lumina": LUMINA, "sana": SANA, "prx": PRX}.items():
        for kind in ("clip", "t5", "gemma"):
            (text,) = texts([kind], tmp_path / name / kind, digits)
            (part,) = recipe(digits, backbone=backbone, text=text).parts.frozen_texts
            found[name, kind] = "masked" if part.masked else part.padding
    assert {value for (_, kind), value in found.items() if kind == "clip"} == {"seen"}
    assert {value for (name, kind), value in found.items() if kind == "t5" and name in ("unet", "pixart", "sd3")} == {"kept"}
    assert {value for (name, kind), value in found.items() if kind != "clip" and name in ("lumina", "sana", "prx")} == {"masked"}


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_stored_embeddings_of_several_encoders_train_as_the_encoders_do(family, digits, tmp_path):
    """The dataset knows each encoder by its digest, so the job's order and further encoders don't matter."""
    backbone, kinds, lengths, widths = JOINED[family]
    text = texts(kinds, tmp_path / "models", digits, lengths, widths)
    pictures = [
        (f"{i}.png", image(8, 8, seed=i), {"caption": c}) for i, c in enumerate(("one", "the digit three", "a handwritten seven"))
    ]
    folder_of(tmp_path / "in", pictures)
    keys = {"name": "test", "input": str(tmp_path / "in"), "resolution": 8}
    encoders = [
        {
            "text_encoder": one["pretrained"],
            "length": one["length"],
            "padding": "seen",
            "layer": "penultimate" if "clip" in kind else "last",
        }
        for one, kind in zip(text, kinds, strict=True)
    ]
    made, _ = prepared({**keys, "output": str(tmp_path / "stored"), "latents": {"text_encoders": encoders[::-1]}})
    prepared({**keys, "output": str(tmp_path / "plain")})
    assert len(made.meta["texts"]) == len(kinds) and made.meta["content"] == "images"
    stored = pq.read_table(tmp_path / "stored" / next(iter(set(made.paths))))
    completed = {}
    for place in ("stored", "plain"):
        one = recipe(tmp_path / place, backbone=backbone, text=text, objective={"prediction": "flow"}, caption_dropout=0.5)
        completed[place] = one.complete(one.batch(stored, np.arange(3)))
    assert completed["stored"].keys() == completed["plain"].keys() >= {"caption", "pooled"}
    for name, values in completed["plain"].items():
        assert torch.allclose(completed["stored"][name], values, atol=5e-3, rtol=5e-3), name
    with pytest.raises(ConfigError, match=r"^model\.text\.0\.layer: last here, but penultimate in the datasets\. Set this key"):
        recipe(tmp_path / "stored", backbone=backbone, text=[{**text[0], "layer": "last"}, *text[1:]])
    other = texts(["clip"], tmp_path / "other", digits, [8], [20])
    with pytest.raises(ConfigError, match=r"^model\.text\.0\.pretrained: the datasets have no embeddings of this text encoder"):
        recipe(tmp_path / "stored", backbone=FLUX, text=[*other, text[-1]])


def test_clip_encoders_whose_padding_cannot_be_masked_together_are_one_line(digits, tmp_path):
    """Their tokens share positions. Padding that one encoder keeps would be read at the positions that the other masks."""
    one, other = texts(["clip", "clip"], tmp_path, digits)
    for first, second in (("masked", "seen"), ("kept", "masked"), ("masked", None)):
        text = [{**one, "padding": first}, {**other, **({"padding": second} if second else {})}]
        with pytest.raises(ConfigError, match=r"^model\.text\.[01]\.padding: CLIP encoders share .* Set the same padding"):
            recipe(digits, backbone=UNET, text=text)
    text = [{**one, "padding": "masked"}, {**other, "padding": "masked"}]
    made = recipe(digits, backbone=UNET, text=text)
    batch = made._completed(made.batch(rows(digits), np.arange(12)), training=False)
    counted = made.parts.tokens(rows(digits)["caption"].to_pylist())["mask"].sum(1)
    assert torch.equal(batch["mask"].sum(1), counted) and int(counted.min()) < 8


@pytest.mark.parametrize(
    ("backbone", "kinds", "says"),
    [
        (PIXART, ["clip", "t5"], "model.text: PixArtTransformer2DModel takes one text encoder (given: clip_text_model, t5)"),
        (UNET, ["clip", "t5"], "model.text: UNet2DConditionModel takes CLIP encoders only"),
        (FLUX, ["clip", "clip"], "model.text: FluxTransformer2DModel takes CLIP encoders for the pooled embedding, and another"),
        (SD3, ["t5", "t5"], "model.text: SD3Transformer2DModel takes CLIP encoders, and at most one other encoder"),
        (SD3, ["clip", "clip", "t5"], "model.text.2: has width 16, less than the CLIP encoders together (32)"),
    ],
)
def test_encoders_that_a_family_cannot_join_are_one_line(backbone, kinds, says, digits, tmp_path):
    with pytest.raises(ConfigError) as e:
        recipe(digits, backbone=backbone, text=texts(kinds, tmp_path, digits))
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ([], "text: a list has one to three text encoders"),
        ([{"hidden_size": 16}], "text: a list has one to three text encoders, each with pretrained"),
        ([{"pretrained": "x", "lenght": 3}], "model.text.0.lenght: unknown key. Did you mean 'length'?"),
        ({"lenght": 3}, "model.text.lenght: unknown key. Did you mean 'length'?"),
        ({"padding": "masked"}, "padding needs a pretrained encoder. Set pretrained, or remove padding"),
    ],
)
def test_wrong_keys_of_text_are_one_line_with_the_key(text, says, digits):
    with pytest.raises(ConfigError) as e:
        TextToImage(job(**build_images.job(digits, text=text)))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_class_without_a_mask_says_so(digits, tmp_path):
    (text,) = texts(["t5"], tmp_path, digits)
    with pytest.raises(ConfigError, match=r"^model\.text\.padding: SD3Transformer2DModel can't mask padding"):
        recipe(digits, backbone=SD3, text={**text, "padding": "masked"})


@pytest.mark.parametrize("kind", ["dc", "shifted"])
def test_latents_of_other_autoencoders_train_and_are_decoded_back(kind, digits, tmp_path):
    """AutoencoderDC, whose latents are no distribution, and an AutoencoderKL of 16 channels with a shift of the latents."""
    torch.manual_seed(3)
    if kind == "dc":
        AutoencoderDC(
            in_channels=1, latent_channels=8, encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
            decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
            downsample_block_type="Conv", upsample_block_type="interpolate", scaling_factor=0.4,
        ).save_pretrained(tmp_path / "vae")  # fmt: skip
    else:
        autoencoder(tmp_path / "vae", 1, latent_channels=16, scaling_factor=0.36, shift_factor=0.12)
    made = recipe(digits, backbone=SANA, autoencoder={"pretrained": str(tmp_path / "vae")}, objective={"prediction": "flow"})
    assert made.parts.shape() == (8 if kind == "dc" else 16, 4, 4)
    batch = made.complete(made.batch(rows(digits), np.arange(12)))
    vae, clean = made.parts.frozen("vae"), made.batch(rows(digits), np.arange(12))["clean"]
    with torch.no_grad():
        if kind == "dc":
            expected = vae.encode(clean).latent * 0.4
            assert torch.allclose(batch["image"], expected, atol=1e-6)
        from heliostat.recipes.images.pipeline import decode

        unscaled = batch["image"] / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        assert torch.equal(decode(vae, batch["image"]), vae.decode(unscaled).sample.clamp(-1, 1))
    assert made.loss(built(made), made.batch(rows(digits), np.arange(12))).sum.isfinite()
    source = manifest.read(Location(str(digits)))
    assert made.parts.companions().keys() == {"vae"} and source.meta["content"] == "images"
    plain: Any = DiffusionPipeline.from_pretrained(export(made, built(made), tmp_path / "out"), trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    assert plain("one", num_inference_steps=2).images[0].size == (8, 8)


def test_the_folders_of_a_list_are_found_like_those_of_a_mapping(tmp_path):
    """Relative folders become absolute, and names of the Hub are found, changed, and described in the card's lineage."""
    from heliostat.config import pretrained, spec

    model = {
        "text": [{"pretrained": "models/clip", "length": 8}, {"pretrained": "org/t5@0123456"}],
        "autoencoder": {"pretrained": "x"},
    }
    (tmp_path / "models/clip").mkdir(parents=True)
    made: Any = spec._pretrained(model, tmp_path)
    assert made["text"][0] == {"pretrained": str(tmp_path / "models/clip"), "length": 8}
    keys = ["model.text.0.pretrained", "model.text.1.pretrained", "model.autoencoder.pretrained"]
    assert [key for key, _ in pretrained.named(made)] == keys
    changed = pretrained._replaced(made, {keys[1]: "/cache/t5"})
    assert changed == {**made, "text": [made["text"][0], {"pretrained": "/cache/t5"}]}


def test_a_t5gemma_is_its_encoder_alone(digits, tmp_path):
    """The folder of a complete model is rejected with the call that saves its encoder, which then embeds captions."""
    from heliostat.recipes.images import config, text_encoders
    from heliostat.recipes.images.pipeline import encode
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    small = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    whole = T5GemmaConfig(encoder=small, decoder=small, vocab_size=320)
    with pytest.raises(
        ConfigError, match=r"^model\.text: the folder has a decoder, too\. Save only the encoder: T5GemmaEncoderModel"
    ):
        text_encoders.kind("model.text", whole)
    torch.manual_seed(0)
    made = T5GemmaEncoderModel(T5GemmaConfig(encoder=small, decoder=small, vocab_size=320, is_encoder_decoder=False))
    made.save_pretrained(tmp_path)
    encoder = config.frozen_text_encoder(str(tmp_path))
    ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
    tokens, pooled = encode(encoder, ids, mask)
    with torch.no_grad():
        alone = encode(encoder, ids[:, :3], mask[:, :3]).tokens
    assert pooled is None and torch.allclose(tokens[:, :3], alone, atol=1e-5) and not tokens[0, 3].any()
    assert text_encoders.widths(encoder.config) == (16, None) and config.frozen_bytes(str(tmp_path), torch.float32) > 0


def test_a_job_with_several_encoders_is_planned_before_its_dataset_exists(digits, tmp_path):
    """By placeholder embeddings of each text encoder, with the shapes that the dataset would store."""
    text = texts(["clip+", "clip+", "t5"], tmp_path, digits, [8, 8, 12], [16, 16, 48])
    made = TextToImage(
        job(**build_images.job(tmp_path / "nowhere", backbone={**SD3, "sample_size": 8, "in_channels": 1}, text=text))
    )
    placeholders = made.presume(2)
    assert placeholders is not None
    batch = made.complete(made.batch(placeholders, np.arange(2)))
    assert (batch["caption"].shape, batch["pooled"].shape) == ((2, 20, 48), (2, 24))
