"""Reads the JSON records in the folders of runs, sweeps, and models. An invalid record raises a one-line error.

A `Format` defines one kind of record, and every reader uses it. So a truncated, edited, or foreign file raises one error, with
the file's name and its first fault. Code that uses a record gets only values that it expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Generic, TypeAlias, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from heliostat.errors import DataError, HeliostatError
from heliostat.storage.locations import Location, is_inside
from heliostat.text import brief, printable

T = TypeVar("T")
Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"  # any JSON value, for reading
Whole = Annotated[int, Field(ge=0, lt=2**53)]  # a count or a position: arithmetic on a few of them stays within 64 bits
Number = Annotated[float, Field(allow_inf_nan=False)]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]
Inside = Annotated[str, AfterValidator(lambda path: _inside(path))]  # a relative path that stays inside its folder
AGAIN = 5  # maximum number of further reads of a file that keeps changing
closed = with_config(ConfigDict(extra="forbid"))  # for a dataclass whose records have its fields and no others
open_ = with_config(ConfigDict(extra="allow"))  # for a TypedDict whose records may have more keys


class Format(Generic[T]):
    """Defines one kind of record.

    `kind`: a dataclass, or any type that pydantic supports; `what`: the record's name in errors; `error`: the class of errors;
    `check`: a function that describes the fault of a value, or returns None; `fix`: advice for the user.
    """

    def __init__(
        self,
        kind: type[T],
        what: str,
        error: type[HeliostatError] = DataError,
        check: Callable[[T], str | None] | None = None,
        fix: str = "",
    ) -> None:
        self.kind, self.what, self.error, self.check, self.fix = kind, what, error, check, fix

    @cached_property
    def _adapter(self) -> TypeAdapter[T]:
        return TypeAdapter(self.kind)

    def read(self, place: Location | Path) -> T:
        """Reads the record in a file. Raises FileNotFoundError if the file is missing, `error` if the record is invalid.

        On S3, the object's length is requested before the object's bytes. So if another process replaces the file between these
        two requests, the bytes may be truncated, or other bytes may follow them. In this case, the file is read again.
        """
        data = _bytes(place)
        for _ in range(AGAIN):
            try:
                return self.parse(data, place)
            except self.error:
                before, data = data, _bytes(place)
                if data == before:
                    break
        return self.parse(data, place)

    def read_lines(self, place: Location | Path) -> list[T]:
        """Reads a file with one JSON record per line, and returns the list of records; skips empty lines."""
        lines = _bytes(place).split(b"\n")
        return [self.parse(line, f"{place}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]

    def build(self, raw: object, where: object) -> T:
        """Builds the record from decoded JSON data. `where`: the name of the data's source, for errors."""
        return self.parse(json.dumps(raw).encode(), where)

    def encode(self, record: T) -> bytes:
        """Encodes a record as JSON that `parse` reads back."""
        return json.dumps(self._adapter.dump_python(record, by_alias=True)).encode()

    def parse(self, data: bytes, where: object) -> T:
        try:
            record = self._adapter.validate_json(data, strict=True)
        except ValidationError as e:
            raise self._error(where, _first(e)) from e
        if self.check and (fault := self.check(record)):
            raise self._error(where, fault)
        return record

    def _error(self, where: object, fault: str) -> HeliostatError:
        return self.error(f"{where}: isn't a valid {self.what} ({fault}){f'. {self.fix}' if self.fix else ''}")


def _inside(path: str) -> str:
    if not is_inside(path):
        raise ValueError(f"{printable(path)[:200]!r} is a path outside the folder of this record")
    return path


def _bytes(place: Location | Path) -> bytes:
    return place.read() if isinstance(place, Location) else place.read_bytes()


def _first(error: ValidationError) -> str:
    """Describes the first error of a validation: the key in the record, and the problem."""
    fault = error.errors(include_url=False, include_context=False)[0]
    where = printable(".".join(str(part) for part in fault["loc"]))[:200]
    said = brief(fault["msg"].removeprefix("Value error, "))
    return f"{where}: {said}" if where else said
