"""A run's progress for the person at the terminal: a live line where there is a terminal, log lines where there is none."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from heliostat.events import Evaluation, Event, Notice, Phase, Spike, Steps
from heliostat.train.worker.loss_spikes import Found

log = logging.getLogger("heliostat")

PHASES = {
    "placing": "placing the workers",
    "model": "building the model",
    "restore": "loading the checkpoint",
    "data": "opening the data stream",
    "step": "first step",
}


class ProgressReporter:
    """Fed with the mailbox's events; remembers when each phase began, for the start-up split."""

    def __init__(self, console: Console, name: str, start: int, steps: int, unit: str) -> None:
        self.unit, self.spikes = unit, 0
        self.phases: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.fields[name]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, name=name, note="starting Ray")
        self._plain = not console.is_terminal
        self._steps, self._began = steps, (0, 0.0)

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)
        if self._plain:
            log.info(text)

    def phase(self, name: str, at: float) -> None:
        self.phases.setdefault(name, at)  # of the first attempt

    def startup(self, started: float) -> dict[str, Any]:
        """Seconds from the command's start to the first finished step, in all and by part."""
        marks = [started, *(self.phases.get(p, started) for p in ("ray", "model", "data", "step", "stepped"))]
        names = ("check_and_ray", "workers", "model", "data", "first_step")
        split = {n: round(b - a, 2) for n, a, b in zip(names, marks, marks[1:], strict=False)}
        return {"seconds_to_first_step": round(marks[-1] - started, 2), "startup": split}

    def event(self, event: Event) -> None:
        match event:
            case Phase():
                self.phase(event.phase, event.at)
                if event.phase in PHASES:
                    self.note(PHASES[event.phase])
            case Notice():
                log.warning(event.text)
            case Steps():
                self._on_steps(event)
            case Evaluation():
                scores = "  ".join(f"{k} {v:.4g}" for k, v in event.scores.items())
                log.info("step %d  held-out: %s", event.step, scores)
            case Spike(action="warn"):  # of one that is undone, the driver tells
                self._on_spike(event)

    def _on_spike(self, event: Spike) -> None:
        self.spikes += 1
        found = Found(event.loss, event.usual, event.limit)
        log.warning(
            "step %d: loss spike (%d so far): %s; training goes on (spike.action: warn). `heliostat samples` with --step %d "
            "shows what it trained on", event.step, self.spikes, found, event.step - 1,
        )  # fmt: skip

    def _on_steps(self, event: Steps) -> None:
        done = event.done
        mfu = f"  MFU {event.mfu:.1%}" if event.mfu else ""
        added = "".join(f"{name.replace('_', ' ')} {values[-1]:.4f}  " for name, values in event.added.items())
        text = (
            f"loss {event.loss[-1]:.4f}  {added}lr {event.lr[-1]:.2e}  "
            f"{event.tokens_per_second:,.0f} {self.unit}/s{mfu}  data wait {event.data_wait:.1%}"
        )
        self._progress.update(self._task, completed=done, note=text)
        if self._plain:
            if not self._began[1]:
                self._began = (done, time.monotonic())
            per_step = (time.monotonic() - self._began[1]) / max(1, done - self._began[0])
            log.info("step %d/%d  %s  ETA %.0f s", done, self._steps, text, per_step * (self._steps - done))
