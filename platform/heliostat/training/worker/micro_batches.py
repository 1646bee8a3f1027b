"""Makes a step's micro-batches: their samples' keys, their random numbers, and their way to the device.

Keys and seeds follow from the step and a sample's place in the global batch, whichever worker computes it, and however often.

While a step computes, a thread reads the next step's samples and makes its batches (`BatchesAhead`):

    batches = ahead.take(step)      # waits if they aren't made yet; raises what failed in making them
    ahead.begin(step + 1)           # at most one step ahead
    ahead.settle()                  # the thread rests: batches may be made elsewhere now
    ahead.end()                     # waits for the thread, up to a deadline

What is made ahead counts for nothing until its step takes it: neither its samples nor its errors. Batches are made in one thread
at a time, because a recipe's `batch` needn't be safe to call in two.

A recipe that draws a batch's random numbers from generators of the whole process, rather than from the samples' keys, would
disturb those of the present step. The thread stops before it draws one (`_OwnNumbers`). That step's batches, and all later ones,
are made where they are taken.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from heliostat.config.spec import Job
from heliostat.data import device_threads
from heliostat.data.dataset import DataPlan
from heliostat.data.device_streams import on_device
from heliostat.data.stream import StepSamples
from heliostat.recipes.protocol import Batch, Recipe

DEADLINE_S = 5.0  # for the thread to end, which may wait for samples; the driver waits for workers twice as long
DRAWS = (
    "recipe: `batch` uses a process-wide random generator, so heliostat can't make batches while a step "
    "computes. Derive random numbers from `keys` (docs/guides/recipe.md)"
)


class BatchPlan:
    """Assigns random seeds to samples rather than to workers."""

    def __init__(self, job: Job, plan: DataPlan) -> None:
        self.seed_base, self.micro, self.per_lane = job.train.seed, job.train.micro_batch_size, plan.shape.per_lane
        self.batch = plan.shape.batch

    def keys(self, step: int, lanes: range) -> np.ndarray:
        """Computes a key for each of this worker's samples, lanes in order: from the step and its place in the global batch."""
        return (step * self.batch + np.array(lanes)[:, None] * self.per_lane + np.arange(self.per_lane)).ravel()

    def seed(self, step: int, lanes: range, micro: int, part: int = 0) -> int:
        """Computes the seed of this worker's micro-batch from the step, the place of its first sample in the global batch, and
        the part of its samples that the worker has."""
        lane, inside = divmod(micro * self.micro, self.per_lane)
        place = lanes[lane] * self.per_lane + inside
        entropy = [self.seed_base, step, place] + ([part] if part else [])
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Micro(NamedTuple):
    """Holds a micro-batch, the seed of its random numbers, and its samples' keys, whose order is that of the step's samples."""

    seed: int
    keys: np.ndarray
    batch: Batch


class StepBatches(NamedTuple):
    """Holds a worker's share of a step: its samples; the micro-batches made of them; and the number of loss terms in these, fp32
    without dimensions, 0 where every sample has as many. Tensors are where a copy to the device needs no wait."""

    samples: StepSamples
    micros: list[Micro]
    terms: torch.Tensor


def seeded(
    micros: Sequence[Micro], device: torch.device, recipe: Recipe, progressed: Callable[[], None]
) -> Iterator[tuple[Micro, Batch]]:
    """Yields each with its completed batch on the device, and its random numbers begun; calls `progressed` after each.

    The host then has handed the micro-batch to the device, whose queue is short: no wait for the device is needed.
    """
    for micro, batch in zip(micros, on_device([micro.batch for micro in micros], device, recipe.complete), strict=True):
        torch.manual_seed(micro.seed)
        yield micro, batch
        progressed()


# a step ahead --------------------------------------------------------------------------------------------------------


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
        self._inline = self._reported = False  # whether `take` makes the batches, and has said so
        self._compared = False  # the generators' states before and after the first batches
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

    def _made(self, step: int, samples: StepSamples) -> StepBatches | StepSamples:
        """Makes a step's batches; returns the samples alone if that would draw from generators of the whole process."""
        before = () if self._compared else _states()
        try:
            with _OwnNumbers():
                batches = self._prepare(step, samples)
        except _SharedNumbers:
            self._inline = True
            return samples
        if not self._compared:  # nothing else draws while the first ones are made
            self._compared, self._inline = True, before != _states()
        return batches


class _SharedNumbers(BaseException):
    """Ends the making of batches, before they draw from a generator of the whole process; no recipe's `except` takes it."""


class _OwnNumbers(TorchDispatchMode):
    """Raises _SharedNumbers where this thread is about to use a generator of the whole process inside, or to set its state.

    Functions of `random` and NumPy that a recipe has imported by name pass: only the first batches show what these draw.

    It is on this thread's stack of modes alone. `TorchDispatchMode.__enter__` also sets flags of the whole process. If these are
    on, `torch.compile` of older torch versions leaves a step uncompiled that another thread makes.
    """

    def __enter__(self) -> _OwnNumbers:
        thread = threading.get_ident()
        for owner, name, function in _SHARED:
            setattr(owner, name, _in_others(function, thread))
        _push_mode(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _pop_mode()
        for owner, name, function in _SHARED:
            setattr(owner, name, function)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if names := _drawing(func):
            values = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            draws = "dropout_p" not in names or values.get("dropout_p")  # attention draws nothing without dropout
            if draws and values.get("generator") is None:
                _stop()
        return func(*args, **(kwargs or {}))


@functools.cache
def _drawing(operation: Any) -> tuple[str, ...]:
    """Returns the names of the arguments of torch's operation if it draws numbers; none if not."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return ()
    return tuple(argument.name for argument in operation._schema.arguments)


def _in_others(function: Callable[..., Any], thread: int) -> Callable[..., Any]:
    """Returns the function for all threads but one, in which it raises _SharedNumbers."""
    return lambda *args, **named: _stop() if threading.get_ident() == thread else function(*args, **named)


def _stop() -> NoReturn:
    raise _SharedNumbers


def _methods(module: Any) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Lists a module's functions that use the generator of its `random`, except those that only read its state."""
    generator = module.random.__self__
    functions = {name: f for name, f in vars(module).items() if getattr(f, "__self__", None) is generator}
    return [(module, name, f) for name, f in functions.items() if name not in ("getstate", "get_state")]


_SHARED = [
    *_methods(random),
    *_methods(np.random),
    (np.random, "seed", np.random.seed),
    *(
        (owner, name, getattr(torch, name))
        for name in ("manual_seed", "seed", "set_rng_state")
        for owner in (torch, torch.random)
    ),
]


def _states() -> tuple[object, ...]:
    """Reads the states of the generators that all threads of the process share."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), kind, np.asarray(keys).tobytes(), *rest
