"""Decides which checkpoints to keep: the newest, the best by an evaluation score, and one checkpoint per given number of steps.

After a save, all other checkpoints are deleted: complete checkpoints that no rule keeps, and remains of failed saves. Checkpoints
of later steps are deleted, too, because the run couldn't load them and returned to an earlier checkpoint. Frozen parameters stay
if a checkpoint refers to them. A benchmark's score may come only after later saves. Until a checkpoint has a score, it can't be
the best one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NotRequired

from typing_extensions import TypedDict

from heliostat.checkpoint import snapshots
from heliostat.checkpoint.layout import FROZEN, INDEX, SavedCheckpoint, folder, open_checkpoint, steps
from heliostat.config.sections import BENCHMARK
from heliostat.config.spec import Checkpoint as Policy
from heliostat.errors import CheckpointError, DataError
from heliostat.storage import run_folder
from heliostat.storage.lease import Fence
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, open_


@open_
class TaskScore(TypedDict):
    """Describes the score of one task."""

    task: str
    score: float


@open_
class Result(TypedDict):
    """Describes the values that are read from a benchmark's result, `benchmarks/SUITE/step-*.json`.

    `written`: time at which the scored checkpoint was written.
    """

    written: float
    tasks: list[TaskScore]


RESULT = Format(Result, "result of a benchmark", DataError, fix="Delete this file. heliostat then scores the checkpoint again")


class RetentionRow(TypedDict):
    """Describes a checkpoint's folder: its state, and the rules that keep it. An incomplete checkpoint has a `fault`."""

    step: int
    bytes: int
    whole: bool
    fault: str | None
    kept: list[str]
    written: NotRequired[float]
    world_size: NotRequired[int]
    zero_stage: NotRequired[int]
    metrics: NotRequired[dict[str, float | None]]


def retained(whole: Iterable[int], policy: Policy, scores: Mapping[int, float] | None = None) -> dict[int, list[str]]:
    """Selects the complete checkpoints to keep. Returns, by ascending step, the rules that keep each checkpoint.

    `scores`: value of the best metric by step. A step without a finite score is never the best. Of equal scores, the newer step
    is better.
    """
    ascending = sorted(whole)
    kept: dict[int, list[str]] = {s: [] for s in ascending}
    for step in ascending[-policy.keep :]:
        kept[step].append("newest")
    if policy.keep_every:
        for step in ascending:
            if step % policy.keep_every == 0:
                kept[step].append(f"every {policy.keep_every}")
    if policy.best:
        sign = 1 if policy.best.mode == "min" else -1
        ranked = [(sign * value, -step) for step, value in (scores or {}).items() if step in kept and math.isfinite(value)]
        for _, negative in sorted(ranked)[: policy.best.keep]:
            kept[-negative].append(f"best {policy.best.metric}")
    return {step: reasons for step, reasons in kept.items() if reasons}


class Pruner:
    """Applies a retention policy to a run's folder. Caches the scores that it has read.

    `fence`: the lease of the driver that prunes, if several drivers could prune.
    """

    def __init__(self, run: Location, policy: Policy, fence: Fence | None = None) -> None:
        self.run, self.policy, self.fence = run, policy, fence
        self._scores: dict[int, float] = {}

    def prune(self, saved: int) -> None:
        """Deletes the checkpoints that the policy doesn't keep. Call this method once step `saved` is complete, with no save in
        flight."""
        files = {path for path, _ in self.run.join(run_folder.CHECKPOINTS).files()}
        self._scores.pop(saved, None)  # from an earlier save of this step
        completeness = {step: f"{folder(self.run, step).name}/{INDEX}" in files for step in steps(self.run)}
        whole = [step for step, complete in completeness.items() if complete and step <= saved]
        kept = retained(whole, self.policy, self._read_scores(whole) if self.policy.best else None)
        gone = completeness.keys() - kept.keys()
        if gone and self.fence:
            self.fence.check()
        for step in gone:
            location = folder(self.run, step)
            location.join(INDEX).delete()  # deleted first, so that a half-deleted checkpoint counts as missing
            location.delete()
        self._prune_frozen({path.split("/")[0] for path in files if path.startswith(f"{FROZEN}-")}, list(kept))

    def prune_snapshots(self, last: int) -> None:
        """Deletes the snapshots of steps after `last`, which are from before the run returned to an earlier step."""
        later = [run_folder.averages(self.run, step) for step in snapshots.steps(self.run) if step > last]
        if later and self.fence:
            self.fence.check()
        for location in later:
            location.join(INDEX).delete()
            location.delete()

    def _prune_frozen(self, names: set[str], kept: list[int]) -> None:
        """Deletes the folders of frozen parameters to which no checkpoint refers.

        If a checkpoint can't be read, all folders stay.
        """
        if len(names) < 2:
            return
        try:
            used = {open_checkpoint(self.run, step).index.frozen for step in kept}
        except CheckpointError:
            return
        if names - used and self.fence:
            self.fence.check()
        for name in names - used:
            location = self.run.join(run_folder.CHECKPOINTS, name)
            location.join(INDEX).delete()
            location.delete()

    def _read_scores(self, whole: list[int]) -> dict[int, float]:
        late = self.policy.best is not None and self.policy.best.is_late
        for step in set(whole) - {known for known, value in self._scores.items() if not (late and math.isnan(value))}:
            try:
                self._scores[step] = score(self.run, open_checkpoint(self.run, step), self.policy)
            except CheckpointError:
                self._scores[step] = math.nan
        return self._scores


def score(run: Location, checkpoint: SavedCheckpoint, policy: Policy) -> float:
    """Returns a checkpoint's value of the metric that decides which checkpoint is best.

    The value comes from the checkpoint's index or from a benchmark; the result is nan if there is no value yet.
    """
    if policy.best and policy.best.is_late:
        return _benchmark(run, checkpoint.step, checkpoint.index.written, policy.best.metric)
    value = checkpoint.index.metrics.get(policy.best.metric) if policy.best else None
    return math.nan if value is None else value


def _benchmark(run: Location, step: int, written: float, metric: str) -> float:
    """Reads a benchmark's score for a step's checkpoint; nan if there is none. `written`: when the checkpoint was written."""
    for suite in run.join(run_folder.BENCHMARKS).folders():
        try:
            result = RESULT.read(run_folder.benchmark(run, suite, step))
        except (FileNotFoundError, DataError):
            continue  # not scored yet, or incomplete: no reason to stop training
        for row in result["tasks"] if result["written"] == written else ():
            if f"{BENCHMARK}{row['task']}" == metric:
                return row["score"]
    return math.nan


def survey(run: Location) -> list[RetentionRow]:
    """Describes each checkpoint folder, by ascending step. The retention rules are from the newest complete checkpoint's job."""
    sizes: dict[str, int] = {}
    for path, size in run.join(run_folder.CHECKPOINTS).files():
        sizes[path.split("/")[0]] = sizes.get(path.split("/")[0], 0) + size
    rows, whole = [], []
    for step in steps(run):
        size = sizes.get(folder(run, step).name, 0)
        row: RetentionRow = {"step": step, "bytes": size, "whole": True, "fault": None, "kept": []}
        try:
            whole.append(open_checkpoint(run, step))
            index = whole[-1].index
            row |= {"written": index.written, "world_size": index.world_size, "zero_stage": index.zero_stage,
                    "metrics": index.metrics}  # fmt: skip
        except CheckpointError as e:
            row |= {"whole": False, "fault": str(e)}
        rows.append(row)
    if whole:
        policy = whole[-1].policy
        kept = retained([c.step for c in whole], policy, {c.step: score(run, c, policy) for c in whole})
        for row in rows:
            row["kept"] = kept.get(row["step"], [])
    return rows
