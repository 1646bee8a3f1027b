"""Relates datasets whose documents have the same ids: versions of one dataset, and datasets that were made from its rows.

A manifest's metadata has the key `made_from` if the rows are those of another dataset, with more columns. So a document that is
known in one of the datasets can be located in the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import TypedDict

from heliostat.data.manifest import UNCOVERED, Manifest

_, PIPELINE = UNCOVERED
# keys of PIPELINE: the origins of the reference model, and of the model that wrote the texts; the folders of `made_from`
REFERENCE, WRITER, FOLDERS = "reference", "writer", "folders"
MADE_FROM = "made_from"  # key of a list of `SourceDataset` in the manifest's metadata, the nearest dataset first


class SourceDataset(TypedDict):
    """Describes a dataset from whose rows another dataset was made."""

    name: str
    digest: str


def made_from(dataset: Manifest) -> list[SourceDataset]:
    """Returns the value of MADE_FROM for a dataset that is made from the rows of `dataset`."""
    own: SourceDataset = {"name": dataset.meta.get("name", dataset.location.name), "digest": dataset.digest}
    return [own, *dataset.meta.get(MADE_FROM, [])]


def related(facts: Mapping[str, Any]) -> set[str]:
    """Returns the digests of a dataset, of its parts (for a collection), of the earlier versions from which documents were
    removed, and of the datasets from which it was made. Two datasets can contain the same documents if they share a digest.

    `facts`: the manifest's metadata, or a run's record of the dataset, which has the same keys.
    """
    earlier = {one["digest"] for one in facts.get("forgotten", [])}
    return {facts["digest"], *facts.get("digests", {}).values(), *earlier, *sources(facts)}


def sources(facts: Mapping[str, Any]) -> set[str]:
    """Returns the digests of the datasets from which a dataset was made."""
    return {one["digest"] for one in facts.get(MADE_FROM, [])}


def inputs_of(dataset: Manifest) -> list[str]:
    """Returns the input of the pipeline that made a dataset, after the folders of the datasets of `made_from`. Empty if the
    dataset has no record, because its pipeline has no stages."""
    record = _record(dataset)
    return [*record.get(FOLDERS, []), *([record["input"]] if "input" in record else [])]


def models_of(dataset: Manifest) -> dict[str, dict[str, Any]]:
    """Returns the origins of the models that made a part of a dataset, as `recipes.model_origins` describes them, by their role:
    REFERENCE computed the log-probabilities, and WRITER wrote the texts (`heliostat model infer`)."""
    record = _record(dataset)
    return {role: record[role] for role in (REFERENCE, WRITER) if record.get(role)}


def _record(dataset: Manifest) -> dict[str, Any]:
    recorded = "curation" in dataset.meta or MADE_FROM in dataset.meta
    return dataset.uncovered(PIPELINE) if recorded else {}
