"""Describes how the frozen encoders (`latents`) encode images, for tasks and streams."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from heliostat.curation.images import batches, features
from heliostat.curation.images.latents import EncodedImages, Encoder, Latents
from heliostat.data.manifest_table import ERRORS
from heliostat.storage.locations import Location
from heliostat.tasks.shipping import Shipment

log = logging.getLogger(__name__)


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


def noted(encoded: Iterable[EncodedImages]) -> dict[str, Any]:
    """Returns the entries of a task's record about some encoded batches: the facts about features, and the errors that storing
    adds to the other columns (ERRORS). Earlier versions of heliostat wrote `errors`, in which means and log variances share an
    error."""
    from heliostat.recipes.images.stored_arrays import summed

    each = list(encoded)
    errors = {name: asdict(error) for name, error in summed(one.errors for one in each).items()}
    return {**features.combined(one.features for one in each), ERRORS: errors}


def stated(errors: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Returns the manifest's entry about the errors that storing adds, from the entries ERRORS of all tasks' records. An entry
    is None if an earlier version of heliostat, which measured no such errors, has written the record."""
    from heliostat.recipes.images.stored_arrays import StoredError, summed

    if None in errors:
        log.info("the error of stored latents and embeddings is unknown, because an earlier version of heliostat encoded images")
    measured = summed({name: StoredError(**error) for name, error in one.items()} for one in errors if one)
    known = {} if None in errors else {name: error.named() for name, error in measured.items()}
    return {ERRORS: known} if known else {}


@lru_cache(maxsize=2)
def loaded(settings: str, shipments: tuple[Shipment, ...]) -> Encoder:
    """Loads encoders once per process. `settings`: `Latents` as JSON, with this node's paths. The cache key contains `shipments`,
    because files may change at the same path."""
    return Encoder(Latents.model_validate_json(settings))
