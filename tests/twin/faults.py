"""Runs faults that only a GPU shows, with heliostat's own classes on the simulated device; they need a process group of one
worker.

`tests/integration/test_twin_grid.py` names what each protects. The grid tries the other faults that only a GPU shows: copies of
offloaded state, DeepSpeed's timer, and fp16's overflow over groups. `rules` tries threads, NVML, and memory.
"""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from heliostat.config.averages import Ema
from heliostat.engine import deepspeed_engine, process_group, stream_patches
from heliostat.engine.ema import AveragedWeights
from heliostat.errors import PeerLostError
from heliostat.numerics import play
from heliostat.runs.time_ledger import Ledger
from heliostat.training.worker.loss_watch import LossWatch
from heliostat.training.worker.micro_batches import StepBatches
from heliostat.training.worker.step import Loop
from heliostat.training.worker.step_reports import StepReports, TrainedTokens

from tests.twin import cuda, device
from tests.twin.steps import Setup, step

FAULTS: dict[str, Callable[[play.Player], None]] = {}


def fault(check: Callable[[play.Player], None]) -> Callable[[play.Player], None]:
    """Adds a fault by its name."""
    FAULTS[check.__name__] = check
    return check


@fault
def weights_are_averaged_while_a_save_copies_them(one: play.Player) -> None:
    """Simulates a skipped fp16 step, without a following step that would wait for the copy. The host gets the copy afterwards."""
    one.state.average = AveragedWeights(one.engine, Ema(decay=0.5))
    for values in one.state.average.state(whole=True).values():
        values.local.zero_()
    before = play.state(one.engine)
    host, exchanged = one.state.saver._host, threading.Event()
    arrive = host.wait
    host.wait = lambda: (exchanged.wait(), arrive())  # type: ignore[assignment, method-assign, return-value]
    try:
        one.state.save(2)
        with one.state.averaged():
            exchanged.set()
            assert not any(weight.any() for weight in play.masters(one.engine).values())
        one.state.wait()
    finally:
        exchanged.set()
        one.state.average, host.wait = None, arrive  # type: ignore[method-assign]
    one.load(one.job.run_folder, 2)
    assert all(torch.equal(values, before[name]) for name, values in play.state(one.engine).items())


def _aborted(tensor: torch.Tensor, *given: Any, **named: Any) -> None:
    """Simulates a collective that the driver's order aborts: the end of its result has arrived, and the rest is unwritten
    memory."""
    process_group.obey(process_group.order())
    tensor.view(-1)[: max(1, tensor.numel() - 1)].fill_(math.nan)


def _with_abort(work: Callable[[], object]) -> None:
    """Runs a function with collectives that are aborted."""
    reduce, dist.all_reduce = dist.all_reduce, _aborted
    try:
        work()
    finally:
        dist.all_reduce = reduce


def _loop(one: play.Player, batches: StepBatches) -> tuple[Any, Any]:
    """Returns the loop of the attempt, and its reports, without a driver. A loss or norm that isn't finite ends it."""
    context: Any = SimpleNamespace(
        job=one.job, posts=one.state.context.posts, progressed=process_group.check, start_step=0, control=one.control,
        latest=SimpleNamespace(loss=None), ledger=one.state.context.ledger,
    )  # fmt: skip
    loop: Any = object.__new__(Loop)
    loop.context, loop.stepper, loop.job, loop.ledger = context, one.stepper, one.job, Ledger("data")
    loop.hooks, loop.state, loop.unsealed = [LossWatch(context, one.dataset, lambda: None)], one.state, one.unsealed
    loop.heartbeat, loop.consensus = SimpleNamespace(), SimpleNamespace(ask=lambda code: None, result=lambda: 0)
    loop.ahead = SimpleNamespace(take=lambda step: batches, begin=lambda step: None)
    loop.heartbeat.stop = 0
    trained = TrainedTokens(one.recipe, one.dataset.order, one.sharing.counts)
    reports: Any = object.__new__(StepReports)
    reports.context, reports.job, reports.ledger, reports.engine = context, one.job, loop.ledger, one.engine
    reports.hooks, reports.unsealed, reports.sums = loop.hooks, one.unsealed, one.stepper.report
    loop.reports, reports.trained = reports, trained
    return loop, reports


@fault
def a_step_whose_reduction_was_aborted_counts(one: play.Player) -> None:
    batches = _batches(one)
    loop, _ = _loop(one, batches)
    before = one.unsealed.part(2).steps
    with _lost():
        _with_abort(lambda: loop._make(1))
    assert one.unsealed.part(2).steps == before


@fault
def a_norm_of_an_aborted_reduction_is_judged(one: play.Player) -> None:
    batches = _batches(one)
    loop, _ = _loop(one, batches)
    _with_abort(lambda: one.stepper.step(1, batches))
    with _lost():
        loop._judge(0)
    assert not math.isfinite(one.stepper.norms[-1]), "no reduction was aborted"


@fault
def a_loss_of_an_aborted_report_is_judged(one: play.Player) -> None:
    batches = _batches(one)
    _, reports = _loop(one, batches)
    one.stepper.step(1, batches)
    one.stepper.read_norms()
    with _lost():
        _with_abort(lambda: reports._post(1, 2, 1.0, 0.0))


def _batches(one: play.Player) -> StepBatches:
    return one.stepper.prepare(1, one.sharing.share(one._read))


@contextmanager
def _lost() -> Iterator[None]:
    """Requires that results of an aborted collective count as the loss of a peer, and then forgets the order to abort."""
    try:
        yield
    except PeerLostError:
        return
    finally:
        process_group._order = threading.Event()
    raise AssertionError("numbers of an aborted collective count")


def tried(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Tries all faults, one after another, with one engine; yields the problem of each."""
    device.start_deepspeed()
    one = Setup("language model", 1).player(Path(folder), 1)
    step(one, 0)
    one.save(1)
    for name, check in FAULTS.items():
        try:
            one.load(one.job.run_folder, 1)
            one.stepper.losses, one.stepper.added = [], []
            one.stepper.read_norms()
            check(one)
            yield {"fault": name, "error": ""}
        except BaseException:  # noqa: BLE001
            yield {"fault": name, "error": traceback.format_exc()}


def unordered(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Trains at stages 2 and 3 without a stream that waits for reductions; yields the errors of the simulated device."""
    device.start_deepspeed()
    for stage in (2, 3):
        with _without_waits_of_patches():
            one = Setup("language model", stage).player(Path(folder), 1)
            try:
                step(one, 0)
                step(one, 1)
                error = ""
            except RuntimeError as e:
                error = str(e)
        yield {"stage": stage, "error": error}
        deepspeed_engine.destroy_engines()
        deepspeed_engine.forget_groups()


@contextmanager
def _without_waits_of_patches() -> Iterator[None]:
    wait = cuda.Stream.wait_stream

    def missing(stream: cuda.Stream, other: cuda.Stream) -> None:
        if traceback.extract_stack(limit=2)[0].filename != stream_patches.__file__:
            wait(stream, other)

    cuda.Stream.wait_stream = missing  # type: ignore[method-assign]
    try:
        yield
    finally:
        cuda.Stream.wait_stream = wait  # type: ignore[method-assign]
