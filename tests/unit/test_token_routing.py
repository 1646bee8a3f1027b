"""Tests TREAD: tokens that skip blocks in training, and are put back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PRXTransformer2DModel, SanaTransformer2DModel
from heliostat.errors import ConfigError
from heliostat.recipes.images import blocks, token_routing
from heliostat.recipes.images.token_routing import KeyedRouter, Tread

from tests.unit import build_text_to_image
from tests.unit.build_aids import recipe
from tests.unit.build_text_to_image import woken

pytestmark = pytest.mark.usefixtures("one_thread")
TREAD = {"from": 2, "to": 3, "share": 0.5}


def test_kept_tokens_follow_from_seed_and_key_alone_and_are_uniform() -> None:
    keys = torch.arange(2000)
    chosen = token_routing.kept(7, keys, 12, 0.25)
    assert chosen.shape == (2000, 9) and (chosen.diff(dim=1) > 0).all()
    alone = torch.cat([token_routing.kept(7, keys[i : i + 1], 12, 0.25) for i in range(50)])
    assert torch.equal(chosen[:50], alone)
    assert not torch.equal(chosen, token_routing.kept(8, keys, 12, 0.25))
    often = torch.bincount(chosen.flatten(), minlength=12) / 2000
    assert (often - 0.75).abs().max() < 4 * (0.75 * 0.25 / 2000) ** 0.5
    together = sum(((chosen == 0).any(1) & (chosen == i).any(1)).float().mean() for i in range(1, 12)) / 11
    assert together == pytest.approx(9 / 12 * 8 / 11, abs=0.02)  # pairs of tokens, without replacement


def by_hand(backbone: Any, arch: str, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor, keys: torch.Tensor) -> Any:
    """Runs a backbone block by block, and selects the tokens of one sample after another by indexing."""
    tokens = {"pixart": 16, "sd3": 16}[arch]
    kept = token_routing.kept(0, keys, tokens, TREAD["share"])
    hidden = backbone.pos_embed(noisy)
    if arch == "pixart":
        time, embedded = backbone.adaln_single(t, {"resolution": None, "aspect_ratio": None}, batch_size=len(noisy),
                                               hidden_dtype=hidden.dtype)  # fmt: skip
        context = backbone.caption_projection(text).view(len(noisy), -1, hidden.shape[-1])
    else:
        time, context = backbone.time_text_embed(t, text.mean(1)), backbone.context_embedder(text)
    for number, block in enumerate(backbone.transformer_blocks, 1):
        if number == TREAD["from"]:
            whole, hidden = hidden, torch.stack([h[i] for h, i in zip(hidden, kept, strict=True)])
        if arch == "pixart":
            hidden = block(hidden, encoder_hidden_states=context, timestep=time)
        else:
            context, hidden = block(hidden, context, time)
        if number == TREAD["to"]:
            short, hidden = hidden, whole.clone()
            for n in range(len(hidden)):
                for place, index in enumerate(kept[n].tolist()):
                    hidden[n, index] = short[n, place]
    if arch == "pixart":
        shift, scale = (backbone.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        hidden = backbone.proj_out(backbone.norm_out(hidden) * (1 + scale) + shift)
    else:
        hidden = backbone.proj_out(backbone.norm_out(hidden, time))
    return hidden.view(len(noisy), 4, 4, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(noisy), -1, 8, 8)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", ["pixart", "sd3"])
def test_output_and_gradients_are_those_of_a_loop_that_selects_tokens_by_hand(
    arch: str, checkpointing: bool, digits: Path
) -> None:
    made = recipe(digits, arch, {"train.activation_checkpointing": checkpointing, "train.seed": 0}, tread=TREAD)
    plain = recipe(digits, arch, {"train.seed": 0})
    torch.manual_seed(2)
    model, other = woken(made.build()).double(), plain.build().double()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(4)
    keys, noisy, t = torch.tensor([5, 11, 40]), torch.randn(3, 1, 8, 8).double(), torch.tensor([3.0, 400.0, 999.0])
    ids = torch.randint(0, 200, (3, 8))
    text = other.text_encoder(input_ids=ids)[0]
    answer = model(noisy, t, ids, keys=keys)
    expected = by_hand(other.transformer, arch, noisy, t, text, keys)
    assert torch.allclose(answer, expected, atol=1e-9)
    assert not torch.allclose(answer, other(noisy, t, ids), atol=1e-3), "routing changes the output"
    answer.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-7)), name
    model.eval()
    assert torch.equal(model(noisy, t, ids), other.eval()(noisy, t, ids)), "no keys, no routing"


def test_the_loss_of_a_batch_is_the_sum_of_its_samples_and_evaluation_routes_nothing(digits: Path) -> None:
    made, plain = recipe(digits, tread=TREAD), recipe(digits)
    rows, keys = build_text_to_image.rows(digits), np.arange(100, 112)
    torch.manual_seed(2)
    model = woken(made.build())
    whole = made.loss(model, made.batch(rows, keys))
    for size in (1, 4):
        parts = [made.loss(model, made.batch(rows.slice(i, size), keys[i : i + size])).sum for i in range(0, 12, size)]
        assert float(sum(parts)) == pytest.approx(float(whole.sum), rel=1e-5)
    assert float(plain.loss(model, plain.batch(rows, keys)).sum) != pytest.approx(float(whole.sum), rel=1e-3)
    with torch.no_grad():
        a, b = (one.evaluate(model, one.batch(rows, keys)) for one in (made, plain))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert 0.5 < made.flops_per_sample(model) / plain.flops_per_sample(model) < 0.9


def test_rotary_positions_go_with_their_tokens() -> None:
    """PRX: keeping all tokens in another order would show a position at the wrong token."""
    torch.manual_seed(0)
    keys = {"in_channels": 4, "patch_size": 1, "context_in_dim": 8, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2,
            "depth": 3, "axes_dim": [4, 4]}  # fmt: skip
    backbone = woken(PRXTransformer2DModel(**keys)).double()
    noisy, t, text = torch.randn(2, 4, 4, 4).double(), torch.tensor([0.2, 0.7]).double(), torch.randn(2, 5, 8).double()
    full = backbone(noisy, t, text).sample
    router = KeyedRouter(Tread(**{"from": 1, "to": 3, "share": 0.5}), backbone, 0)
    assert torch.equal(backbone(noisy, t, text).sample, full)
    router.keys = torch.tensor([1, 2])
    kept = token_routing.kept(0, router.keys, 16, 0.5)
    found = backbone(noisy, t, text).sample.flatten(2).mT
    from diffusers.models.transformers import transformer_prx as prx

    image, txt = backbone.img_in(prx.img2seq(noisy, 1)), backbone.txt_in(text)
    positions = backbone.pe_embedder(prx.get_image_ids(2, 4, 4, 1, noisy.device))
    vec = backbone._compute_timestep_embedding(t, dtype=image.dtype)
    for n in range(2):
        h = image[n : n + 1, kept[n]]
        for block in backbone.blocks:
            block._forward_pre_hooks.clear(), block._forward_hooks.clear()
            h = block(h, txt[n : n + 1], vec[n : n + 1], positions[n : n + 1, :, kept[n]])
        whole = image[n : n + 1].clone()
        whole[0, kept[n]] = h[0]
        assert torch.allclose(found[n], backbone.final_layer(whole, vec[n : n + 1])[0], atol=1e-9)


@pytest.mark.parametrize(
    ("arch", "model", "said"),
    [
        ("unet", {"tread": TREAD}, r"^model\.tread: not supported with UNet2DConditionModel.*use one of: PixArt"),
        ("pixart", {"tread": {"from": 2, "to": 9}}, r"^model\.tread\.to: 9 given, but the backbone has 4 blocks"),
        ("pixart", {"tread": {"from": 3, "to": 2}}, r"to: 2 is before from: 3"),
        ("pixart", {"tread": {"from": 1, "to": 2, "share": 1.0}}, r"^model\.tread\.share: 1\.0 is too large"),
    ],
)
def test_what_does_not_fit_is_one_error(arch: str, model: dict[str, Any], said: str, digits: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(digits, arch, **model)


def test_blocks_with_convolutions_are_rejected_and_few_tokens_give_a_warning(digits: Path, caplog: Any) -> None:
    with torch.device("meta"):
        sana = SanaTransformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)
    with pytest.raises(ConfigError, match="not supported with SanaTransformer2DModel"):
        blocks.require_routing("model.tread", sana)
    with caplog.at_level(logging.WARNING):
        recipe(digits, tread=TREAD)
    assert "model.tread: images have 16 tokens. Below 1024 tokens" in caplog.text
