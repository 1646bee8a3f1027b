"""Describes U-Nets that get the caption also as feature maps (`canvas_unet`), for small pictures in pixels.

Initial weights: those of U-Nets, and normal numbers in the canvases and gates, so that a white caption gives gates, and ungated
maps, with a standard deviation of CANVAS_STD.
"""

from __future__ import annotations

import math
from typing import Any

from heliostat.recipes.images.backbones import unet
from heliostat.recipes.images.backbones.canvas_unet import CanvasUNet
from heliostat.recipes.images.backbones.family import Family, Keys, Weights, linear

CANVAS_STD = 0.5


def _initial(backbone: Any) -> Weights:
    yield from unet.initial(backbone)
    for layer in (*backbone.canvases, *backbone.canvas_gates):
        yield from linear(layer, std=CANVAS_STD / math.sqrt(layer.in_features))


def _fault(keys: Keys, pretrained: bool) -> str | None:
    if keys.get("encoder_hid_dim_type") != "text_proj":
        return "encoder_hid_dim_type: the canvas needs a projection of captions. Set this key to text_proj"
    return None


CANVAS = Family(CanvasUNet, "cross_attention_dim", outputs=4, part="unet", fault=_fault, initial=_initial)
