"""Reads what an index says of itself, `index.json`."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, cast

from pydantic import Field
from typing_extensions import TypedDict

from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Inside, Number, Whole, open_

RECORD = "index.json"


@open_
class Record(TypedDict):
    """Describes an index. `ends`: the record of its documents, as datasets list it; `replaced`: earlier ones, since when."""

    dataset: Any
    embedder: Any
    settings: Any
    documents: Any
    passages: Any
    version: Whole
    ends: list[Annotated[list[Inside], Field(min_length=2, max_length=2)]]
    replaced: NotRequired[dict[Inside, Number]]


FORMAT = Format(Record, "record of an index", fix="run `heliostat index-documents` again")


def read(index: Location) -> dict[str, Any]:
    """Reads the record; ConfigError if there is no finished index, DataError if the record is damaged."""
    place = index.join(RECORD)
    try:
        return cast(dict[str, Any], FORMAT.read(place))
    except FileNotFoundError as e:
        raise ConfigError(f"{index}: no index here ({RECORD} is missing); make one with `heliostat index-documents`") from e
