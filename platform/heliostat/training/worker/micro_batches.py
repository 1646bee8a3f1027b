"""Makes a step's micro-batches: derives keys for samples and random seeds for micro-batches, and moves the micro-batches to the
device.

Keys and seeds depend only on the step and on a sample's position in the global batch, not on the worker that computes this
sample. Recomputing a step gives the same keys and seeds.

While a step computes, a thread reads the next step's samples and makes its batches (`BatchesAhead`):

    batches = ahead.take(step)      # waits until they are made; raises the error if making them failed
    ahead.begin(step + 1)           # at most one step ahead
    ahead.settle()                  # afterwards the thread is idle, so batches may be made elsewhere
    ahead.end()                     # waits for the thread, up to a deadline

Samples and errors of batches made ahead count only once their step takes them. Only one thread at a time makes batches, because
recipes don't have to make `batch` thread-safe.

A recipe should derive a batch's random numbers from the samples' keys. A recipe that uses process-wide generators would change
the random numbers of the current step. So the thread stops before such a draw (`_OwnNumbers`). From that step on, `take` makes
the batches.
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

DEADLINE_S = 5.0  # seconds for the thread to end, because it may wait for samples; the driver waits for workers twice as long
DRAWS = (
    "recipe: `batch` uses a process-wide random generator, so heliostat can't make batches while a step "
    "computes. Derive random numbers from `keys` (docs/guides/recipe.md)"
)


class BatchPlan:
    """Derives random seeds from the samples' positions, so that they don't depend on the workers."""

    def __init__(self, job: Job, plan: DataPlan) -> None:
        self.seed_base, self.micro, self.per_lane = job.train.seed, job.train.micro_batch_size, plan.shape.per_lane
        self.batch = plan.shape.batch

    def keys(self, step: int, lanes: range) -> np.ndarray:
        """Computes a key for each of this worker's samples, int64 [samples], in the order of its virtual ranks (`lanes`).

        A key is the sample's position in the sequence of all global batches.
        """
        return (step * self.batch + np.array(lanes)[:, None] * self.per_lane + np.arange(self.per_lane)).ravel()

    def seed(self, step: int, lanes: range, micro: int, part: int = 0) -> int:
        """Computes the seed of this worker's micro-batch.

        The seed depends on the step, on the position of the micro-batch's first sample in the global batch, and on `part`: the
        part of each sample that this worker computes.
        """
        lane, inside = divmod(micro * self.micro, self.per_lane)
        place = lanes[lane] * self.per_lane + inside
        entropy = [self.seed_base, step, place] + ([part] if part else [])
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Micro(NamedTuple):
    """Holds a micro-batch, its random seed, and its samples' keys. The keys are in the order of the step's samples."""

    seed: int
    keys: np.ndarray
    batch: Batch


class StepBatches(NamedTuple):
    """Holds a worker's share of a step: its samples, and the micro-batches made from them.

    `terms`: the number of loss terms in the micro-batches, an fp32 scalar; 0 if every sample has the same number. For a GPU,
    tensors are in pinned memory, so that copying them to the device needs no wait.
    """

    samples: StepSamples
    micros: list[Micro]
    terms: torch.Tensor


def seeded(
    micros: Sequence[Micro], device: torch.device, recipe: Recipe, progressed: Callable[[], None]
) -> Iterator[tuple[Micro, Batch]]:
    """Yields each micro-batch with its completed batch on the device, after setting its random seed.

    Calls `progressed` after each micro-batch.

    At each call of `progressed`, the host has queued the micro-batch on the device. The device's queue is short, so the host
    doesn't need to wait until the device has finished.
    """
    for micro, batch in zip(micros, on_device([micro.batch for micro in micros], device, recipe.complete), strict=True):
        torch.manual_seed(micro.seed)
        yield micro, batch
        progressed()


# a step ahead --------------------------------------------------------------------------------------------------------


class Begun(NamedTuple):
    """Holds a step, counted from 0, that the thread is making. `outcome`: its batches, or only its samples if `take` makes the
    batches."""

    step: int
    outcome: Future[StepBatches | StepSamples]


class BatchesAhead:
    """Makes batches one step ahead, in one thread. Steps are begun and taken in order."""

    def __init__(
        self,
        read: Callable[[], StepSamples],
        prepare: Callable[[int, StepSamples], StepBatches],
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Starts the thread. `read`: takes the next step's samples, in order. `prepare`: makes a step's batches from them.
        `notice`: reports to the user that batches can't be made ahead."""
        self._read, self._prepare, self._notice = read, prepare, notice
        self._begun: Begun | None = None
        self._inline = self._reported = False  # whether `take` makes the batches, and whether this was reported
        self._compared = False  # whether the first batches were checked for changing the generators' states
        self._ended = threading.Event()
        self._steps: SimpleQueue[Begun | None] = SimpleQueue()
        self._thread = device_threads.thread(self._work, "batches")

    def begin(self, step: int) -> None:
        """Asks the thread to read a step's samples and make its batches."""
        self._begun = Begun(step, Future())
        self._steps.put(self._begun)

    def take(self, step: int) -> StepBatches:
        """Waits for a step's batches and returns them. Raises the error if reading or making them failed."""
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
        """Waits until the thread has made the batches that were begun, or has failed. `take` raises that failure."""
        if self._begun:
            futures.wait([self._begun.outcome])

    def end(self) -> None:
        """Ends the thread, and drops its batches and errors."""
        self._ended.set()
        self._steps.put(None)
        self._begun = None
        self._thread.join(DEADLINE_S)

    @property
    def busy(self) -> bool:
        """Returns whether the thread is still running."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while (begun := self._steps.get()) is not None and not self._ended.is_set():
            self._make(begun)
            del begun  # frees its batches, which the step has taken

    def _make(self, begun: Begun) -> None:
        try:
            samples = self._read()
            if not self._ended.is_set():
                begun.outcome.set_result(samples if self._inline else self._made(begun.step, samples))
        except BaseException as e:  # noqa: BLE001 (raised where the step is taken)
            begun.outcome.set_exception(e)

    def _made(self, step: int, samples: StepSamples) -> StepBatches | StepSamples:
        """Makes a step's batches. If making them would draw from process-wide generators, returns only the samples."""
        before = () if self._compared else _states()
        try:
            with _OwnNumbers():
                batches = self._prepare(step, samples)
        except _SharedNumbers:
            self._inline = True
            return samples
        if not self._compared:  # no other code draws random numbers during the first batches
            self._compared, self._inline = True, before != _states()
        return batches


class _SharedNumbers(BaseException):
    """Interrupts the making of batches before they draw from a process-wide generator. It is a BaseException, so that a recipe's
    `except Exception` doesn't catch this error."""


class _OwnNumbers(TorchDispatchMode):
    """Raises _SharedNumbers if this thread, inside the context, would draw from a process-wide generator or set its state.

    This class can't intercept functions of `random` and NumPy that a recipe has imported by name. The check of the first batches
    detects these functions.

    The mode (a TorchDispatchMode) is only on this thread's stack of modes. `TorchDispatchMode.__enter__` would also set
    process-wide flags. With these flags, `torch.compile` of older torch versions leaves a step uncompiled in another thread.
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
            draws = "dropout_p" not in names or values.get("dropout_p")  # attention without dropout draws no random numbers
            if draws and values.get("generator") is None:
                _stop()
        return func(*args, **(kwargs or {}))


@functools.cache
def _drawing(operation: Any) -> tuple[str, ...]:
    """Returns the argument names of a torch operation if it draws random numbers, else an empty tuple."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return ()
    return tuple(argument.name for argument in operation._schema.arguments)


def _in_others(function: Callable[..., Any], thread: int) -> Callable[..., Any]:
    """Wraps the function so that it raises _SharedNumbers in the given thread, and works in all other threads."""
    return lambda *args, **named: _stop() if threading.get_ident() == thread else function(*args, **named)


def _stop() -> NoReturn:
    raise _SharedNumbers


def _methods(module: Any) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Lists a module's functions that use the generator of its `random` function, except those that only read its state."""
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
    """Reads the states of the process-wide random generators."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), kind, np.asarray(keys).tobytes(), *rest
