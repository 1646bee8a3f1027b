"""Profiles a worker's steps with `torch.profiler` when the driver orders a profile (`runs.profile`).

Without an order, profiling costs one check per step.

A profile never ends a run: if an error occurs, the answer to the request contains it as `problem`. A thread writes the files
while training continues.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from heliostat.data import device_ranges, device_threads
from heliostat.errors import HeliostatError
from heliostat.runs import profile, profile_table
from heliostat.runs.events import Profiled
from heliostat.runs.profile import ProfileRequest
from heliostat.storage.locations import Location
from heliostat.text import brief
from heliostat.training.worker.context import Due, Hook, Posts
from heliostat.training.worker.heartbeat import Heartbeat

log = logging.getLogger(__name__)

MEMORY_EVENTS = 100_000  # maximum number of allocations in a memory snapshot
PULSE_S = 1.0  # seconds between two calls of `progressed`
WRITE_S = 60.0  # seconds to write the files, after a worker's last step
END_S = 5.0  # seconds to write the files, when a worker ends; the driver waits for workers twice as long


@dataclass
class Recording:
    """Holds the current profile: its first step, counted from 0, and its steps so far.

    `running`: the contexts to close when the profile ends.
    """

    request: ProfileRequest
    first: int
    folder: Path
    profiler: torch.profiler.profile
    running: ExitStack
    steps: int = 0
    span: record_function | None = None

    @property
    def name(self) -> str:
        return f"rank-{self.request.rank:05d}"


class StepProfiler(Hook):
    """Profiles complete steps, from before the forward pass to after the optimizer step, and the time between two steps."""

    def __init__(self, run: Location, heartbeat: Heartbeat, posts: Posts) -> None:
        self._run, self._heartbeat, self._posts = run, heartbeat, posts
        self._recording: Recording | None = None
        self._writing: threading.Thread | None = None

    def before_step(self, step: int) -> None:
        if self._recording is None and self._heartbeat.profiles and not self._is_writing():
            self._begin(self._heartbeat.profiles.popleft(), step)
        if self._recording:
            self._recording.span = record_function(f"{profile_table.STEP}{step + 1}")
            self._recording.span.__enter__()

    def after_step(self, done: int, due: Due) -> None:
        if self._recording:
            assert self._recording.span
            self._recording.steps += 1
            ends = due.last or self._recording.steps == self._recording.request.steps
            if ends:
                _finish_queued()
            self._recording.span.__exit__(None, None, None)
            if ends:
                self.finish()

    def finish(self) -> None:
        """Ends the current profile, if any, and starts writing its files."""
        if not (recording := self._recording):
            return
        self._recording = None
        try:
            with recording.running:
                if _on_gpu():
                    torch.cuda.memory._dump_snapshot(str(recording.folder / f"{recording.name}{profile.MEMORY}"))
        except Exception as e:  # noqa: BLE001 (whatever the profiler raises: training continues)
            self._failed(recording.request, e)
            shutil.rmtree(recording.folder, ignore_errors=True)
            return
        self._writing = device_threads.thread(lambda: self._write(recording), "profile")

    def wait(self, seconds: float = WRITE_S, progressed: Callable[[], None] = lambda: None) -> None:
        """Waits until the files are written, at most `seconds`. Calls `progressed` every PULSE_S seconds."""
        until = time.monotonic() + seconds
        while self._writing and self._writing.is_alive() and (left := until - time.monotonic()) > 0:
            self._writing.join(min(left, PULSE_S))
            progressed()

    def end(self) -> None:
        """Discards the current profile, if any, and waits until the files of an earlier profile are written, at most END_S
        seconds."""
        if self._recording:
            with suppress(Exception):
                self._recording.running.close()
            shutil.rmtree(self._recording.folder, ignore_errors=True)
            self._recording = None
        self.wait(END_S)

    def _is_writing(self) -> bool:
        """Returns whether files of an earlier profile are being written. The next profile then starts at a later step."""
        return self._writing is not None and self._writing.is_alive()

    def _begin(self, request: ProfileRequest, step: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _on_gpu() else [])]
        try:
            with ExitStack() as started:  # on an error, turns everything off; otherwise all later steps would be slower
                profiler = torch.profiler.profile(activities=activities)
                _finish_queued()
                profiler.start()
                started.callback(profiler.stop)
                if _on_gpu():
                    torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
                    started.callback(torch.cuda.memory._record_memory_history, enabled=None)
                started.enter_context(device_ranges.shown())
                running = started.pop_all()
        except Exception as e:  # noqa: BLE001 (whatever the profiler raises: training continues)
            self._failed(request, e)
            return
        self._recording = Recording(request, step, Path(tempfile.mkdtemp(prefix="heliostat-profile-")), profiler, running)

    def _write(self, recording: Recording) -> None:
        """Writes the files to the run's folder, then the answer."""
        request, folder = recording.request, recording.folder
        try:
            recording.profiler.export_chrome_trace(str(folder / f"{recording.name}{profile.TRACE}"))
            files = sorted(file.name for file in folder.iterdir())
            for name in files:
                profile.place(self._run, request).join(name).upload(folder / name)
            if profile.place(self._run, request).join(profile.DRIVER).exists():  # written by the driver
                files.append(profile.DRIVER)
            profile.answer(self._run, request, recording.first + 1, recording.steps, files)
            self._posts.post_of_any(Profiled(id=request.id, files=files))
        except Exception as e:  # noqa: BLE001 (a full disk, an unreachable store: training continues)
            self._failed(request, e)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, request: ProfileRequest, error: Exception) -> None:
        problem = f"{type(error).__name__}: {brief(error)}"
        log.warning("can't profile worker %d: %s", request.rank, problem)
        try:
            profile.answer(self._run, request, problem=problem)
        except (HeliostatError, OSError) as e:
            log.warning("can't write the answer to a request for a profile: %s", e)


def _finish_queued() -> None:
    """Waits for the GPU's queue. Otherwise the profile would include work of earlier steps, and miss work of the last step."""
    if _on_gpu():
        torch.cuda.synchronize()


def _on_gpu() -> bool:
    return torch.cuda.is_initialized()
