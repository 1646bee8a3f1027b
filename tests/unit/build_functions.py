"""Builds a small dataset for the example classifier, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heliostat.data import manifest
from heliostat.data.manifest import Manifest
from heliostat.storage.locations import Location

from jobs.examples.functions import Functions


def dataset(folder: Path, **keys: Any) -> Manifest:
    """Writes a dataset of functions from two packages, unless `keys` choose another input."""
    given = {
        "name": "functions",
        "output": str(folder),
        "packages": ["json", "http"],
        "vocab_size": 384,
        "chunk_rows": 32,
        **keys,
    }
    pipeline, place = Functions(**given), Location(str(folder))
    pipeline.check()
    return manifest.write(place, *pipeline.write(place, pipeline.inputs()))
