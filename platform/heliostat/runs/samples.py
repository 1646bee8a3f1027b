"""Shows the samples of a step: the origin and the content of each sample. The recipe formats the content for people."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from heliostat.checkpoint import layout
from heliostat.data.content import part
from heliostat.data.dataset import Dataset, open_dataset
from heliostat.errors import ConfigError
from heliostat.recipes.loading import load
from heliostat.recipes.protocol import Recipe
from heliostat.runs.history import History
from heliostat.storage.locations import Location


class Place(TypedDict):
    """Describes the location of a sample. `row`: the sample's index in the row group."""

    shard: str
    row_group: int
    row: int


class BadSample(Place):
    reason: str


class Sample(Place):
    """Describes a sample of a step. `replaces`: the bad sample that this sample replaced."""

    lane: int
    place: int
    source: str
    epoch: int
    text: str
    replaces: BadSample | None


def samples(run: Location, step: int) -> list[Sample]:
    """Reads the global batch of a step, counted from 1, ordered by virtual rank. Raises ConfigError if the run has no such
    step."""
    history = History(run)
    if not 1 <= step <= history.steps:
        raise ConfigError(f"step: the run has no step {step}. Pass a step from 1 to {history.steps}.")
    index = step - 1
    data = open_dataset(history.plans[history.segment(index)])
    recipe = _recipe(run, data)
    places = data.order.step(index)
    loaded = data.load(places.ravel())
    bad: dict[int, BadSample] = {b.position: {**_place(data, b.source, b.chunk, b.row), "reason": b.reason} for b in loaded.bad}
    out = list[Sample]()
    for i, position in enumerate(places.ravel().tolist()):
        lane, place = divmod(i, places.shape[1])
        source, chunk, row, epoch = (int(getattr(loaded.samples, f)[i]) for f in ("source", "chunk", "row", "epoch"))
        out.append(
            {
                "lane": lane,
                "place": place,
                "source": data.plan.uris[source],
                **_place(data, source, chunk, row),
                "epoch": epoch,
                "text": recipe.describe(part(loaded.content, slice(i, i + 1))),
                "replaces": bad.get(position),
            }
        )
    return out


def _place(data: Dataset, source: int, chunk: int, row: int) -> Place:
    chunks = data.sources[source].chunks
    return {"shard": chunks["path"][chunk].as_py(), "row_group": chunks["row_group"][chunk].as_py(), "row": row}


def _recipe(run: Location, data: Dataset) -> Recipe:
    """Loads the recipe of the job in the newest checkpoint, and binds it to the data. Raises ConfigError if there is no
    checkpoint."""
    last = layout.latest(run)
    if last is None:
        raise ConfigError(
            f"{run}: has no complete checkpoint, so the run's recipe isn't known. Try again after the first checkpoint"
        )
    return load(last.job, data.sources, None if run.is_s3 else Path(run.path), weights=False)
