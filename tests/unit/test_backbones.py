"""Tests the backbones of text-to-image models: which models are rejected, and the initial weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.recipes.images.backbones.table import FAMILIES

from tests.unit.build_images import FLUX, LUMINA, PIXART, PRX, SANA, SD3, UNET
from tests.unit.build_text_to_image import BACKBONES, recipe, rows, woken

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"backbone": {"arch": "unett"}}, "model.backbone.arch: 'unett' isn't a backbone. Did you mean 'unet'?"),
        (
            {"backbone": {**UNET, "layer_per_block": 1}},
            "model.backbone.layer_per_block: unknown key for arch 'unet'. Did you mean",
        ),
        ({"backbone": {**UNET, "norm_num_groups": 3}}, "model.backbone: "),
        ({"backbone": {**UNET, "in_channels": 4}}, "model.backbone.in_channels: 4 given, but the data has 1"),
        (
            {"backbone": {"pretrained": "/nowhere"}},
            "model.backbone.pretrained: '/nowhere' isn't a model folder (no "
            "readable config.json). Set this key to such a folder, for example after hf download NAME --local-dir FOLDER",
        ),
        ({"text": {"pretrained": "/nowhere"}}, "model.text.pretrained: '/nowhere' isn't a model folder"),
        ({"text": {"hidden_size": 30, "num_attention_heads": 4}}, "num_attention_heads: 4 doesn't divide hidden_size 30"),
        ({"autoencoder": {"pretrained": "/nowhere"}}, "model.autoencoder.pretrained: '/nowhere' isn't a model folder"),
        ({"objective": {"prediction": "flow"}, "samples": {"sampler": "ddim"}}, "Use euler"),
        ({"backbone": {**PIXART, "qk_norm": "rms_norm"}}, "model.backbone.qk_norm: arch 'pixart' of diffusers has no QK norm."),
        ({"backbone": {**UNET, "qk_norm": "rms_norm"}}, "or use arch: sd3 with qk_norm: rms_norm"),
        ({"backbone": {**SD3, "qk_norm": "rms"}}, "model.backbone: "),
        (
            {"backbone": {**UNET, "cross_attention_norm": "layer_norm"}},
            "model.backbone.cross_attention_norm: only the blocks Simple",
        ),
        ({"objectives": {}}, "objectives: unknown key. Did you mean 'objective'?"),
    ],
)
def test_models_that_make_no_sense_are_one_line_that_names_the_key(model, says, digits):
    with pytest.raises(ConfigError) as e:
        recipe(digits, **model)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_sd3_normalizes_queries_and_keys(digits):
    """Scaling the weights of queries and keys doesn't change the prediction, which it does without QK norm."""
    for norm in ({"qk_norm": "rms_norm"}, {}):
        made = recipe(digits, backbone={**SD3, **norm})
        torch.manual_seed(0)
        model = woken(made.build()).eval()
        batch = made.complete(made.batch(rows(digits), np.arange(12)))
        with torch.no_grad():
            before = made.evaluate(model, batch)["loss"]
            for name, parameter in model.named_parameters():
                if (
                    name.endswith(("to_q.weight", "to_q.bias", "to_k.weight", "to_k.bias"))
                    or "add_q_" in name
                    or "add_k_" in name
                ):
                    parameter.mul_(4.0)
            after = made.evaluate(model, batch)["loss"]
        assert torch.allclose(before, after, rtol=1e-3) == bool(norm)


def test_a_unet_of_other_blocks_normalizes_captions(digits):
    blocks = {"down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"], "cross_attention_norm": "layer_norm",
              "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
              "up_block_types": ["SimpleCrossAttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
    made = recipe(digits, backbone={**UNET, **blocks})
    assert any("norm_cross" in name for name, _ in made.build().named_parameters())


PIXARTS = {
    "the variance too": ({"out_channels": 2}, "model.backbone.out_channels: 2 given, but the prediction target has 1 channels."),
    "the class's default": ({}, "model.backbone.out_channels: 8 given, but the prediction target has 1"),
    "sizes wanted": (
        {"out_channels": 1, "use_additional_conditions": True}, "model.backbone.use_additional_conditions: not supported",
    ),
    "another width": ({"out_channels": 1, "caption_channels": 24}, "model.backbone.caption_channels: 24 given, but"),
}  # fmt: skip


def pixart(folder: Path, **keys: Any) -> str:
    from diffusers import PixArtTransformer2DModel

    given = {k: v for k, v in PIXART.items() if k != "arch"}
    made = {**given, "in_channels": 1, "caption_channels": 16, "cross_attention_dim": 16, "sample_size": 8, **keys}
    PixArtTransformer2DModel(**made).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", PIXARTS)
def test_a_pretrained_pixart_that_cannot_be_trained_is_one_line_before_anything_starts(case, digits, tmp_path):
    keys, says = PIXARTS[case]
    with pytest.raises(ConfigError) as e:
        recipe(digits, backbone={"pretrained": pixart(tmp_path, **keys)})
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_pretrained_pixart_that_can_be_trained_is(digits, tmp_path):
    """Conditions of None mean no conditions at this size, and are accepted."""
    made = recipe(digits, backbone={"pretrained": pixart(tmp_path, out_channels=1)})
    loss = made.loss(made.build(), made.batch(rows(digits), np.arange(12))).sum
    loss.backward()
    assert loss.isfinite()


def test_sizes_that_a_pixart_takes_none_for_are_wanted_where_its_side_is_128():
    family = FAMILIES["pixart"]
    said = [bool(family.fault(given, True)) for given in ({}, {"sample_size": 64}, {"use_additional_conditions": False})]
    assert said == [True, False, False] and not family.fault({}, False)


def test_a_pretrained_backbone_without_some_weights_is_one_line(tmp_path):
    """diffusers would only log a warning, and the job would train from other weights. A canvas of an earlier version has no
    gates."""
    from heliostat.recipes.images.backbones.canvas_unet import CanvasUNet
    from heliostat.recipes.images.config import load_or_build
    from safetensors.torch import load_file, save_file

    keys = {key: value for key, value in BACKBONES["canvas"].items() if key != "arch"}
    CanvasUNet(**keys, in_channels=1, out_channels=1, encoder_hid_dim=16).save_pretrained(tmp_path)
    load_or_build(CanvasUNet, tmp_path)
    place = tmp_path / "diffusion_pytorch_model.safetensors"
    kept = {name: values for name, values in load_file(place).items() if not name.startswith("canvas_gates")}
    save_file(kept, place, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"2 of the model's weights are missing, for example canvas_gates\.0\.bias\. Copy"):
        load_or_build(CanvasUNet, tmp_path)


def test_another_pretrained_backbone_that_wants_more_than_images_and_captions_is_refused_too(digits, tmp_path):
    from diffusers import UNet2DConditionModel

    keys = {k: v for k, v in UNET.items() if k != "arch"} | {"in_channels": 1, "out_channels": 1, "cross_attention_dim": 16}
    UNet2DConditionModel(**keys, addition_embed_type="text_time", addition_time_embed_dim=8,
                         projection_class_embeddings_input_dim=24).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"model\.backbone\.pretrained: the backbone can't compute 8 x 8 positions from images and captions \("
    ) as e:
        recipe(digits, backbone={"pretrained": str(tmp_path)})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("arch", ["unet", "pixart"])
def test_a_backbone_from_nothing_begins_as_its_authors_have_it(arch, digits):
    """Its output is zero, because every branch's last layer is zero (U-Net), or that of cross-attention and of the network
    (PixArt)."""
    made = recipe(digits, backbone=BACKBONES[arch])
    torch.manual_seed(0)
    model: Any = made.build()
    backbone = model.unet if arch == "unet" else model.transformer
    zero = {n.rpartition(".")[0] for n, p in backbone.named_parameters() if n.endswith("weight") and not p.any()}
    if arch == "unet":
        ends = ("conv2", "attentions.0.proj_out", "attentions.1.proj_out", "conv_out")
        assert zero == {n for n, _ in backbone.named_modules() if n.endswith(ends)} and len(zero) > 10
    else:
        assert zero == {"proj_out", *(f"transformer_blocks.{i}.attn2.to_out.0" for i in range(2))}
        linear = {n: m for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)}
        assert not any(m.bias.any() for m in linear.values() if m.bias is not None)
        small = ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "adaln_single.linear", "caption_projection.linear_1")
        for name in (n for n in linear if n.endswith(small)):
            assert 0.015 < float(linear[name].weight.detach().std()) < 0.025
        width, parts = 16, {"attn1.to_q": 3, "attn2.to_q": 1, "attn2.to_v": 2, "attn1.to_out.0": 1}
        for name, count in parts.items():
            bound = (6 / (width + count * width)) ** 0.5
            assert 0.9 * bound < float(linear[f"transformer_blocks.1.{name}"].weight.detach().abs().max()) <= bound
    said = made.loss(model, made.batch(rows(digits), np.arange(12))).sum
    noise = made.complete(made.batch(rows(digits), np.arange(12)))["noise"]
    assert said.item() == pytest.approx(float(noise.square().flatten(1).mean(1).sum()), rel=1e-5)  # epsilon, answered with 0
    torch.manual_seed(0)
    again = made.build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("arch", ["lumina", "sana", "prx"])
def test_other_transformers_begin_as_their_training_code_has_it(arch, digits):
    """By the rules that the family's file names: which matrices are zero, small, or Xavier-uniform."""
    made = recipe(digits, backbone=BACKBONES[arch])
    torch.manual_seed(0)
    backbone = made.parts.backbone(made.build())
    linear = {n: m for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)}
    zero = {n for n, m in linear.items() if not m.weight.any()}
    ends = {"lumina": ("norm1.linear", "norm_out.linear_1", "norm_out.linear_2"), "sana": (),
            "prx": ("modulation.lin", "adaLN_modulation.1", "final_layer.linear")}[arch]  # fmt: skip
    assert zero == {n for n in linear if ends and n.endswith(ends)}
    if arch != "prx":
        assert not any(m.bias.any() for m in linear.values() if m.bias is not None)
        small = ("timestep_embedder.linear_1", "caption_embedder.1", "caption_projection.linear_1", "time_embed.linear")
        for name in (n for n in linear if n.endswith(small)):
            assert 0.015 < float(linear[name].weight.detach().std()) < 0.025
    if arch == "lumina":  # query, key, and value are one matrix there: 24 inputs, 24 + 12 + 12 outputs
        bound = (6 / (24 + 48)) ** 0.5
        assert 0.9 * bound < float(linear["layers.0.attn.to_k"].weight.detach().abs().max()) <= bound
    if arch == "sana":
        bound = (6 / (16 + 2 * 16)) ** 0.5
        assert 0.9 * bound < float(linear["transformer_blocks.0.attn2.to_v"].weight.detach().abs().max()) <= bound


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ({**FLUX, "guidance_embeds": True}, "model.backbone.guidance_embeds: needs a pretrained backbone"),
        ({**FLUX, "axes_dims_rope": [2, 4, 4]}, "model.backbone.axes_dims_rope: [2, 4, 4] aren't even numbers with the sum 12"),
        ({**LUMINA, "axes_dim_rope": [3, 5, 4]}, "model.backbone.axes_dim_rope: [3, 5, 4] aren't even numbers with the sum 12"),
        ({**SANA, "guidance_embeds": True}, "model.backbone.guidance_embeds: not supported"),
        (
            {**PRX, "patch_size": 16},
            "data.sources: images of 8x8 pixels given, but the backbone needs sides that are multiples of 16",
        ),
        ({**FLUX, "in_channels": 8}, "model.backbone.in_channels: 8 given, but the data has 1 channels. Set this key to 4"),
    ],
)
def test_keys_that_a_family_does_not_train_with_are_one_line(backbone, says, digits):
    with pytest.raises(ConfigError) as e:
        recipe(digits, backbone=backbone)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_distilled_flux_is_trained_with_a_guidance_of_one_and_sampled_with_the_scale(digits, tmp_path):
    """It gets the scale as input, so that one prediction per step is enough, and no prediction without text is used."""
    from diffusers import FluxTransformer2DModel

    keys = {k: v for k, v in FLUX.items() if k != "arch"} | {"in_channels": 4, "joint_attention_dim": 16}
    FluxTransformer2DModel(**keys, pooled_projection_dim=16, guidance_embeds=True).save_pretrained(tmp_path)
    made = recipe(digits, backbone={"pretrained": str(tmp_path), "sample_size": 8}, objective={"prediction": "flow"},
                  samples={"guidance": 3.5})  # fmt: skip
    model, seen = made.build(), list[torch.Tensor]()
    made.parts.backbone(model).register_forward_pre_hook(lambda _, args, named: seen.append(named["guidance"]), with_kwargs=True)
    with torch.no_grad():
        made.loss(model, made.batch(rows(digits, 2), np.arange(2)))
        said = made.sampler_of(model, "cpu")(["one"])(torch.zeros((2, 1, 8, 8)), torch.full((2,), 500.0))
    assert [set(values.tolist()) for values in seen] == [{1.0}, {3.5}] and torch.equal(said[0], said[1])
    with pytest.raises(ConfigError, match=r"^model\.samples\.guidance_rescale: not supported by a distilled backbone"):
        recipe(
            digits, backbone={"pretrained": str(tmp_path)}, objective={"prediction": "flow"}, samples={"guidance_rescale": 0.7}
        )
    with pytest.raises(ConfigError, match=r"^model\.backbone\.num_layers: a pretrained backbone takes its configuration"):
        recipe(digits, backbone={"pretrained": str(tmp_path), "num_layers": 8})


def test_the_canvas_puts_a_caption_into_places_and_refuses_images_of_other_sizes(digits):
    """Without the canvases, the picture of a caption is the same at each place, except near the border."""
    made = recipe(digits, backbone=BACKBONES["canvas"])
    torch.manual_seed(0)
    backbone = made.parts.backbone(woken(made.build()).eval())
    noisy, t = torch.zeros((2, 1, 8, 8)), torch.tensor([500.0, 500.0])
    text = torch.randn((2, 3, backbone.config.encoder_hid_dim), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        drawn = backbone(noisy, t, encoder_hidden_states=text).sample
        for canvas in backbone.canvases:
            canvas.weight.zero_()
        blank = backbone(noisy, t, encoder_hidden_states=text).sample
    changes = (drawn - blank)[0] - (drawn - blank)[1]
    assert float(changes.std()) > 0.01, "two captions draw different pictures"
    with pytest.raises(ValueError, match="8 x 8 positions, not 16 x 4"):
        backbone(torch.zeros((1, 1, 4, 16)), t[:1], encoder_hidden_states=text[:1])
    with pytest.raises(ConfigError, match=r"^model\.backbone: the backbone can't compute 8 x 8 positions from images and"):
        recipe(digits, backbone={**BACKBONES["canvas"], "sample_size": 16})  # which the check finds, before a worker does
    mixed = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    recipe(digits, backbone={**BACKBONES["canvas"], **mixed})
    odd = made.parts.family.cls(**{**backbone.config, "sample_size": 7}).eval()
    assert odd(torch.zeros((1, 1, 7, 7)), t[:1], encoder_hidden_states=text[:1]).sample.shape[2:] == (7, 7)
    keys = {key: value for key, value in BACKBONES["canvas"].items() if key != "encoder_hid_dim_type"}
    with pytest.raises(ConfigError, match="encoder_hid_dim_type: the canvas needs a projection of captions"):
        recipe(digits, backbone=keys)
