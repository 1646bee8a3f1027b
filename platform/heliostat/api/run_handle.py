"""Reads a run's folder from Python: its curves, checkpoints, and receipts. The class `Run` also exports the run's model, and
generates with this model.

run = heliostat.Run(".heliostat/runs/quickstart") # or an MLflow run id
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from heliostat.config.spec import Job
from heliostat.errors import CheckpointError, ConfigError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location

if TYPE_CHECKING:  # imports torch, which takes a second
    from heliostat.checkpoint.layout import SavedCheckpoint
    from heliostat.checkpoint.retention import RetentionRow
    from heliostat.recipes.protocol import Generated
    from heliostat.runs.goodput import GoodputReport as Goodput
    from heliostat.runs.history import ReceiptFile
    from heliostat.runs.samples import Sample
    from heliostat.runs.summary import Ending
    from heliostat.runs.verify import VerifyReport as Verification


class Run:
    """Opens a run. Raises ConfigError if the run doesn't exist. Reads everything on demand, so the run may still be in
    progress."""

    def __init__(self, run: str | os.PathLike[str], tracking_uri: str | None = None) -> None:
        """Finds a run by its folder (STORAGE/NAME, local or on S3) or by its MLflow run id. `tracking_uri`: the MLflow store that
        has the run with this id."""
        from heliostat.storage.model_sources import default_uri
        from heliostat.tracking.models import find_run

        if not isinstance(run, str | os.PathLike):
            raise ConfigError(f"run: expected a run's folder or its MLflow id, got {run!r}")
        self._place: Location = find_run(os.fspath(run), tracking_uri or default_uri()).absolute(Path.cwd())

    def __repr__(self) -> str:
        return f"heliostat.Run({self.folder!r})"

    @property
    def folder(self) -> str:
        return str(self._place)

    @property
    def name(self) -> str:
        return self._place.name

    @property
    def run_id(self) -> str | None:
        """Returns the MLflow run's id; None before MLflow has the run."""
        from heliostat.runs.mlflow_id import record

        return record(self._place).get("run_id")

    @property
    def job(self) -> Job:
        """Reads the job from the newest checkpoint. Raises CheckpointError if there is no checkpoint."""
        return self._checkpoint(None).job

    @property
    def result(self) -> Ending | None:
        """Reads the output of `heliostat train --json`; None before the run has ended."""
        try:
            return json.loads(self._place.join(run_folder.RESULT).read())
        except FileNotFoundError:
            return None

    def metrics(self) -> dict[str, dict[int, float]]:
        """Reads every curve up to the newest checkpoint: name in MLflow (`train/loss`, `eval/loss`, ...) -> step -> value.

        Steps count from 1.
        """
        from heliostat.tracking.local_curves import read

        curves = dict[str, dict[int, float]]()
        for point in read(self._place):
            curves.setdefault(point.key, {})[point.step] = point.value
        return curves

    def losses(self) -> dict[int, float]:
        """Reads the training loss of every step, counted from 1, up to the newest checkpoint."""
        return self.metrics().get("train/loss", {})

    def checkpoints(self) -> list[RetentionRow]:
        """Lists the checkpoints in ascending order of steps: {step, bytes, whole, fault, kept, written, world_size, zero_stage,
        metrics}.

        `whole`: whether the checkpoint is complete. An incomplete checkpoint has a `fault`, and none of the later fields.
        `written`: seconds since 1970.
        """
        from heliostat.checkpoint.retention import survey

        return survey(self._place)

    def receipts(self) -> list[ReceiptFile]:
        """Reads the receipts in order. A receipt covers the steps `first` + 1 to `end`. A receipt has one digest per step, and
        the chained hash after these steps."""
        from heliostat.runs.history import receipts

        return receipts(self._place)

    def samples(self, step: int) -> list[Sample]:
        """Reads the samples of a step, counted from 1: {lane, place, source, shard, row_group, row, epoch, text, replaces}."""
        from heliostat.runs.samples import samples

        return samples(self._place, step)

    def verify(self) -> Verification:
        """Recomputes every receipt from the shards: {ok, steps, samples, lost, repeated, replaced, first_difference}."""
        from heliostat.runs.verify import verify

        return verify(self._place)

    def goodput(self) -> Goodput:
        """Reports how the run used its time in seconds, including all restarts: {total_s, parts, goodput, attempts, ...}."""
        from heliostat.runs.goodput import read_report

        return read_report(self._place)

    def export(self, to: str | os.PathLike[str], step: int | None = None, adapter: bool = False) -> Path:
        """Writes a checkpoint (by default the newest) to a folder for `from_pretrained`; returns the folder.

        `adapter`: whether to write only the adapter that the run trained, instead of merging it into its base.

        Raises ConfigError if the folder isn't empty, CheckpointError if the checkpoint doesn't exist.
        """
        from heliostat.runs import exports

        folder = Path(to)
        exports.add(self._place, folder, self._export(folder, step, adapter), adapter)
        return folder

    def _export(self, folder: Path, step: int | None, adapter: bool = False) -> int:
        """Writes a checkpoint to a folder; returns the checkpoint's step."""
        from heliostat.inference.export import export

        checkpoint = self._checkpoint(step)
        export(checkpoint, folder, self.run_id, adapter)
        return checkpoint.step

    @overload
    def generate(  # type: ignore[overload-overlap]  # a string is a sequence of strings
        self, prompts: str, *, step: int | None = None, seed: int = 0, out: str | None = None, **options: object
    ) -> Generated: ...

    @overload
    def generate(
        self, prompts: Sequence[str], *, step: int | None = None, seed: int = 0, out: str | None = None, **options: object
    ) -> list[Generated]: ...

    def generate(
        self, prompts: str | Sequence[str], *, step: int | None = None, seed: int = 0, out: str | None = None, **options: object
    ) -> Generated | list[Generated]:
        """Generates text or images with the model of a checkpoint (by default the newest), like `heliostat.generate`."""
        from heliostat.inference.generate import answer

        with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
            self._export(model := Path(folder) / "model", step)
            return answer(model, prompts, options, seed, out)

    def _checkpoint(self, step: int | None) -> SavedCheckpoint:
        from heliostat.checkpoint import layout

        if step is not None:
            if step not in (steps := layout.steps(self._place)):
                have = ", ".join(map(str, steps)) or "none"
                raise CheckpointError(f"step: {self._place} has no checkpoint of step {step}. The run's checkpoints: {have}")
            return layout.open_checkpoint(self._place, step)
        saved = layout.latest(self._place)
        if saved is None:
            raise CheckpointError(
                f"{self._place}: has no complete checkpoint. List the checkpoints: heliostat run checkpoints RUN"
            )
        return saved
