"""Tests that a thread prepares the next step's batches while a step computes, without side effects until that step takes them.

The gradient norm is read one step late, but before anything that depends on it.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.data.device_streams import LateRead
from heliostat.errors import DataError, NonFiniteError, PeerLostError
from heliostat.runs.time_ledger import Ledger
from heliostat.training.stops import INTERRUPTED, RUN
from heliostat.training.worker import micro_batches
from heliostat.training.worker.context import Due, Hook
from heliostat.training.worker.loss_watch import LossWatch
from heliostat.training.worker.micro_batches import BatchesAhead, StepBatches
from heliostat.training.worker.step import Loop, Stepper
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

from tests.unit.build_job import job

SOON_S = 120.0


def batches(step: int, samples: Any) -> StepBatches:
    return StepBatches(samples, [], torch.tensor(float(step)))


class Samples:
    """Reads samples, which are numbers in order; raises an error at `fails`."""

    def __init__(self, fails: int = -1) -> None:
        self.read, self.fails = 0, fails
        self.threads = set[str]()

    def __call__(self) -> Any:
        self.threads.add(threading.current_thread().name)
        self.read += 1
        if self.read - 1 == self.fails:
            raise DataError("the shard is gone")
        return self.read - 1


@pytest.fixture
def made() -> Iterator[Callable[..., BatchesAhead]]:
    """Creates batch makers, and ends all of them after the test."""
    ones: list[BatchesAhead] = []

    def make(*given: Any) -> BatchesAhead:
        ones.append(BatchesAhead(*given))
        return ones[-1]

    yield make
    for one in ones:
        one.end()


def settled(check: Callable[[], bool]) -> bool:
    until = time.monotonic() + SOON_S
    while not check() and time.monotonic() < until:
        time.sleep(0.001)
    return check()


# the thread ----------------------------------------------------------------------------------------------------------


def test_batches_are_made_in_order_in_one_other_thread_and_at_most_one_step_ahead(made):
    samples = Samples()
    ahead = made(samples, batches)
    for step in range(5):
        taken = ahead.take(step)
        assert (taken.samples, float(taken.terms)) == (step, step) and samples.read == step + 1
        ahead.begin(step + 1)
        ahead.settle()
        time.sleep(0.002)
        assert samples.read == step + 2
    assert samples.threads == {"batches"}


def test_the_step_goes_on_while_the_next_ones_batches_are_made_and_waits_only_to_take_them(made):
    may, at_work = threading.Event(), threading.Event()

    def prepare(step: int, samples: Any) -> StepBatches:
        if step:
            at_work.set()
            assert may.wait(SOON_S)
        return batches(step, samples)

    ahead = made(Samples(), prepare)
    ahead.take(0)
    ahead.begin(1)
    assert at_work.wait(SOON_S)  # and this thread computes
    threading.Timer(0.05, may.set).start()
    assert ahead.take(1).samples == 1 and may.is_set()


def test_an_error_is_raised_by_the_step_that_needs_the_samples_and_not_before(made):
    ahead = made(Samples(fails=1), batches)
    ahead.take(0)
    ahead.begin(1)
    ahead.settle()
    with pytest.raises(DataError, match="the shard is gone"):
        ahead.take(1)


def test_the_thread_ends_with_the_attempt(made):
    ahead = made(Samples(fails=1), batches)
    ahead.take(0)
    ahead.begin(1)
    ahead.end()
    assert not ahead.busy


def test_a_thread_that_waits_for_samples_is_left_within_the_deadline_and_does_nothing_afterwards(made, monkeypatch):
    """Its process isn't used again (`Worker.busy`). On a GPU, a batch is pinned, and by then perhaps in the next attempt's
    context."""
    monkeypatch.setattr(micro_batches, "DEADLINE_S", 0.02)
    may, waits, prepared = threading.Event(), threading.Event(), list[int]()
    reads = iter([lambda: 0, lambda: waits.set() or may.wait(SOON_S)])
    ahead = made(lambda: next(reads)(), lambda step, samples: prepared.append(step) or batches(step, samples))
    ahead.take(0)
    ahead.begin(1)
    assert waits.wait(SOON_S)
    ahead.end()
    assert ahead.busy
    may.set()
    assert settled(lambda: not ahead.busy) and prepared == [0]


def forked() -> float:
    """Restores torch's generator afterwards, but not while it draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return torch.rand(1).item()


def restored() -> float:
    before = np.random.get_state()
    np.random.seed(7)
    drawn = np.random.random()
    np.random.set_state(before)
    return drawn


@pytest.mark.parametrize("draw", [lambda: torch.rand(1).item(), lambda: np.random.random(), random.random, forked, restored])
def test_a_recipe_that_draws_from_generators_of_the_process_makes_its_batches_where_nothing_else_draws(made, draw):
    """Otherwise a step's dropout and the next step's batches would draw from one generator in any order."""
    threads, notices = list[str](), list[str]()

    def prepare(step: int, samples: Any) -> StepBatches:
        threads.append(threading.current_thread().name)
        return batches(step, draw())

    ahead = made(Samples(), prepare, notices.append)
    for step in range(3):
        assert isinstance(ahead.take(step).samples, float)
        ahead.begin(step + 1)
    assert threads[0] == "batches" and set(threads[1:]) == {threading.current_thread().name}
    assert len(notices) == 1 and notices[0].startswith("recipe: `batch` uses a process-wide random") and "`keys`" in notices[0]


def attended(dropout: float) -> float:
    """Its attention draws random numbers only with dropout."""
    states = torch.ones(1, 1, 4, 8)
    return torch.nn.functional.scaled_dot_product_attention(states, states, states, dropout_p=dropout).sum().item()


DRAWS = {
    "torch": lambda: torch.rand(1).item(),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(8)).sum().item(),
    "attention": lambda: attended(0.5),
    "numpy": lambda: np.random.random(),
    "random": lambda: random.random(),
    "fork_rng": forked,
    "set_state": restored,
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_thread_stops_before_a_later_batch_draws_while_a_step_computes(made, name):
    """A recipe may draw only from its tenth batch on, or only for some samples. Then the current step has lost nothing."""
    threads, notices = list[str](), list[str]()

    def prepare(step: int, samples: Any) -> StepBatches:
        threads.append(threading.current_thread().name)
        return batches(step, DRAWS[name]() if step >= 2 else step)

    def shared() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]

    ahead = made(Samples(), prepare, notices.append)
    for step in range(4):
        taken, before = ahead.take(step), shared()
        ahead.begin(step + 1)
        ahead.settle()
        assert shared() == before, "the thread has drawn numbers of the step"
    assert isinstance(taken.samples, float) and threads == ["batches"] * 3 + [threading.current_thread().name] * 2
    assert len(notices) == 1


def test_other_threads_draw_and_own_generators_are_free_while_batches_are_made(made):
    at_work, may = threading.Event(), threading.Event()

    def prepare(step: int, samples: Any) -> StepBatches:
        own = torch.rand(1, generator=torch.Generator().manual_seed(step)), np.random.default_rng(step).random(), attended(0.0)
        if step:
            at_work.set()
            assert may.wait(SOON_S)
        return batches(step, own)

    notices = list[str]()
    ahead = made(Samples(), prepare, notices.append)
    ahead.take(0)
    ahead.begin(1)
    assert at_work.wait(SOON_S)
    torch.manual_seed(3)
    drawn = torch.rand(1), random.random(), np.random.random()
    may.set()
    ahead.take(1)
    assert len(drawn) == 3 and notices == []


def test_the_modes_of_other_threads_are_theirs_alone_while_batches_are_made(made):
    """`torch.compile` of torch 2.9 compiles nothing while a process-wide flag reports a mode. Another thread's mode, such as a
    memory saver's, may begin before a batch and end during it."""
    at_work, may, seen = threading.Event(), threading.Event(), list[bool]()

    def prepare(step: int, samples: Any) -> StepBatches:
        if step:
            at_work.set()
            assert may.wait(SOON_S)
        return batches(step, samples)

    ahead = made(Samples(), prepare)
    ahead.take(0)
    with TorchDispatchMode():
        ahead.begin(1)
        assert at_work.wait(SOON_S)
    seen.append(is_in_torch_dispatch_mode())
    may.set()
    ahead.take(1)
    assert [*seen, is_in_torch_dispatch_mode()] == [False, False]


# in the loop ---------------------------------------------------------------------------------------------------------


class Noted(Hook):
    """Records the order of events."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def on_norm(self, step: int, norm: float) -> None:
        self.order.append(f"norm {step}: {norm:g}")

    def on_save(self, done: int, due: Due) -> None:
        self.order += [f"{what} {done}" for what in ("evaluates", "saves") if getattr(due, what)]


def looped(ahead: Any, steps: int, stop: int, order: list[str], **changes: Any) -> Any:
    """Returns a loop whose workers agree to stop after `stop` steps. A step's norm is its number, from 1."""
    loop: Any = object.__new__(Loop)
    loop.job = job(**{"train.steps": steps, "checkpoint.every": 3, **changes})
    loop.ledger, loop.hooks = Ledger("data"), [Noted(order)]
    loop.context = SimpleNamespace(start_step=0, progressed=lambda: order.append("progress"), phase=lambda name: None)
    loop.heartbeat, loop.ahead, loop.pauses = SimpleNamespace(stop=0), ahead, ()
    loop.reports = SimpleNamespace(begin=lambda: None, aside=lambda: loop.ledger("idle"))
    loop.reports.trained = SimpleNamespace(add=lambda step, batches: None)
    loop.reports.report = lambda done: order.append(f"report {done}")
    counted: list[int] = []
    loop.unsealed = SimpleNamespace(steps=counted, replaced=0, add=lambda step, samples: counted.append(samples))
    loop.consensus = SimpleNamespace(ask=lambda code: None, result=lambda: INTERRUPTED if len(counted) == stop else RUN)
    loop.stepper = object.__new__(Stepper)
    loop.stepper._norms, loop.stepper._unread, loop.stepper.untrained = [], deque(), set()
    loop.stepper.step = lambda step, batches: loop.stepper._unread.append((step, LateRead(torch.tensor(step + 1.0))))
    return loop


def test_samples_that_were_read_ahead_of_a_stop_do_not_count(made):
    samples = Samples()
    loop = looped(made(samples, batches), 9, 4, [])
    assert loop.run() == (4, INTERRUPTED)
    loop.ahead.settle()
    assert samples.read == 5 and loop.unsealed.steps == [0, 1, 2, 3]


def test_nothing_is_read_ahead_of_the_last_step(made):
    samples = Samples()
    assert looped(made(samples, batches), 3, 0, []).run() == (3, RUN)
    assert samples.read == 3


def test_norms_are_judged_a_step_late_and_before_reports_saves_and_evaluations(made):
    order: list[str] = []
    changes = {"train.log_every": 100, "checkpoint.every": 5, "evaluate": {"every": 3, "samples": 2, "fraction": 0.5}}
    looped(made(Samples(), batches), 6, 0, order, **changes).run()
    assert [what for what in order if what != "progress"] == [
        "norm 0: 1", "report 1",
        "norm 1: 2", "norm 2: 3", "evaluates 3",
        "norm 3: 4", "norm 4: 5", "report 5", "saves 5",
        "norm 5: 6", "report 6", "evaluates 6", "saves 6",
    ]  # fmt: skip
    judged = [i for i, what in enumerate(order) if what.startswith("norm")]
    assert all(order[i - 1].startswith(("progress", "norm")) for i in judged), "an abort would have garbage judged"


def test_a_norm_between_two_reports_is_read_after_the_next_step(made):
    order: list[str] = []
    loop = looped(made(Samples(), batches), 5, 0, order, **{"train.log_every": 100, "checkpoint.every": 5})
    step = loop.stepper.step
    loop.stepper.step = lambda number, batches: (order.append(f"step {number}"), step(number, batches))
    loop.run()
    assert order.index("step 2") < order.index("norm 1: 2") < order.index("step 3")


def test_norms_are_judged_before_workers_are_compared(made):
    """Weights that aren't finite may differ in their bits, without a faulty worker."""
    order: list[str] = []
    loop = looped(made(Samples(), batches), 5, 0, order, **{"train.log_every": 100, "checkpoint.every": 5})
    (hook,) = loop.hooks
    hook.looks, hook.before_step = lambda step: step == 3, lambda step: order.append(f"looks {step}")
    loop.run()
    assert order.index("norm 1: 2") < order.index("looks 3") and order.index("norm 2: 3") < order.index("looks 3")
    assert order.index("looks 2") < order.index("norm 1: 2"), "other steps don't wait"


def watching() -> Any:
    """Returns the monitor of gradient norms for a dataset with one sample per step."""
    watch: Any = object.__new__(LossWatch)
    watch.job, watch.saved, watch.untrained = job(), lambda: None, set()
    watch.dataset = SimpleNamespace(
        sources=[], order=SimpleNamespace(step=lambda step: np.array([step]), locate=lambda positions: Places())
    )
    return watch


class Places:
    source, chunk, row = [0], [0], [7]

    def __len__(self) -> int:
        return 1


def test_an_error_names_the_step_whose_norm_is_not_finite():
    watch = watching()
    watch.on_norm(3, 1.0)
    with pytest.raises(NonFiniteError, match="step 4: gradient norm inf"):
        watch.on_norm(3, math.inf)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_a_trained_token_is_an_error_that_names_its_samples(precision: str):
    stepper, watch = object.__new__(Stepper), watching()
    stepper._norms, stepper.untrained = [], watch.untrained
    read = {0: torch.tensor([2.0, 5.0]), 1: torch.tensor([math.nan, 0.0])}  # by step: norm, number of loss terms
    stepper._unread = deque((step, LateRead(values)) for step, values in read.items())
    watch.job = job(**{"train.precision": precision, "workers.gpus": 1})
    (first, second) = stepper.read_norms()
    watch.on_norm(*first)
    with pytest.raises(NonFiniteError, match=r"step 2: no token of its samples is trained.*before the next checkpoint.*0:0:7"):
        watch.on_norm(*second)


def failing(made: Callable[..., BatchesAhead], norm: float) -> Any:
    """Returns a loop whose recipe raises its own error in step 3, after a step with this norm."""
    loop = looped(made(Samples(), batches), 9, 0, [], **{"train.log_every": 100, "checkpoint.every": 100})

    def step(number: int, batches: Any) -> None:
        if number == 2:
            raise ValueError("the latents aren't finite")
        loop.stepper._unread.append((number, LateRead(torch.tensor(norm if number == 1 else 1.0))))

    loop.stepper.step, loop.hooks = step, [watching()]
    loop.hooks[0].saved = lambda: pytest.fail("other workers may not have failed, and wait elsewhere")
    return loop


def test_a_recipes_error_about_weights_that_are_not_finite_does_not_hide_the_step_that_made_them_so(made):
    with pytest.raises(NonFiniteError, match="step 2: gradient norm nan") as caught:
        failing(made, math.nan).run()
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_recipes_error_after_finite_steps_and_after_an_abort_is_its_own(made):
    with pytest.raises(ValueError, match="latents"):
        failing(made, 1.0).run()
    loop = failing(made, math.nan)
    step, aborted = loop.stepper.step, threading.Event()

    def progressed() -> None:
        if aborted.is_set():
            raise PeerLostError

    loop.context.progressed = progressed
    loop.stepper.step = lambda number, batches: (aborted.set() if number == 2 else None, step(number, batches))
    with pytest.raises(ValueError, match="latents"):
        loop.run()
