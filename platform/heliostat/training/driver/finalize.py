"""Finalizes a run whose steps are done: exports its model, logs and registers it, and writes the run's result."""

from __future__ import annotations

import json
import logging
from typing import Any

from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.config.spec import Job
from heliostat.recipes.protocol import Exports, Serves
from heliostat.runs import goodput
from heliostat.runs.time_ledger import LedgerRecorder
from heliostat.storage import local_files
from heliostat.storage import run_folder as paths
from heliostat.storage.lease import Lease
from heliostat.terminal import console
from heliostat.tracking.logger import RunOwner
from heliostat.validation.check import Checked

log = logging.getLogger(__name__)

LEFT = {  # what a run leaves whose model is not logged, by whether its recipe exports
    True: "is of no kind that MLflow serves; `heliostat export` writes the model as a folder",
    False: "is not exported; what the run leaves are its checkpoints",
}


def finalize(
    checked: Checked, held: Lease, ledger: LedgerRecorder, owner: RunOwner, last: SavedCheckpoint, summary: dict[str, Any]
) -> dict[str, Any]:
    """Exports the last checkpoint, logs and registers the model, and shows sample outputs; returns the run's result.

    Idempotent: after an interruption all of it may run again, which reuses what is there; `result.json` is written last.
    """
    from heliostat.inference.export import export
    from heliostat.tracking import card
    from heliostat.tracking.models import log_model

    job = checked.job
    held.fence.check()
    owner.client()  # MLflow is there, and the run is open
    model_uri: str | None = None
    samples: list[tuple[str, str]] = []
    if isinstance(checked.recipe, Exports):
        with local_files.temporary_folder("heliostat-export-") as name, console.status("exporting the model"):
            folder = name / "model"
            recipe: Any = export(last, folder, owner.run_id)
            card.write(folder, job, owner.run_id, last.step, summary["eval"], checked.manifests)
            if isinstance(recipe, Serves):
                model_uri = log_model(job, owner.run_id, last, folder, recipe, summary["eval"])
            samples = recipe.demonstrate(folder)
    if model_uri is None:
        what = LEFT[isinstance(checked.recipe, Exports)]
        log.warning("no model is logged, because %s %s", job.recipe, what)
    owner.describe(model_uri, samples)
    result = {"run_id": owner.run_id, **summary, "model_uri": model_uri, "checkpoint": str(last.location)}
    result["reference"] = {m.location.name: m.meta.get("unigram_entropy") for m in checked.manifests}
    result["goodput"] = goodput.summary(ledger.report())
    result["unit"] = unit(job)
    result["samples"] = [{"prompt": p, "text": t} for p, t in samples]
    held.fence.check()
    job.run_folder.join(paths.RESULT).write(json.dumps(result, indent=2).encode())
    return result


def unit(job: Job) -> str:
    """Returns the unit that rates count: tokens or samples."""
    return "tokens" if job.data.sequence_length else "samples"
