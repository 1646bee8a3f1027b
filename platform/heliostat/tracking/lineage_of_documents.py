"""Traces a document forwards: in which samples and steps which runs have trained on it, of any version of its dataset."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from heliostat.config import workspace
from heliostat.curation import reasons
from heliostat.data import documents
from heliostat.data.dataset import open_dataset
from heliostat.data.documents import Piece
from heliostat.data.manifest import Manifest
from heliostat.data.visits import visits
from heliostat.errors import DataError
from heliostat.runs import consumed
from heliostat.storage.locations import Location
from heliostat.tracking import tags
from heliostat.tracking.lineage import data_of
from heliostat.tracking.lineage_of_data import Seen


@dataclass
class Trained:
    """Finds the runs that have trained on a document, which a dataset holds under `id`."""

    client: Any
    made: Manifest
    id: str
    places: dict[str, list[tuple[str, Piece]]] = field(default_factory=dict)  # by a version's digest
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # samples, by run
    faults: dict[str, str] = field(default_factory=dict)  # by run

    @property
    def digests(self) -> set[str]:
        """Returns the digests of the dataset, of a collection's parts, and of what it was made from by forgetting documents."""
        parts = self.made.meta.get("digests", {}).values()
        return {self.made.digest, *parts, *(earlier["digest"] for earlier in self.made.meta.get("forgotten", []))}

    def runs(self, only: str | None = None) -> list[dict[str, Any]]:
        """Finds each run, or `only` one, that has trained on the document, itself or through what it was initialised from.

        Each row holds run_id, name, status, samples (where each lies: step from 1, lane, place, epoch, shard, row_group, row),
        steps, inherited (the ancestors' run ids), models, unsure (replaced bad samples that are not listed), and fault: why
        it is not known what the run took, of a dataset that this one is a version of, or null.
        """
        seen = Seen(self.client)
        rows = seen.rows(lambda run, before: len(self._before(run, before)), only)
        unknown = [seen.runs[run_id] for run_id in self.faults if only in (None, run_id)]
        known = {row["run_id"] for row in rows}
        rows += [{"run_id": run.info.run_id, "name": run.data.tags[tags.NAME], "status": run.info.status, "inherited": [],
                  "models": []} for run in unknown if run.info.run_id not in known]  # fmt: skip
        for row in rows:
            samples = self.found.get(row["run_id"], [])
            row |= {"samples": samples, "steps": sorted({sample["step"] for sample in samples}), "unsure": 0}
            row["fault"] = self.faults.get(row["run_id"])
            if samples:
                data = data_of(self.client, self.client.get_run(row["run_id"]))
                row["unsure"] = data["replaced_count"] - len(data["replaced"])
        return rows

    def _before(self, run: Any, before: int | None) -> list[dict[str, Any]]:
        """Finds the samples of a run in its steps up to `before`, as it was counted there, or in all."""
        run_id = run.info.run_id
        if run_id not in self.found:
            try:
                self.found[run_id] = self._samples(data_of(self.client, run))
            except DataError as e:
                self.found[run_id], self.faults[run_id] = [], str(e)
        return [s for s in self.found[run_id] if before is None or s["step"] <= before]

    def _samples(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        out, held = list[dict[str, Any]](), dict[tuple[Any, ...], range]()
        for segment, told in zip(consumed.parse(data), data["segments"], strict=True):
            for number, source in enumerate(told["sources"]):
                if source["digest"] not in self.digests and not same_folder(source["uri"], str(self.made.location)):
                    continue
                for shard, piece in self._pieces(open_dataset(segment.plan).sources[number]):
                    rows = piece.samples(segment.plan.sequence_length or 1)
                    place = {"dataset": source["uri"], "shard": shard, "row_group": piece.row_group}
                    held[tuple(place.values())] = rows
                    out += [{**place, **asdict(visit)} for visit in visits(segment, number, piece.chunk, rows)]
        return with_replaced(out, data["replaced"], held)

    def _pieces(self, version: Manifest) -> list[tuple[str, Piece]]:
        """Locates the document in a version of the dataset; nowhere, if that one did not keep it."""
        if version.digest not in self.places:
            part = next((name for name, digest in self.made.meta.get("digests", {}).items() if digest == version.digest), None)
            whole, folder = (version, "") if part is None else (self.made, f"{part}/")
            ends = reasons.end_of(whole, self.id) if "curation" in whole.meta else []
            kept = [row["detail"].removeprefix(folder) for row in ends
                    if row["reason"] == "kept" and row["detail"].startswith(folder)]  # fmt: skip
            path = documents.current(version, kept[0]) if kept else None
            self.places[version.digest] = [(path, p) for p in documents.pieces(version, path, self.id)] if path else []
        return self.places[version.digest]


def same_folder(a: str, b: str) -> bool:
    """Tells whether two URIs name the same folder; relative ones start at the workspace."""
    return Location(a).absolute(workspace.root()).path == Location(b).absolute(workspace.root()).path


def with_replaced(samples: list[dict[str, Any]], replaced: list[Any], held: dict[tuple[Any, ...], range]) -> list[dict[str, Any]]:
    """Leaves out the samples that were bad, and others took their place; adds those that took others' places.

    `held`: the rows of each (dataset, shard, row group) that hold the document. Who took a place has no lane in the record.
    """

    def at(place: Any) -> tuple[Any, ...]:
        return place["dataset"], place["shard"], place["row_group"]

    gone = {(bad["step"], *at(bad), bad["row"]) for bad in replaced}
    kept = [s for s in samples if (s["step"], *at(s), s["row"]) not in gone]
    for bad in replaced:
        by = bad["replaced_by"]
        if by["row"] in held.get(at(by), range(0)):
            named = {name: by[name] for name in ("dataset", "shard", "row_group", "row")}
            kept.append({**named, "step": bad["step"], "lane": None, "place": None, "epoch": None})
    return sorted(kept, key=lambda s: (s["step"], s["lane"] or 0, s["place"] or 0))
