"""Shows a run's progress to the user: as a live line on a terminal, or else as log lines."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import TypedDict

from rich.console import Console
from rich.live import Live
from rich.text import Text

from heliostat.runs.events import Evaluation, Event, LossSpike, Notice, Phase, Steps
from heliostat.terminal import duration, fit

log = logging.getLogger("heliostat")

PHASES = {
    "placing": "placing the workers",
    "model": "building the model",
    "restore": "loading the checkpoint",
    "data": "opening the data stream",
    "step": "first step",
}
BAR = 24  # width in characters


class StartUp(TypedDict):
    """Describes the seconds from the command's start to the first completed step: the total, and the seconds of each part."""

    seconds_to_first_step: float
    startup: dict[str, float]


class ProgressReporter:
    """Shows progress from the mailbox's events. Records when each phase began, for the breakdown of the start-up time."""

    def __init__(self, console: Console, name: str, start: int, steps: int, unit: str) -> None:
        self.unit, self.spikes, self.name = unit, 0, name
        self.phases: dict[str, float] = {}
        self._plain, self._console = not console.is_terminal, console
        self._done, self._steps, self._parts = start, steps, [(2, "starting Ray")]
        self._speed = Speed(steps)
        self._live = None if self._plain else Live(console=console, get_renderable=self._line, refresh_per_second=4)

    def __enter__(self) -> ProgressReporter:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def _line(self) -> Text:
        left = self._speed.left()
        return Text(line(self.name, self._done, self._steps, self._parts, left, self._console.width), no_wrap=True)

    def note(self, text: str) -> None:
        self._parts = [(2, text)]
        if self._plain:
            log.info(text)

    def phase(self, name: str, at: float) -> None:
        self.phases.setdefault(name, at)  # keeps the time of the first attempt

    def startup(self, started: float) -> StartUp:
        """Computes the seconds from the command's start to the first completed step: the total, and the seconds of each part."""
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
            case LossSpike(action="warn"):  # the driver logs a spike that is rolled back
                self._on_spike(event)

    def _on_spike(self, event: LossSpike) -> None:
        self.spikes += 1
        log.warning(
            ("step %d: loss spike (%d so far): %s. Training continues (spike.action: warn). To see the samples: "
                "heliostat run samples RUN --step %d"), event.step, self.spikes, event.text, event.step,
        )  # fmt: skip

    def _on_steps(self, event: Steps) -> None:
        self._done = event.done
        self._speed.reached(self._done, time.monotonic())
        self._parts = [
            (1, f"loss {event.loss[-1]:.4f}"),
            *((6, f"{name.replace('_', ' ')} {values[-1]:.4f}") for name, values in event.added.items()),
            *((8, f"expert {name} {event.experts[name][-1]:.3g}") for name in ("imbalance", "unused") if name in event.experts),
            (5, f"lr {event.lr[-1]:.2e}"),
            (3, f"{event.tokens_per_second:,.0f} {self.unit}/s"),
            (4, f"MFU {event.mfu:.1%}" if event.mfu else ""),
            (7, f"data wait {event.data_wait:.1%}"),
            (9, trained(event)),
        ]
        if self._plain:
            left = self._speed.left()
            ahead = f"  ETA {duration(left)}" if left else ""
            log.info("step %d/%d  %s%s", self._done, self._steps, "  ".join(t for _, t in self._parts if t), ahead)


def trained(event: Steps) -> str:
    """Formats the trained tokens per step, of each source if there are several. Returns "" if samples have no loss mask."""
    tokens = {name: counts["trained_tokens"] for name, counts in event.sources.items() if "trained_tokens" in counts}
    shown = ", ".join(f"{name} {count:,.0f}" if len(tokens) > 1 else f"{count:,.0f}" for name, count in tokens.items())
    return shown and f"trained tokens/step {shown}"


class Speed:
    """Estimates the time that the remaining steps will take, from the mean time per step since the first report."""

    def __init__(self, steps: int) -> None:
        self._steps, self._began, self._last = steps, (0, 0.0), (0, 0.0)

    def reached(self, done: int, at: float) -> None:
        if not self._began[1] or done <= self._began[0]:  # the first report, or the run returned to a checkpoint
            self._began = (done, at)
        self._last = (done, at)

    def left(self) -> float | None:
        """Estimates the seconds until the last step. Returns None before there is an estimate, or when no step remains."""
        (first, began), (done, at) = self._began, self._last
        return (at - began) / (done - first) * (self._steps - done) if first < done < self._steps else None


def line(name: str, done: int, steps: int, parts: list[tuple[int, str]], left: float | None, width: int) -> str:
    """Renders the live progress line. If the line is longer than `width` characters, drops its least important parts first."""
    full = round(BAR * done / steps) if steps else 0
    bar = "━" * full + "╌" * (BAR - full)
    ahead = f"ETA {duration(left)}" if left is not None else ""
    return fit([(0, f"{name} {done:,}/{steps:,}"), (8, bar), *parts, (2, ahead)], width)
