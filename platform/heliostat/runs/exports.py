"""Records the folders to which the user exported a run's checkpoints, in the run's folder. `heliostat run lineage` lists these
folders, and `heliostat data forget` lists them among the models that contain the forgotten document."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from typing_extensions import TypedDict

from heliostat.errors import HeliostatError
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Whole, open_
from heliostat.storage.run_folder import EXPORTS

log = logging.getLogger(__name__)


@open_
class ExportedFolder(TypedDict):
    """Describes an export. `adapter`: whether the folder contains only the adapter. `at`: seconds since the epoch."""

    folder: str
    step: Whole
    adapter: bool
    at: float


LISTED = Format(list[ExportedFolder], "list of a run's exports", fix="Delete the file to start a new list")


def add(run: Location, folder: Path, step: int, adapter: bool) -> None:
    """Adds an export to the run's list. If the list can't be written, logs a warning, because the export is complete."""
    one: ExportedFolder = {"folder": str(folder.absolute()), "step": step, "adapter": adapter, "at": round(time.time(), 3)}
    try:
        others = [known for known in read(run) if known["folder"] != one["folder"]]
        run.join(EXPORTS).write(json.dumps([*others, one]).encode())
    except (HeliostatError, OSError) as e:
        log.warning("%s: the lineage won't list the export in %s (%s)", run, folder, e)


def read(run: Location) -> list[ExportedFolder]:
    """Lists the exports of a run, oldest first. Raises DataError if the list is damaged."""
    try:
        return LISTED.read(run.join(EXPORTS))
    except FileNotFoundError:
        return []
