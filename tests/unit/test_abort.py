"""Tests that a worker ignores results computed after the order to abort, because an aborted collective returns unwritten
buffers."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.engine import process_group
from heliostat.errors import HeliostatError, NonFiniteError, PeerLostError, WorkerError
from heliostat.runs.events import Evaluation, Saved
from heliostat.runs.time_ledger import Ledger
from heliostat.training.worker.context import Posts
from heliostat.training.worker.heartbeat import Heartbeat
from heliostat.training.worker.process import TrainWorker
from heliostat.training.worker.recheck import CorruptionCheck
from heliostat.training.worker.step import Loop
from heliostat.training.worker.step_reports import StepReports, StepResults
from heliostat.training.worker.training_state import TrainingState

from tests.unit.build_job import job


@pytest.fixture(autouse=True)
def attempt() -> Iterator[None]:
    """Gives each test its own attempt, without an order to abort."""
    process_group._order = process_group.threading.Event()
    yield
    process_group._order = process_group.threading.Event()


def ordered(*given: Any) -> None:
    process_group.obey(process_group.order())


class Never:
    """Fails the test at the first use."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was used after the abort")


def test_the_order_is_noted_before_the_group_is_aborted_and_only_for_its_own_attempt(monkeypatch):
    seen: list[bool] = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    monkeypatch.setattr("torch.distributed.distributed_c10d._abort_process_group", lambda: seen.append(process_group.ordered()))
    process_group.check()
    earlier = process_group.order()
    process_group.obey(earlier)
    assert seen == [True]
    with pytest.raises(PeerLostError):
        process_group.check()
    process_group._order = process_group.threading.Event()  # as `join` does
    process_group.obey(earlier)
    process_group.check()
    assert seen == [True], "a late order of an earlier attempt would abort the present one"


def test_the_heartbeat_hands_the_order_on(monkeypatch):
    beat = object.__new__(Heartbeat)
    beat._rank, beat.progress, beat._ordered, beat._node, beat._every = 0, 0, 0, "n", 0.0
    beat._abort, beat.step, beat.micro = process_group.order(), 0, 0
    beat._ended = SimpleNamespace(wait=lambda seconds: True)  # type: ignore[assignment]
    beat._mailbox = SimpleNamespace(heartbeat=lambda *given: {"abort": True})
    monkeypatch.setattr("ray.get", lambda answer, timeout: answer)
    beat._beat()
    assert process_group.ordered()


def loop_in_step(step: Callable[[], object]) -> Any:
    loop: Any = object.__new__(Loop)
    loop.ledger, loop.job, loop.hooks = Ledger("data"), job(), []
    loop.context = SimpleNamespace(start_step=0, progressed=process_group.check)
    loop.ahead = SimpleNamespace(take=lambda step: SimpleNamespace(samples="samples"), begin=lambda step: None)
    loop.heartbeat = SimpleNamespace(stop=0)
    loop.consensus = SimpleNamespace(ask=lambda code: None, result=lambda: 0)
    loop.stepper = SimpleNamespace(step=lambda *given: step())
    loop.unsealed, loop.reports = Never(), SimpleNamespace(trained=Never())
    return loop


def test_a_step_that_was_aborted_is_not_counted_as_trained():
    with pytest.raises(PeerLostError):
        loop_in_step(ordered)._make(5)


def test_a_norm_that_was_read_after_the_abort_is_not_judged():
    """The norm isn't finite, so it would end the run, or with `rollback` leave out good samples."""
    loop = loop_in_step(lambda: None)
    loop.stepper.read_norms = lambda but: ordered() or [(4, math.nan)]
    loop.hooks = [SimpleNamespace(on_norm=Never().__getattr__)]
    with pytest.raises(PeerLostError):
        loop._judge(1)


def test_a_step_before_the_abort_counts():
    loop, noted = loop_in_step(lambda: None), list[Any]()
    loop.unsealed = SimpleNamespace(add=lambda *given: noted.append(given))
    loop.reports = SimpleNamespace(trained=SimpleNamespace(add=lambda *given: None))
    assert loop._make(5) == 0 and noted == [(5, "samples")]


def test_numbers_of_an_aborted_report_are_neither_judged_nor_logged():
    def report(*given: Any) -> StepResults:
        ordered()
        return StepResults([math.nan], [1.0], {}, {}, [10**9])

    reports: Any = object.__new__(StepReports)
    reports.sums, reports.job = report, job()
    reports.context = SimpleNamespace(control=None, progressed=process_group.check, posts=Never(), latest=Never())
    reports.hooks, reports.unsealed = Never(), SimpleNamespace(replaced=0, dataset=Never())
    reports.trained = SimpleNamespace(take=list)
    with pytest.raises(PeerLostError):
        reports._post(0, 1, 1.0, 0.0)


def test_after_an_abort_no_checkpoint_no_receipt_and_no_copy_is_made():
    state: Any = object.__new__(TrainingState)
    state.context = SimpleNamespace(progressed=process_group.check, posts=Never())
    state.unsealed = state.saver = state.memory = Never()
    ordered()
    with pytest.raises(PeerLostError):
        state.save(10)
    with pytest.raises(PeerLostError):
        state.keep(10)


def test_what_a_worker_posts_after_the_abort_is_dropped_and_counted(caplog):
    """This holds for every part of the worker that posts, without a check of its own."""
    posted: list[Any] = []
    posts = Posts(SimpleNamespace(post=posted.append), 0)  # type: ignore[arg-type]
    posts.notice("before")
    ordered()
    with caplog.at_level("DEBUG", "heliostat"):
        posts.post(Saved(step=10, blocked_s=0.0))
        posts.tell(Evaluation(step=10, scores={"loss": math.nan}))
        posts.notice_of_any("the bits differ")
    assert [event.text for event in posted] == ["before"] and posts.dropped == 3
    assert [r.getMessage() for r in caplog.records] == [
        f"dropped {kind} of an attempt that was aborted" for kind in ("Saved", "Evaluation", "Notice")
    ]


def test_bits_of_an_aborted_collective_are_no_corruption(monkeypatch):
    """At ZeRO-3, the weights are gathered for the comparison, so a healthy node would be excluded for good."""
    recheck: Any = object.__new__(CorruptionCheck)
    recheck.where, recheck.kind, recheck.group = ("node", "address"), "cpu", None
    recheck._digests = lambda *given: ordered() or [1]
    monkeypatch.setattr("heliostat.training.worker.recheck.together", Never().__getattr__)
    with pytest.raises(PeerLostError):
        recheck._all({}, 0, [])


# the process ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch) -> list[Any]:
    """Returns the actions of a worker's process after a failed attempt, in order."""
    done: list[Any] = []
    monkeypatch.setattr(process_group, "join", lambda place: None)
    monkeypatch.setattr(process_group, "abort", lambda: done.append("abort"))
    monkeypatch.setattr(process_group, "leave", lambda: done.append("leave"))
    monkeypatch.setattr("heliostat.training.worker.collector.spare_imports", lambda: None)
    return done


def failing(monkeypatch: pytest.MonkeyPatch, told: list[Any], error: Exception, before: Any = lambda: None) -> TrainWorker:
    class Failing:
        busy = False

        def __init__(self, config: Any) -> None: ...

        def run(self) -> None:
            before()
            raise error

        def end(self) -> None:
            told.append("end")

    monkeypatch.setattr("heliostat.training.worker.build.Worker", Failing)
    worker = object.__new__(TrainWorker)
    worker._spent = False
    return worker


def run(worker: TrainWorker, told: list[Any]) -> None:
    place: Any = SimpleNamespace(rank=2, backend="gloo")
    worker.run(place, {"mailbox": SimpleNamespace(post=told.append)})


@pytest.mark.parametrize(
    "error", [ValueError("Default process group has not been initialized"), NonFiniteError("step 3: loss nan"), RuntimeError("x")]
)
def test_every_error_after_the_abort_is_the_loss_of_a_peer(monkeypatch, told, error):
    with pytest.raises(PeerLostError, match=str(error)):
        run(failing(monkeypatch, told, error, ordered), told)
    assert isinstance(told[0].error, PeerLostError)


def test_a_device_that_breaks_is_told_of_after_the_abort_too(monkeypatch, told):
    """This may be the reason why the first worker failed; an abort never causes such an error."""
    error = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    with pytest.raises(RuntimeError, match="ECC"):
        run(failing(monkeypatch, told, error, ordered), told)


class TwoWords(Exception):
    """Can't reach the driver, because it can't be created from its `args`."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(NonFiniteError("step 3: loss nan"), NonFiniteError), (KeyError("x"), WorkerError), (TwoWords("a", "b"), WorkerError)],
)
def test_a_worker_tells_its_error_before_it_cleans_up(monkeypatch, told, error, kind):
    """On a broken device, the abort, a copy to memory in progress, or leaving the group may never end."""
    with pytest.raises((type(error), WorkerError)) as raised:
        run(failing(monkeypatch, told, error), told)
    report, *rest = told
    assert (report.rank, type(report.error), rest) == (2, kind, ["abort", "end", "leave"])
    assert isinstance(report.error, HeliostatError) and not isinstance(raised.value, PeerLostError)


def test_a_device_that_is_broken_when_a_worker_leaves_hides_no_error_and_its_process_is_not_used_again(monkeypatch, told):
    def leave() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    worker = failing(monkeypatch, told, KeyError("the cause"))
    monkeypatch.setattr(process_group, "leave", leave)
    with pytest.raises(KeyError, match="the cause"):
        run(worker, told)
    assert worker._spent
