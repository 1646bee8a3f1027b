"""Reads recorded data plans (of a run's segments, its checkpoints, `data.json`), or refuses them with a one-line error."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from heliostat.config.fields import Json
from heliostat.data.dataset import DataPlan
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Number, Whole, closed, open_

LARGEST = 1 << 27  # samples of a step or a window: what is beyond it was never a plan, and would be read at once
Size = Annotated[int, Field(gt=0, le=LARGEST)]


@closed
class RecordedShape(TypedDict):
    batch: Size
    lanes: Size
    superstep: Size
    window: Size
    unit: Size


@open_
class Plan(TypedDict):
    uris: list[str]
    digests: list[str]
    mix: list[tuple[Whole, list[Number]]]
    max_epochs: list[Number | None]
    sequence_length: Annotated[int, Field(gt=1, le=LARGEST)] | None
    seed: Whole
    held_fraction: Annotated[float, Field(ge=0, lt=1)]
    shape: RecordedShape
    skips: list[tuple[Whole, Whole, Whole]]
    version: NotRequired[Annotated[int, Field(ge=1)]]


def _fault(plan: Plan) -> str | None:
    shape, sources, steps = plan["shape"], len(plan["uris"]), [step for step, _ in plan["mix"]]
    per_lane, rest = divmod(shape["batch"], shape["lanes"])
    if not sources or {len(plan["digests"]), len(plan["max_epochs"]), *(len(weights) for _, weights in plan["mix"])} != {sources}:
        return "uris, digests, max_epochs and weights are not one for each source"
    if not steps or any(a >= b for a, b in itertools.pairwise(steps)):
        return "mix: its steps do not ascend"
    if any(min(weights) < 0 or not 0 < math.fsum(weights) < 1e18 for _, weights in plan["mix"]):
        return "mix: weights must not be negative, and one must be above 0"
    if any(limit is not None and not 0 < limit < 1e12 for limit in plan["max_epochs"]):
        return "max_epochs: must be above 0"
    if rest or per_lane % shape["unit"] or shape["window"] % (shape["superstep"] * per_lane):
        return "shape: lanes must divide the batch, the unit a lane's samples, and a block the window"
    return None


RAW, PLAN = Format(dict[str, Json], "data plan"), Format(Plan, "data plan", check=_fault)


def build(raw: Json, where: object) -> DataPlan:
    """Builds the plan that was dumped as `raw`; DataError that names `where` if it is no valid plan."""
    if isinstance(raw, dict):  # plans of before there were any do not name theirs
        shape = raw.get("shape")
        raw = {"skips": [], **raw, **({"shape": {"unit": 1, **shape}} if isinstance(shape, dict) else {})}
    PLAN.build(raw, where)
    try:
        return DataPlan.parse(raw)
    except DataError as e:
        raise DataError(f"{where}: {e}") from e
    except (TypeError, ValueError, KeyError) as e:  # a key of another version's
        raise DataError(f"{where}: is a data plan of another version of heliostat ({e})") from e


def read(place: Location) -> DataPlan:
    """Reads the plan in a file; FileNotFoundError if there is none."""
    return build(RAW.read(place), place)
