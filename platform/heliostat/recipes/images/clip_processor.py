"""Makes the pixels that a CLIP takes: as the image processor in its folder would, of images that have their size already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.pretrained import from_folder


def of_size(side: int, channels: int) -> Any:
    """Makes a processor of square images, which takes pixels to [-1, 1]."""
    return CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, do_convert_rgb=channels == 3,
                                 image_mean=[0.5] * channels, image_std=[0.5] * channels)  # fmt: skip


def of_folder(folder: str) -> Any:
    """Loads the processor of a pretrained model; ConfigError if it does more than scale and shift pixels of the right size."""
    with exported.using(Path(folder)):
        found = from_folder("model.pretrained", AutoImageProcessor, folder, backend="pil")
    if not (found.do_rescale and found.do_normalize and abs(found.rescale_factor * 255 - 1) < 1e-6):
        raise ConfigError(
            f"model.pretrained: the image processor of {folder!r} does not scale pixels of 0 to 255 by their mean and deviation; "
            "take another model"
        )
    return found


def normalised(processor: Any, images: np.ndarray) -> torch.Tensor:
    """Makes what the model takes, fp32 [n, channels, height, width], of uint8 [n, height, width, channels]."""
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / deviation
