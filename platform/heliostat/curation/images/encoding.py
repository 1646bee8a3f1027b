"""Describes how the frozen encoders (`latents`) encode images, for tasks and streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from heliostat.curation.images import batches
from heliostat.curation.images.latents import Encoder, Latents
from heliostat.storage.locations import Location
from heliostat.tasks.shipping import Shipment


@dataclass(frozen=True)
class Encoding:
    """Describes how to encode images: the pipeline's settings, the files of the encoders, and the columns with further captions
    to encode."""

    latents: Latents
    shipments: tuple[Shipment, ...]
    captions: tuple[str, ...] = ()

    def batches(self, table: pa.Table) -> Iterator[pa.Table]:
        """Divides images into batches for `encoder`. If an encoder needs pixels, decodes the images."""
        for batch in batches.batches(table, self.latents.batch):
            yield batches.with_pixels(batch) if self.latents.needs_pixels else batch

    def encoder(self, folder: Location) -> Encoder:
        """Loads the encoders once per process. Raises NotHereError if this node lacks files. `folder`: for temporary files."""
        return loaded(self.latents.located(folder, list(self.shipments)).model_dump_json(), self.shipments)


@lru_cache(maxsize=2)
def loaded(settings: str, shipments: tuple[Shipment, ...]) -> Encoder:
    """Loads encoders once per process. `settings`: `Latents` as JSON, with this node's paths. The cache key contains `shipments`,
    because files may change at the same path."""
    return Encoder(Latents.model_validate_json(settings))
