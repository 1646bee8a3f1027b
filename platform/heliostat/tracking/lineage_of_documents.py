"""Finds the runs that have trained on a document, in any version of its dataset, with their samples and steps."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from heliostat.config import workspace
from heliostat.curation import reasons, recording
from heliostat.data import ancestry, documents
from heliostat.data.coverage import Visit, visits
from heliostat.data.dataset import open_dataset
from heliostat.data.documents import Piece
from heliostat.data.manifest import Manifest
from heliostat.errors import DataError
from heliostat.runs import consumed
from heliostat.runs.consumed import Consumed, ConsumedPlace, ConsumedSource, Replaced
from heliostat.storage.locations import Location
from heliostat.tracking.descendants import Descendant, Seen
from heliostat.tracking.lineage import data_of

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run

Chunk = tuple[str, str, int]  # dataset, shard, row group


class DocumentSample(ConsumedPlace):
    """Describes a sample that contains a part of the document.

    For a sample that replaced a bad sample, `lane` (the virtual rank), `place`, and `epoch` are None, because the run's list of
    replaced samples doesn't contain these values.
    """

    step: int  # counted from 1
    lane: int | None
    place: int | None
    epoch: int | None


class Reached(Descendant):
    """Describes a run that has trained on the document, or that may have trained on it.

    `unsure`: number of bad samples whose replacements the run's record doesn't list, so that they may contain the document.
    `fault`: why the samples of this dataset that the run has taken or inherited are unknown; None if they are known.
    """

    samples: list[DocumentSample]
    steps: list[int]
    unsure: int
    fault: str | None


class CopiedDataset(TypedDict):
    """Describes a dataset that was made from the rows of another dataset."""

    name: str
    uri: str
    digest: str


@dataclass
class TrainedOnDocument:
    """Finds the runs that have trained on the document `id` of a dataset: on any version of the dataset, on a dataset from which
    it was made, or on a dataset that was made from it."""

    client: MlflowClient
    dataset: Manifest
    id: str
    places: dict[str, list[tuple[str, Piece]]] = field(default_factory=dict)  # (shard, piece), by the digest of a dataset version
    samples: dict[str, list[DocumentSample]] = field(default_factory=dict)  # by run id
    faults: dict[str, str] = field(default_factory=dict)  # by run id
    copies: list[CopiedDataset] = field(default_factory=list)  # with the document, made from this dataset; known after `runs`

    def runs(self, only: str | None = None) -> list[Reached]:
        """Lists the runs that have trained on the document, directly or through a model from which they were initialized.
        `only`: id of the only run to check."""
        seen = Seen(self.client)
        rows: list[Descendant] = [*seen.rows(lambda run, before: len(self._before(run, before)), only)]
        known = {row["run_id"] for row in rows}
        unsure = seen.unsure(self.faults, [only] if only else seen.runs)
        self.faults |= {run_id: reason for run_id, reason in unsure.items() if run_id not in known}
        rows += [seen.row(seen.runs[run_id], [], 0) for run_id in unsure if run_id not in known]
        return [self._reached(row) for row in rows]

    def _reached(self, row: Descendant) -> Reached:
        samples, unsure = self.samples.get(row["run_id"], []), 0
        if samples:
            data = data_of(self.client, self.client.get_run(row["run_id"]))
            unsure = data["replaced_count"] - len(data["replaced"])
        steps = sorted({sample["step"] for sample in samples})
        return {**row, "samples": samples, "steps": steps, "unsure": unsure, "fault": self.faults.get(row["run_id"])}

    def _before(self, run: Run, before: int | None) -> list[DocumentSample]:
        """Returns the run's samples that contain a part of the document, in the steps up to `before`. If `before` is None, all
        steps count."""
        run_id = run.info.run_id
        if run_id not in self.samples:
            try:
                self.samples[run_id] = self._samples(data_of(self.client, run))
            except DataError as e:
                self.samples[run_id], self.faults[run_id] = [], str(e)
        return [s for s in self.samples[run_id] if before is None or s["step"] <= before]

    def _samples(self, data: Consumed) -> list[DocumentSample]:
        samples, rows_of = list[DocumentSample](), dict[Chunk, set[int]]()
        for segment, taken in zip(consumed.parse(data), data["segments"], strict=True):
            for number, source in enumerate(taken["sources"]):
                if not self._may_contain(source):
                    continue
                for shard, piece in (located := self._pieces(open_dataset(segment.plan).sources[number])):
                    rows = piece.samples(segment.plan.sequence_length or 1)
                    chunk = source["uri"], shard, piece.row_group
                    rows_of.setdefault(chunk, set()).update(rows)
                    samples += [_sample(chunk, visit) for visit in visits(segment, number, piece.chunk, rows)]
                copy: CopiedDataset = {"name": source["name"], "uri": source["uri"], "digest": source["digest"]}
                if located and self.dataset.digest in ancestry.sources(source) and copy not in self.copies:
                    self.copies.append(copy)
        return with_replaced(samples, data["replaced"], rows_of)

    def _may_contain(self, source: ConsumedSource) -> bool:
        shared = ancestry.related(source) & ancestry.related(self.dataset.meta)
        return bool(shared) or same_folder(source["uri"], str(self.dataset.location))

    def _pieces(self, version: Manifest) -> list[tuple[str, Piece]]:
        """Locates the document in a version of the dataset; empty if that version doesn't contain the document."""
        if version.digest not in self.places:
            part = next((name for name, digest in self.dataset.meta.get("digests", {}).items() if digest == version.digest), None)
            whole, folder = (version, "") if part is None else (self.dataset, f"{part}/")
            ends = reasons.end_of(whole, self.id) if "curation" in whole.meta else []
            if not ends and recording.may_lack(whole, self.id):
                limits = recording.limits(recording.every_of(whole))
                raise DataError(f"{whole.location}, version {whole.digest[:12]}: {limits}. {self.id} isn't recorded")
            kept = [row["detail"].removeprefix(folder) for row in ends
                    if row["reason"] == "kept" and row["detail"].startswith(folder)]  # fmt: skip
            path = documents.current(version, kept[0]) if kept else None
            self.places[version.digest] = [(path, p) for p in documents.pieces(version, path, self.id)] if path else []
        return self.places[version.digest]


def same_folder(a: str, b: str) -> bool:
    """Checks whether two URIs name the same folder. Relative paths start at the workspace."""
    return Location(a).absolute(workspace.root()).path == Location(b).absolute(workspace.root()).path


def _sample(chunk: Chunk, visit: Visit) -> DocumentSample:
    dataset, shard, row_group = chunk
    return {"dataset": dataset, "shard": shard, "row_group": row_group, "step": visit.step, "lane": visit.lane,
            "place": visit.place, "epoch": visit.epoch, "row": visit.row}  # fmt: skip


def with_replaced(
    samples: list[DocumentSample], replaced: list[Replaced], rows_of: Mapping[Chunk, Container[int]]
) -> list[DocumentSample]:
    """Removes the bad samples that were replaced, and adds the replacements that contain the document.

    `rows_of` maps each row group to the rows that contain the document.
    """

    def at(place: ConsumedPlace) -> Chunk:
        return place["dataset"], place["shard"], place["row_group"]

    gone = {(bad["step"], at(bad), bad["row"]) for bad in replaced}
    kept = [s for s in samples if (s["step"], at(s), s["row"]) not in gone]
    for bad in replaced:
        by = bad["replaced_by"]
        if by["row"] in rows_of.get(at(by), ()):
            kept.append({"dataset": by["dataset"], "shard": by["shard"], "row_group": by["row_group"], "row": by["row"],
                         "step": bad["step"], "lane": None, "place": None, "epoch": None})  # fmt: skip
    return sorted(kept, key=lambda s: (s["step"], s["lane"] or 0, s["place"] or 0))
