"""Reads what an index says of itself, `index.json`."""

from __future__ import annotations

import json
from typing import Any

from heliostat.errors import ConfigError, DataError
from heliostat.storage import Location

RECORD = "index.json"
PARTS = ("dataset", "embedder", "settings", "documents", "passages", "version", "ends")


def read(index: Location) -> dict[str, Any]:
    """Reads the record; ConfigError if there is no finished index, DataError if the record is damaged."""
    place = index.join(RECORD)
    try:
        found = json.loads(place.read())
    except FileNotFoundError as e:
        raise ConfigError(f"{index}: no index here ({RECORD} is missing); make one with `heliostat index-documents`") from e
    except ValueError as e:
        raise DataError(f"{place}: damaged; delete it, and run `heliostat index-documents` again") from e
    if not isinstance(found, dict) or any(part not in found for part in PARTS):
        raise DataError(f"{place}: is no record of an index; name another folder")
    return found
