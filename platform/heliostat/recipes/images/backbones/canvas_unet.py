"""Defines a U-Net that gets the caption also as feature maps. This file needs only diffusers: exports contain a copy of it.

A U-Net has no positions, so a caption that only scales and shifts its channels can't say where to draw. Here, a linear layer per
resolution draws the projected caption as a feature map (the canvas), which is added to the output of the down block. A second
linear layer (the gate) scales the map's channels: a caption says what to draw and how, for example a fox as an outline, and sums
can't leave out the fox's color. On small pictures, this is much cheaper than cross-attention.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

LIMIT = 4.0  # of a projected caption's numbers: captions unlike those of the training stay in the trained range


class CanvasUNet(UNet2DConditionModel):
    """Has the keys of UNet2DConditionModel. Needs `sample_size`, and `encoder_hid_dim_type: text_proj`. Supports only images of
    `sample_size`."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        config: Any = self.config
        self.side, width = int(config.sample_size), int(config.cross_attention_dim)
        levels = enumerate(config.block_out_channels[:-1], start=1)
        sides = [(channels, -(-self.side >> level)) for level, channels in levels]  # a down block halves a side, and rounds up
        self.canvas_shapes = [(channels, side, side) for channels, side in sides]
        self.canvases = nn.ModuleList([nn.Linear(width, n * height * across) for n, height, across in self.canvas_shapes])
        self.canvas_gates = nn.ModuleList([nn.Linear(width, channels) for channels, _, _ in self.canvas_shapes])
        for block in self.drawn_over:
            block.register_forward_hook(_drawn_over)

    @property
    def drawn_over(self) -> list[Any]:
        """Returns the down blocks that get a canvas: all but the last."""
        return list(self.down_blocks)[:-1]

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **inputs: Any) -> Any:
        """Computes the prediction. `sample`: [n, channels, side, side], with side `sample_size`. `encoder_hidden_states`: [n,
        tokens, width]. Raises ValueError for another size."""
        side, project = self.side, cast("nn.Module", self.encoder_hid_proj)
        if sample.shape[2:] != (side, side):
            raise ValueError(f"the model draws images of {side} x {side} positions, not {sample.shape[3]} x {sample.shape[2]}")
        caption = project(encoder_hidden_states.mean(1)).clamp(-LIMIT, LIMIT)
        layers = zip(self.drawn_over, self.canvases, self.canvas_gates, self.canvas_shapes, strict=True)
        for block, canvas, gate, shape in layers:
            block.drawn = canvas(caption).view(len(sample), *shape) * (1 + gate(caption))[:, :, None, None]
        try:
            return super().forward(sample, timestep, encoder_hidden_states, **inputs)
        finally:
            for block in self.drawn_over:
                block.drawn = None


def _drawn_over(block: Any, inputs: Any, output: tuple[torch.Tensor, tuple[torch.Tensor, ...]]) -> Any:
    """Adds a down block's canvas to its output, and to the skip connection from this output.

    diffusers can add maps in place (`down_intrablock_additional_residuals`). At ZeRO stage 3, DeepSpeed returns a separate tensor
    for each use of an output, with shared memory. So after an addition in place, the skip connection would have no gradient.
    """
    sample, states = output
    drawn = sample + block.drawn
    return drawn, (*states[:-1], drawn) if states[-1] is sample else states


functools.update_wrapper(CanvasUNet.__init__, UNet2DConditionModel.__init__)  # diffusers reads the keys from the signature
