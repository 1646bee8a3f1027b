"""Finalizes a run whose steps are done: exports its model, logs and registers it, and writes the run's result.

Two parts run earlier, while workers still train. `WarmUp` imports the modules that finalizing needs. `Beside` scores the run's
checkpoints on tasks (`evaluate.benchmarks`): it runs `heliostat model benchmark RUN SUITE --follow` in a separate process, on the
driver's CPUs, at low priority. No worker waits for it, and its failure doesn't fail the run.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading

import psutil

from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.cluster import processes
from heliostat.config.spec import Job
from heliostat.recipes.protocol import Exports, Generates, Recipe, Serves
from heliostat.runs import goodput
from heliostat.runs.summary import Ending
from heliostat.runs.time_ledger import LedgerRecorder
from heliostat.storage import local_files
from heliostat.storage import run_folder as paths
from heliostat.storage.lease import Lease
from heliostat.terminal import console
from heliostat.tracking.logger import RunOwner
from heliostat.validation.check import Checked

log = logging.getLogger(__name__)

END_S = 10.0  # seconds for the process that scores checkpoints to end
WAIT_S = 120.0  # seconds that a run's end waits for WarmUp's imports; after that it imports the modules itself
NICE = 10
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # the workers use the GPUs
LEFT = {  # why a run's model isn't logged, by whether its recipe exports
    True: "has a kind of model that MLflow doesn't serve. Write the model to a folder: heliostat model export",
    False: "doesn't support export. The run's checkpoints remain",
}


def finalize(
    checked: Checked, lease: Lease, ledger: LedgerRecorder, owner: RunOwner, last: SavedCheckpoint, summary: Ending
) -> Ending:
    """Exports the last checkpoint, logs and registers the model, and records sample outputs. Returns the run's result.

    Idempotent: after an interruption, this function can run again, and reuses the parts that exist. The function writes
    `result.json` last.
    """
    from heliostat.inference.export import export
    from heliostat.tracking import card
    from heliostat.tracking.models import log_model

    job = checked.job
    lease.fence.check()
    owner.client()  # waits until MLflow answers; raises TrackingError if it doesn't
    model_uri: str | None = None
    samples: list[tuple[str, str]] = []
    if isinstance(checked.recipe, Exports):
        with local_files.temporary_folder("heliostat-export-") as name, console.status("exporting the model"):
            folder = name / "model"
            recipe = export(last, folder, owner.run_id)
            assert isinstance(recipe, Exports)
            card.write(folder, job, owner.run_id, last.step, summary["eval"], checked.manifests)
            if isinstance(recipe, Serves):
                model_uri = log_model(job, owner.run_id, last, folder, recipe, summary["eval"])
            samples = recipe.demonstrate(folder)
    if model_uri is None:
        what = LEFT[isinstance(checked.recipe, Exports)]
        log.warning("no model logged in MLflow: the recipe %s %s", job.recipe, what)
    owner.describe(model_uri, samples)
    result = {"run_id": owner.run_id, **summary, "model_uri": model_uri, "checkpoint": str(last.location)}
    result["reference"] = {m.location.name: m.meta.get("unigram_entropy") for m in checked.manifests}
    result["goodput"] = goodput.summary(ledger.report())
    result["unit"] = unit(checked)
    rendered = isinstance(checked.recipe, Generates) and checked.recipe.rendered
    result["samples"] = [{"prompt": p, "text": t, "rendered": rendered} for p, t in samples]
    lease.fence.check()
    job.run_folder.join(paths.RESULT).write(json.dumps(result, indent=2).encode())
    return result


def unit(checked: Checked) -> str:
    """Returns the unit of rates: tokens or samples."""
    return "tokens" if checked.sample_tokens else "samples"


class WarmUp:
    """Imports the modules that exporting and logging a recipe's model needs, once `begin` is called."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._thread = threading.Thread(target=self._import, name="warm-up", daemon=True)

    def begin(self) -> None:
        """Begins the imports in a thread. Does nothing if the imports have begun, or if the recipe exports nothing."""
        if isinstance(self.recipe, Exports) and not self._thread.ident:
            self._thread.start()

    def wait(self) -> None:
        """Waits for the imports to complete if they have begun, at most WAIT_S seconds."""
        if self._thread.ident:
            self._thread.join(WAIT_S)

    def _import(self) -> None:
        """Imports the modules, and builds the recipe's model on the meta device, as the export does later."""
        try:
            import torch

            from heliostat.inference import export  # noqa: F401
            from heliostat.recipes import building
            from heliostat.tracking import models  # noqa: F401

            with torch.device("meta"):
                building.build(self.recipe)
        except Exception as e:  # noqa: BLE001 (the export would raise and report the same error)
            log.debug("can't import the modules for the export in advance: %s", e)


class Beside:
    """Owns the process that scores checkpoints on tasks, if the job asks for one."""

    def __init__(self, job: Job) -> None:
        self.job, self.asked = job, job.evaluate.benchmarks if job.evaluate else None
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Starts the process that scores and exports checkpoints, if the job needs this process and it isn't running.

        So the process starts at the first checkpoint, and again after its death.
        """
        if self.asked is None or (self._process and self._process.poll() is None):
            return
        run = self.job.run_folder
        command = ["model", "benchmark", run.uri, self.asked.suite, "--follow", "--every", str(self.asked.every), "--out",
                   run.join(paths.BENCHMARKS, "followed.json").uri, "--json"]  # fmt: skip
        self._process = subprocess.Popen(
            ["nice", "-n", str(NICE), sys.executable, "-m", "heliostat", *command],
            env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Waits for the last scores, at most `evaluate.benchmarks.wait` seconds.

        Logs a warning if the scores aren't complete by then.
        """
        if self.asked is None or self._process is None:
            return
        again = f"heliostat model benchmark {self.job.run_folder} {self.asked.suite} --follow"
        try:
            code = self._process.wait(self.asked.wait)
        except subprocess.TimeoutExpired:
            self.end()
            log.warning(
                "evaluate.benchmarks: not all checkpoints are scored after %g s. Continue with: %s", self.asked.wait, again
            )
            return
        if code:
            log.warning("evaluate.benchmarks: scoring ended with exit code %d. Continue with: %s", code, again)

    def end(self) -> None:
        """Ends the process that scores checkpoints. heliostat keeps the scores so far."""
        if self._process and self._process.poll() is None:
            processes.stop([psutil.Process(self._process.pid)], END_S)
            self._process.wait(END_S)
