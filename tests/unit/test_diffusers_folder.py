"""Tests exported text-to-image models: diffusers loads their folders, and its pipelines generate the same images."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from heliostat.recipes.images import diffusers_folder, exporting
from heliostat.recipes.images.pipeline import TextToImagePipeline, generators
from heliostat.recipes.images.server import ImageServer
from PIL import Image
from transformers import CLIPTextModel

from tests.unit.build_images import SD3, UNET
from tests.unit.build_text_encoders import texts
from tests.unit.build_text_to_image import BACKBONES, autoencoder, clip, export, recipe, woken

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("prediction", "sampler"), [("epsilon", "ddim"), ("v", "ddpm"), ("v", "dpm++"), ("epsilon", "dpm++")])
def test_latents_are_sampled_as_stable_diffusions_own_pipeline_does(prediction, sampler, digits, tmp_path):
    """With the same parts, seeds, guidance, and steps: pixels agree within 2e-3 of their range, one by one and in a batch."""
    from diffusers import UNet2DConditionModel
    from heliostat.recipes.images.noising import NoiseObjective, Process

    torch.manual_seed(0)
    keys = {k: v for k, v in UNET.items() if k != "arch"}
    unet = UNet2DConditionModel(**keys, in_channels=4, out_channels=4, sample_size=8, cross_attention_dim=16).eval()
    vae = AutoencoderKL.from_pretrained(autoencoder(tmp_path / "vae"))
    encoder = CLIPTextModel.from_pretrained(clip(tmp_path / "clip", digits)).eval()
    tokenizer = diffusers_folder.tokenizer((digits / "tokenizer.json").read_bytes(), 0, 8)
    scheduler = Process(NoiseObjective(prediction=prediction)).scheduler(sampler)
    parts: dict[str, Any] = {"scheduler": scheduler, "text_encoder": encoder, "tokenizer": tokenizer, "unet": unet, "vae": vae}
    ours = TextToImagePipeline(**parts)
    theirs: Any = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    prompts = ["the digit one", "seven, handwritten"]
    rescale = 0.6 if sampler == "ddim" else 0.0
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "guidance_rescale": rescale, "output_type": "np"}
    a = ours(prompts, generator=generators([1, 2]), **call).images
    b = theirs(prompts, generator=generators([1, 2]), **call).images
    assert a.shape == b.shape == (2, 16, 16, 3) and float(np.abs(a - b).max()) < 2e-3
    alone = ours(prompts[1], generator=generators([2]), **call).images
    assert float(np.abs(alone[0] - a[1]).max()) < 2e-3
    other = ours(prompts[1], generator=generators([3]), **call).images
    assert float(np.abs(other[0] - a[1]).max()) > 0.02


@pytest.mark.parametrize("arch", sorted(BACKBONES))
@pytest.mark.parametrize("prediction", ["v", "flow", "x"])
def test_an_exported_folder_loads_with_plain_diffusers_and_draws_the_same(arch, prediction, digits, tmp_path):
    """Weights as `export` stores them, and everything else as the recipe saves it. Then DiffusionPipeline alone loads the
    folder."""
    made = recipe(digits, backbone=BACKBONES[arch], objective={"prediction": prediction})
    torch.manual_seed(0)
    model = woken(made.build()).eval()
    export(made, model, tmp_path)
    prompts = ["the digit one", "seven, handwritten"]
    plain: Any = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    draws = [torch.Generator("cpu").manual_seed(s) for s in (5, 6)]
    guidance = {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.9), "guidance_rescale": 0.7}
    theirs = plain(prompts, num_inference_steps=5, generator=draws, **guidance).images
    ours = diffusers_folder.load(tmp_path)(prompts, num_inference_steps=5, generator=generators([5, 6]), **guidance).images
    assert [np.asarray(i).tolist() for i in theirs] == [np.asarray(i).tolist() for i in ours]
    assert theirs[0].size == (8, 8) and theirs[0].mode == "L"
    from heliostat.recipes.images.pipeline import Guidance, denoise

    with torch.no_grad():  # as it is drawn while it is trained
        predictor = made.sampler_of(model, "cpu")(prompts)
        scheduler = made.process.scheduler(made.sampler, clip=True)
        trained = made.pixels_of(
            denoise(
                predictor,
                scheduler,
                (2, 1, 8, 8),
                5,
                Guidance(2.0, (0.1, 0.9), 0.7),
                generators([5, 6]),
                "cpu",
                prediction == "x",
                True,
            )
        )
    assert all(np.abs(trained[i][:, :, 0].astype(int) - np.asarray(theirs[i]).astype(int)).max() <= 1 for i in range(2))


def test_latents_with_clip_and_a_unet_are_exported_as_stable_diffusion(digits, tmp_path):
    text = {"pretrained": str(clip(tmp_path / "clip", digits)), "length": 8}
    made = recipe(digits, text=text, autoencoder={"pretrained": str(autoencoder(tmp_path / "vae", 1))})
    assert made.parts.shape() == (4, 4, 4)
    torch.manual_seed(0)
    model = made.build()
    assert not any("text_encoder" in n or "vae" in n for n, _ in model.named_parameters()), "frozen parts are not trained"
    plain: Any = DiffusionPipeline.from_pretrained(export(made, model, tmp_path / "out"))
    assert type(plain) is StableDiffusionPipeline
    limited = recipe(
        digits, text=text, autoencoder={"pretrained": str(tmp_path / "vae")}, samples={"guidance_interval": [0, 0.8]}
    )
    plain = DiffusionPipeline.from_pretrained(export(limited, model, tmp_path / "limited"), trust_remote_code=True)
    assert type(plain).__name__ == "TextToImagePipeline", "Stable Diffusion's own pipeline has no interval"
    shift = {"pretrained": str(autoencoder(tmp_path / "shifted", 1, shift_factor=0.1))}
    shifted = recipe(digits, text=text, autoencoder=shift)
    assert exporting.standard(shifted.parts, shifted.process) is None, "Stable Diffusion's own pipeline ignores the shift"


def test_sd3_with_its_three_text_encoders_is_exported_as_stable_diffusion_3_and_draws_the_same(digits, tmp_path):
    """T5 has the 256 tokens that the pipeline gives it, and the tokenizer of heliostat's export cuts them to its own length."""
    text = texts(["clip+", "clip+", "t5"], tmp_path, digits, [8, 8, 256], [16, 16, 48])
    vae = autoencoder(tmp_path / "vae", 1, latent_channels=16, scaling_factor=0.5, shift_factor=0.1)
    made = recipe(digits, backbone=SD3, text=text, autoencoder={"pretrained": str(vae)}, objective={"prediction": "flow"})
    torch.manual_seed(0)
    model = woken(made.build()).eval()
    plain: Any = DiffusionPipeline.from_pretrained(export(made, model, tmp_path / "out"))
    assert type(plain) is StableDiffusion3Pipeline
    plain.set_progress_bar_config(disable=True)
    prompts = ["the digit one", "seven, handwritten"]
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    theirs = plain(prompts, generator=generators([5, 6]), **call).images
    ours = diffusers_folder.load(tmp_path / "out")(prompts, generator=generators([5, 6]), **call).images
    assert exporting.guidance(made.parts, made.process) == {"guidance": 4.0}, "the pipeline has no other parameters"
    for other in ({"samples": {"guidance_rescale": 0.7}}, {"objective": {"prediction": "flow", "shift": "auto", "base_size": 4}}):
        keys = {"backbone": SD3, "text": text, "autoencoder": {"pretrained": str(vae)}, "objective": {"prediction": "flow"}}
        changed = recipe(digits, **{**keys, **other})
        assert exporting.standard(changed.parts, changed.process) is None
    assert np.asarray(theirs).shape == (2, 8, 8, 1) and float(np.abs(np.asarray(theirs) - np.asarray(ours)).max()) < 2e-3


def test_mlflows_server_computes_in_fp32_with_a_frozen_text_encoder_in_bf16(digits, tmp_path):
    """The export has a copy of the text encoder's folder, and transformers would load it in bf16. Then the UNet in fp32 couldn't
    read its output."""
    frozen = clip(tmp_path / "clip", digits)
    CLIPTextModel.from_pretrained(frozen, dtype=torch.bfloat16).save_pretrained(frozen)
    text = {"pretrained": str(frozen), "length": 8}
    made = recipe(digits, text=text, autoencoder={"pretrained": str(autoencoder(tmp_path / "vae", 1))})
    torch.manual_seed(0)
    folder = export(made, woken(made.build()).eval(), tmp_path / "out")
    assert DiffusionPipeline.from_pretrained(folder).text_encoder.dtype == torch.bfloat16
    served = ImageServer()
    served.load_context(SimpleNamespace(artifacts={"model": str(folder)}))
    assert {part.dtype for part in served.pipeline.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}
    ours = diffusers_folder.load(folder)("seven", num_inference_steps=3, guidance_scale=4.0, generator=generators([5])).images
    (theirs,) = served.predict(None, ["seven"], {"steps": 3, "seed": 5})
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(theirs))), np.int16)
    assert np.abs(drawn - np.asarray(ours[0], np.int16)).max() <= 1
