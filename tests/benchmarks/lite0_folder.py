"""Writes EfficientNet-Lite0 as a model folder of transformers, for features of patches (`latents.features.encoder`).

    python -m tests.benchmarks.lite0_folder FOLDER

transformers has only EfficientNets with squeeze-and-excitation. Here, each excitation is the sigmoid of a large number, so it
multiplies by exactly 1. The program compares the folder's pooled features with those of heliostat's own class.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from heliostat.recipes.images import efficientnet_lite as lite
from transformers import AutoModel, EfficientNetConfig, EfficientNetModel, ViTImageProcessor

OPEN = 40.0  # sigmoid(40) is 1 in fp32
TOLERANCE = 1e-4
LAYERS = {
    "expansion.expand_conv": "_expand_conv", "expansion.expand_bn": "_bn0", "depthwise_conv.depthwise_conv": "_depthwise_conv",
    "depthwise_conv.depthwise_norm": "_bn1", "projection.project_conv": "_project_conv", "projection.project_bn": "_bn2",
}  # fmt: skip
ENDS = {"embeddings.convolution": "_conv_stem", "embeddings.batchnorm": "_bn0", "encoder.top_conv": "_conv_head",
        "encoder.top_bn": "_bn1"}  # fmt: skip


def config() -> EfficientNetConfig:
    counts, kernels, strides, expansions, channels = (list(column) for column in zip(*lite.STAGES, strict=True))
    return EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, image_size=lite.SIDE, hidden_dim=lite.WIDTH, hidden_act="relu6",
        kernel_sizes=kernels, in_channels=[lite.STEM, *channels[:-1]], out_channels=channels, strides=strides,
        num_block_repeats=counts, expand_ratios=expansions, depthwise_padding=[], batch_norm_eps=1e-3, pooling_type="mean",
    )  # fmt: skip


def converted(weights: lite.EfficientNetLite0) -> EfficientNetModel:
    """Returns the model of transformers with the same weights."""
    model = EfficientNetModel(config()).eval()
    model.encoder.top_activation = torch.nn.ReLU6()
    pairs = [(model.get_submodule(ours), weights.get_submodule(name)) for ours, name in ENDS.items()]
    for block, other in zip(model.encoder.blocks, weights._blocks, strict=True):
        pairs += [(block.get_submodule(a), other.get_submodule(b)) for a, b in LAYERS.items() if hasattr(other, b)]
        for layer, bias in ((block.squeeze_excite.reduce, 0.0), (block.squeeze_excite.expand, OPEN)):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, bias)
    for mine, source in pairs:
        mine.load_state_dict(source.state_dict())
    return model


def main() -> None:
    folder, weights = Path(sys.argv[1]), lite.load("lite0")
    converted(weights).save_pretrained(folder)
    normal = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3, "size": {"height": lite.SIDE, "width": lite.SIDE}}
    ViTImageProcessor(**normal).save_pretrained(folder)
    pixels = torch.randint(0, 256, (2, 3, lite.SIDE, lite.SIDE), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder)(pixel_values=(pixels - 127) / 128).last_hidden_state.mean((2, 3))
        error = float((theirs - weights(pixels)).abs().max())
    if error > TOLERANCE:
        sys.exit(f"{folder}: the features differ from those of heliostat's class by {error:.2g}")
    print(f"{folder}: the features differ from those of heliostat's class by at most {error:.2g}")


if __name__ == "__main__":
    main()
