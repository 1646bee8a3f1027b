"""Tests that a store with occasional failures costs checkpoints, not a healthy attempt; but the last checkpoint must be saved."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import layout
from heliostat.checkpoint.saver import TOLERATED, Saver
from heliostat.config import spec
from heliostat.data import receipt
from heliostat.data.dataset import Bad
from heliostat.errors import AccessError, CheckpointError, LeaseError, StorageError, WorkerError
from heliostat.recipes.adapters import AdapterBase
from heliostat.recipes.folder_digests import digest_of, weights_state
from heliostat.runs import consumed
from heliostat.runs.events import Evaluation, Saved
from heliostat.runs.history import receipts
from heliostat.runs.time_ledger import Ledger
from heliostat.storage.locations import Location
from heliostat.tracking.metrics import points
from heliostat.training.stops import FAILED, RESIZE, RUN
from heliostat.training.worker import unsealed
from heliostat.training.worker.context import Due, Latest, Posts
from heliostat.training.worker.training_state import TrainingState
from heliostat.training.worker.unsealed import Unsealed

from tests.unit.build_job import job
from tests.unit.test_abort import loop_in_step

AWAY = StorageError("s3://x: storage failed for 600 s")


def saving(*outcomes: Exception | bool) -> tuple[Any, list[str]]:
    """Returns a worker's state whose saves end in the given ways, one after another, and the notices that it posts."""
    left, notices = iter(outcomes), list[str]()

    def wait() -> bool:
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    state: Any = object.__new__(TrainingState)
    state.saver, state.memory, state.failed, state._in_a_row = SimpleNamespace(wait=wait, failed=True), None, 0, 0
    state._sealing = None
    state.context = SimpleNamespace(posts=SimpleNamespace(notice=notices.append))
    return state, notices


def test_a_failed_save_is_passed_over_counted_and_shown():
    state, notices = saving(AWAY, True, AWAY)
    for _ in range(3):
        state.settle()
    assert state.failed == 2 and state._in_a_row == 1
    tolerated = f"(failed saves in a row: 1; limit: {TOLERATED})"
    assert notices == [f"can't save a checkpoint {tolerated}. Training continues without this checkpoint: {AWAY}"] * 2
    logged = {point.key: point.value for point in points(Saved(step=5, blocked_s=1.0, failed=2))}
    assert logged == {"train/checkpoint/blocked_s": 1.0, "train/checkpoint/failed": 2}


def test_saves_that_fail_in_a_row_end_the_attempt():
    """A step without a save in progress doesn't count as a success."""
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
    loop = loop_in_step(lambda: None)
    state.saver.blocked_s, loop.hooks = 0.0, [state]
    asked: list[int] = []
    loop.consensus = SimpleNamespace(ask=asked.append, result=lambda: FAILED)
    loop.unsealed = loop.reports.trained = SimpleNamespace(add=lambda *given: None)
    assert loop._make(5) == RUN and asked == [FAILED] and len(notices) == 1


@pytest.mark.parametrize("failures", [0, 1, TOLERATED, TOLERATED + 1])
def test_a_pause_point_waits_for_its_checkpoint_and_survives_as_many_failed_saves_as_a_step(monkeypatch, failures):
    """A sweep decides by that checkpoint, because another trial may continue from it."""
    state, _ = saving(*[AWAY] * failures, True)
    loop, again, posted = loop_in_step(lambda: None), list[int](), list[Any]()
    state.save, state.context.ledger = again.append, Ledger("idle")
    due = Due(last=False, reports=True, evaluates=False, saves=True, keeps=False, holds=True)
    loop.context.posts = SimpleNamespace(mailbox=SimpleNamespace(decision=lambda step: RESIZE), post=posted.append)
    loop.context.latest = Latest()
    monkeypatch.setattr("ray.get", lambda answer: answer)
    if failures > TOLERATED:
        with pytest.raises(StorageError):
            state.on_save(7, due)
        return
    state.on_save(7, due)
    assert again == [7] * (failures + 1) and loop._hold(7) == RESIZE and [event.step for event in posted] == [7]


def pruning(prune: Callable[[int], None]) -> tuple[Any, list[str]]:
    notices: list[str] = []
    saver: Any = object.__new__(Saver)
    saver._pruner, saver._notice, saver._unpruned = (
        SimpleNamespace(prune=prune, prune_snapshots=lambda step: None),
        notices.append,
        0,
    )
    return saver, notices


def test_old_checkpoints_that_cannot_be_removed_cost_warnings_and_never_a_save():
    """The fourth failed removal in a row was reported and counted as a failed save."""
    outcomes: list[Exception | None] = [AccessError("delete: denied"), None, *[AWAY] * (TOLERATED + 3)]

    def prune(step: int) -> None:
        if (error := outcomes.pop(0)) is not None:
            raise error

    saver, notices = pruning(prune)
    for step in range(TOLERATED + 5):
        saver._prune(step, False)
    later = "These checkpoints use space until heliostat can delete them"
    assert notices[0] == f"step 0: can't remove old checkpoints. {later}: delete: denied"
    assert notices[1].startswith("step 2: can't remove old checkpoints. ")
    assert notices[-1] == f"step 7: can't remove old checkpoints, 6 times in a row. {later}: {AWAY}"
    assert len(notices) == TOLERATED + 4


def test_a_run_that_another_driver_has_taken_over_removes_nothing():
    def prune(step: int) -> None:
        raise LeaseError("another's")

    with pytest.raises(LeaseError):
        pruning(prune)[0]._prune(1, False)


# what the receipt of a failed save covers --------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def training(run: Location, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a worker's state that really saves one small tensor."""
    state: Any = object.__new__(TrainingState)
    group, posts = dist.group.WORLD, Posts(None, 0)
    posts.notice = (notices := list[str]()).append  # type: ignore[method-assign,assignment]
    made = job()
    state.context = SimpleNamespace(
        job=made, plan=SimpleNamespace(dump=dict, digest="d"), run_folder=run, world=1, rank=0, posts=posts,
        fence=SimpleNamespace(check=lambda: None), progressed=lambda: None, control=group, ledger=Ledger("computing"),
        latest=Latest(),
    )  # fmt: skip
    state.unsealed = Unsealed(run, SimpleNamespace(plan=SimpleNamespace(digest="d")), group)  # type: ignore[arg-type]
    state.saver = Saver(run, spec.Checkpoint(every=1, keep=9), group)
    state.memory, state.failed, state._in_a_row, state._sealing = None, 0, 0, None
    state.tensors = lambda: {"w": torch.ones(3)}
    state.sharded = SimpleNamespace(frozen=dict, base=None, steps=1, read_loss_scale=lambda: None)
    state.engine, state.notices = SimpleNamespace(sharded_state=state.sharded), notices
    return state


def test_the_base_of_an_adapter_is_read_before_the_first_step_and_not_by_the_first_save(tmp_path, monkeypatch, alone):
    """A base of 140 GB takes minutes, in which no worker makes progress. The watchdog allows this only before the first step."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    known = training(Location(str(tmp_path / "run")), monkeypatch)
    base = AdapterBase(tmp_path / "base", {}, weights_state(tmp_path / "base"))
    sharded = SimpleNamespace(base=base, optimizer=torch.optim.SGD([torch.zeros(1)]))
    monkeypatch.setattr("heliostat.engine.sharded_state.of", lambda engine: sharded)
    TrainingState(SimpleNamespace(**vars(known.context) | {"posts": Posts(None, 0)}), known.engine, known.unsealed)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert base.digest == digest_of({"model.safetensors": hashlib.sha256(b"weights").hexdigest()})


def train(state: Any, *steps: int) -> None:
    for step in steps:
        state.unsealed.add(step - 1, SimpleNamespace(digests=[step, 100 + step], bad=[]))


@pytest.mark.parametrize("away", ["receipts", "curves", "quarantine", "checkpoints"])
def test_an_outage_while_the_receipt_is_written_costs_one_checkpoint_and_nothing_else(tmp_path, monkeypatch, alone, away):
    """The training thread wrote the receipt, so an unreachable store ended the attempt."""
    run = Location(str(tmp_path / "run"))
    state, down, in_thread = training(run, monkeypatch), [True], list[str]()
    write = Location.write

    def failing(self: Location, data: bytes, *given: Any) -> None:
        in_thread.append(threading.current_thread().name)
        if down[0] and f"/{away}/" in str(self):
            raise AWAY
        write(self, data, *given)

    monkeypatch.setattr(Location, "write", failing)
    bad = 0, Bad(0, 0, 0, 0, "x", (0, 0, 1))
    monkeypatch.setattr(unsealed, "describe", lambda step, bad, dataset: {"step": step, **dataclasses.asdict(bad)})
    state.unsealed._bad, state.context.posts.unsaved = [bad], [Evaluation(step=1, scores={}, images={})]
    train(state, 1, 2)
    state.save(2)
    train(state, 3)
    kept = state.unsealed.part(3)  # in memory while the receipt is written: everything that no receipt covers for certain
    assert np.shape(kept.lanes) == (1, 3, 2) and kept.chain == "" and len(kept.bad) == 1
    with pytest.raises(StorageError):
        state.saver.wait()
    state.settle()
    sealed = away == "checkpoints"
    assert len(state.unsealed._lanes) == (1 if sealed else 3)
    assert len(state.context.posts.unsaved) == len(state.unsealed._bad) == (0 if sealed else 1)
    down[0] = False
    state.save(3)
    state.wait()
    assert threading.main_thread().name not in in_thread
    assert layout.steps(run) == [3]
    last = {r.end: r for r in receipts(run)}[3]
    digests = receipt.step_digests(np.array([[1, 101], [2, 102], [3, 103]]))
    assert last.first == (2 if sealed else 0) and last.steps == digests[last.first :]
    index = layout.decode(layout.folder(run, 3).join(layout.INDEX).read())
    assert last.chain == receipt.extend("", digests) == index["receipt"]["chain"]
    listed = [name for name, _ in run.join("quarantine").files()]
    assert listed == ["step-00000002.jsonl" if sealed else "step-00000003.jsonl"]
    assert state.unsealed._lanes == state.unsealed._bad == state.context.posts.unsaved == []


def test_outages_of_receipts_count_as_failed_saves_and_the_attempt_ends_behind_the_tolerated_ones(tmp_path, monkeypatch, alone):
    state = training(Location(str(tmp_path / "run")), monkeypatch)

    def away(*given: Any) -> None:
        raise AWAY

    monkeypatch.setattr(Location, "write", away)
    for step in range(1, TOLERATED + 2):
        train(state, step)
        state.save(step)
    assert state.failed == TOLERATED and len(state.notices) == TOLERATED
    with pytest.raises(StorageError):
        state.wait()


def test_no_checkpoint_is_complete_before_its_receipt(tmp_path, monkeypatch, alone):
    run, written, write = Location(str(tmp_path / "run")), list[str](), Location.write
    state = training(run, monkeypatch)
    monkeypatch.setattr(Location, "write", lambda self, *given: (written.append(str(self)), write(self, *given))[1])
    train(state, 1)
    state.save(1)
    state.wait()
    kinds = [place.removeprefix(f"{run}/").split("/")[0] for place in written]
    assert kinds == ["curves", "receipts", "checkpoints", "checkpoints"] and written[-1].endswith("checkpoint.json")


def test_a_replaced_sample_that_two_lists_name_is_counted_once(tmp_path, monkeypatch):
    """Lists overlap if a receipt was written, but its worker hasn't been informed."""
    run = Location(str(tmp_path))
    place = {"dataset": "d", "shard": "s", "row_group": 0, "row": 1}
    first = {"step": 1, "counted_from": 1, **place, "reason": "torn", "replaced_by": place}
    run.join("quarantine", "step-00000002.jsonl").write(json.dumps(first).encode() + b"\n")
    both = [first, {**first, "step": 3}]
    run.join("quarantine", "step-00000004.jsonl").write("".join(json.dumps(one) + "\n" for one in both).encode())
    monkeypatch.setattr(consumed.segments, "read", lambda run: [])
    monkeypatch.setattr(consumed.coverage, "cut", lambda plans, steps: [])
    found = consumed.record(run, 4)
    assert found["replaced_count"] == 2 and [bad["step"] for bad in found["replaced"]] == [1, 3]
