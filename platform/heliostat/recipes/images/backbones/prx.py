"""Describes PRX: a transformer whose image tokens attend to image and text; the text has no stream of its own (Photoroom 2026).

Initial weights: as in `models/prx_layers.py` of Photoroom/PRX: zero in the modulations and in the last layer, torch's weights in
all other layers. diffusers' class has no zeros in the last layer.
"""

from __future__ import annotations

from typing import Any

from diffusers import PRXTransformer2DModel

from heliostat.recipes.images.backbones.family import Family, Weights, zero


def _initial(backbone: Any) -> Weights:
    for block in backbone.blocks:
        yield from zero(block.modulation.lin)
    yield from zero(backbone.final_layer.adaLN_modulation[1])
    yield from zero(backbone.final_layer.linear)


PRX = Family(PRXTransformer2DModel, "context_in_dim", patch=2, masks=True, masked=True, initial=_initial)
