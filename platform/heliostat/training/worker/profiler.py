"""Profiles a worker's steps with `torch.profiler` when the driver orders it (`runs.profile`). Else it costs one check a step.

A profile never ends a run: an error becomes the answer's `problem`. The files are written in a thread, while training continues.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from heliostat.data import device_threads
from heliostat.errors import HeliostatError
from heliostat.runs import profile, profile_table
from heliostat.runs.events import Profiled
from heliostat.runs.profile import ProfileRequest
from heliostat.storage.locations import Location
from heliostat.text import brief
from heliostat.training.worker.context import Due, Hook, Posts
from heliostat.training.worker.heartbeat import Heartbeat

log = logging.getLogger(__name__)

MEMORY_EVENTS = 100_000  # allocations that a memory snapshot holds
END_S = 120.0  # for files that are being written when the attempt ends


@dataclass
class Recording:
    """Holds a profile under way: its first step, counted from 0, and its steps so far."""

    request: ProfileRequest
    first: int
    folder: Path
    profiler: torch.profiler.profile
    steps: int = 0
    span: record_function | None = None

    @property
    def name(self) -> str:
        return f"rank-{self.request.rank:05d}"


class StepProfiler(Hook):
    """Profiles whole steps, from before the forward pass to after the optimizer's step, with what lies between two of them."""

    def __init__(self, run: Location, heartbeat: Heartbeat, posts: Posts) -> None:
        self._run, self._heartbeat, self._posts = run, heartbeat, posts
        self._recording: Recording | None = None
        self._writing: threading.Thread | None = None

    def before_step(self, step: int) -> None:
        if self._recording is None and self._heartbeat.profiles:
            self._begin(self._heartbeat.profiles.popleft(), step)
        if self._recording:
            self._recording.span = record_function(f"{profile_table.STEP}{step + 1}")
            self._recording.span.__enter__()

    def after_step(self, done: int, due: Due) -> None:
        if self._recording:
            assert self._recording.span
            self._recording.span.__exit__(None, None, None)
            self._recording.steps += 1
            if due.last or self._recording.steps == self._recording.request.steps:
                self.finish()

    def finish(self) -> None:
        """Ends the profile that is under way, if there is one, and has its files written."""
        if not (recording := self._recording):
            return
        self._recording = None
        try:
            recording.profiler.stop()
            if _on_gpu():
                torch.cuda.memory._dump_snapshot(str(recording.folder / f"{recording.name}{profile.MEMORY}"))
                torch.cuda.memory._record_memory_history(enabled=None)
        except Exception as e:  # noqa: BLE001 (whatever the profiler raises: training continues)
            self._failed(recording.request, e)
            shutil.rmtree(recording.folder, ignore_errors=True)
            return
        self._writing = device_threads.thread(lambda: self._write(recording), "profile")

    def end(self) -> None:
        """Ends a profile without its files, if one is under way, and waits for files that are being written."""
        if self._recording:
            with suppress(Exception):
                self._recording.profiler.stop()
                if _on_gpu():
                    torch.cuda.memory._record_memory_history(enabled=None)
            shutil.rmtree(self._recording.folder, ignore_errors=True)
            self._recording = None
        if self._writing:
            self._writing.join(END_S)

    def _begin(self, request: ProfileRequest, step: int) -> None:
        if self._writing:
            self._writing.join()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _on_gpu() else [])]
        try:
            profiler = torch.profiler.profile(activities=activities)
            profiler.start()
            if _on_gpu():
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        except Exception as e:  # noqa: BLE001 (whatever the profiler raises: training continues)
            self._failed(request, e)
            return
        self._recording = Recording(request, step, Path(tempfile.mkdtemp(prefix="heliostat-profile-")), profiler)

    def _write(self, recording: Recording) -> None:
        """Writes the files to the run's folder, and then the answer."""
        request, folder = recording.request, recording.folder
        try:
            recording.profiler.export_chrome_trace(str(folder / f"{recording.name}{profile.TRACE}"))
            files = sorted(file.name for file in folder.iterdir())
            for name in files:
                profile.place(self._run, request).join(name).upload(folder / name)
            profile.answer(self._run, request, recording.first + 1, recording.steps, files)
            self._posts.post_of_any(Profiled(id=request.id, files=files))
        except Exception as e:  # noqa: BLE001 (a full disk, a store that is away: training continues)
            self._failed(request, e)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, request: ProfileRequest, error: Exception) -> None:
        problem = f"{type(error).__name__}: {brief(error)}"
        log.warning("worker %d was not profiled: %s", request.rank, problem)
        try:
            profile.answer(self._run, request, problem=problem)
        except (HeliostatError, OSError) as e:
            log.warning("the answer to a request for a profile could not be written: %s", e)


def _on_gpu() -> bool:
    return torch.cuda.is_initialized()
