"""Builds a run's folder for `verify`, with receipts, segments, and checkpoints written from their definitions."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from heliostat.checkpoint import layout
from heliostat.data.dataset import DataPlan, Dataset, open_dataset
from heliostat.data.manifest import Manifest
from heliostat.runs import segments, verify
from heliostat.storage.locations import Location

from tests.unit.build_index import index
from tests.unit.test_dataset import naive

CUTS = (0, 3, 10, 11, 20, 23)  # where checkpoints were, and so where receipts begin and end; rounds have two steps
CHANGE = 10  # the step at which the second run's data was changed


class Run:
    """Builds a run's folder with a plain loop. It shares only the positions of samples with the code of the verification."""

    def __init__(self, folder: Path, *plans: DataPlan, cuts: tuple[int, ...] = CUTS) -> None:
        self.location, self.plans = Location(str(folder)), plans
        for plan in plans:
            segments.begin(self.location, plan, plan.first_step)
        self.digests = [self.digest(step) for step in range(cuts[-1])]
        self.chains = [""]
        for digest in self.digests:
            joined = bytes.fromhex(self.chains[-1]) + bytes.fromhex(digest)
            self.chains.append(hashlib.blake2b(joined, digest_size=16).hexdigest())
        for first, end in itertools.pairwise(cuts):
            self.receipt(first, end)
        for step in cuts[1:][-2:]:
            self.checkpoint(step)

    def plan(self, step: int) -> DataPlan:
        return [p for p in self.plans if p.first_step <= step][-1]

    def digest(self, step: int) -> str:
        data = open_dataset(self.plan(step))
        lanes = b""
        for lane in data.order.step(step).tolist():
            digests = b""
            for position in lane:
                place, content = self.sample(data, position)
                hashed = np.array(place, "<i8").tobytes() + np.array(content, "<i4").tobytes()
                digests += hashlib.blake2b(hashed, digest_size=8).digest()
            lanes += hashlib.blake2b(digests, digest_size=8).digest()
        return hashlib.blake2b(lanes, digest_size=16).hexdigest()

    def sample(self, data: Dataset, position: int) -> tuple[list[int], list[int]]:
        """Returns (source, epoch, chunk, row) and the content at a position, or of the next good samples of the source in the
        window."""
        _, begin, end = data.order.window_at(position)
        at = data.order.locate(np.array([*range(position, end), *range(begin, position)]))
        for place in np.stack([at.source, at.epoch, at.chunk, at.row], axis=1).tolist():
            source = data.sources[place[0]]
            content = self.content(source, place[2], place[3])
            if place[0] == at.source[0] and max(content) < source.meta.get("vocab_size", 60_000):
                return place, content
        raise AssertionError("no sample of the source in the window is good")

    def content(self, source: Manifest, chunk: int, row: int) -> list[int]:
        return naive(source, chunk, row)

    def file(self, end: int) -> Location:
        return self.location.join("receipts", f"step-{end:08d}.json")

    def receipt(self, first: int, end: int, **changes: Any) -> None:
        """Writes the receipt of steps [first, end) as the run had to write it, with the given changes."""
        right = {"first": first, "steps": self.digests[first:end], "chain": self.chains[end]}
        self.file(end).write(json.dumps({**right, "data_digest": self.plan(first).digest, **changes}).encode())

    def checkpoint(self, step: int, data_digest: str | None = None, **receipt: Any) -> None:
        facts = {"steps": step, "chain": self.chains[step], **receipt}
        made = index(step, receipt=facts, data_digest=data_digest or self.plan(step - 1).digest)
        layout.folder(self.location, step).join(layout.INDEX).write(layout.encode(made))

    def difference(self) -> tuple[int, str]:
        """Returns the index of the first step that `verify` rejects, and the problem."""
        report = verify.verify(self.location)
        first = report["first_difference"]
        assert not report["ok"] and f"step {first['step']} is the first" in verify.explain(report)
        return first["step"] - 1, first["what"]


def wrong(digest: str) -> str:
    """Returns the digest with another last digit."""
    return digest[:-1] + ("0" if digest[-1] != "0" else "1")


def copied(run: Run, tmp_path: Path) -> Run:
    copy = object.__new__(Run)
    copy.__dict__ = {**run.__dict__, "location": Location(str(tmp_path / "run"))}
    shutil.copytree(run.location.path, tmp_path / "run")
    return copy
