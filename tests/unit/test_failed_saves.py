"""A store that fails now and then costs checkpoints, not a healthy attempt; the last checkpoint must be there."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.checkpoint.saver import TOLERATED, Saver
from heliostat.errors import AccessError, CheckpointError, LeaseError, StorageError, WorkerError
from heliostat.runs.events import Saved
from heliostat.tracking.metrics import points
from heliostat.training.stop_codes import FAILED, RUN
from heliostat.training.worker.training_state import TrainingState

from tests.unit.test_abort import worker_in_step

AWAY = StorageError("s3://x: storage failed for 600 s")


def saving(*outcomes: Exception | bool) -> tuple[Any, list[str]]:
    """A worker's state whose saves end like this, one after another, and the notices that it posts."""
    left, notices = iter(outcomes), list[str]()

    def wait() -> bool:
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    state: Any = object.__new__(TrainingState)
    state.saver, state.memory, state.failed, state._in_a_row = SimpleNamespace(wait=wait, failed=True), None, 0, 0
    state.context = SimpleNamespace(posts=SimpleNamespace(notice=notices.append))
    return state, notices


def test_a_failed_save_is_passed_over_counted_and_shown():
    state, notices = saving(AWAY, True, AWAY)
    for _ in range(3):
        state.settle()
    assert state.failed == 2 and state._in_a_row == 1
    tolerated = f"(1 in a row, of {TOLERATED} that are tolerated)"
    assert notices == [f"a checkpoint could not be saved {tolerated}; training continues without it: {AWAY}"] * 2
    logged = {point.key: point.value for point in points(Saved(step=5, blocked_s=1.0, failed=2))}
    assert logged == {"train/checkpoint/blocked_s": 1.0, "train/checkpoint/failed": 2}


def test_saves_that_fail_in_a_row_end_the_attempt():
    """Nothing in flight is no success."""
    state, _ = saving(AWAY, False, *[AWAY] * TOLERATED)
    for _ in range(TOLERATED + 1):
        state.settle()
    with pytest.raises(StorageError):
        state.settle()


@pytest.mark.parametrize("error", [AccessError("no"), LeaseError("another's"), CheckpointError("torn"), WorkerError("a bug")])
def test_what_is_no_outage_ends_the_attempt_at_once(error):
    state, _ = saving(error)
    with pytest.raises(type(error)):
        state.settle()


def test_the_last_save_must_succeed():
    state, _ = saving(AWAY)
    with pytest.raises(StorageError):
        state.wait()


def test_a_step_after_which_a_save_has_failed_somewhere_is_followed_by_the_next():
    state, notices = saving(AWAY)
    worker = worker_in_step(1.0, lambda: None)
    worker.state = state
    worker.state.saver.blocked_s = 0.0
    asked: list[int] = []
    worker.consensus = SimpleNamespace(ask=asked.append, result=lambda: FAILED)
    worker.unsealed = SimpleNamespace(add=lambda *given: None)
    worker.watch = SimpleNamespace(check_norm=lambda *given: None)
    assert worker._make(5) == RUN and asked == [FAILED] and len(notices) == 1


def pruning(prune: Callable[[int], None]) -> tuple[Any, list[str]]:
    notices: list[str] = []
    saver: Any = object.__new__(Saver)
    saver._pruner, saver._notice, saver._unpruned = SimpleNamespace(prune=prune), notices.append, 0
    return saver, notices


def test_old_checkpoints_that_cannot_be_removed_cost_no_new_one():
    outcomes: list[Exception | None] = [AccessError("delete: denied"), None, *[AWAY] * (TOLERATED + 1)]

    def prune(step: int) -> None:
        if (error := outcomes.pop(0)) is not None:
            raise error

    saver, notices = pruning(prune)
    for step in range(TOLERATED + 2):
        saver._prune(step)
    assert notices[0] == "step 0: old checkpoints could not be removed (1 in a row, of 3 that are tolerated): delete: denied"
    assert len(notices) == TOLERATED + 1
    with pytest.raises(StorageError):
        saver._prune(9)


def test_a_run_that_another_driver_has_taken_over_removes_nothing():
    def prune(step: int) -> None:
        raise LeaseError("another's")

    with pytest.raises(LeaseError):
        pruning(prune)[0]._prune(1)
