"""Checks properties that a single step, or the comparison of two losses, doesn't show.

The host doesn't wait for the device, a run repeats to the last bit, attempts leave no memory in use, the average of the weights
is right, and all recipes compute the CPU's numbers.
"""

from __future__ import annotations

import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.gpu import setting
from tests.gpu.correctness import LIMITS, STEPS, Row, apart, row
from tests.twin import traffic

ATTEMPTS = 10
GROWTH = 64 << 20  # bytes that may be in use more after the last attempt than after an earlier one: by libraries
OWN = {3: 10}  # synchronizations and uploads of DeepSpeed in a step of four micro-batches (docs/benchmarks/device-traffic.md)


def sync() -> Iterator[Row]:
    """Counts the places where the host waits for the device in a step, including the batches and the deferred read of the
    norm."""
    from heliostat.engine import deepspeed_engine

    from tests.golden import data
    from tests.twin import steps

    setting.start()
    with tempfile.TemporaryDirectory() as name:
        data.tokens(Path(name) / "causal_lm")
        for stage in range(4):
            setup = steps.Setup("language model", stage, precision="bf16" if stage else "fp32")
            one = setup.player(Path(name), int(setting.GPU))
            steps.step(one, 0)
            places = waits(lambda one=one: steps.step(one, 1), strict=stage not in OWN)
            yield row(f"{setup}: waits in a step", len(places), OWN.get(stage, 0), problem=_listed(places, OWN.get(stage, 0)))
            norms = len(one.stepper.norms)
            yield row(f"{setup}: norms that weren't read in the end", 2 - norms, 0)
            del one
            deepspeed_engine.destroy_engines()
            deepspeed_engine.forget_groups()


def waits(call: Callable[[], object], strict: bool) -> list[str]:
    """Lists the lines where the host waits for the device in a call. `strict`: the first one raises an error, and is the only
    one."""
    if not setting.GPU:
        call()
        return []
    if setting.TWIN:
        with traffic.recorded() as seen:
            call()
        kinds = ("read", "unpinned upload", "blocking upload", *(() if strict else ("synchronization",)))
        return [str(crossing) for crossing in seen.crossings.elements() if crossing.what in kinds]
    places: list[str] = []

    def keep(message: Warning | str, *given: object, **more: object) -> None:
        if "synchroniz" in str(message):
            places.append(_place(traceback.extract_stack()))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = keep
        torch.cuda.set_sync_debug_mode("error" if strict else "warn")
        try:
            call()
        except RuntimeError as e:
            if "synchroniz" not in str(e):
                raise
            places.append(_place(traceback.extract_tb(e.__traceback__)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def _place(stack: traceback.StackSummary) -> str:
    """Returns the innermost line outside torch and this file."""
    frame = next(
        (f for f in reversed(stack) if f.filename not in (__file__, warnings.__file__) and "/torch/" not in f.filename), stack[-1]
    )
    return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"


def _listed(places: list[str], limit: int) -> str:
    return f"{len(places)} waits, limit {limit}: {'; '.join(dict.fromkeys(places))}" if len(places) > limit else ""


def ema() -> Iterator[Row]:
    """Compares the average of the weights, also of offloaded ones, with its definition; and the weights after an evaluation with
    it."""
    from heliostat.config.averages import Ema
    from heliostat.engine.ema import AveragedWeights
    from heliostat.numerics import play

    setting.start()
    for stage, offload in ((1, None), (2, "cpu"), (3, None), (3, "cpu")):
        keys = {"train.precision": "bf16", "train.zero.stage": stage, "train.zero.offload.optimizer": offload}
        at = f"ZeRO-{stage}{', offloaded' if offload else ''}"
        made = setting.job(setting.TINY, **keys)
        its = setting.recipe(made)
        on = setting.engine(made, its)
        average, right = AveragedWeights(on, Ema(decay=0.9)), play.masters(on)
        for step in range(STEPS):
            setting.losses(made, its, on, step, 1)
            average.update(step + 1)
            now, rate = play.masters(on), 1 - min(0.9, (2 + step) / (11 + step))
            right = {name: torch.lerp(values.double(), now[name].double(), rate) for name, values in right.items()}
        with average.applied():
            applied = play.masters(on)
        furthest = max(float((applied[name] - right[name]).norm() / right[name].norm()) for name in right)
        yield row(f"average of the weights, {at}", furthest, 1e-5)
        after = play.masters(on)
        unequal = sum(not torch.equal(now[name], after[name]) for name in now)
        yield row(f"weights that differ after an evaluation with the average, {at}", unequal, 0)


def replay() -> Iterator[Row]:
    """Compares two runs of the same steps: to the last bit with deterministic kernels, within rounding with all others."""
    from heliostat.training.worker import recheck

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may add up in another order on each stream
    setting.start()
    for stage in (1, 3):
        made = setting.job(setting.TINY, **{"train.precision": "bf16", "train.zero.stage": stage})

        def trained(made: Any = made) -> list[float]:
            its = setting.recipe(made)
            return setting.losses(made, its, setting.engine(made, its), 0, STEPS)

        with recheck.kernels(compiled=False):
            first, second = trained(), trained()
        unequal = sum(a != b for a, b in zip(first, second, strict=True))
        yield row(f"losses that differ between two runs, ZeRO-{stage}, deterministic kernels", unequal, 0)
        yield row(f"losses of a run with other kernels, ZeRO-{stage}", apart(trained(), first), LIMITS["bf16"])


def attempts() -> Iterator[Row]:
    """Measures the device's memory after each of ten attempts in one process, which joins and leaves its group like a worker."""
    from heliostat.engine import deepspeed_engine, process_group
    from heliostat.engine.process_group import WorkerPlace

    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],) if setting.GPU and not setting.TWIN else ()
    allocated, used = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ATTEMPTS):
            process_group.join(WorkerPlace(0, 1, 0, 1, f"file://{folder}/group-{number}", setting.BACKEND, gpus))
            deepspeed_engine.prepare_environment(float(setting.GPU))
            _attempt(number % 4)
            process_group.leave()
            if setting.GPU:
                free, total = torch.cuda.mem_get_info()
                allocated.append(torch.cuda.memory_allocated())
                used.append(total - free)
    if not setting.GPU:
        allocated = used = [len(deepspeed_engine._engines)] * ATTEMPTS
    # with that of the same stage before: by then each stage has been run, and libraries have what they keep
    yield row("bytes of tensors after attempt 10, more than after 6", allocated[-1] - allocated[-5], 1 << 20, after=allocated)
    yield row("bytes of the device after attempt 10, more than after 6", used[-1] - used[-5], GROWTH, after=used)


def _attempt(stage: int) -> None:
    """Runs some steps at a stage. Everything that it creates is out of scope when it returns."""
    made = setting.job(setting.TINY, **{"train.precision": "bf16" if stage else "fp32", "train.zero.stage": stage})
    its = setting.recipe(made)
    setting.losses(made, its, setting.engine(made, its), 0, 2)


def recipes() -> Iterator[Row]:
    """Compares the loss and gradients of a step of every recipe in fp32, its scores, its picture, and each optimizer with the
    CPU."""
    from tests.twin import cases, passes

    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as name:
        cases.prepare(Path(name))
        for case in cases.CASES:
            if setting.GPU:
                result = passes.compared(case, Path(name))
                yield row(f"{case}: loss and gradients", result["gradients"], 1e-4)
                yield row(f"{case}: scores and pictures", result["scores"], 1e-3)
            else:
                passes.batches(cases.made(case, Path(name)))
                yield row(f"{case}: batches", 0, 0)
    for optimizer in passes.OPTIMIZERS if setting.GPU else ():
        yield row(f"{optimizer}: weights after three steps", passes.optimized(optimizer)["weights"], 1e-5)
