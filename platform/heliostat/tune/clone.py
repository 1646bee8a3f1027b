"""Clones a trial for PBT's exploitation: its run goes on from another trial's checkpoint, as if it had come there itself.

The data cursor's rule: a checkpoint's step is the run's step, so the cursor is the donor's. Samples follow from the step alone,
and all trials of a PBT sweep have the same data plan; so the clone goes on with the samples that come after the donor's, and its
receipts up to there, which are copied, are those that it would have written itself: `heliostat verify` holds.
"""

from __future__ import annotations

import json
from typing import Any

from heliostat.checkpoint import layout
from heliostat.errors import CheckpointError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.tune.trial_record import read_json


def clone(wanted: dict[str, Any], run: Location) -> bool:
    """Makes the checkpoint of `wanted` (id, folder, step) the newest of the run; returns False if that was done before."""
    if (read_json(run.join(run_folder.CLONE)) or {}).get("id") == wanted["id"]:
        return False
    donor, step = Location(wanted["folder"]), wanted["step"]
    found = layout.open_checkpoint(donor, step)
    for own in layout.steps(run):
        if own >= step:
            place = layout.folder(run, own)
            place.join(layout.INDEX).delete()  # first, so that a half-deleted checkpoint does not exist
            place.delete()
    if found.frozen:
        place = run.join(run_folder.CHECKPOINTS, found.frozen.location.name)
        for name in (*(file for file, _ in layout.files(found.frozen.index)), layout.INDEX):
            copy(found.frozen.location.join(name), place.join(name))
    target = layout.folder(run, step)
    for file, _ in layout.files(found.index):
        copy(found.location.join(file), target.join(file))
    for folder in (run_folder.SEGMENTS, run_folder.RECEIPTS, run_folder.QUARANTINE):
        run.join(folder).delete()
        for name, _ in donor.join(folder).files():
            if run_folder.step_of(name) <= step:
                copy(donor.join(folder, name), run.join(folder, name))
    copy(found.location.join(layout.INDEX), target.join(layout.INDEX))
    made = layout.open_checkpoint(run, step)
    if made.index != found.index:
        raise CheckpointError(f"{target}: is not what was cloned from {found.location}")
    run.join(run_folder.CLONE).write(json.dumps(wanted).encode())
    return True


def copy(source: Location, target: Location) -> None:
    """Copies a file as a stream, so that it appears at the target only when it is whole."""
    with source.open() as file:
        size = file.size()

        def fill(out: Any) -> None:
            file.seek(0)
            while block := file.read(16 << 20):
                out.write(block)

        target.send(fill, size)
