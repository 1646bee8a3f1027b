"""One run from the driver's side: check, start Ray and the workers, keep MLflow and the terminal informed, export, register.

    from heliostat.train.run import train
    result = train(Path("jobs/quickstart.yaml"))

The result is the object that `heliostat train --json` prints; it is also written to `result.json` in the run's folder.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from heliostat import check, goodput
from heliostat.check import Checked
from heliostat.data import segments
from heliostat.data.dataset import DataPlan, sample_bytes
from heliostat.errors import CheckpointError, ConfigError, HeliostatError, TrainingError, innermost
from heliostat.storage import Location
from heliostat.track.run import RunOwner
from heliostat.train.ledger import Recorder

log = logging.getLogger(__name__)

POLL_S = 0.25


def train(
    path: Path,
    settings: list[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_data_change: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Trains a job to its last step; HeliostatError with one line for whatever stopped it."""
    started = psutil.Process().create_time()
    job, recipe = check.check_file(path, settings)
    check.check_storage(job)
    from heliostat.train import checkpoint

    found = None if overwrite else checkpoint.latest(job.run_folder)
    if found and not resume:
        raise ConfigError(
            f"name: run {job.name!r} already has checkpoints up to step {found.step} in {job.run_folder}; "
            "use --resume to go on, --overwrite to start anew, or another name"
        )
    recorded = DataPlan.parse(found.index["data"]) if found else None
    checked = check.check_stores(job, recipe, recorded)
    if found and recorded and (changes := recorded.differences(checked.plan)):
        if not allow_data_change:
            raise ConfigError(
                "the run's samples would change on resume; undo this, use another name, or start a new segment of the run with "
                "--allow-data-change:\n  " + "\n  ".join(changes)
            )
        log.warning("the run's samples change at step %d: %s", found.step, "; ".join(changes))
        checked = check.check_stores(job, recipe, recorded, change_at=found.step)
    if overwrite:
        job.run_folder.delete()
    start_step = found.step if found else 0
    if start_step >= job.train.steps:
        log.info("run %s has finished: step %d of %d", job.name, start_step, job.train.steps)
        return _finished(job.run_folder)
    return _Run(checked, start_step, started, verbose).go()


def _finished(run_folder: Location) -> dict[str, Any]:
    try:
        return json.loads(run_folder.join("result.json").read())
    except FileNotFoundError as e:
        raise CheckpointError(f"{run_folder}: all steps are done, but there is no result.json; use `heliostat export`") from e


class _Run:
    def __init__(self, checked: Checked, start_step: int, started: float, verbose: bool) -> None:
        self.job, self.checked = checked.job, checked
        self.start_step, self.started, self.verbose = start_step, started, verbose
        self.console = Console(stderr=True)
        self.ledger = Recorder(self.job.run_folder, started, start_step, self.job.workers.count)

    def go(self) -> dict[str, Any]:
        owner = RunOwner(self.job, self.checked.manifests)
        segments.begin(self.job.run_folder, self.checked.plan, self.start_step)
        try:
            summary = self._fit(owner)
            result = self._conclude(owner, summary)
        except KeyboardInterrupt:
            self._finish(owner, "KILLED", "interrupted")
            raise
        except Exception as e:
            self._finish(owner, "FAILED", str(e))
            raise
        self._finish(owner, "FINISHED")
        return result

    def _finish(self, owner: RunOwner, status: str, reason: str = "") -> None:
        try:
            owner.log_goodput(self.ledger.report())
            owner.finish(status, reason)
        finally:
            self.ledger.close({"KILLED": "interrupted"}.get(status, status.lower()))

    # training --------------------------------------------------------------------------------------------------------

    def _fit(self, owner: RunOwner) -> dict[str, Any]:
        from heliostat.train.show import Show

        job = self.job
        with Show(self.console, job.name, self.start_step, job.train.steps) as show:
            board, trainer = self._start()
            show.phases["ray"] = time.time()
            show.note("starting the workers")
            outcome: dict[str, Any] = {}

            def fit() -> None:
                try:
                    outcome["summary"] = trainer.fit().return_value
                except Exception as e:  # noqa: BLE001 (raised again below, in the main thread)
                    outcome["error"] = e

            thread = threading.Thread(target=fit, name="fit", daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(POLL_S)
                self._drain(board, owner, show)
            self._drain(board, owner, show)
        if "error" in outcome:
            raise explain(outcome["error"])
        job.run_folder.join("ray").delete()  # Ray Train's own state, of no use after the fit
        summary = outcome["summary"]
        summary["startup"] = self._startup(show.phases, summary)
        return summary

    def _start(self) -> tuple[Any, Any]:
        """Ray, the board and a trainer that is ready to fit."""
        from heliostat.cluster.connect import connect, worker_environment

        job = self.job
        workers = job.workers
        # data tasks need CPUs of their own; on a small machine these are logical, and mostly wait
        connect(
            cpus=max(os.cpu_count() or 1, round(workers.count * workers.cpus) + 2),
            gpus=round(workers.count * workers.gpus),
            verbose=self.verbose,
        )
        import ray.train.torch

        api: Any = ray.train  # the package is annotated with V1's classes, and V2's are the ones that it holds
        from heliostat.data import stream
        from heliostat.train.board import Board, Placing

        board = Board.remote()  # type: ignore[attr-defined]
        plan, start = self.checked.plan, self.start_step
        replace = job.data.on_bad_sample == "replace"
        fetch = stream.fetch(plan, self.checked.order, start, job.train.steps, replace)
        concurrency, memory = max(2, workers.count), job.data.memory_limit
        size = sample_bytes(job.data.sequence_length, self.checked.manifests)
        config = {
            "job": job.dump(),
            "plan": plan.dump(),
            "start_step": start,
            "board": board,
            "started": self.started,
            "run_folder": str(job.run_folder),
        }
        attempts = job.run_folder.join("ray")
        trainer = api.torch.TorchTrainer(
            _worker,
            train_loop_config=config,
            datasets={"train": lambda: stream.dataset(fetch, concurrency, memory, size, job.data.labels)},
            dataset_config=stream.OrderedSplit(),
            torch_config=api.torch.TorchConfig(backend="nccl" if workers.gpus else "gloo"),
            scaling_config=api.ScalingConfig(
                num_workers=workers.count,
                use_gpu=bool(workers.gpus),
                label_selector=workers.labels or None,
                resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
            ),
            run_config=api.RunConfig(
                name=f"{job.name}-{uuid.uuid4().hex[:8]}",  # a name used before would restore Ray's own state
                storage_path=attempts.path,
                storage_filesystem=attempts.fs,
                callbacks=[Placing(board)],
                failure_config=api.FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": worker_environment(workers.gpus)} if os.environ.get("RAY_ADDRESS") else {},
            ),
        )
        return board, trainer

    def _drain(self, board: Any, owner: RunOwner, show: Any) -> None:
        import ray

        self.ledger.beat()
        try:
            events = ray.get(board.drain.remote(), timeout=10)
        except ray.exceptions.GetTimeoutError:
            return
        for event in events:
            if event["kind"] == "steps":
                event["sources"] = self._sources(event["first"] + len(event["loss"]))
            owner.post(event)
            self.ledger.event(event)
            if event["kind"] == "checkpoint":
                owner.post({"kind": "goodput", "report": self.ledger.report(), "step": event["step"], "at": event["at"]})
            show.event(event)

    def _sources(self, step: int) -> dict[str, dict[str, float]]:
        """What each source has given in this sequence's steps before `step`, by its name: tokens or samples, and epochs."""
        order, manifests = self.checked.order, self.checked.manifests
        names = [m.meta.get("name", m.location.name) for m in manifests]
        taken = order.consumed(step)
        return {
            name if names.count(name) == 1 else f"{name}.{i}": {
                "tokens": float(taken[i] * (self.job.data.sequence_length or 0)),
                "samples": float(taken[i]),
                "epochs": float(taken[i] / order.epoch_samples[i]),
            }
            for i, name in enumerate(names)
        }

    def _startup(self, phases: dict[str, float], summary: dict[str, Any]) -> dict[str, float]:
        """Seconds from the command to the first finished step, by part."""
        marks = [self.started, *(phases.get(p, self.started) for p in ("ray", "model", "data", "step", "stepped"))]
        names = ("check_and_ray", "workers", "model", "data", "first_step")
        return {n: round(b - a, 2) for n, a, b in zip(names, marks, marks[1:], strict=False)}

    # afterwards ------------------------------------------------------------------------------------------------------

    def _conclude(self, owner: RunOwner, summary: dict[str, Any]) -> dict[str, Any]:
        """Exports the last checkpoint, logs and registers the model, and shows what it can do."""
        from heliostat.export import export
        from heliostat.track.models import log_model
        from heliostat.train import checkpoint

        job = self.job
        last = checkpoint.open_checkpoint(job.run_folder, job.train.steps)
        client = owner.client()
        with tempfile.TemporaryDirectory(prefix="heliostat-export-") as name, self.console.status("exporting the model"):
            folder = Path(name) / "model"
            recipe = export(last, folder)
            model_uri = log_model(job, owner.run_id, folder, recipe, summary["eval"])
            client.set_tag(owner.run_id, "heliostat.model_uri", model_uri)
            samples = recipe.demonstrate(folder)
        client.log_table(owner.run_id, {"prompt": [p for p, _ in samples], "text": [t for _, t in samples]}, "samples.json")
        result = {"run_id": owner.run_id, **summary, "model_uri": model_uri, "checkpoint": str(last.location)}
        result["reference"] = {m.location.name: m.meta.get("unigram_entropy") for m in self.checked.manifests}
        result["goodput"] = goodput.summary(self.ledger.report())
        result["samples"] = [{"prompt": p, "text": t} for p, t in samples]
        job.run_folder.join("result.json").write(json.dumps(result, indent=2).encode())
        return result


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    from heliostat.train.loop import worker

    return worker(config)


def explain(error: Exception) -> HeliostatError:
    """The one line for a failed fit: our own error from a worker if there is one, else Ray's, with the cause chained."""
    failures = getattr(error, "worker_failures", {})
    for cause in [*failures.values(), getattr(error, "controller_failure", None)]:
        if known := innermost(cause):
            known.args = (str(known).partition("\nFailed to apply UDF")[0], *known.args[1:])  # Ray Data's addition
            return known
    text = [line for line in str(next(iter(failures.values()), error)).splitlines() if line.strip()]
    fault = TrainingError(f"the workers failed: {text[-1].strip() if text else type(error).__name__}")
    fault.__cause__ = error
    return fault
