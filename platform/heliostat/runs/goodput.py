"""Accounts for a run's wall-clock time over all its attempts. Every second belongs to exactly one part, so the sum of the parts
is the total time.

An attempt is one start of the workers: a command (`heliostat train`), or a restart within a command. The driver keeps a file
for each attempt in the run's folder (`ledger/`). This module computes everything from these files, with pure functions.

    queued         waiting until Ray has room for the workers
    starting       from the command to the first step: checks, Ray, workers, model, checkpoint, first batch
    compiling      the first step under `train.compile`, without the time of the second step
    data           waiting for data
    computing      steps that the run keeps; DeepSpeed's collectives are included, because they overlap with computing
    communicating  the loop's own collectives, with the wait for the slowest worker
    checkpoint     waiting for a checkpoint or a receipt
    evaluating     held-out scores
    lost           steps that were recomputed after a return to a checkpoint, and the last unreported work of a worker that died
    restarting     within a command, from a failure to the first step of the next attempt
    idle           no training: between two commands, and after the last step (export, registration of the model)

Goodput is the share of `computing` in the total time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from heliostat.errors import ConfigError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, closed

if TYPE_CHECKING:  # this import takes a second
    from matplotlib.figure import Figure

COLOURS = {
    "queued": "#d9d9d9", "starting": "#fdd0a2", "compiling": "#fdae6b", "data": "#9ecae1", "computing": "#31a354",
    "communicating": "#6baed6", "checkpoint": "#bcbddc", "evaluating": "#c7e9c0", "lost": "#de2d26", "restarting": "#fb6a4a",
    "idle": "#969696",
}  # fmt: skip
PARTS = tuple(COLOURS)
LATEST = 2.0**36  # seconds since 1970: in the year 4147
COLUMNS, BARS = 8, 20  # maximum number of attempts in the table, and in the chart


@closed
@dataclass
class RecordedAttempt:
    """Describes one attempt (one start of the workers), as in its driver's ledger file.

    The seconds in `parts` add up to `known - started`. When the attempt is over, the time between `known` and `seen` belongs to
    the part `pending`.
    """

    id: str
    started: float  # wall-clock time, like all times here
    known: float  # the parts are measured until this time
    seen: float  # the driver's last sign of life
    start_step: int
    workers: int
    restart: bool = False  # whether it began within a command: after a failure, a preemption, or a new number of workers
    host: str = ""  # host and process id of the driver
    pid: int = 0
    # finished, failed, interrupted, preempted or resize; None while it runs, or if the driver was killed
    outcome: str | None = None
    reason: str = ""  # reason of a failure
    pending: str = "starting"
    parts: dict[str, float] = field(default_factory=dict)
    marks: list[tuple[int, float]] = field(default_factory=list)  # (finished steps, computing seconds until then)

    @property
    def name(self) -> str:
        """Returns the file name of the attempt's ledger. The names sort by start time, to the millisecond."""
        began = datetime.fromtimestamp(self.started, UTC)
        return f"attempt-{began:%Y%m%dT%H%M%S}.{began.microsecond // 1000:03d}Z-{self.id}.json"

    @property
    def reached(self) -> int:
        return self.marks[-1][0] if self.marks else self.start_step

    def computed(self, step: int) -> float:
        """Computes the computing seconds until a step, by linear interpolation between the marks."""
        points = [(self.start_step, 0.0), *self.marks]
        return float(np.interp(step, [s for s, _ in points], [seconds for _, seconds in points]))

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def _fault(attempt: RecordedAttempt) -> str | None:
    if unknown := {*attempt.parts, attempt.pending} - set(PARTS):
        return f"unknown part {min(unknown)!r}"
    times = [attempt.started, attempt.known, attempt.seen]
    seconds = [*attempt.parts.values(), *(s for _, s in attempt.marks)]
    if not all(0 <= t < LATEST for t in times) or not all(abs(s) < LATEST for s in seconds):
        return "a time isn't a number"
    if not all(0 <= n < 2**53 for n in (attempt.start_step, attempt.workers, *(step for step, _ in attempt.marks))):
        return "a step or the number of workers isn't a whole number from 0 on"
    return None


LEDGER = Format(
    RecordedAttempt, "ledger of an attempt", ConfigError, _fault, "Delete this file to continue without the times of this attempt"
)


@dataclass
class Settled:
    """Holds an attempt with its final parts. Every second belongs to a part, and recomputed steps count as lost.

    `gap`: the seconds before the attempt, and the part to which they belong. `unknown`: seconds that a running attempt hasn't
    reported yet.
    """

    attempt: RecordedAttempt
    gap: tuple[str, float]
    parts: dict[str, float]
    unknown: float


def settle(attempts: Iterable[RecordedAttempt]) -> list[Settled]:
    """Computes the final parts of every attempt. If a later attempt recomputed an attempt's steps, the time of these steps moves
    from computing to lost."""
    ordered = sorted(attempts, key=lambda a: (a.started, a.seen))
    kept = kept_steps(ordered)
    settled: list[Settled] = []
    end = ordered[0].started if ordered else 0.0
    for number, attempt in enumerate(ordered):
        gap = "restarting" if attempt.restart else "idle", max(0.0, attempt.started - end)
        end = max(end, attempt.seen)
        parts = dict.fromkeys(PARTS, 0.0) | attempt.parts
        tail, over = attempt.seen - attempt.known, attempt.outcome or number + 1 < len(ordered)
        unknown = 0.0 if over or attempt.pending != "lost" else tail
        parts[attempt.pending] += tail - unknown
        wasted = attempt.computed(attempt.reached) - attempt.computed(kept[number])
        parts["computing"] -= wasted
        parts["lost"] += wasted
        if attempt.restart:
            parts["restarting"] += parts["starting"] + parts["queued"]
            parts["starting"] = parts["queued"] = 0.0
        settled.append(Settled(attempt, gap, parts, unknown))
    return settled


def kept_steps(attempts: list[RecordedAttempt]) -> list[int]:
    """Returns for each attempt its last step that the run keeps. The attempts are in the order of their start.

    The function goes backward through the attempts, and finds the writer of the checkpoint from which an attempt began. The
    writer is the latest earlier attempt that reached the checkpoint's step. A killed attempt may have reached more steps than its
    last mark shows. So if no earlier attempt is known to have reached the step, the writer is the latest attempt that began
    before that step. The run keeps no step of the attempts between the writer and the attempt that began from its checkpoint. The
    writer's steps after the checkpoint are lost.
    """
    kept = [a.start_step for a in attempts]
    if not attempts:
        return kept
    owner = len(attempts) - 1
    kept[owner] = attempts[owner].reached
    while (bound := attempts[owner].start_step) > 0:
        before = [i for i in range(owner) if attempts[i].start_step < bound]
        if not before:
            break
        owner = max([i for i in before if attempts[i].reached >= bound] or before)
        kept[owner] = min(bound, attempts[owner].reached)
    return kept


def account(attempts: Iterable[RecordedAttempt]) -> dict[str, float]:
    """Adds up the seconds by part, over all attempts and the gaps between them."""
    total = dict.fromkeys(PARTS, 0.0)
    for one in settle(attempts):
        total[one.gap[0]] += one.gap[1]
        for part, seconds in one.parts.items():
            total[part] += seconds
    return total


class Outline(TypedDict):
    """Describes an attempt without its seconds by part."""

    started: float
    seconds: float
    workers: int
    start_step: int
    reached: int
    outcome: str | None
    reason: str
    restart: bool


class AttemptStart(Outline):
    """Describes an attempt in the report. `before`: the seconds between the end of the previous attempt and the start of this
    attempt, by part."""

    before: dict[str, float]
    parts: dict[str, float]


class GoodputReport(TypedDict):
    """Describes the output of `heliostat run goodput --json`. `attributed`: the share of the total time that belongs to a known
    part."""

    total_s: float
    parts: dict[str, float]
    attributed: float
    goodput: float
    worker_hours: float
    attempts: list[AttemptStart]


def report(attempts: Iterable[RecordedAttempt]) -> GoodputReport:
    """Builds the goodput report: the seconds by part, of the run and of each attempt."""
    settled = settle(attempts)
    parts = account(s.attempt for s in settled)
    known = sum(parts.values())
    total = known + sum(s.unknown for s in settled)
    return {
        "total_s": total,
        "parts": parts,
        "attributed": known / total if total else 1.0,
        "goodput": parts["computing"] / total if total else 0.0,
        "worker_hours": sum(s.attempt.workers * (s.attempt.seen - s.attempt.started) for s in settled) / 3600,
        "attempts": [
            {
                "started": s.attempt.started,
                "seconds": s.attempt.seen - s.attempt.started,
                "workers": s.attempt.workers,
                "start_step": s.attempt.start_step,
                "reached": s.attempt.reached,
                "outcome": s.attempt.outcome,
                "reason": s.attempt.reason,
                "restart": s.attempt.restart,
                "before": dict([s.gap]),
                "parts": s.parts,
            }
            for s in settled
        ],
    }


def read(run: Location) -> list[RecordedAttempt]:
    """Reads the attempts of a run from the ledger in its folder."""
    folder = run.join(run_folder.LEDGER)
    attempts = []
    for name, _ in folder.files():
        if name.endswith(".json"):
            attempts.append(LEDGER.read(folder.join(name)))
    return attempts


def read_report(run: Location) -> GoodputReport:
    attempts = read(run)
    if not attempts:
        raise ConfigError(
            f"{run}: has no {run_folder.LEDGER}/, because an older version of heliostat trained this run. "
            "Goodput needs this folder"
        )
    return report(attempts)


def table(report: GoodputReport) -> list[list[str]]:
    """Formats a goodput report as rows of text: a header, the parts that took any time, and the total.

    If there are several attempts, the newest attempts have one column each.
    """
    attempts = report["attempts"][-COLUMNS:] if len(report["attempts"]) > 1 else []
    first = len(report["attempts"]) - len(attempts) + 1
    rows = [["part", "seconds", "share", *(f"attempt {i}" for i in range(first, first + len(attempts)))]]
    unknown = report["total_s"] - sum(report["parts"].values())
    values = [(part, seconds, [a["parts"][part] + a["before"].get(part, 0.0) for a in attempts])
              for part, seconds in report["parts"].items()]  # fmt: skip
    if unknown > 0.05:
        values.append(("not reported yet", unknown, [a["seconds"] - sum(a["parts"].values()) for a in attempts]))
    values = [v for v in values if v[1] >= 0.05]
    values.append(("total", report["total_s"], [a["seconds"] + sum(a["before"].values()) for a in attempts]))
    for part, seconds, each in values:
        share = seconds / report["total_s"] if report["total_s"] else 0.0
        rows.append([part, f"{seconds:,.1f}", f"{share:.1%}", *(f"{s:,.1f}" for s in each)])
    steps = [f"{a['start_step'] + 1:,}-{a['reached']:,}" for a in attempts]
    return [*rows, ["steps", "", "", *steps]] if attempts else rows


def summary(report: GoodputReport) -> dict[str, object]:
    return {"total_s": report["total_s"], "parts": report["parts"], "goodput": report["goodput"]}


def line(report: GoodputReport) -> str:
    """Summarizes a goodput report in one line: the goodput, and the largest parts except computing."""
    others = sorted(((s, p) for p, s in report["parts"].items() if p != "computing"), reverse=True)[:4]
    rest = ", ".join(f"{part} {seconds:.1f}" for seconds, part in others if seconds >= 0.05)
    return f"goodput {report['goodput']:.1%}: computing {report['parts']['computing']:.1f} of {report['total_s']:.1f} s ({rest})"


def chart(report: GoodputReport) -> Figure:
    """Draws a goodput report as a matplotlib figure, with one stacked bar per attempt and one for the run."""
    from matplotlib.figure import Figure

    shown = report["attempts"][-BARS:]  # the newest attempts
    bars = [("run", report["parts"])]
    for number, one in enumerate(shown, len(report["attempts"]) - len(shown) + 1):
        both = {p: s + one["before"].get(p, 0.0) for p, s in one["parts"].items()}
        bars.append((f"attempt {number}", both))
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names, left = [name for name, _ in bars], np.zeros(len(bars))
    for part, colour in COLOURS.items():
        widths = np.array([parts[part] for _, parts in bars])
        if widths.any():
            axes.barh(names, widths, left=left, color=colour, label=f"{part} {report['parts'][part]:,.1f} s")
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(f"goodput {report['goodput']:.1%} of {report['total_s']:,.0f} s")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
