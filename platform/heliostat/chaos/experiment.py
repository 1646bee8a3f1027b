"""Runs a job once per fault, and compares each run with a run without faults.

    rows = chaos(Path("jobs/chaos.yaml"), ["kill-worker", "hang"], work=Path(".heliostat/chaos"))

Each run is a separate `heliostat train` on a private Ray cluster on this machine. The run has the job's settings, except the
name, the storage, and the MLflow store. The storage and the MLflow store are in the work folder. A fault's files are in `FAULT/`,
and the output of its run is in `FAULT.log`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from heliostat import schema
from heliostat.chaos import measure
from heliostat.chaos.faults import FAULTS, Fault, Scene, rng, when
from heliostat.chaos.measure import FaultEffect
from heliostat.chaos.process import ChaosError, Command
from heliostat.checkpoint import layout
from heliostat.config import workspace
from heliostat.errors import ConfigError, HeliostatError
from heliostat.runs import goodput
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.validation import check
from heliostat.validation.check import Checked

log = logging.getLogger(__name__)

RUN_S = 1800.0  # maximum seconds of a run


@dataclass(frozen=True)
class Unbroken:
    loss: float
    checkpoint_bytes: int
    late_s: float  # seconds from the run's last step to its end


@dataclass(frozen=True)
class Chaos:
    path: Path
    checked: Checked
    settings: list[str]
    work: Path
    seed: int
    rate: float

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.work}/mlflow.db"

    def arguments(self, name: str, changes: dict[str, str]) -> list[str]:
        changed = {"name": name, "storage": str(self.work / "runs"), "mlflow.uri": self.tracking, "mlflow.register": "null",
                "train.log_every": "1", **changes}  # fmt: skip
        settings = [*self.settings, *(f"{key}={value}" for key, value in changed.items())]
        return [str(self.path), *(word for setting in settings for word in ("--set", setting))]


def chaos(
    path: Path,
    names: list[str],
    settings: list[str] | None = None,
    seed: int = 0,
    rate: float = 0.2,
    work: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, object]], list[str]]:
    """Runs the job once without faults and once per fault; returns (a table row per fault, a list of the problems of all runs).

    `report` gets a description of each stage. Raises ConfigError, before anything starts, if the job or a fault isn't suitable.
    """
    faults = choose(names)
    job_given = check.load_job(path, settings)
    if job_given.train.parallel.auto:
        raise ConfigError(
            "train.parallel: auto may choose a different configuration after each fault. Set the configuration that `heliostat "
            "plan JOB --rank` finds"
        )
    checked = check.check(job_given)
    job = checked.job
    if job.train.steps < 4 * job.checkpoint.every:
        raise ConfigError(
            f"checkpoint.every: {job.checkpoint.every} means fewer than four checkpoints in {job.train.steps} "
            f"steps, but the faults need at least four. Set checkpoint.every to {max(1, job.train.steps // 8)}"
        )
    for fault in faults:
        if reason := fault.unable(job):
            raise ConfigError(f"--faults: can't inject {fault.name} here: this fault {reason}. Remove this fault from --faults")
    work = (work or workspace.root() / ".heliostat" / "chaos").absolute() / job.name
    work.mkdir(parents=True, exist_ok=True)
    it = Chaos(path, checked, settings or [], work, seed, rate)
    report("the run without faults")
    whole = _unbroken(it)
    rows, wrong = [], []
    for number, fault in enumerate(faults, 1):
        report(f"{fault.name} ({number} of {len(faults)}): {fault.what}")
        try:
            row, faulty = _broken(it, fault, whole)
        except (ChaosError, HeliostatError) as e:
            row, faulty = measure.broken(fault.name), [str(e)]
        rows.append(row)
        report(json.dumps(row))
        wrong += [f"{fault.name}: {text}" for text in faulty]
    return rows, wrong


def choose(names: list[str]) -> list[Fault]:
    for name in names:
        if name not in FAULTS:
            raise ConfigError(f"--faults: unknown fault ({name}){schema.nearest(name, list(FAULTS))}")
    if not names:
        raise ConfigError(f"--faults: the list is empty. Use one or more of: {', '.join(FAULTS)}")
    if twice := [name for name in FAULTS if names.count(name) > 1]:
        raise ConfigError(f"--faults: a fault is listed twice ({', '.join(twice)}). List each fault once")
    return [FAULTS[name] for name in names]


def _unbroken(it: Chaos) -> Unbroken:
    """Runs the job without faults. If an earlier run without faults has the same job and data, resumes that earlier run
    instead."""
    same = json.dumps([it.checked.job.dump(), it.checked.plan.digest], sort_keys=True)
    name = f"unbroken-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
    with Command([*it.arguments(name, {}), "--resume"], it.work / "unbroken.log") as command:
        if command.wait(RUN_S):
            raise HeliostatError(
                f"the run without faults failed, so no fault can be measured: {command.last_words()}. Read {command.log}"
            )
        result = command.result()
    run = Location(str(it.work / "runs")).join(name)
    sizes = [sum(size for _, size in layout.folder(run, step).files()) for step in layout.steps(run)]
    late = [a.parts.get("idle", 0.0) + a.seen - a.known for a in goodput.read(run) if a.outcome == "finished"]
    return Unbroken(result["train_loss"], max(sizes), max(late))


def _broken(it: Chaos, fault: Fault, whole: Unbroken) -> tuple[dict[str, object], list[str]]:
    """Runs the job with a fault; returns (the fault's row, the run's problems)."""
    job, folder = it.checked.job, it.work / fault.name
    folder.mkdir(exist_ok=True)
    random_ = rng(it.seed, fault.name)
    at = when(random_, job.train.steps, job.checkpoint.every)
    with ExitStack() as stack:
        scene = Scene(it.checked, folder, at, it.rate, random_, stack, Location(str(it.work / "runs")), it.tracking,
                      whole.checkpoint_bytes, whole.late_s, fault.name)  # fmt: skip
        scene.tool = fault.prepare(scene)
        log_file = it.work / f"{fault.name}.log"
        log_file.unlink(missing_ok=True)
        arguments = [*it.arguments(fault.name, scene.settings), "--overwrite"]
        command = stack.enter_context(Command(arguments, log_file, scene.environment))
        last = job.last_step if fault.late else int(at)
        command.until(lambda: command.step >= last, RUN_S, f"step {last}")
        time.sleep(0.0 if fault.late else at % 1 * measure.pace_s(command.lines))
        scene.struck = scene.struck or time.time()
        fault.strike(scene, command)
        code = command.wait(RUN_S)
        if code and fault.submitted_again:
            command.arguments = [*arguments[:-1], "--resume"]
            command.start()
            code = command.wait(RUN_S)
            scene.cured = time.time() if fault.late else None  # a late fault has no later step that could show its end
        if code:
            raise ChaosError(f"the run ended with exit code {code}: {command.last_words()}. Read {command.log}")
        return _compare(it, fault, scene, command, whole)


def _compare(it: Chaos, fault: Fault, scene: Scene, command: Command, whole: Unbroken) -> tuple[dict[str, object], list[str]]:
    result, report = command.result(), verify(scene.run)
    if fault.name == "corrupt-shard" and not report["replaced"]:
        raise ChaosError("the run didn't read the damaged shard, so this fault had no effect. Try another --seed")
    attempts = goodput.read(scene.run)
    seen = scene.seen or (command.heard(fault.notice, scene.struck) if fault.notice else None)
    cured = scene.cured or (command.heard(fault.cured, scene.struck) if fault.cured else None)
    measured = FaultEffect(scene.struck, seen, cured, command.lines, attempts)
    row = measure.row(fault.name, measured, report, result["train_loss"], whole.loss, goodput.report(attempts)["goodput"])
    faulty = measure.problems(row, report, _logged(it.tracking, result["run_id"]), it.checked.job.train.steps)
    return row, faulty + measure.unregistered(_registered(it.tracking, result["run_id"]), fault.late)


def _logged(tracking: str, run_id: str) -> list[int]:
    """Lists the steps that have a loss in MLflow."""
    from mlflow import MlflowClient

    return sorted(m.step for m in MlflowClient(tracking_uri=tracking).get_metric_history(run_id, "train/loss"))


def _registered(tracking: str, run_id: str) -> int:
    """Counts the model versions that the run has registered."""
    from mlflow import MlflowClient

    return len(MlflowClient(tracking_uri=tracking).search_model_versions(f"run_id = '{run_id}'"))
