"""Records the results of a training: in `summary.json` after the last step, and in `result.json` after the model is exported.

Both files have the step at which training ended. If the driver dies after the last checkpoint, there is no summary, or only the
summary of an earlier end. Then the scores and the loss come from the checkpoint, with the same bits as a summary would have.
Rates and times come from the ledger.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from heliostat.config.spec import Job
from heliostat.errors import HeliostatError
from heliostat.runs import goodput
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage import run_folder
from heliostat.storage.locations import Location

if TYPE_CHECKING:  # imports torch, which takes a second
    from heliostat.checkpoint.layout import SavedCheckpoint

log = logging.getLogger(__name__)

Ending = dict[str, Any]  # the facts that the last command wrote when it ended; `heliostat train --json` prints them
TRAINING = ("data", "computing", "communicating")  # rates are computed from these parts of an attempt


def write(run: Location, summary: Mapping[str, object]) -> None:
    run.join(run_folder.SUMMARY).write(json.dumps(summary).encode())


def read(run: Location, last: SavedCheckpoint, job: Job, sample_tokens: float = 0.0) -> Ending:
    """Reads the summary of the training that ended with checkpoint `last`. If there is no such summary, computes it from the
    checkpoint and the ledger. `sample_tokens`: the mean tokens of a sample; 0 if samples have no tokens."""
    ending = _of_step(run.join(run_folder.SUMMARY), last.step)
    if ending is None:
        log.info("%s: no command recorded the end of training, so heliostat uses the last checkpoint and the ledger", run)
        ending = from_checkpoint(last.step, last.index.metrics, job, _attempts(run), sample_tokens)
    return ending


def result(run: Location, step: int) -> Ending | None:
    """Reads the result of the run that ended with `step`; None if there is no result, or if the result is from a training that
    ended with another step."""
    return _of_step(run.join(run_folder.RESULT), step)


def from_checkpoint(
    step: int, metrics: Mapping[str, float | None], job: Job, attempts: list[RecordedAttempt], sample_tokens: float = 0.0
) -> Ending:
    """Computes the summary of a training from its last checkpoint and its ledger.

    `metrics`: from the checkpoint's index. `attempts`: from the ledger. `sample_tokens`: as for `read`.
    """
    ordered = sorted(attempts, key=lambda a: a.started)
    trained = next((a for a in reversed(ordered) if a.reached > a.start_step), None)
    parts = trained.parts if trained else {}
    seconds = sum(parts.get(p, 0.0) for p in TRAINING)
    done = trained.reached - trained.start_step if trained else 0
    size = job.data.sequence_length or sample_tokens or 1
    begun = max((i for i, a in enumerate(ordered) if not a.restart and trained and a.started <= trained.started), default=0)
    return {
        "steps": step,
        "train_loss": metrics["train_loss"],
        "eval": {k: v for k, v in metrics.items() if k != "train_loss"},
        "tokens_per_second": done * job.train.global_batch_size * size / seconds if seconds else 0.0,
        "data_wait": parts.get("data", 0.0) / seconds if seconds else 0.0,
        "checkpoint_blocked_s": parts.get("checkpoint", 0.0),
        "seconds_to_first_step": sum(ordered[begun].parts.get(p, 0.0) for p in ("queued", "starting")) if ordered else 0.0,
        "startup": {},  # these parts were lost when the driver died
        "restarts": sum(a.restart for a in ordered[begun:] if trained and a.started <= trained.started),
    }


def _of_step(place: Location, step: int) -> Ending | None:
    try:
        ending = json.loads(place.read())
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s: damaged, so heliostat writes the file again", place)
        return None
    return ending if isinstance(ending, dict) and ending.get("steps") == step else None


def _attempts(run: Location) -> list[RecordedAttempt]:
    try:
        return goodput.read(run)
    except (HeliostatError, OSError) as e:
        log.warning("the rates and times of the training aren't known: %s", e)
        return []
