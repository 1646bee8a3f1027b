"""Lists the families of backbones by the names that `model.backbone.arch` has for them."""

from __future__ import annotations

from heliostat.recipes.images.backbones.canvas import CANVAS
from heliostat.recipes.images.backbones.family import Family
from heliostat.recipes.images.backbones.flux import FLUX
from heliostat.recipes.images.backbones.lumina import LUMINA
from heliostat.recipes.images.backbones.pixart import PIXART
from heliostat.recipes.images.backbones.prx import PRX
from heliostat.recipes.images.backbones.sana import SANA
from heliostat.recipes.images.backbones.sd3 import SD3
from heliostat.recipes.images.backbones.unet import UNET

FAMILIES: dict[str, Family] = {
    "unet": UNET,
    "canvas": CANVAS,
    "pixart": PIXART,
    "sd3": SD3,
    "flux": FLUX,
    "lumina": LUMINA,
    "sana": SANA,
    "prx": PRX,
}


def named(cls: object) -> tuple[str, Family] | None:
    """Finds the family of a class by the class's name; None for another class."""
    return next(((arch, family) for arch, family in FAMILIES.items() if family.cls.__name__ == cls), None)
