"""Reads the samples of the next step and makes its batches in a thread, while the present step computes.

    batches = ahead.take(step)      # waits if they aren't made yet; raises what failed in making them
    ahead.begin(step + 1)           # at most one step ahead
    ahead.settle()                  # the thread rests: batches may be made elsewhere now
    ahead.end()                     # waits for the thread, up to a deadline

What is made ahead counts for nothing until its step takes it: neither its samples nor its errors. Batches are made in one thread
at a time, because a recipe's `batch` needn't be safe to call in two.

A recipe that draws a batch's random numbers from generators of the whole process, rather than from the samples' keys, would
disturb those of the present step. The first batches, during which nothing else computes, show that; then all are made where
they are taken.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from heliostat.data import device_threads
from heliostat.data.stream import StepSamples
from heliostat.training.worker.micro_batches import StepBatches

DEADLINE_S = 5.0  # for the thread to end, which may wait for samples; the driver waits for workers twice as long
DRAWS = (
    "recipe: `batch` draws from a random generator of the whole process, so batches aren't made while a step computes. Derive "
    "what is random from `keys` (docs/guides/recipe.md)"
)
SETTERS: tuple[tuple[Any, str], ...] = (
    (torch, "manual_seed"), (torch, "set_rng_state"), (torch.random, "manual_seed"), (torch.random, "set_rng_state"),
    (np.random, "seed"), (np.random, "set_state"), (random, "seed"), (random, "setstate"),
)  # fmt: skip


class Begun(NamedTuple):
    """Holds a step that the thread reads and makes, counted from 0, and what comes of it: its samples alone where batches are
    made by `take`."""

    step: int
    outcome: Future[StepBatches | StepSamples]


class BatchesAhead:
    """Makes batches ahead. Steps are begun and taken in order, by one thread."""

    def __init__(
        self,
        read: Callable[[], StepSamples],
        prepare: Callable[[int, StepSamples], StepBatches],
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Starts the thread. `read`: takes the next step's samples, in order; `prepare`: makes a step's batches from them;
        `notice`: reports that batches can't be made ahead."""
        self._read, self._prepare, self._notice = read, prepare, notice
        self._begun: Begun | None = None
        self._inline: bool | None = None  # whether `take` makes the batches; None until the first ones are made
        self._reported = False
        self._ended = threading.Event()
        self._steps: SimpleQueue[Begun | None] = SimpleQueue()
        self._thread = device_threads.thread(self._work, "batches")

    def begin(self, step: int) -> None:
        """Lets the thread read and make a step's batches."""
        self._begun = Begun(step, Future())
        self._steps.put(self._begun)

    def take(self, step: int) -> StepBatches:
        """Waits for a step's batches and returns them; raises the error of reading or making them."""
        if self._begun is None:
            self.begin(step)
        assert self._begun and self._begun.step == step
        outcome, self._begun = self._begun.outcome, None
        result = outcome.result()
        if self._inline and not self._reported:
            self._reported = True
            self._notice(DRAWS)
        return result if isinstance(result, StepBatches) else self._prepare(step, result)

    def settle(self) -> None:
        """Waits until the thread has made what was begun, or has failed, which is raised when the step is taken."""
        if self._begun:
            futures.wait([self._begun.outcome])

    def end(self) -> None:
        """Ends the thread: what it has made, or what fails there from now on, is dropped."""
        self._ended.set()
        self._steps.put(None)
        self._begun = None
        self._thread.join(DEADLINE_S)

    @property
    def busy(self) -> bool:
        """Tells whether the thread hasn't ended."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while (begun := self._steps.get()) is not None and not self._ended.is_set():
            self._make(begun)
            del begun  # with its batches, which are of no use once the step has taken them

    def _make(self, begun: Begun) -> None:
        try:
            samples = self._read()
            if not self._ended.is_set():
                begun.outcome.set_result(samples if self._inline else self._made(begun.step, samples))
        except BaseException as e:  # noqa: BLE001 (raised where the step is taken)
            begun.outcome.set_exception(e)

    def _made(self, step: int, samples: StepSamples) -> StepBatches:
        if self._inline is not None:
            return self._prepare(step, samples)
        before = _generators()
        with _noting_seeds() as seeded:
            batches = self._prepare(step, samples)
        self._inline = bool(seeded) or before != _generators()
        return batches


def _generators() -> tuple[object, ...]:
    """Reads the states of the generators that all threads of the process share."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), kind, np.asarray(keys).tobytes(), *rest


@contextmanager
def _noting_seeds() -> Iterator[list[str]]:
    """Notes what sets those states inside: `torch.random.fork_rng` leaves them as they were, but not meanwhile."""
    seeded = list[str]()

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: object, **named: object) -> object:
            seeded.append(name)
            return function(*args, **named)

        return noted

    with ExitStack() as stack:
        for owner, name in SETTERS:
            stack.enter_context(patch.object(owner, name, noting(name, getattr(owner, name))))
        yield seeded
